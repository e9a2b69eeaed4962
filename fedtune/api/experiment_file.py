"""Hydra composition of conf/ and of users' experiment files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf

from fedtune.api.config_groups import list_config_groups, list_options, suggest_experiment
from fedtune.codec import read_regular_file
from fedtune.config import read_plain_yaml
from fedtune.runs.overrides import FREE_MAPS
from fedtune.spec import NOT_GIVEN, ConfigError, expand_home
from fedtune.version import find_config_folder

OPEN = "???"  # Hydra's marker for a mandatory value
_SCHEME = "fedtune"
_PACKAGE = re.compile(r"^# *@package +(\S+)", re.MULTILINE)
_SEAL = "\ufdd0"  # first character of a sealed map; a noncharacter, which no text contains


class _ConfSource(ConfigSource):
    """Hydra config source for conf/ and for experiment files that are given as paths.

    During composition a map with user-defined keys is sealed in a string, because a later file must replace the whole
    map, and OmegaConf would merge the two maps.
    """

    @staticmethod
    def scheme() -> str:
        return _SCHEME

    def available(self) -> bool:
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        group, path = _find_config_file(config_path)
        if path is None:
            raise ConfigLoadError(config_path)
        is_own = find_config_folder() not in path.parents
        settings = read_experiment_file(path) if is_own else read_plain_yaml(path, key=group or "conf")
        package = _PACKAGE.search(read_regular_file(path).decode())
        header = {"package": package[1] if package else "_global_" if is_own else None}
        if is_own and package and package[1].startswith("hydra"):
            raise ConfigError(f"{path}: @package", package[1], "is not allowed: configure Hydra on the command line")
        sealed = _seal_free_maps(settings, within="" if header["package"] == "_global_" else group)
        return ConfigResult(provider=self.provider, path=str(path), config=OmegaConf.create(sealed), header=header)

    def is_group(self, config_path: str) -> bool:
        return (find_config_folder() / config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        return _find_config_file(config_path)[1] is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if results_filter is ObjectType.CONFIG:
            return list_options(config_path)
        return [] if config_path else list_config_groups()


class _ConfSearchPath(SearchPathPlugin):
    """Hydra search path plugin that adds conf/ during fedtune's own compositions only."""

    composes = False

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.composes:
            search_path.append("fedtune", f"{_SCHEME}://conf")


for _plugin in (_ConfSource, _ConfSearchPath):
    Plugins.instance().register(_plugin)


@contextmanager
def initialize_hydra() -> Iterator[None]:
    """Initialize Hydra with conf/ on its search path, and restore the previous Hydra state on exit."""
    other, base = GlobalHydra.instance().hydra, VersionBase.instance().getbase()
    GlobalHydra.instance().clear()
    _ConfSearchPath.composes = True
    try:
        with initialize(config_path=None, job_name="fedtune", version_base="1.3"):
            yield
    finally:
        _ConfSearchPath.composes = False
        GlobalHydra.instance().hydra = other
        VersionBase.instance().version_base = base


def compose_settings(words: Sequence[str] = (), *, name: str = "config") -> DictConfig:
    """Compose a run's settings with Hydra, without merging maps with user-defined keys.

    Args:
        words: overrides in Hydra's grammar.
        name: the primary config in conf/.

    Raises:
        HydraException: an override or a file is invalid.
        OmegaConfBaseException: an interpolation is invalid.
    """
    with initialize_hydra():
        config = compose(name, overrides=[*words])
    OmegaConf.set_struct(config, False)
    for key in FREE_MAPS:
        sealed = OmegaConf.select(config, key)
        if isinstance(sealed, str) and sealed.startswith(_SEAL) and sealed != _SEAL + OPEN:
            OmegaConf.update(config, key, json.loads(sealed[1:]), merge=False)
    return config


def read_hydra_settings(words: Sequence[str]) -> dict[str, Any]:
    """Compose Hydra's own configuration node.  Values that exist only in a Hydra job remain missing."""
    with initialize_hydra():
        node = compose("config", overrides=[*words], return_hydra_config=True).hydra
    return OmegaConf.to_container(node)  # type: ignore[return-value]


def list_composed_files(words: Sequence[str]) -> list[tuple[str, str, str]]:
    """List the config files of a composition in order, as (file, package, including file)."""
    with initialize_hydra():
        files = GlobalHydra.instance().config_loader().compute_defaults_list("config", [*words], RunMode.RUN).defaults
    ours = [one for one in files if not str(one.package).startswith("hydra") and one.parent != "<root>"]
    return [(str(one.config_path), one.package or "_global_", str(one.parent)) for one in ours]


@cache
def compose_default_settings() -> Mapping[str, Any]:
    """Compose the default run's settings.  The result is cached; do not modify it."""
    return to_plain_settings(compose_settings())


def to_plain_settings(config: DictConfig) -> dict[str, Any]:
    """Convert a configuration to plain values, with interpolations resolved and missing values replaced by `OPEN`."""
    return _unseal_missing_values(OmegaConf.to_container(config, resolve=True))  # type: ignore[no-any-return]


def _unseal_missing_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unseal_missing_values(one) for key, one in value.items()}
    return OPEN if value == _SEAL + OPEN else value


