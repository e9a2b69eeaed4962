"""Config groups of conf/ and their options, listed from file names to avoid the slow import of Hydra."""

from __future__ import annotations

import os

from fedtune.version import find_config_folder


def list_config_groups() -> list[str]:
    """List the names of the config groups in conf/."""
    return sorted(one.name for one in find_config_folder().iterdir() if list_options(one.name))


def list_options(group: str) -> list[str]:
    """List the options of a config group, except files with a leading underscore.  An unknown group has no options."""
    found = (find_config_folder() / group).glob("[!_]*.yaml") if group.isidentifier() else ()
    return sorted(one.stem for one in found)


def suggest_experiment(word: str) -> str:
    """Return a hint ("; did you mean experiment=...?") if `word` names an experiment in conf/ or a YAML file, else "".

    The extension of a YAML file may be missing from `word`.
    """
    named = word in list_options("experiment")
    endings = ("",) if named or word.endswith((".yaml", ".yml")) else (".yaml", ".yml")
    path = next((f"{word}{ending}" for ending in endings if named or os.path.isfile(f"{word}{ending}")), None)
    return f"; did you mean experiment={path if named or '/' in path else f'./{path}'}?" if path else ""
