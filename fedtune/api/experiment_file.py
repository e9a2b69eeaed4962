"""Experiments: those of conf/, and a file of the user's own: plain data, which is checked before Hydra sees it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from fedtune.config import plain_yaml
from fedtune.data.load import shipped_folders
from fedtune.spec import NOT_GIVEN, ConfigError


def config_folder() -> Path:
    """The folder `conf/`, in a checkout or inside the installed package."""
    return next(folder / "conf" for folder in shipped_folders() if (folder / "conf" / "config.yaml").is_file())


def experiment_called(word: str) -> str | None:
    """The experiment that a person may have meant: a name of conf/, or a file, whose ending may lack."""
    if os.path.isfile(config_folder() / "experiment" / f"{word}.yaml"):
        return word
    endings = ("",) if word.endswith((".yaml", ".yml")) else (".yaml", ".yml")
    path = next((f"{word}{ending}" for ending in endings if os.path.isfile(f"{word}{ending}")), None)
    return path if path is None or "/" in path else f"./{path}"


@dataclass(frozen=True, slots=True)
class ExperimentFile:
    """An experiment in a file of the user's own: plain data, checked before Hydra sees it."""

    path: Path
    # as Hydra takes them: experiments of conf/ that it builds on, itself, and options of groups
    defaults: tuple[str | dict[str, str], ...]
    settings: dict[str, Any]  # what it sets beside these, with files beside it by their path

    def sets(self, key: str) -> bool:
        return value_at(self.settings, key) is not NOT_GIVEN


def value_at(settings: Any, key: str) -> Any:
    """The value of a dotted key in nested settings, or `NOT_GIVEN`."""
    for part in key.split("."):
        settings = settings.get(part, NOT_GIVEN) if isinstance(settings, dict) else NOT_GIVEN
    return settings


def read_experiment(path: Path) -> ExperimentFile:
    """A file of settings with, at most, a defaults list of groups' options and of conf's experiments."""
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError("experiment", str(path), "must be a name from conf/experiment, or a file that ends in .yaml")
    settings = plain_yaml(path, key="experiment")
    listed = settings.pop("defaults", [])
    for key in ("hydra", "resume"):
        if key in settings:
            raise ConfigError(f"{path}: {key}", "...", "must not be there: a file holds an experiment's settings")
    _check_plain(settings, path)
    for group in ("data", "public"):
        _find_files_beside(settings.get(group), path.parent)
    return ExperimentFile(path, _defaults(listed, path), settings)


def _check_plain(value: Any, path: Path, key: str = "") -> None:
    """Refuse what would be more than data: a key that names code, and a value that stands for another."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in ("_target_", "_partial_", "_recursive_", "_convert_", "_args_"):
                raise ConfigError(f"{path}: {key}{name}", inner, "must not be there: a file of settings runs no code")
            _check_plain(inner, path, f"{key}{name}.")
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, path, key)
    elif isinstance(value, date | bytes):
        raise ConfigError(f"{path}: {key.rstrip('.')}", str(value), "must be text; put quotes around it")
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{path}: {key.rstrip('.')}", value, "must not hold '${': a file of settings is plain data")


def _defaults(listed: Any, path: Path) -> tuple[str | dict[str, str], ...]:
    """The experiments and options of a file's defaults list, all of which are conf's, in the order that counts."""
    bases: list[str] = []
    options: dict[str, str] = {}
    for entry in listed if isinstance(listed, list) else [listed]:
        if entry == "_self_":
            continue
        alone = isinstance(entry, dict) and len(entry) == 1
        ((group, option),) = entry.items() if alone else [("experiment", entry)]
        group = str(group).removeprefix("override ").lstrip("/")
        choices = sorted(one.stem for one in (config_folder() / group).glob("*.yaml")) if group.isidentifier() else []
        if not isinstance(option, str) or option not in choices:
            bound = f"must be one of {', '.join(choices)}" if choices else "is no group of settings"
            raise ConfigError(f"{path}: defaults, {group}", option, bound)
        if group == "experiment":
            bases.append(option)
        else:
            options[f"override /{group}"] = option
    return (*bases, "_self_", *({group: option} for group, option in options.items()))


def _find_files_beside(group: Any, folder: Path) -> None:
    """Name each relative data file that lies beside the file of its settings by its path."""
    for key in ("train_file", "validation_file", "test_file"):
        name = group.get(key) if isinstance(group, dict) else None
        if isinstance(name, str) and name.strip():
            path = folder / name
            # With {site} in its name, one for any site.
            if path.exists() or ("{site}" in path.name and any(path.parent.glob(path.name.replace("{site}", "*")))):
                group[key] = str(path)
