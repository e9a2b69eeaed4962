"""docs/mutants.md: every mutant with the test that killed it, as a table that the harness writes and reads."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .mutant import ROOT, Mutant

PAGE = ROOT / "docs" / "mutants.md"
_ROW = re.compile(r"\| `([a-z0-9-]+)` \| (.*) \| `(\S.*)` \| (\d+) \| (\d{4}-\d\d-\d\d) \|")

_HEAD = """\
# Mutants

<!-- Written by `python -m tests.mutants.write_table`; `make test` checks that it lists the catalogue. -->

A privacy fault is invisible: the loss falls and epsilon looks right. So each fault below, most of them seen in a
published system or easily made, is put into a copy of the code, and the tests must find it there. A mutant counts as
killed when a test ran and failed on what it expects; breaking an import, a fixture or the interpreter does not count,
nor does running out of time, and the same tests pass on an unchanged copy.

`make nightly` runs all of them, `make test` the quickest and a check that every one still applies; the catalogue is
`tests/mutants/faults`. To run some of them and renew their rows: `python -m tests.mutants.write_table NAME ...`.

**{killed} of {all} killed**, the last of them on {date}.

| mutant | fault | killed by | seconds | on |
| --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A mutant that was killed.

    Attributes:
        test: node id of the test that failed.
        seconds: until it did, with what starting Python and pytest takes.
        date: ISO 8601.
    """

    name: str
    fault: str
    test: str
    seconds: int
    date: str


def rows(path: Path = PAGE) -> dict[str, Row]:
    """The rows of a page, by name; none where there is no page."""
    if not path.exists():
        return {}
    found = (_ROW.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {
        match[1]: Row(
            name=match[1], fault=_plain(match[2]), test=_plain(match[3]), seconds=int(match[4]), date=match[5]
        )
        for match in found
        if match
    }


def text(mutants: Iterable[Mutant], done: dict[str, Row]) -> str:
    """The page: a row for each mutant that was killed, in the order of the catalogue."""
    every = list(mutants)
    there = [done[mutant.name] for mutant in every if mutant.name in done]
    newest = max((row.date for row in there), default="no day")
    table = [
        f"| `{row.name}` | {_cell(row.fault)} | `{_cell(row.test)}` | {row.seconds} | {row.date} |" for row in there
    ]
    return _HEAD.format(killed=len(there), all=len(every), date=newest) + "\n".join(table) + "\n"


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def _plain(cell: str) -> str:
    return cell.replace("\\|", "|")
