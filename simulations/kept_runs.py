"""Runs of a study that are kept: what is finished in a folder is taken from there, and one line can be made alone."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import fedtune


def asked(doc: str | None, lines: Collection[str]) -> tuple[Path, list[str] | None]:
    """The folder of the runs, and those of the study's lines that a person asked for; None: all."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="+", choices=lines)
    options = parser.parse_args()
    runs = options.runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    return runs, options.only


def finished(runs: Path, name: str, recipe: str, settings: Mapping[str, Any]) -> fedtune.Run:
    """A run of this name, which is made if it is not there."""
    if not (runs / name / "adapter").exists():
        print(f"--- {name}", flush=True)
        fedtune.simulate(recipe, {**settings, "name": name, "tracking.output_dir": str(runs)}, progress=lambda _: None)
    return fedtune.load(runs / name)
