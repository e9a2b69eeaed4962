"""The groups in conf/ and their options, listed from file names so that nothing slow is imported."""

from __future__ import annotations

import os

from fedtune.version import find_config_folder


def list_config_groups() -> list[str]:
    """Return the names of the groups of settings."""
    return sorted(one.name for one in find_config_folder().iterdir() if list_options(one.name))


def list_options(group: str) -> list[str]:
    """Return the options of a group, without private files (leading underscore); empty if conf/ has no such group."""
    found = (find_config_folder() / group).glob("[!_]*.yaml") if group.isidentifier() else ()
    return sorted(one.stem for one in found)


def suggest_experiment(word: str) -> str:
    """Return the hint for the end of an error message: the experiment that `word` probably means.

    Looks for the name in conf/experiment and for a YAML file, with or without its extension; empty if neither exists.
    """
    named = word in list_options("experiment")
    endings = ("",) if named or word.endswith((".yaml", ".yml")) else (".yaml", ".yml")
    path = next((f"{word}{ending}" for ending in endings if named or os.path.isfile(f"{word}{ending}")), None)
    return f"; did you mean experiment={path if named or '/' in path else f'./{path}'}?" if path else ""
