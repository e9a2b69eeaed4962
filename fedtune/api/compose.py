"""From overrides, which are in Hydra's grammar, to validated configurations: the one room that knows Hydra."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, Quote, QuotedString, ValueType
from hydra.errors import HydraException

from fedtune.api.experiment_file import check_nothing_open, composed, experiment_meant, options_of, settings_of
from fedtune.config import PATHS, RunConfig, parse, saved_config, with_secure_sums
from fedtune.federation.run_folder import run_folders_near
from fedtune.runs.changed_settings import FREE_MAPS, put
from fedtune.runs.place_of_run import time_stamp
from fedtune.runs.public_stage import awaits_public_stage, with_public_stage
from fedtune.runs.renewal import renewed, with_start
from fedtune.spec import NOT_GIVEN, ConfigError, expand_home
from fedtune.words import dotted

Recipe = str | Path | RunConfig
"""A recipe of conf/experiment by its name, an experiment file, or a run's whole configuration."""
Settings = Mapping[str, Any]
"""Values by dotted key, `{"privacy.epsilon": 3}`, and options of groups, `{"privacy": "none"}`."""
_QUOTES = ("'", '"')
_IN_WORDS = r"""[^,\[\]{}:=()'"]"""
_WORD = re.compile(rf"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?=\S)(?={_IN_WORDS}*[^\x00-\x7f])({_IN_WORDS}+)(?<=\S)""")
"""A quoted text, or (the group) an open word with a letter that Hydra's grammar does not know."""
_OTHER_WORDS = {
    "federation.num_rounds and training.local_steps": "epochs num_epochs num_train_epochs max_steps",
    "federation.num_rounds": "rounds",
    "federation.num_sites": "clients num_clients sites",
    "privacy.sampling_rate, which sets how many records a step takes": "batch_size",
    "training.learning_rate": "lr",
    "privacy.max_grad_norm": "clip",
    "lora.rank": "r",
    "data.train_file": "file",
    "data.max_length": "max_seq_length",
    "runtime.device": "device",
}
"""A setting, and what other programs call it."""
_UNKNOWN = "is not a setting of fedtune"
_FORM = "must look like key=value, and a value with signs of its own like key='...'"
_OF_A_SPACE = "must be values with commas between them, interval(LOW,HIGH), log(LOW,HIGH), or int(...) of one of these"
_SEVERAL = "is several values: add -m to run each of them, or write [a,b] for a list"
MOST_RUNS = 1000  # of a sweep or a search: more than anybody means

_PARSER = OverridesParser.create()
for _name in ("shuffle", "glob"):  # the same words mean the same run, each time and everywhere
    del _PARSER.functions.functions[_name], _PARSER.functions.definitions[_name]
_PARSER.functions.register(name="log", func=lambda start, end: IntervalSweep({"log"}, float(start), float(end)))
_PARSER.functions.definitions["log"] = _PARSER.functions.definitions["interval"]  # it takes the same two numbers


def compose_run(
    overrides: Sequence[str], *, changed: Mapping[str, Any] | None = None, for_real_sites: bool = False
) -> RunConfig:
    """Compose and validate one run from overrides as they were typed; a ConfigError tells of every mistake.

    `changed` has settings by dotted key in place of composed ones; `for_real_sites` is as of `fedtune.config.parse`.
    """
    given = [_parsed(override) for override in overrides if override.strip()]
    return _composed(given, changed or {}, for_real_sites=for_real_sites)


def compose_recipe(recipe: Recipe | None, settings: Settings | None = None) -> RunConfig:
    """Compose and validate one run from Python values; without a recipe, the default run."""
    given = [_said(str(key), value) for key, value in (settings or {}).items()]
    if isinstance(recipe, RunConfig):
        config = _changed(recipe, given)
        return config if config.resume else with_start(config)
    return _composed(given if recipe is None else [_said("experiment", recipe), *given], {})


