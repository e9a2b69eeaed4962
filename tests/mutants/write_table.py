"""docs/mutants.md: runs mutants, and writes and reads the table of them, each with the test that killed it.

python -m tests.mutants.write_table             every mutant
python -m tests.mutants.write_table NAME ...    these; the other rows stay as they are

Exit code 1 if any of them was not killed.
"""

import datetime
import re
import sys
from typing import NamedTuple

from .harness import MUTANTS, ROOT, NoResult, Rotten, hunt

PAGE = ROOT / "docs" / "mutants.md"
_ROW = r"^\| `([a-z0-9-]+)` \| (.*) \| `(\S.*)` \| (\d+) \| (\d{4}-\d\d-\d\d) \|$"
_HEAD = """\
# Mutants

<!-- Written by `python -m tests.mutants.write_table`; `make test` checks that it lists the catalogue. -->

A privacy fault is invisible: the loss falls and epsilon looks right. So each fault below, most of them seen in a
published system or easily made, is put into a copy of the code, and the tests must find it there. A mutant counts as
killed when a test ran and failed on what it expects; breaking an import, a fixture or the interpreter does not count,
nor does running out of time, and the same tests pass on an unchanged copy.

`make test` runs the quickest and checks that every one still applies, `make nightly` runs the others; the catalogue is
`tests/mutants/faults`. To run some of them and renew their rows: `python -m tests.mutants.write_table NAME ...`.

**{killed} of {all} killed**, the last of them on {date}.

| mutant | fault | killed by | seconds | on |
| --- | --- | --- | --- | --- |
"""


class Row(NamedTuple):
    """A mutant that was killed, by the test of this node id; the seconds include starting Python and pytest."""

    name: str
    fault: str
    test: str
    seconds: str
    date: str


def rows() -> dict[str, Row]:
    """The rows of the page, by name."""
    found = re.findall(_ROW, PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {row[0]: Row(*(cell.replace("\\|", "|") for cell in row)) for row in found}


def text(done: dict[str, Row]) -> str:
    """The page: a row for each mutant that was killed, in the order of the catalogue."""
    there = [done[name] for name in MUTANTS if name in done]
    newest = max((row.date for row in there), default="no day")
    cells = ((cell.replace("|", "\\|") for cell in row) for row in there)
    table = "".join("| `{}` | {} | `{}` | {} | {} |\n".format(*row) for row in cells)
    return _HEAD.format(killed=len(there), all=len(MUTANTS), date=newest) + table


def main(names: list[str]) -> int:
    """Run the named mutants, or all."""
    if unknown := set(names) - set(MUTANTS):
        print(f"no such mutant: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    done = rows()
    not_killed = []
    for name in names or MUTANTS:
        try:
            test, seconds = hunt(MUTANTS[name])
        except (NoResult, Rotten) as error:
            print(error, file=sys.stderr)
            test, seconds = None, 0.0
        if test is None:
            not_killed.append(name)
            done.pop(name, None)
        else:
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            done[name] = Row(name, MUTANTS[name].fault, test, str(round(seconds)), today)
        print(f"{name}: {'survived' if test is None else f'killed by {test} in {seconds:.0f} s'}", flush=True)
        PAGE.write_text(text(done), encoding="utf-8")
    if not_killed:
        print(f"not killed: {', '.join(not_killed)}", file=sys.stderr)
    return bool(not_killed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
