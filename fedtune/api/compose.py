"""From overrides on the command line to validated configurations; Hydra's one room."""

from __future__ import annotations

import datetime
import difflib
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedtune.api.experiment_file import ExperimentFile, config_folder, experiment_called, read_experiment, value_at
from fedtune.config import PATHS, RunConfig, parse, saved_config, settings_to_save, with_secure_sums
from fedtune.federation.run_folder import RunFolder, run_folders_near
from fedtune.runs.public_stage import awaits_public_stage, with_public_stage
from fedtune.runs.renewal import renewed, with_start
from fedtune.spec import NOT_GIVEN, ConfigError

_FREE_MAPS = ("data.columns", "data.partition.sites", "public.columns")
"""Settings whose keys are the user's own: a new value replaces all of the old one."""
_VERBATIM = ("data.prompt_template", "experiment")
"""Settings whose values are often no words of Hydra's grammar, and are taken as they were typed."""
_QUOTES = ("'", '"')
_NOT_ASCII = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,\[\]{}:=()'"]*[^\x00-\x7f][^,\[\]{}:=()'"]*""")
"""A quoted text, or an unquoted word with a letter that Hydra's grammar does not know."""
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
_OF_A_SPACE = "must be values with commas between them, interval(LOW,HIGH), log(LOW,HIGH), or int(...) of one of these"
_SEVERAL = "is several values: add -m to run each of them, or write [a,b] for a list"
MOST_RUNS = 1000  # of a sweep or a search: more than anybody means


def compose_run(
    overrides: Sequence[str], *, changed: Mapping[str, Any] | None = None, for_real_sites: bool = False
) -> RunConfig:
    """Compose and validate one run from overrides as they were typed; a ConfigError tells of every mistake.

    `changed` has settings by dotted key in place of composed ones; `for_real_sites` is as of `fedtune.config.parse`.
    """
    overrides = [_in_grammar(override, swept=False) for override in overrides if override.strip()]
    resumed = [override for override in overrides if override.startswith("resume=")]
    # A folder is resumed with its own settings and its name, by which ledgers know it, unless a group is replaced.
    if resumed and not any((config_folder() / key_of(override)).is_dir() for override in overrides):
        folder, saved = _run_folder(str(value_of(resumed[-1])))
        fixed = [f"resume={quoted(str(folder))}", f"name={quoted(saved.name)}"]
        return _changed(saved, [*(override for override in overrides if override not in resumed), *fixed])
    if any(key_of(override) == "renew" for override in overrides):
        values = {key_of(override): value_of(override) for override in overrides}
        return with_start(renewed(str(values.pop("renew")), {"name": time_stamp(), **values, **(changed or {})}))
    file, overrides = _experiment_file(overrides)
    maps, overrides = _free_maps(overrides)
    # An empty map stands for a value that conf leaves open, until it is put in.
    settings = _composed([*overrides, *(f"++{_map_of(key)}={{}}" for key in maps)], file)
    _replace_maps(settings, file, maps)

    def said_beside(key: str) -> set[str]:
        # What was said where secure sums or a public stage were asked for, or later, stays: the rest had none in mind.
        said = {key_of(override) for override in overrides}
        if file is not None and file.sets(key):
            said |= {f"{group}.{key}" for group in ("federation", "training") for key in file.settings.get(group, ())}
        return said

    plain = settings
    if settings.get("federation", {}).get("aggregation") == "secure":
        settings = with_secure_sums(settings, keep=said_beside("federation.aggregation"))
    if settings.get("resume"):
        settings["name"] = _run_folder(settings["resume"])[1].name
    if settings.get("name") is None:
        settings["name"] = time_stamp()
    for dotted, value in (changed or {}).items():
        *parents, last = dotted.split(".")
        reduce(dict.__getitem__, parents, settings)[last] = value
    try:
        config = parse(settings, for_real_sites=for_real_sites)
        if config.public.train_file is not None:
            given = {key.removeprefix("training.") for key in said_beside("public.train_file")}
            if value_at(plain, "training.learning_rate") == "auto":  # which gives no rate
                given.discard("learning_rate")
            config = with_public_stage(config, plain, keep=given)
        return with_start(config)
    except ConfigError as error:
        unknown = error.bound == "is not a setting of fedtune"
        hinted = ConfigError(error.key, error.value, error.bound + _nearest(error.key)) if unknown else error
        typed = any(key_of(override) == error.key for override in overrides) or error.key in maps
        raise hinted.in_file(file.path) if file and file.sets(error.key) and not typed else hinted from None