def _composed(given: Sequence[Override], changed: Mapping[str, Any], *, for_real_sites: bool = False) -> RunConfig:
    typed = {one.key_or_group: _value(one) for one in given}
    of_groups = [one for one in given if options_of(one.key_or_group) and not isinstance(one.value(), dict)]
    for one in of_groups:
        if one.is_add() or one.is_force_add():
            raise ConfigError("override", one.input_line, _FORM)
    groups = {one.key_or_group: str(one.value()) for one in of_groups}
    others = [one for one in given if one not in of_groups]
    for key in ("experiment", "resume"):
        named = [one.value() for one in given if one.key_or_group == key]
        if len(named) > 1:  # the last would be all that counts
            raise ConfigError(key, named[1], f"is one too many: {key}={named[0]} is given, too")
    if (resumed := typed.get("resume")) is not None:
        # A folder is resumed with its own settings and its name, by which ledgers know it, unless all are typed again.
        folder = Path(expand_home(str(resumed), key="resume"))
        if not folder.is_dir():
            raise ConfigError("resume", str(resumed), f"must be a run folder{run_folders_near(folder)}")
        saved = saved_config(folder)
        others += [_said("resume", folder), _said("name", saved.name)]
        if "experiment" not in groups:
            options = {group: settings_of(group, option) for group, option in groups.items()}
            return _changed(saved, [*itertools.starmap(_said, options.items()), *others])
    if "renew" in typed:
        return with_start(renewed(str(typed.pop("renew")), {"name": time_stamp(), **typed, **changed}))
    settings, file, of_file = composed(groups)
    settings = plain = _applied(settings, others)
    values = {key for key, _ in dotted({one.key_or_group: _value(one) for one in others})}

    def said_beside(key: str) -> set[str]:
        # What was said where secure sums or a public stage were asked for, or later, stays: the rest had none in mind.
        return values | (of_file if _among(key, of_file) else set())

    if ("federation.aggregation", "secure") in dotted(settings):
        settings = with_secure_sums(settings, keep=said_beside("federation.aggregation"))
    if settings.get("name") is None:
        settings["name"] = time_stamp()
    settings = _applied(settings, [_said(key, value) for key, value in changed.items()])
    try:
        check_nothing_open(settings)
        config = parse(settings, for_real_sites=for_real_sites)
        if config.public.train_file is not None:
            config = with_public_stage(config, plain, keep=said_beside("public.train_file"))
        return with_start(config)
    except ConfigError as error:
        found = _unknown(error.key, error.value) if error.bound == _UNKNOWN else error
        raise found.in_file(file) if _among(error.key, of_file - values) else found from None


def _among(key: str, keys: Iterable[str]) -> bool:
    """True if a key is one of `keys`, or a part of one, or one is a part of it."""
    return any(f"{one}.".startswith(f"{key}.") or f"{key}.".startswith(f"{one}.") for one in keys)


def _changed(known: RunConfig, given: Sequence[Override]) -> RunConfig:
    """A whole configuration with other values, which has its rates by choice: a public stage lowers none of them."""
    changed = _applied(known.to_json(), given)
    config = parse(changed)
    if awaits_public_stage(config) or config.public != known.public:
        return with_public_stage(config, changed, keep={key for key, _ in dotted(changed)})
    return config


def _applied(settings: Mapping[str, Any], given: Sequence[Override]) -> dict[str, Any]:
    """Settings with the values of overrides, in their order."""
    changed = deepcopy(dict(settings))
    for one in given:
        if not put(changed, one.key_or_group, _value(one)):
            raise _unknown(one.key_or_group, str(one.input_line).partition("=")[2])
    return changed


def quoted(text: str) -> str:
    """A text as one word of Hydra's grammar, whatever it holds."""
    return QuotedString(text, Quote.single).with_quotes()


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """A setting, or a group of them, that is given several values."""

    key: str
    # values as they are typed; empty: any number from `low` to `high`, whole where both are
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # whether numbers are drawn evenly by their logarithm

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


def split_searched(overrides: Sequence[str]) -> tuple[list[str], tuple[Searched, ...]]:
    """The overrides that all runs have in common, and the settings that are given several values."""
    parsed = [_parsed(override, swept=True) for override in overrides]
    # An option of a group, and settings of that group, are two things.
    keys = [(one.key_or_group, "{" in one.get_value_string() or not options_of(one.key_or_group)) for one in parsed]
    for place, ((key, is_setting), one) in enumerate(zip(keys, parsed, strict=True)):
        again = (other for other, also in keys[place + 1 :] if also == is_setting)
        if one.is_sweep_override() and _among(key, again):
            bound = "must not be given again after its values: the last would be all that counts"
            raise ConfigError(key, NOT_GIVEN, bound)
    fixed = [typed for typed, one in zip(overrides, parsed, strict=True) if not one.is_sweep_override()]
    return fixed, tuple(_searched(one) for one in parsed if one.is_sweep_override())


