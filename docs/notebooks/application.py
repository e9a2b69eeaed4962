"""The strongest promise at which a model serves: tries epsilons from the smallest, and stops at the first that does.

python application.py banks_intents --needs 0.85 --epsilon 1 3 8
"""

import argparse
import sys

import fedtune


def trained(recipe: str, epsilon: float) -> fedtune.Run:
    """A run at this epsilon; its progress goes to the terminal."""

    def show(progress: fedtune.Progress) -> None:
        if progress.round:
            print(f"  round {progress.done} of {progress.total}: {progress.round.metrics}", file=sys.stderr)

    settings = {"privacy.epsilon": epsilon, "name": f"{recipe}-at-{epsilon:g}"}
    return fedtune.simulate(recipe, settings, progress=show)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--needs", type=float, required=True, metavar="ACCURACY")
    parser.add_argument("--epsilon", type=float, nargs="+", required=True)
    asked = parser.parse_args()
    for epsilon in sorted(asked.epsilon):
        run = trained(asked.recipe, epsilon)
        # By validation records: the test records are for the one run that is kept.
        if (found := run.rounds[-1].metrics["accuracy"] or 0.0) >= asked.needs:
            return print(f"epsilon {epsilon:g}: {found:.3f} on validation; {run.metrics} on test; {run.folder}")
    sys.exit("no epsilon of these serves")


if __name__ == "__main__":
    main()