def compose_recipe(recipe: str | Path | RunConfig | None, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Compose and validate one run, from values in place of typed words.

    `recipe` is the name of an experiment of conf/, an experiment file, or a whole configuration (None: the default);
    `settings` are values by dotted key, and options by group.
    """
    words = [f"{key}={_word(value)}" for key, value in (settings or {}).items()]
    if isinstance(recipe, RunConfig):
        return _changed(recipe, words)
    return compose_run(words if recipe is None else [f"experiment={recipe}", *words])


def _word(value: Any) -> str:
    match value:
        case None | bool():
            return "null" if value is None else str(value).lower()
        case Mapping():
            return f"{{{','.join(f'{key}:{_word(inner)}' for key, inner in value.items())}}}"
        case list() | tuple():
            return f"[{','.join(map(_word, value))}]"
        case str() | Path():
            return quoted(str(value))
    return repr(value)


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
    words = [_in_grammar(override) for override in overrides]
    parser = OverridesParser.create()
    parser.functions.register(name="log", func=_log)
    parser.functions.definitions["log"] = inspect.signature(_log, eval_str=True)  # Hydra takes no types in strings
    try:
        parsed = parser.parse_overrides(words)
    except HydraException as error:
        wrong = _in_our_words(error, words)
        key, _, value = str(wrong.value).partition("=")
        raise ConfigError(key, value, _OF_A_SPACE) if re.match(r"\w+\(", value) else wrong from error
    keys = [one.get_key_element() for one in parsed]
    for place, (key, one) in enumerate(zip(keys, parsed, strict=True)):
        if one.is_sweep_override() and key in keys[place + 1 :]:
            bound = "must not be given again after its values: the last would be all that counts"
            raise ConfigError(key, NOT_GIVEN, bound)
    fixed = [typed for typed, one in zip(overrides, parsed, strict=True) if not one.is_sweep_override()]
    return fixed, tuple(_searched(one) for one in parsed if one.is_sweep_override())


def _log(start: int | float, end: int | float) -> IntervalSweep:
    return IntervalSweep(start=float(start), end=float(end), tags={"log"})


def _searched(override: Override) -> Searched:
    key, value = override.get_key_element(), override.value()
    typed = override.input_line.partition("=")[2] if override.input_line else ""
    if not isinstance(value, IntervalSweep):
        try:
            # Before a range of them fills the memory.
            values = tuple(dict.fromkeys(map(str, islice(override.sweep_string_iterator(), MOST_RUNS + 1))))
        except (ValueError, HydraException):  # a range of steps of 0, or names of files
            raise ConfigError(key, typed, _OF_A_SPACE) from None
        return Searched(key=key, choices=values)
    low, high, log = value.start, value.end, "log" in value.tags
    if low is None or high is None or not (low < high and math.isfinite(high - low) and (low > 0 or not log)):
        least = ", both above 0" if log else ""
        raise ConfigError(key, typed, f"must go from a smaller number to a larger one{least}")
    return Searched(key=key, low=low, high=high, log=log)


def write_config(config: RunConfig, folder: Path) -> None:
    """Write `config.yaml`; `saved_config` reads it back."""
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(settings_to_save(config)), RunFolder(folder).config)


def _changed(known: RunConfig, overrides: Sequence[str]) -> RunConfig:
    settings = OmegaConf.create(known.to_json())
    for override in overrides:
        try:
            OmegaConf.update(settings, key_of(override), value_of(override))
        except OmegaConfBaseException as error:
            raise _in_our_words(error, [override]) from error
    changed: Any = OmegaConf.to_container(settings)
    config = parse(changed)
    if awaits_public_stage(config) or config.public != known.public:  # its rates stay: a person has chosen all of it
        return with_public_stage(config, changed, keep=changed["training"])
    return config


def _run_folder(name: str) -> tuple[Path, RunConfig]:
    """A folder to resume and what it was made with; its run keeps its name, whatever the folder is called by now."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError("resume", name, f"must be a run folder{run_folders_near(folder)}")
    return folder, saved_config(folder)


def _composed(overrides: Sequence[str], file: ExperimentFile | None = None) -> dict[str, Any]:
    for override in overrides:
        # Hydra would take its own settings and do nothing with them here.
        if re.match(r"[+~]*hydra[./=]", override):
            key, _, value = override.partition("=")
            raise ConfigError(key, value, "is not a setting of fedtune")
    try:
        chosen = list(overrides)
        if file is not None:
            node = {"defaults": list(file.defaults), **file.settings}
            ConfigStore.instance().store("_from_file_", node, group="experiment", package="_global_")
            chosen.append("experiment=_from_file_")
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            composed = compose("config", overrides=chosen)
        settings: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise _in_our_words(error, overrides) from error
    return {key: value for key, value in settings.items() if key != "experiment"}


def _in_grammar(override: str, *, swept: bool = True) -> str:
    """An override as Hydra's grammar takes it: it has no word for a letter like \u00e4, nor for a template's braces.

    A comma parts values where the override is `swept`, and otherwise belongs to a path.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    if name == "data.prompt_template":
        value = value.replace("\\n", "\n").replace("\\t", "\t")
    is_path = name == "experiment" or (name in PATHS and value != "null")
    if (name in _VERBATIM or is_path) and value and not value.startswith(_QUOTES):
        if is_path and swept and "," in value:
            parts = (quoted(part) if part.startswith("~") else part for part in value.split(","))
            return f"{key}={','.join(parts)}"
        return f"{key}={quoted(value)}"
    return f"{key}{equals}{_NOT_ASCII.sub(lambda found: _if_open(found.group()), value)}"


def _if_open(word: str) -> str:
    bare = word.strip()
    return word if word.startswith(_QUOTES) or not bare else word.replace(bare, quoted(bare))


def key_of(override: str) -> str:
    """The key that an override sets, adds or takes out."""
    return override.lstrip("+~").partition("=")[0].strip()


def value_of(override: str) -> Any:
    """The one value that an override gives its key."""
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException as error:
        raise _in_our_words(error, [override]) from error
    if isinstance(value, Sweep):
        raise ConfigError(key_of(override), override.partition("=")[2], _SEVERAL)
    return value


def _free_maps(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Values for maps with free keys, whole (`data.columns={text: body}`) or by entry, and the other overrides."""
    maps: dict[str, Any] = {}
    others = []
    taken_out = tuple(f"{key_of(override)}." for override in overrides if override.startswith("~"))
    for override in overrides:
        name = _map_of(key := key_of(override))
        if name is None or override.startswith("~"):
            others.append(override)
        elif not name.startswith(taken_out):
            maps[key] = value_of(override)
    return maps, others


def _map_of(key: str) -> str | None:
    """The map with free keys that a key is, or is an entry of."""
    return next((name for name in _FREE_MAPS if f"{key}.".startswith(f"{name}.")), None)


def _replace_maps(settings: dict[str, Any], file: ExperimentFile | None, maps: Mapping[str, Any]) -> None:
    """Put in the free maps: the file's in place of conf's, and what was typed in place of both."""
    of_file = {name: value_at(file.settings, name) for name in _FREE_MAPS if file is not None and file.sets(name)}
    for key, value in (*of_file.items(), *maps.items()):
        name = _map_of(key) or key
        outer, _, last = name.rpartition(".")
        if isinstance(inner := value_at(settings, outer), dict):  # else taken out with ~
            entry = key.removeprefix(f"{name}.")
            inner[last] = value if key == name else {**(inner[last] or {}), entry: value}


def _experiment_file(overrides: Sequence[str]) -> tuple[ExperimentFile | None, list[str]]:
    """The one file that `experiment=` names, if its value is a path, and the other overrides."""
    given = [override for override in overrides if key_of(override) == "experiment"]
    if not given:
        return None, list(overrides)
    if len(given) > 1:  # Hydra would take the last one, and say nothing
        first, second = map(value_of, given[:2])
        raise ConfigError("experiment", second, f"is one too many: experiment={first} is given, too")
    name = value_of(given[0])
    if not (isinstance(name, str) and (name.endswith((".yaml", ".yml")) or "/" in name)):
        return None, list(overrides)
    return read_experiment(Path(name).expanduser()), [override for override in overrides if override not in given]


def _in_our_words(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Hydra's message as one line about the override that caused it."""
    text = " ".join(line.strip() for line in str(error).splitlines())
    given = {key: value for key, _, value in (override.lstrip("+~").partition("=") for override in overrides)}
    if found := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
        key = found[1] or found[2]
        return ConfigError(key, given.get(key, ""), f"is not a setting of fedtune{_nearest(key)}")
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group = config_folder() / found[1]
        choices = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        meant = experiment_called(found[2]) if found[1] == "experiment" else None
        bound = f"must be one of {choices}{_meant(meant)}" if choices else "is no group of settings"
        return ConfigError(found[1], found[2], bound)
    if found := re.search(r"Ambiguous value for argument '([^'=]+)=(.*?)'", text):
        return ConfigError(found[1], found[2], _SEVERAL)
    if found := re.search(r"Missing mandatory value.*full_key: (\S+)", text):
        how = "is for you to say where the file has ???" if "[" in found[1] else f"give it as {found[1]}=VALUE"
        return ConfigError(found[1], "", f"is required: {how}")
    text = text.split(" See https")[0]
    if found := re.search(r"(Interpolation .*?) full_key: (\S+)", text):
        return ConfigError(found[2], given.get(found[2], ""), f"must be a value ({found[1]})")
    culprit = next((o for o in overrides if o in text or not _is_override(o)), " ".join(overrides))
    key, equals, value = culprit.partition("=")
    if key and value.startswith("="):
        return ConfigError("override", culprit, f"must have one equals sign: {key}={value.lstrip('=')}")
    if not equals and (experiment := experiment_called(culprit)):
        return ConfigError("override", culprit, f"must look like key=value{_meant(experiment)}")
    bound = "must look like key=value, and a value with signs of its own like key='...'"
    return ConfigError("override", culprit, bound)


def _meant(experiment: str | None) -> str:
    return f"; did you mean experiment={experiment}?" if experiment else ""


def _is_override(text: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(text).key_or_group)
    except HydraException:
        return False


def _nearest(key: str) -> str:
    """A hint for a wrong key: what it is called here, or the known key most like it."""
    last = key.rpartition(".")[2]
    known = sorted(_all_keys(_composed([])), key=lambda path: path.startswith("public."))  # seldom what is meant
    meant = (ours for ours, theirs in _OTHER_WORDS.items() if last in theirs.split())
    named = next(meant, None) or next((path for path in known if path.rpartition(".")[2] == last), None)
    # Alike in its own name, too: training.epochs shares most letters with training.betas.
    alike = difflib.get_close_matches(key, known, n=3, cutoff=0.75)
    own = [path for path in alike if difflib.SequenceMatcher(None, last, path.rpartition(".")[2]).ratio() > 0.6]
    hint = named or next(iter(own), None)
    return f"; did you mean {hint}?" if hint else ""


def _all_keys(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _all_keys(value, f"{prefix}{key}.")


def time_stamp() -> str:
    """The name of a run that is given none."""
    return datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
