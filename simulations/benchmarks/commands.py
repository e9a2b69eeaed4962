"""How long commands take that a person waits for, in this tree and in an earlier commit, side by side.

Each command runs in a process of its own, first in one tree and then in the other, so that whatever else the machine
does meets both alike.  Written down are the medians of wall time and of CPU time, user and system together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
TREE = FOLDER.parent.parent
LEDGER = "LEDGER"  # stands for one that the same tree wrote: another version's may have another format
COMMANDS = {
    "plan": ["plan"],
    "plan experiment=hospitals_abstracts": ["plan", "experiment=hospitals_abstracts"],
    "ledger spent": ["ledger", "spent", LEDGER],
    "ledger verify": ["ledger", "verify", LEDGER],
    "--help": ["--help"],
}
CALL = "import sys; from fedtune.cli.main import main; sys.exit(main())"


def seconds(tree: Path, arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU time of one call of fedtune from `tree`."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, *arguments], cwd=tree, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"fedtune {' '.join(arguments)} failed in {tree}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def compared(
    trees: dict[str, Path], arguments: list[str], *, ledgers: dict[str, Path], runs: int
) -> dict[str, dict[str, float]]:
    """Medians by tree."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in trees}
    for _ in range(runs):
        for name, tree in trees.items():
            own = [str(ledgers[name]) if word == LEDGER else word for word in arguments]
            taken[name].append(seconds(tree, own))
    return {
        name: {
            "wall_s": round(statistics.median(wall for wall, _ in pairs), 2),
            "cpu_s": round(statistics.median(cpu for _, cpu in pairs), 2),
        }
        for name, pairs in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", metavar="COMMIT", default="c520fa9", help="the commit to compare with")
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "tree"
        git = ["git", "-C", str(TREE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), asked.before], check=True)
        try:
            trees = {"before": before, "after": TREE}
            ledgers = {name: Path(folder) / name / "run" / "sites" / "site-1" for name in trees}
            for name, tree in trees.items():
                seconds(tree, ["simulate", "experiment=debug", "name=run", f"tracking.output_dir={folder}/{name}"])
            found = {name: compared(trees, words, ledgers=ledgers, runs=asked.runs) for name, words in COMMANDS.items()}
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    result = {
        "before": asked.before,
        "runs": asked.runs,
        "commands": found,
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}",
    }
    (FOLDER / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
