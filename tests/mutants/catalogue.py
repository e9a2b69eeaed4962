"""Every mutant: plain data, one file for each room of the package; and those that are quick enough for every run."""

import tomllib
from pathlib import Path

from .mutant import Mutant

MUTANTS: dict[str, Mutant] = {
    name: Mutant(name=name, **{**fault, "tests": tuple(fault["tests"])})
    for path in sorted((Path(__file__).parent / "faults").glob("*.toml"))
    for name, fault in tomllib.loads(path.read_text(encoding="utf-8")).items()
}
QUICK = ("no-noise",)
"""Found by a test of a second or two that needs no torch."""
