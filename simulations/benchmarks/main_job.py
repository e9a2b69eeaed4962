"""The default run, `fedtune simulate`, in this tree and in an earlier commit, in turns: seconds, memory and its score.

    python simulations/benchmarks/main_job.py --before COMMIT             three runs of each, into main_job.json
    python simulations/benchmarks/main_job.py experiment=debug --runs 1   whether it works

Each run is a process of its own, first in one tree and then in the other, so that whatever else the machine does meets
both alike.  Memory is the most that a run's processes hold, shared pages counted once.  A run's noise is unpredictable,
so that scores of one tree differ from run to run; a seed (`runtime.seed` with `runtime.seeded_noise`) makes them alike.
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
from typing import Any

from peers import held
from trees import before_and_after

FOLDER = Path(__file__).parent
CALL = "import sys; from fedtune.cli.main import main; sys.exit(main())"


def run(tree: Path, overrides: list[str]) -> dict[str, float]:
    """One run in `tree`: wall and CPU seconds, GiB, accuracy, epsilon, and MB that all sites sent in a round."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["simulate", f"tracking.output_dir={folder}", "name=main_job", *overrides]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        began, most = time.perf_counter(), 0
        process = subprocess.Popen(
            [sys.executable, "-c", CALL, *words], cwd=tree, env=environment, stdout=subprocess.DEVNULL
        )
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            most = max(most, held(process.pid))
            time.sleep(0.5)
        _, status, usage = ended
        if status:
            raise SystemExit(f"fedtune {' '.join(words)} failed in {tree}")
        result = json.loads((Path(folder) / "main_job" / "run.json").read_text(encoding="utf-8"))
    return {
        "wall_s": time.perf_counter() - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "gib": most / 2**30,
        "accuracy": result["final"]["metrics"]["accuracy"],
        "epsilon": result["privacy"]["epsilon"],
        "mb_up_a_round": result["rounds"][-1]["bytes_up"] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", metavar="COMMIT", default="2d6231c5", help="the commit to compare with")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    asked = parser.parse_args()
    taken: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    with before_and_after(asked.before) as trees:
        for tree in trees.values():
            run(tree, ["experiment=debug"])  # the first start compiles, and reads from the disk
        for _ in range(asked.runs):
            for name, tree in trees.items():
                taken[name].append(run(tree, asked.overrides))
    result: dict[str, Any] = {
        "before": asked.before,
        "runs": asked.runs,
        "overrides": asked.overrides,
        "medians": {
            name: {key: round(statistics.median(one[key] for one in runs), 3) for key in runs[0]}
            for name, runs in taken.items()
        },
        "each": taken,
        "load": [round(load, 1) for load in os.getloadavg()],
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}",
    }
    (FOLDER / "main_job.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
