"""Runs mutants and writes docs/mutants.md.

python -m tests.mutants.write_table             every mutant
python -m tests.mutants.write_table NAME ...    these; the other rows stay as they are

Exit code 1 if any of them was not killed.
"""

import datetime
import sys

from .catalogue import MUTANTS
from .harness import NoResult, hunt
from .mutant import Rotten
from .page import PAGE, Row, rows, text


def main(names: list[str]) -> int:
    """Run the named mutants, or all."""
    if unknown := set(names) - set(MUTANTS):
        print(f"no such mutant: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    done = rows()
    not_killed = []
    for name in names or MUTANTS:
        mutant = MUTANTS[name]
        try:
            test, seconds = hunt(mutant)
        except (NoResult, Rotten) as error:
            print(error, file=sys.stderr)
            test, seconds = None, 0.0
        if test is None:
            not_killed.append(name)
            done.pop(name, None)
        else:
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            done[name] = Row(name=name, fault=mutant.fault, test=test, seconds=round(seconds), date=today)
        print(f"{name}: {'survived' if test is None else f'killed by {test} in {seconds:.0f} s'}", flush=True)
        PAGE.write_text(text(MUTANTS.values(), done), encoding="utf-8")
    if not_killed:
        print(f"not killed: {', '.join(not_killed)}", file=sys.stderr)
    return bool(not_killed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