def is_path(option: object) -> bool:
    """Whether the value of `experiment` is a file path instead of a name."""
    return isinstance(option, str) and (option.endswith((".yaml", ".yml")) or "/" in option)


def read_experiment_file(path: Path) -> dict[str, Any]:
    """Read a user's experiment file, and resolve the data files that exist relative to it.

    Raises:
        ConfigError: the file is not YAML, or sets a key that is not allowed in an experiment file.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError("experiment", str(path), "must be a name from conf/experiment, or a file that ends in .yaml")
    settings = read_plain_yaml(path, key="experiment")
    named = {str(key) for entry in settings.get("defaults") or () if isinstance(entry, dict) for key in entry}
    hydras = {key for key in named if re.search("(^|[ /@])hydra([./@]|$)", key)}
    if wrong := sorted(({"experiment", "resume", "hydra"} & settings.keys()) | hydras):
        raise ConfigError(f"{path}: {wrong[0]}", "...", "is not allowed in an experiment file")
    for group in ("data", "public"):
        _resolve_data_files(settings.get(group), path.parent)
    return settings


def require_no_missing_values(settings: Mapping[str, Any]) -> None:
    """Check that every mandatory setting (`???`) has a value.

    Raises:
        ConfigError: at least one value is missing; the message lists all missing settings.
    """
    if left := [*_iter_missing_keys(settings)]:
        key, *others = left
        whole = key.partition("[")[0]  # the setting, if an entry of its list has no value
        bound = f"add {key}=VALUE" if whole == key else f"set {whole} in the experiment file or the settings"
        more = f" (also missing: {', '.join(others)})" if others else ""
        raise ConfigError(key, "", f"is required{more}: {bound}")


def _iter_missing_keys(value: Any, key: str = "") -> Iterator[str]:
    """Yield the keys of missing values, in which a list entry is identified by its columns or its index."""
    if value == OPEN:
        yield key
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from _iter_missing_keys(inner, f"{key}.{name}".lstrip("."))
    for place, inner in enumerate(value) if isinstance(value, list) else ():
        columns = inner.get("columns") if isinstance(inner, dict) else None
        name = ", ".join(map(str, columns)) if isinstance(columns, list) else place
        yield from _iter_missing_keys(inner, f"{key}[{name}]")


def read_option(group: str, option: str) -> dict[str, Any]:
    """Compose the settings of an option of a config group."""
    if option not in list_options(group):
        raise build_unknown_option_error(group, option)
    return to_plain_settings(compose_settings(name=f"{group}/{option}"))[group]  # type: ignore[no-any-return]


def build_unknown_option_error(group: str, option: Any, *, key: str | None = None) -> ConfigError:
    """Build the error for an unknown option of a config group, with `key` (default: the group) in the message."""
    choices = list_options(group)
    meant = suggest_experiment(str(option)) if group == "experiment" else ""
    bound = f"must be one of {', '.join(choices)}{meant}" if choices else "is not a settings group"
    return ConfigError(key or group, option, bound)


def _find_config_file(config_path: str) -> tuple[str, Path | None]:
    """Return the config group and the file (None if it does not exist) for one of Hydra's config paths."""
    group, _, option = config_path.rpartition("/")
    if config_path.startswith("experiment/"):
        group, option = "experiment", config_path.removeprefix("experiment/")
    if group == "experiment" and is_path(option):
        path = Path(expand_home(option, key="experiment"))
        return group, path if path.is_file() else None
    path = find_config_folder() / group / f"{option.removesuffix('.yaml')}.yaml"
    return group, path if path.is_file() else None


def _seal_free_maps(settings: Any, *, within: str) -> Any:
    """Replace every map in `FREE_MAPS` by a sealed string, and every missing value by a sealed placeholder.

    OmegaConf would merge the maps, and would not let `???` replace an earlier value.  `within` is the dotted key of
    `settings`.
    """
    if not isinstance(settings, dict):
        return _SEAL + OPEN if settings == OPEN else settings
    if within in FREE_MAPS:
        for key in settings:
            if not isinstance(key, str):
                raise ConfigError(f"{within}.{key}", NOT_GIVEN, "must be text; put quotes around it")
        # Escape the dollar sign: interpolations in the map are resolved after it is unsealed.
        return _SEAL + json.dumps(settings, ensure_ascii=False).replace("$", "\\u0024")
    return {key: _seal_free_maps(one, within=f"{within}.{key}".lstrip(".")) for key, one in settings.items()}


def _resolve_data_files(group: Any, folder: Path) -> None:
    """Resolve data files that exist relative to `folder`, the folder of the experiment file."""
    for key in ("train_file", "validation_file", "test_file"):
        name = group.get(key) if isinstance(group, dict) else None
        if isinstance(name, str) and name.strip():
            path = folder / name.replace(r"\${", "${")  # unescape OmegaConf's dollar sign
            with suppress(OSError, ValueError):  # an invalid file name is reported when the file is read
                # A name with {site} exists if the file of any site exists.
                if path.exists() or ("{site}" in path.name and any(path.parent.glob(path.name.replace("{site}", "*")))):
                    group[key] = str(path).replace("${", r"\${")
