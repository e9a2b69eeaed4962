"""One named fault: where it goes, what it does, and which tests are to find it."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Rotten(Exception):
    """The text that a mutant replaces is no longer there exactly once: the mutant shows nothing until it is mended."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A fault that somebody could really make.

    Attributes:
        name: in lower case with hyphens.
        fault: what is wrong, in one sentence; and where it was seen, if it was.
        file: under the root of the repository.
        old: text of that file, which must occur exactly once.
        new: what stands there instead.
        tests: files, or single tests, that are run until one fails; the quickest first.
    """

    name: str
    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        """The mutated module."""
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
