"""From `fedtune simulate` to the first step of round 1, by phase, in this tree and in an earlier commit, side by side.

Each start is a process of its own, which ends where the first site would take its first step; first in one tree, then
in the other, so that whatever else the machine does meets both alike.  Written down are medians of wall time and of CPU
time, user and system together, since the process began.  On a machine that does other work, go by the CPU time.
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

from trees import before_and_after

FOLDER = Path(__file__).parent
PHASES = {
    "loading the model": "imports and settings",
    "trying the model": "loading the model",
    "reading the sites' records": "trying the model",
    "scoring the model before training": "reading and tokenising",
    "prepared": "scoring before training",
    "first step": "the first site's frozen layers",
}
"""What ends at a mark, by the mark."""
# A module is changed as soon as it is imported, so that it is imported when it would be.
STARTED = """
import functools, importlib.abc, importlib.util, json, os, sys, time
marks = {}

def mark(what):
    marks.setdefault(what, (time.time() - float(os.environ["BEGAN"]), sum(os.times()[:2])))

def first_step(*given, **rest):
    mark("first step")
    os.write(int(os.environ["MARKS"]), json.dumps(marks).encode())
    os._exit(0)

def marked(method, what):
    @functools.wraps(method)
    def called(self, *given):
        mark(what or given[0])
        return method(self, *given)
    return called

def of_training(module):
    module.train_round = first_step

def of_display(module):
    module.Display.preparing = marked(module.Display.preparing, None)
    module.Display.prepared = marked(module.Display.prepared, "prepared")

CHANGED = {"fedtune.training.local": of_training, "fedtune.show.run_progress": of_display}
CHANGED |= {"fedtune.cli.display": of_display}  # where it was before 0.2.0

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        change = CHANGED.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        plain = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (plain(module), change(module))
        return spec

sys.meta_path.insert(0, Finder())
from fedtune.cli.main import main
sys.exit(main(sys.argv[1:]) or 1)
"""


def started(tree: Path, overrides: list[str]) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each phase of one start in `tree`, and of all together."""
    with tempfile.TemporaryDirectory() as folder:
        reading, writing = os.pipe()
        words = ["simulate", f"tracking.output_dir={folder}", "name=startup", *overrides]
        environment = {**os.environ, "PYTHONPATH": str(tree), "MARKS": str(writing)}
        environment["BEGAN"] = str(time.time())
        done = subprocess.run(
            [sys.executable, "-c", STARTED, *words],
            cwd=tree,
            env=environment,
            pass_fds=[writing],
            stdout=subprocess.DEVNULL,
            check=False,
        )
        os.close(writing)
        with open(reading, "rb") as told:
            text = told.read()
    if done.returncode or not text:
        raise SystemExit(f"fedtune {' '.join(words)} took no first step in {tree}")
    marks, phases, before = json.loads(text), {}, (0.0, 0.0)
    for mark, phase in PHASES.items():
        wall, cpu = marks[mark]
        phases[phase] = (wall - before[0], cpu - before[1])
        before = (wall, cpu)
    return {**phases, "before round 1": tuple(marks["prepared"]), "to the first step": tuple(marks["first step"])}


def compared(trees: dict[str, Path], overrides: list[str], *, runs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Medians by tree and phase."""
    taken: dict[str, list[dict[str, tuple[float, float]]]] = {name: [] for name in trees}
    for _ in range(runs):
        for name, tree in trees.items():
            taken[name].append(started(tree, overrides))
    return {
        name: {
            phase: {
                "wall_s": round(statistics.median(one[phase][0] for one in starts), 2),
                "cpu_s": round(statistics.median(one[phase][1] for one in starts), 2),
            }
            for phase in starts[0]
        }
        for name, starts in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", metavar="COMMIT", default="d21e1bb", help="the commit to compare with")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    asked = parser.parse_args()
    with before_and_after(asked.before) as trees:
        for tree in trees.values():
            started(tree, asked.overrides)  # the first start compiles, and reads from the disk
        found = compared(trees, asked.overrides, runs=asked.runs)
    result = {
        "before": asked.before,
        "runs": asked.runs,
        "overrides": asked.overrides,
        "phases": found,
        "load": [round(one, 1) for one in os.getloadavg()],
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}",
    }
    (FOLDER / "startup.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
