"""What conf/ and a file of the user's own say: plain data, by experiment and by option of a group of settings."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

from fedtune.config import plain_yaml
from fedtune.data.load import shipped_folders
from fedtune.runs.changed_settings import merged
from fedtune.spec import ConfigError, expand_home
from fedtune.words import dotted

OPEN = "???"  # in place of a value, which must then be given


def config_folder() -> Path:
    """The folder `conf/`, in a checkout or inside the installed package."""
    return next(folder / "conf" for folder in shipped_folders() if (folder / "conf" / "config.yaml").is_file())


def options_of(group: str) -> list[str]:
    """The options of a group; none if conf/ has no such group."""
    return sorted(one.stem for one in (config_folder() / group).glob("*.yaml")) if group.isidentifier() else []


def experiment_meant(word: str) -> str:
    """The end of a message: the experiment that may be meant, of conf/ or in a file, with its ending or without."""
    named = word in options_of("experiment")
    endings = ("",) if named or word.endswith((".yaml", ".yml")) else (".yaml", ".yml")
    path = next((f"{word}{ending}" for ending in endings if named or os.path.isfile(f"{word}{ending}")), None)
    return f"; did you mean experiment={path if named or '/' in path else f'./{path}'}?" if path else ""


def composed(chosen: Mapping[str, str]) -> tuple[dict[str, Any], Path | None, set[str]]:
    """An experiment's settings over those of the groups' options; its file, if it is the user's, and the keys it sets.

    `chosen` has options by group in place of the experiment's; and as "experiment" the experiment, a name of
    conf/experiment or a file.
    """
    settings = plain_yaml(config_folder() / "config.yaml", key="conf")
    options = dict(pair for entry in settings.pop("defaults") if entry != "_self_" for pair in entry.items())
    name = chosen.get("experiment", options.pop("experiment"))
    is_file = isinstance(name, str) and (name.endswith((".yaml", ".yml")) or "/" in name)
    path = Path(expand_home(name, key="experiment")) if is_file else _option("experiment", name)
    own, layers = _read(path, of_user=is_file)
    options |= own | {group: option for group, option in chosen.items() if group != "experiment"}
    of_groups = ({group: settings_of(group, option)} for group, option in options.items())
    found = reduce(merged, (*of_groups, *layers), settings)
    return (found, path, {key for key, _ in dotted(layers[-1])}) if is_file else (found, None, set())


def check_nothing_open(settings: Mapping[str, Any]) -> None:
    """Require a value for whatever an experiment leaves open; all that lacks one is named together."""
    if left := [*_left_open(settings)]:
        key, *others = left
        bound = "write it where the file has ???" if "[" in key else f"give it as {key}=VALUE"
        more = f", and so are {', '.join(others)}" if others else ""
        raise ConfigError(key, "", f"is required{more}: {bound}")


def _left_open(value: Any, key: str = "") -> Iterator[str]:
    """The keys of settings without a value; an entry of a list is called by its columns, where it has any."""
    if value == OPEN:
        yield key
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from _left_open(inner, f"{key}.{name}".lstrip("."))
    for place, inner in enumerate(value) if isinstance(value, list) else ():
        columns = inner.get("columns") if isinstance(inner, dict) else None
        name = ", ".join(map(str, columns)) if isinstance(columns, list) else place
        yield from _left_open(inner, f"{key}[{name}]")


def settings_of(group: str, option: str) -> dict[str, Any]:
    """What an option of a group sets."""
    return plain_yaml(_option(group, option), key=group)


def _option(group: str, option: Any, *, key: str | None = None) -> Path:
    """The file of an option of a group, or else a ConfigError about `key`."""
    choices = options_of(group)
    if option not in choices:
        meant = experiment_meant(str(option)) if group == "experiment" else ""
        bound = f"must be one of {', '.join(choices)}{meant}" if choices else "is no group of settings"
        raise ConfigError(key or group, option, bound)
    return config_folder() / group / f"{option}.yaml"


def _read(path: Path, *, of_user: bool) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """An experiment: options by group, and its settings, last, after those of the experiments that it builds on."""
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError("experiment", str(path), "must be a name from conf/experiment, or a file that ends in .yaml")
    settings = plain_yaml(path, key="experiment")
    listed = settings.pop("defaults", [])
    if of_user:
        if wrong := sorted({"experiment", "resume"} & settings.keys()):
            raise ConfigError(f"{path}: {wrong[0]}", "...", "must not be there: a file holds an experiment's settings")
        for group in ("data", "public"):
            _find_files_beside(settings.get(group), path.parent)
    options, of_bases, layers = dict[str, str](), dict[str, str](), list[dict[str, Any]]()
    for entry in listed if isinstance(listed, list) else [listed]:
        alone = isinstance(entry, dict) and len(entry) == 1
        ((group, option),) = entry.items() if alone else [("experiment", entry)]
        group = str(group).removeprefix("override ").lstrip("/")
        if entry == "_self_":
            continue
        file = _option(group, option, key=f"{path}: defaults, {group}")
        if group == "experiment":
            more, below = _read(file, of_user=False)
            of_bases, layers = of_bases | more, layers + below
        else:
            options[group] = option
    return of_bases | options, [*layers, settings]


def _find_files_beside(group: Any, folder: Path) -> None:
    """Name each relative data file that lies beside the file of its settings by its path."""
    for key in ("train_file", "validation_file", "test_file"):
        name = group.get(key) if isinstance(group, dict) else None
        if isinstance(name, str) and name.strip():
            path = folder / name
            with suppress(OSError, ValueError):  # of a name that no file can have: its reader says so
                # With {site} in its name, one for any site.
                if path.exists() or ("{site}" in path.name and any(path.parent.glob(path.name.replace("{site}", "*")))):
                    group[key] = str(path)
