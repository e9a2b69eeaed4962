"""From overrides on the command line to validated configurations; the only place that knows Hydra."""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedtune.config import RunConfig, parse, saved_settings
from fedtune.data.load import shipped_folders
from fedtune.federation.run_folder import RunFolder
from fedtune.spec import ConfigError


def config_folder() -> Path:
    """The folder `conf/`, in a checkout or inside the installed package."""
    return next(folder / "conf" for folder in shipped_folders() if (folder / "conf" / "config.yaml").is_file())


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """Compose and validate one run.

    Raises:
        ConfigError: for every mistake in an override or a value, Hydra's own errors among them.
    """
    overrides = [override for override in overrides if override.strip()]
    resumed = [override for override in overrides if override.startswith("resume=")]
    if resumed and not any(_chooses_option(override) for override in overrides):
        return _resumed(resumed[-1].removeprefix("resume="), [o for o in overrides if o not in resumed])
    settings = _composed(overrides)
    if settings.get("resume"):
        settings["name"] = _run_folder(settings["resume"])[1].name
    if settings.get("name") is None:
        settings["name"] = _time_stamp()
    return _with_start(parse(settings))


def _with_start(config: RunConfig) -> RunConfig:
    """The same with the digest of the adapter that it begins in, which was looked at.

    Raises:
        ConfigError: it is none, or does not fit the run.
    """
    name, expected = config.model.adapter, config.model.adapter_sha256
    if name is None and expected is None:
        return config
    if name is None:
        raise ConfigError("model.adapter", None, "is required with model.adapter_sha256: the folder of that adapter")
    from fedtune.tasks.saved import StartAdapter  # torch takes seconds to import

    start = StartAdapter.read(name)
    if RunFolder(start.folder.parent).audit_mark.exists():
        raise ConfigError("model.adapter", name, "is an audit's, which was trained on canaries")
    if expected not in (None, start.digest):
        raise ConfigError(
            "model.adapter_sha256", expected, f"is not the digest of the adapter, which is {start.digest}"
        )
    start.require_fits(config.task_model())
    return replace(config, model=replace(config.model, adapter_sha256=start.digest))


def compose_sweep(overrides: Sequence[str]) -> list[RunConfig]:
    """One run for each combination of comma-separated values, all validated before the first one begins."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    except HydraException as error:
        raise _in_our_words(error, overrides) from error
    swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
    if "name" in swept:
        return [compose_run(batch) for batch in batches]
    given = [str(override.value()) for override in parsed if override.key_or_group == "name"]
    prefix = given[-1] if given else _time_stamp()
    runs = []
    for batch in batches:
        chosen = ",".join(part.lstrip("+") for part in batch if part.lstrip("+").split("=")[0] in swept)
        suffix = re.sub(r"[^A-Za-z0-9_.,=-]+", "-", chosen).strip("-") or "run"
        runs.append(compose_run([*batch, f"name='{prefix}-{suffix}'"]))
    return runs


def saved_config(folder: Path) -> RunConfig:
    """The configuration that a run folder was made with.

    Raises:
        ConfigError: the folder has none, or one that this version does not understand.
    """
    return parse(saved_settings(folder))


def write_config(config: RunConfig, folder: Path) -> None:
    """Write `config.yaml`; `saved_config` reads it back."""
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config.to_json()), RunFolder(folder).config)


def _chooses_option(override: str) -> bool:
    """Whether an override replaces a whole group, as in privacy=none."""
    return (config_folder() / override.lstrip("+~").partition("=")[0]).is_dir()


def _resumed(name: str, overrides: Sequence[str]) -> RunConfig:
    """`resume=FOLDER` continues with the folder's own configuration, changed by single values only."""
    folder, saved = _run_folder(name.strip("'\""))
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
        settings = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(saved.to_json()), changes))
    except (OmegaConfBaseException, YAMLError) as error:
        raise _in_our_words(error, overrides) from error
    assert isinstance(settings, dict)
    # The name is how the sites' ledgers know the run: another one would start their count at zero.
    fixed = {"resume": str(folder), "name": saved.name}
    return parse({**{str(key): value for key, value in settings.items()}, **fixed})


def _run_folder(name: str) -> tuple[Path, RunConfig]:
    """A folder to resume and what it was made with.

    A run keeps the name it began with, by which its sites' ledgers know it, whatever its folder is called by now.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError("resume", name, "must be a run folder")
    return folder, saved_config(folder)


def _composed(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        # Hydra would take its own settings and do nothing with them here.
        if re.match(r"[+~]*hydra[./=]", override):
            key, _, value = override.partition("=")
            raise ConfigError(key, value, "is not a setting of fedtune")
    try:
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
        settings = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise _in_our_words(error, overrides) from error
    assert isinstance(settings, dict)
    settings.pop("experiment", None)
    return {str(key): value for key, value in settings.items()}


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
        return ConfigError(found[1], found[2], f"must be one of {choices}" if choices else "is no group of settings")
    if found := re.search(r"Ambiguous value for argument '([^'=]+)=(.*?)'", text):
        bound = "is several values: add -m to run each of them, or write [a,b] for a list"
        return ConfigError(found[1], found[2], bound)
    if found := re.search(r"Missing mandatory value.*full_key: (\S+)", text):
        return ConfigError(found[1], "", f"is required: give it as {found[1]}=VALUE")
    text = text.split(" See https")[0]
    if found := re.search(r"(Interpolation .*?) full_key: (\S+)", text):
        return ConfigError(found[2], given.get(found[2], ""), f"must be a value ({found[1]})")
    culprit = next((o for o in overrides if o in text or not _is_override(o)), " ".join(overrides))
    return ConfigError("override", culprit, f"must look like key=value ({text})")


def _is_override(text: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(text).key_or_group)
    except HydraException:
        return False


def _nearest(key: str) -> str:
    """A hint for a misspelt key: the known key most like it."""
    known = [".".join(path) for path in _key_paths(_composed([]), ())]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _key_paths(settings: dict[str, Any], outer: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for key, value in settings.items():
        yield (*outer, key)
        if isinstance(value, dict):
            yield from _key_paths(value, (*outer, key))


def _time_stamp() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