def _searched(override: Override) -> Searched:
    key, value, typed = override.key_or_group, override.value(), override.get_value_string()
    if not isinstance(value, IntervalSweep):
        try:
            # Before a range of them fills the memory.
            values = tuple(dict.fromkeys(map(str, itertools.islice(override.sweep_string_iterator(), MOST_RUNS + 1))))
        except (ValueError, HydraException):  # a range of steps of 0, or names of files
            raise ConfigError(key, typed, _OF_A_SPACE) from None
        return Searched(key=key, choices=values)
    low, high, log = value.start, value.end, "log" in value.tags
    if low is None or high is None or not (low < high and math.isfinite(high - low) and (low > 0 or not log)):
        least = ", both above 0" if log else ""
        raise ConfigError(key, typed, f"must go from a smaller number to a larger one{least}")
    return Searched(key=key, low=low, high=high, log=log)


def _parsed(override: str, *, swept: bool = False) -> Override:
    """An override as it was typed; `swept`: it may have several values."""
    word = _in_grammar(override, swept=swept)
    key, equals, value = word.partition("=")
    if word.startswith("~"):
        raise ConfigError("override", word, "must be key=value: nothing can be taken out")
    try:
        parsed = _PARSER.parse_override(word)
        if parsed.key_or_group and parsed.package is None:
            return parsed
    except (HydraException, ValueError):  # the latter of a number with more digits than Python takes
        if swept and re.match(r"\w+\(", value):
            raise ConfigError(key, value, _OF_A_SPACE) from None
    if key and value.startswith("="):
        raise ConfigError("override", word, f"must have one equals sign: {key}={value.lstrip('=')}")
    meant = "" if equals else experiment_meant(word)
    raise ConfigError("override", word, f"must look like key=value{meant}" if meant else _FORM)


def _said(key: str, value: Any) -> Override:
    """An override that gives a value of Python's."""
    try:
        plain = json.loads(json.dumps(value, default=_plain))
    except (TypeError, ValueError, RecursionError):  # the last two of what holds itself, or is too large to be written
        bound = "must be text, a number, true, false, None, or made of these"
        raise ConfigError(key, f"a value of type {type(value).__name__}", bound) from None
    return Override(OverrideType.CHANGE, key, ValueType.ELEMENT, plain, input_line=f"{key}={value}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else os.fspath(value)  # numpy's; or else a path, or a TypeError


def _value(override: Override) -> Any:
    if override.is_sweep_override():
        raise ConfigError(override.key_or_group, override.get_value_string(), _SEVERAL)
    return override.value()


def _in_grammar(override: str, *, swept: bool) -> str:
    """An override in Hydra's grammar, which knows no umlauts and few paths; `swept`: a comma parts values."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    is_path = name == "experiment" or (name in PATHS and value != "null")
    if is_template := name == "data.prompt_template":
        value = value.replace("\\n", "\n").replace("\\t", "\t")
    if is_path and swept and "," in value and not value.startswith(_QUOTES):
        value = ",".join(quoted(part) if part.startswith("~") else part for part in value.split(","))
    elif (is_path or is_template) and value and not value.startswith(_QUOTES):
        value = quoted(value)
    else:
        value = _WORD.sub(lambda found: quoted(found[1]) if found[1] else found[0], value)
    return f"{key}{equals}{value}"


def key_of(override: str) -> str:
    """The key that an override sets, adds or takes out."""
    return override.lstrip("+~").partition("=")[0].strip()


def value_of(override: str) -> Any:
    """The one value that an override gives its key."""
    return _value(_parsed(override))


def _unknown(key: str, value: object) -> ConfigError:
    """The error about an unknown setting, with a hint: its name here, or the known key most like it."""
    last = key.rpartition(".")[2]
    paths = [path.split(".") for path, _ in dotted(composed({})[0])]
    every = {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)} | {*FREE_MAPS}
    known = sorted(every, key=lambda path: (path.startswith("public."), path))  # those are seldom what is meant
    meant = (ours for ours, theirs in _OTHER_WORDS.items() if last in theirs.split())
    named = next(meant, None) or next((path for path in known if path.rpartition(".")[2] == last), None)
    # Alike in its own name, too: training.epochs shares most letters with training.betas.
    alike = difflib.get_close_matches(key, known, n=3, cutoff=0.75)
    own = [path for path in alike if difflib.SequenceMatcher(None, last, path.rpartition(".")[2]).ratio() > 0.6]
    hint = named or next(iter(own), None)
    return ConfigError(key, value, _UNKNOWN + (f"; did you mean {hint}?" if hint else ""))
