"""Every named fault: plain data, one file for each room of the package, and those quick enough for every run."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Rotten(Exception):
    """The text that a mutant replaces is no longer there exactly once: the mutant shows nothing until it is mended."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A fault that somebody could really make."""

    name: str  # in lower case with hyphens
    fault: str  # what is wrong, in one sentence; and where it was seen, if it was
    file: str  # under the root of the repository
    old: str  # text of that file, which must occur exactly once
    new: str  # what stands there instead
    tests: tuple[str, ...]  # files, or single tests, that are run until one fails; the quickest first

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py").replace("/", ".")

    def mutated(self, root: Path = ROOT) -> str:
        """The file's text with the fault.

        Raises:
            Rotten: what is to be replaced does not occur exactly once.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        found = text.count(self.old)
        if found != 1:
            raise Rotten(f"mutant {self.name}: its text occurs {found} times in {self.file}, and must occur once")
        return text.replace(self.old, self.new)


MUTANTS: dict[str, Mutant] = {
    name: Mutant(name=name, **{**fault, "tests": tuple(fault["tests"])})
    for path in sorted((Path(__file__).parent / "faults").glob("*.toml"))
    for name, fault in tomllib.loads(path.read_text(encoding="utf-8")).items()
}
QUICK = ("no-noise",)
"""Found by a test of a second or two that needs no torch."""
