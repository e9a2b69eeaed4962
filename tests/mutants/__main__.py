"""Print the table of mutants, or run some of them.

python -m tests.mutants                 print the catalog as a Markdown table
python -m tests.mutants --run NAME ...  run these mutants (without names: all of them), one line for each

The exit code of `--run` is 1 if a mutant was not killed, and 2 if a name is unknown.
"""

import argparse
import sys
from collections.abc import Iterable

from .harness import MUTANTS, Mutant, NoResult, Rotten, evaluate_mutant


def render_table(mutants: Iterable[Mutant]) -> str:
    """Return a Markdown table with the name, the fault, the file and the tests of each mutant."""
    lines = ["| mutant | fault | file | tests |", "| --- | --- | --- | --- |"]
    for mutant in mutants:
        fault = mutant.fault.replace("|", "\\|")
        lines.append(f"| `{mutant.name}` | {fault} | `{mutant.file}` | {', '.join(mutant.tests)} |")
    return "\n".join(lines)


def run(names: Iterable[str]) -> int:
    """Run the named mutants, print the result of each, and return the exit code."""
    killed = []
    for name in names:
        try:
            test, seconds = evaluate_mutant(MUTANTS[name])
        except (NoResult, Rotten) as error:
            print(error, file=sys.stderr)
            test, seconds = None, 0.0
        killed.append(test is not None)
        print(f"{name}: {'not killed' if test is None else f'killed by {test} in {seconds:.0f} s'}", flush=True)
    return not all(killed)


def main(words: list[str]) -> int:
    """Print the table or run mutants, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Print the table of mutants.")
    parser.add_argument("--run", nargs="*", metavar="NAME", help="run these mutants; without names, all of them")
    names = parser.parse_args(words).run
    if names is None:
        print(render_table(MUTANTS.values()))
        return 0
    if unknown := set(names) - set(MUTANTS):
        print(f"no such mutant: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    return run(names or MUTANTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
