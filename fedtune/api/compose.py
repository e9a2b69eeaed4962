"""Composition of validated run configurations from overrides in Hydra's grammar.

The only module that uses Hydra's override parser.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, Quote, QuotedString, ValueType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedtune.api.config_groups import list_options, suggest_experiment
from fedtune.api.experiment_file import (
    build_unknown_option_error,
    compose_default_settings,
    compose_settings,
    is_path,
    read_experiment_file,
    read_option,
    require_no_missing_values,
    to_plain_settings,
)
from fedtune.config import PATHS, RunConfig, parse, read_saved_config
from fedtune.derived_settings import use_recipe_without_privacy, use_secure_aggregation
from fedtune.federation.run_folder import suggest_run_folders
from fedtune.formatting import flatten
from fedtune.runs.overrides import FREE_MAPS, set_by_key
from fedtune.runs.public_stage import add_public_stage, needs_public_stage
from fedtune.runs.renewal import add_start_adapter, renew_config
from fedtune.runs.run_paths import make_default_run_name
from fedtune.spec import NOT_GIVEN, ConfigError, expand_home
from fedtune.tasks.registry import TASKS
from fedtune.training.algorithms.algorithm_registry import ALGORITHMS

Recipe = str | Path | RunConfig | DictConfig
"""The name of an experiment in conf/experiment, the path of an experiment file, or a complete run configuration."""
Settings = Mapping[str, Any]
"""Overrides: values by dotted key (`{"privacy.epsilon": 3}`) and options of config groups (`{"model": "minilm"}`)."""
_QUOTES = ("'", '"')
_IN_WORDS = r"""[^,\[\]{}:=()'"]"""
_WORD = re.compile(rf"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?=\S)(?={_IN_WORDS}*[^\x00-\x7f])({_IN_WORDS}+)(?<=\S)""")
"""Pattern for a quoted string or, in its capture group, an unquoted word with non-ASCII characters."""
_OTHER_WORDS = {
    "federation.num_rounds and training.local_steps": "epochs num_epochs num_train_epochs max_steps",
    "federation.num_rounds": "rounds",
    "federation.num_sites": "clients num_clients sites",
    "federation.algorithm": "strategy aggregator",
    "federation.algorithm_settings.mu": "proximal_mu",
    "privacy.sampling_rate, which determines the batch size": "batch_size",
    "training.learning_rate": "lr",
    "privacy.max_grad_norm": "clip",
    "lora.rank": "r",
    "data.train_file": "file",
    "data.max_length": "max_seq_length",
    "runtime.device": "device",
}
"""Equivalent setting names in other libraries, by fedtune's key, for hints in error messages."""
_UNKNOWN = "is not a setting of fedtune"  # also the text by which `_complete_config` recognizes the error
_FORM = "must look like key=value; quote a value with special characters, as in key='...'"
_OF_A_SPACE = "must be comma-separated values, interval(LOW,HIGH), log(LOW,HIGH), or int(...) around one of these"
_OF_THIS_MACHINE = ("name", "seed", "runtime.", "tracking.", "report.", "cost.", "model.cache_dir")
"""Prefixes of the keys that the lead does not send to the sites."""
_SEVERAL = "has several values: add -m to run each of them, or write [a,b] for a list"
MAX_RUNS = 1000  # limit for a sweep or a search; a larger number is a typing error

_PARSER = OverridesParser.create()
for _name in ("shuffle", "glob"):  # not reproducible: the same overrides must always compose the same run
    del _PARSER.functions.functions[_name], _PARSER.functions.definitions[_name]
_PARSER.functions.register(name="log", func=lambda start, end: IntervalSweep({"log"}, float(start), float(end)))
_PARSER.functions.definitions["log"] = _PARSER.functions.definitions["interval"]  # it takes the same two numbers


def compose_run(
    overrides: Sequence[str], *, changed: Mapping[str, Any] | None = None, for_real_sites: bool = False
) -> RunConfig:
    """Compose and validate a run configuration from command-line overrides.

    Args:
        overrides: overrides in Hydra's grammar, such as "privacy.epsilon=3".
        changed: values by dotted key, applied after composition.
        for_real_sites: whether the run is for real sites; see `fedtune.config.parse`.

    Raises:
        ConfigError: an override is malformed, or a setting is unknown or invalid.
    """
    given = [_parse_override(override) for override in overrides if override.strip()]
    return _compose_overrides(given, [], changed or {}, for_real_sites=for_real_sites)


def compose_recipe(recipe: Recipe | None, settings: Settings | None = None) -> RunConfig:
    """Compose and validate a run configuration from Python values.

    Args:
        recipe: the experiment; None: the default run.  A `DictConfig` is a complete configuration that a Hydra
            application has composed from fedtune's config groups.
        settings: overrides by dotted key.

    Raises:
        ConfigError: the recipe does not exist, or a setting is unknown or invalid.
    """
    said = read_settings(settings)
    overrides = itertools.starmap(_make_override, said.items())
    if isinstance(recipe, Mapping) and not isinstance(recipe, DictConfig):
        meant = "settings" if any("." in str(key) for key in recipe) else "sites"
        bound = f"must be the name of a recipe, an experiment file or a configuration: did you mean {meant}=...?"
        raise ConfigError("recipe", "a dict", bound)
    if isinstance(recipe, RunConfig):
        config = _override_config(recipe, list(overrides))
        return config if config.resume else add_start_adapter(config)
    if isinstance(recipe, DictConfig):
        known = _apply_overrides(_resolve_interpolations(recipe), list(overrides))
        return _complete_config(known, values={key for key, _ in flatten(said)})
    said |= {} if recipe is None else {"experiment": os.fspath(recipe)}
    options = {key: value for key, value in said.items() if list_options(key) and not isinstance(value, Mapping)}
    words = [_parse_override(f"{group}={quote_word(str(option))}") for group, option in options.items()]
    others = [_make_override(key, value) for key, value in said.items() if key not in options]
    return _compose_overrides(words, others, {})


def read_settings(settings: Settings | None) -> dict[str, Any]:
    """Return the settings of a Python caller by name, or raise a ConfigError for anything but a mapping."""
    if not isinstance(settings, Mapping | None):
        bound = "must map names to values, as in {'privacy.epsilon': 3}"
        raise ConfigError("settings", type(settings).__name__, bound)
    return {str(key): value for key, value in (settings or {}).items()}


def require_known_settings(settings: Settings) -> None:
    """Raise a ConfigError for the first unknown setting or group option, without checking values."""
    options = {key: value for key, value in settings.items() if list_options(key) and not isinstance(value, Mapping)}
    for group, option in options.items():
        if option not in list_options(group):
            raise build_unknown_option_error(group, option)
    others = [_make_override(key, value) for key, value in settings.items() if key not in options]
    _apply_overrides(compose_default_settings(), others)


def _compose_overrides(
    typed: Sequence[Override], others: Sequence[Override], changed: Mapping[str, Any], *, for_real_sites: bool = False
) -> RunConfig:
    """Compose a run configuration from overrides that Hydra composes (`typed`) and that fedtune applies (`others`)."""
    given = [*typed, *others]
    selecting = [one for one in typed if list_options(one.key_or_group) and not one.is_delete()]
    options = {one.key_or_group: one for one in selecting if not isinstance(one.value(), dict)}
    for group, one in options.items():
        if not isinstance(_parse_single_value(one), str):
            raise build_unknown_option_error(group, _parse_single_value(one))
        if one.is_add():
            raise ConfigError("override", str(one.input_line), "is already in the configuration: remove the +")
    for key in ("experiment", "resume"):
        named = [one.value() for one in given if one.key_or_group == key]
        if len(named) > 1:  # the last would be all that counts
            raise ConfigError(key, named[1], f"conflicts with {key}={named[0]}: give only one of them")
    values = {one.key_or_group: _parse_single_value(one) for one in given if one not in options.values()}
    if ours := [key for key in values if re.match("hydra([./]|$)", key) and key != "hydra.searchpath"]:
        bound = "has no effect here: use a Hydra application that calls fedtune.simulate(cfg) for Hydra's own settings"
        raise ConfigError(ours[0], values[ours[0]], bound)
    if (resumed := values.get("resume")) is not None:
        # A folder is resumed with its own settings and its name, by which ledgers know it, unless all are typed again.
        folder = Path(expand_home(str(resumed), key="resume"))
        if not folder.is_dir():
            raise ConfigError("resume", str(resumed), f"must be a run folder{suggest_run_folders(folder)}")
        saved = read_saved_config(folder)
        others = [*others, _make_override("resume", folder), _make_override("name", saved.name)]
        if "experiment" not in options:
            of_groups = [_make_override(group, read_option(group, str(one.value()))) for group, one in options.items()]
            of_keys = [one for one in given if one not in options.values()]
            return _override_config(saved, [*of_groups, *of_keys, *others])
    if "renew" in values:
        named_options = {group: one.value() for group, one in options.items()}
        said = named_options | {key: value for key, value in values.items() if key != "renew"}
        config = renew_config(str(values["renew"]), {"name": make_default_run_name(), **said, **changed})
        return add_start_adapter(config)
    chosen = options["experiment"].value() if "experiment" in options else None
    file = Path(expand_home(str(chosen), key="experiment")) if is_path(chosen) else None
    of_file = {key for key, _ in flatten(read_experiment_file(file)) if key != "defaults"} if file else set[str]()
    later = [one for one in typed if _is_applied_later(one)]
    by_person = {key for key, _ in flatten(values)}
    try:
        settings = _apply_overrides(_compose_by_hydra(_select_hydra_words(typed), file), [*later, *others])
        return _complete_config(settings, changed, values=by_person, of_file=of_file, for_real_sites=for_real_sites)
    except ConfigError as error:
        raise error.in_file(file) if _overlaps_any(error.key, of_file - set(values)) else error from None


def select_hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """Select the overrides for Hydra's composition.  fedtune applies the other overrides to the composed settings."""
    return _select_hydra_words([_parse_override(override) for override in overrides])


def _select_hydra_words(typed: Sequence[Override]) -> list[str]:
    return [str(one.input_line) for one in typed if not _is_applied_later(one)]


def restore_interpolations(config: RunConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a run's settings as JSON values, with interpolations restored where they resolve to the run's value."""
    settings, composed_of = config.to_json(), compose_settings(select_hydra_overrides(overrides))
    raw: Any = OmegaConf.to_container(composed_of)
    written, found = dict(flatten(raw)), dict(flatten(to_plain_settings(composed_of)))
    for key, value in flatten(settings):
        if "${" in str(written.get(key)) and found[key] == value:
            set_by_key(settings, key, written[key])
    return settings


def _is_applied_later(one: Override) -> bool:
    """Whether an override is applied after Hydra's composition.

    True for `resume` and `renew`, for a group that is set to a map, and for maps with user-defined keys, which Hydra
    would merge instead of replacing.
    """
    is_group = bool(list_options(one.key_or_group)) and isinstance(one.value(), dict)
    is_own_map = any(f"{one.key_or_group}.".startswith(f"{key}.") for key in FREE_MAPS)
    return is_group or is_own_map or one.key_or_group in ("resume", "renew")


def _complete_config(
    settings: dict[str, Any],
    changed: Mapping[str, Any] | None = None,
    *,
    values: set[str],
    of_file: Set[str] = frozenset(),
    for_real_sites: bool = False,
) -> RunConfig:
    """Validate a run's settings, then add the secure-aggregation defaults, the public stage and the start adapter.

    Args:
        settings: the composed settings.
        changed: values by dotted key, applied after the secure-aggregation defaults.
        values: the keys that the user set explicitly.
        of_file: the keys that the experiment file sets.
        for_real_sites: see `fedtune.config.parse`.
    """
    for name in ("validation", "test"):  # an explicit file replaces the experiment's held-out fraction
        if f"data.{name}_file" in values and f"data.{name}_fraction" not in values and settings["data"][f"{name}_file"]:
            settings["data"][f"{name}_fraction"] = 0.0
    _drop_claims_about_other_weights(settings, values | of_file)
    as_given = deepcopy(settings)

    def list_explicit_keys(key: str) -> set[str]:
        # Derived defaults must not replace settings of the command line, or of the file that sets `key`.
        return values | (of_file if _overlaps_any(key, of_file) else set())

    if ("federation.aggregation", "secure") in flatten(settings):
        settings = use_secure_aggregation(settings, keep=list_explicit_keys("federation.aggregation"))
    if settings.get("name") is None:
        settings["name"] = make_default_run_name()
    settings = _apply_overrides(settings, [_make_override(key, value) for key, value in (changed or {}).items()])
    settings = use_recipe_without_privacy(settings, keep=list_explicit_keys("privacy.mechanism") | set(changed or {}))
    try:
        require_no_missing_values(settings)
        config = parse(settings, for_real_sites=for_real_sites)
        if config.public.train_file is not None:
            config = add_public_stage(config, as_given, keep=list_explicit_keys("public.train_file"))
        return add_start_adapter(config)
    except ConfigError as error:
        raise _build_unknown_setting_error(error.key, error.value) if error.bound == _UNKNOWN else error from None


def _drop_claims_about_other_weights(settings: dict[str, Any], explicit: Set[str]) -> None:
    """Remove an option's license and public id if `model.path` names weights that the option's hash does not pin."""
    model = settings.get("model", {})  # missing if an override deletes the group
    if "model.path" in explicit and (model["sha256"] is None or "model.sha256" in explicit):
        model |= {key: None for key in ("license", "public_id") if f"model.{key}" not in explicit}


def _compose_by_hydra(words: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Compose the settings with Hydra, and convert Hydra's errors to a ConfigError about the override or `file`."""
    try:
        return _resolve_interpolations(compose_settings(words))
    except MissingConfigException as error:
        group, _, option = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
        is_typed = any(parse_override_key(word) == group for word in words)
        key = None if is_typed else f"{file}: defaults, {group}"
        raise build_unknown_option_error(group, option, key=key) from None
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:  # both leak plain errors
        _require_whole_lists(words)
        told = " ".join(str(error).split())
        meant = (word for word in words if f"'{parse_override_key(word)}'" in told or word in told)
        word = next(meant, " ".join(words))
        if told.startswith("Could not override"):
            raise _build_unknown_setting_error(parse_override_key(word), word.partition("=")[2]) from None
        of_file = file is not None and told.startswith("Multiple values")
        key, value = (f"{file}: defaults", NOT_GIVEN) if of_file else ("override", word)
        raise ConfigError(key, value, f"was rejected by Hydra: {told}") from None


def _require_whole_lists(words: Sequence[str]) -> None:
    """Refuse overrides that set a part of a list, or a list by a mapping."""
    lists = [key for key, value in flatten(compose_default_settings()) if isinstance(value, list)]
    for word in words:
        key, _, value = word.partition("=")
        path = parse_override_key(word)
        for whole in lists:
            if path.startswith(f"{whole}.") or (path == whole and value.startswith("{")):
                raise ConfigError(key, value or NOT_GIVEN, f"must be written as a whole list: {whole}=[...]")


def _resolve_interpolations(config: DictConfig) -> dict[str, Any]:
    """Resolve the interpolations in the settings.

    Raises:
        ConfigError: an interpolation cannot be resolved, a setting that is sent to sites comes from an environment
            variable, or a setting would run code (`_target_`).
    """
    raw: Any = OmegaConf.to_container(config)
    written = dict(flatten(raw))
    for key, value in written.items():
        if "${oc.env:" in str(value) and not (key in PATHS or key.startswith(_OF_THIS_MACHINE)):
            bound = "cannot come from an environment variable, because sites receive it: write the value"
            raise ConfigError(key, value, bound)
        if key.rpartition(".")[2] == "_target_":
            raise ConfigError(key, value, "is not allowed: no setting of fedtune runs code")
    try:
        return to_plain_settings(config)
    except OmegaConfBaseException as error:
        key = error.full_key or "override"
        bound = f"cannot be resolved; put a backslash before a literal $ ({str(error).splitlines()[0]})"
        raise ConfigError(key, written.get(key), bound) from None


def _overlaps_any(key: str, keys: Iterable[str]) -> bool:
    """Whether `key` equals one of the dotted `keys`, or is an ancestor or descendant of it."""
    return any(f"{one}.".startswith(f"{key}.") or f"{key}.".startswith(f"{one}.") for one in keys)


def _override_config(known: RunConfig, given: Sequence[Override]) -> RunConfig:
    """Apply overrides to a complete configuration.

    A public stage that the overrides add or change does not replace any other setting, such as the learning rates.
    """
    changed = _apply_overrides(known.to_json(), given)
    explicit = flatten({one.key_or_group: _parse_single_value(one) for one in given})
    _drop_claims_about_other_weights(changed, {key for key, _ in explicit})
    config = parse(changed)
    if needs_public_stage(config) or config.public != known.public:
        return add_public_stage(config, changed, keep={key for key, _ in flatten(changed)})
    return config


def _apply_overrides(settings: Mapping[str, Any], given: Sequence[Override]) -> dict[str, Any]:
    """Apply the overrides in order to a copy of the settings."""
    changed = deepcopy(dict(settings))
    for one in given:
        if not set_by_key(changed, one.key_or_group, _parse_single_value(one)):
            raise _build_unknown_setting_error(one.key_or_group, str(one.input_line).partition("=")[2])
    return changed


def quote_word(text: str) -> str:
    """Quote a string for Hydra's override grammar."""
    return QuotedString(text, Quote.single).with_quotes()


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchedSetting:
    """Search space of one setting or config group in a sweep or a search: a list of choices, or an interval."""

    key: str
    choices: tuple[str, ...] = ()  # as typed; empty: the interval from `low` to `high`
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # whether the interval is sampled uniformly in log space

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


def split_search_space(overrides: Sequence[str]) -> tuple[list[str], tuple[SearchedSetting, ...]]:
    """Split overrides into fixed overrides and the search space of a sweep or a search."""
    parsed = [_parse_override(override, swept=True) for override in overrides]
    # A group's option and the settings within the group do not overlap.
    keys = [(one.key_or_group, "{" in one.get_value_string() or not list_options(one.key_or_group)) for one in parsed]
    for place, ((key, is_setting), one) in enumerate(zip(keys, parsed, strict=True)):
        again = (other for other, also in keys[place + 1 :] if also == is_setting)
        if one.is_sweep_override() and _overlaps_any(key, again):
            bound = "has several values and is set again by a later override: set it only once"
            raise ConfigError(key, NOT_GIVEN, bound)
    fixed = [typed for typed, one in zip(overrides, parsed, strict=True) if not one.is_sweep_override()]
    return fixed, tuple(_parse_searched(one) for one in parsed if one.is_sweep_override())


def _parse_searched(override: Override) -> SearchedSetting:
    key, value, typed = override.key_or_group, override.value(), override.get_value_string()
    if not isinstance(value, IntervalSweep):
        try:
            # A long range must not fill the memory.
            values = tuple(dict.fromkeys(map(str, itertools.islice(override.sweep_string_iterator(), MAX_RUNS + 1))))
        except (ValueError, HydraException):  # a range with a step of 0, or glob()
            raise ConfigError(key, typed, _OF_A_SPACE) from None
        return SearchedSetting(key=key, choices=values)
    low, high, log = value.start, value.end, "log" in value.tags
    if low is None or high is None or not (low < high and math.isfinite(high - low) and (low > 0 or not log)):
        least = ", both above 0" if log else ""
        raise ConfigError(key, typed, f"must have LOW below HIGH{least}")
    return SearchedSetting(key=key, low=low, high=high, log=log)


def _parse_override(override: str, *, swept: bool = False) -> Override:
    """Parse a command-line override.  With `swept`, the override may list several values."""
    word = _quote_for_grammar(override, swept=swept)
    key, equals, value = word.partition("=")
    try:
        parsed = _PARSER.parse_override(word)
        if parsed.key_or_group:
            return parsed
    except (HydraException, ValueError):  # ValueError: an integer with more digits than Python converts
        if swept and re.match(r"\w+\(", value):
            raise ConfigError(key, value, _OF_A_SPACE) from None
    if key and value.startswith("="):
        raise ConfigError("override", word, f"must have one equals sign: {key}={value.lstrip('=')}")
    meant = "" if equals else suggest_experiment(word)
    raise ConfigError("override", word, f"must look like key=value{meant}" if meant else _FORM)


def _make_override(key: str, value: Any) -> Override:
    """Build an override from a Python value."""
    try:
        plain = json.loads(json.dumps(value, default=_convert_to_json_value))
    except (TypeError, ValueError, RecursionError):  # the last two: circular references, or huge integers
        bound = "must be text, a number, true, false, None, or a container of these"
        raise ConfigError(key, f"a value of type {type(value).__name__}", bound) from None
    return Override(OverrideType.CHANGE, key, ValueType.ELEMENT, plain, input_line=f"{key}={value}")


def _convert_to_json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else os.fspath(value)  # NumPy value or path, else a TypeError


def _parse_single_value(override: Override) -> Any:
    if override.is_sweep_override():
        raise ConfigError(override.key_or_group, override.get_value_string(), _SEVERAL)
    return override.value()


def _quote_for_grammar(override: str, *, swept: bool) -> str:
    """Quote the values that Hydra's grammar rejects unquoted: non-ASCII words, paths and prompt templates.

    With `swept`, commas in a path separate values.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    is_path = name == "experiment" or (name in PATHS and value != "null")
    if is_template := name == "data.prompt_template":
        value = value.replace("\\n", "\n").replace("\\t", "\t")
    if is_path and swept and "," in value and not value.startswith(_QUOTES):
        value = ",".join(quote_word(part) if part.startswith("~") else part for part in value.split(","))
    elif (is_path or is_template) and value and not value.startswith(_QUOTES):
        value = quote_word(value)
    else:
        value = _WORD.sub(lambda found: quote_word(found[1]) if found[1] else found[0], value)
    return f"{key}{equals}{value}"


def parse_override_key(override: str) -> str:
    """Return the key that an override sets, adds or deletes."""
    return override.lstrip("+~").partition("=")[0].strip()


def parse_override_value(override: str) -> Any:
    """Return the value of an override.

    Raises:
        ConfigError: the override has several values.
    """
    return _parse_single_value(_parse_override(override))


def _build_unknown_setting_error(key: str, value: object) -> ConfigError:
    """Build the error for an unknown setting, with a hint at fedtune's equivalent or the most similar key."""
    last = key.rpartition(".")[2]
    paths = [path.split(".") for path, _ in flatten(compose_default_settings())]
    every = {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)} | {*FREE_MAPS}
    of_tasks = (task.settings for task in TASKS.values() if task.settings is not None)
    every |= {f"task_settings.{one.name}" for settings in of_tasks for one in fields(settings)}
    of_algorithms = (algorithm.settings for algorithm in ALGORITHMS.values() if algorithm.settings is not None)
    every |= {f"federation.algorithm_settings.{one.name}" for settings in of_algorithms for one in fields(settings)}
    known = sorted(every, key=lambda path: (path.startswith("public."), path))  # public.* is rarely intended
    meant = (ours for ours, theirs in _OTHER_WORDS.items() if last in theirs.split())
    named = next(meant, None) or next((path for path in known if path.rpartition(".")[2] == last), None)
    # Compare the last component as well: training.epochs shares most letters with training.betas.
    alike = difflib.get_close_matches(key, known, n=3, cutoff=0.75)
    own = [path for path in alike if difflib.SequenceMatcher(None, last, path.rpartition(".")[2]).ratio() > 0.6]
    hint = named or next(iter(own), None)
    return ConfigError(key, value, _UNKNOWN + (f"; did you mean {hint}?" if hint else ""))
