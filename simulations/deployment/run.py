"""What a real deployment costs beside a simulation: time of a round without training, warm models, the same adapter.

python simulations/deployment/run.py                    everything, into results.json
python simulations/deployment/run.py --only overhead    one part; the others are kept
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from local_federation import SITES, LocalFederation
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import study

SEEDED = ("runtime.seeded_noise=true", "runtime.num_threads=1")
STARTS = 5


def overhead(folder: Path) -> study.Found:
    """Rounds of one step on a random tiny model: a round's time less the slowest site's own work on it."""
    made = LocalFederation(folder, ["experiment=debug", *SEEDED, "federation.num_rounds=20", "training.local_steps=1"])
    with made.up():
        result = made.run("overhead")
    work = {
        round["round"]: max(
            entry["seconds"] for site in SITES for entry in made.log(site) if entry.get("round") == round["round"]
        )
        for round in result["rounds"]
    }
    beyond = [round["seconds"] - work[round["round"]] for round in result["rounds"]]
    return {
        "rounds": len(beyond),
        "seconds_beyond_the_sites_work_median": statistics.median(beyond),
        "seconds_beyond_the_sites_work_max": max(beyond),
        "seconds_a_round_median": statistics.median(round["seconds"] for round in result["rounds"]),
        "bytes_down": result["rounds"][0]["bytes_down"],
        "bytes_up": result["rounds"][0]["bytes_up"],
    }


def warm(folder: Path) -> study.Found:
    """Seeded rounds on the real sentence encoder: when it is loaded, and how far from the simulation they end."""
    made = LocalFederation(folder, ["experiment=banks_intents", *SEEDED, "federation.num_rounds=3"])
    with made.up():
        deployed = made.run("deployed")
    simulated = made.simulate("simulated")
    loads = [entry for site in SITES for entry in made.log(site) if "model_s" in entry]
    ours, theirs = _adapter(made.folder / "runs/deployed"), _adapter(made.folder / "runs/simulated")
    return {
        "seconds_to_load_model_and_records": [entry["model_s"] for entry in loads],
        "times_loaded_at_each_site": len(loads) / len(SITES),
        "seconds_by_round_deployed": [round["seconds"] for round in deployed["rounds"]],
        "seconds_by_round_simulated": [round["seconds"] for round in simulated["rounds"]],
        "largest_difference_of_adapters": max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs),
        "largest_value_of_adapter": max(float(np.abs(value).max()) for value in theirs.values()),
        "test_deployed": deployed["final"]["metrics"],
        "test_simulated": simulated["final"]["metrics"],
    }


def start(folder: Path) -> study.Found:
    """A site's process alone, beside a server: from its command to "the site is up", one start after the other."""
    made = LocalFederation(folder, ["experiment=debug", *SEEDED], sites=SITES[:2])
    with made.server_up():
        seconds = [made.start_alone(SITES[0]) for _ in range(STARTS)]
    return {"starts": len(seconds), "seconds_median": statistics.median(seconds), "seconds_max": max(seconds)}


def whole(folder: Path) -> study.Found:
    """banks_intents as it is, with noise of the operating system, at three real sites."""
    made = LocalFederation(folder, ["experiment=banks_intents", "runtime.num_threads=1"])
    with made.up():
        result = made.run("whole")
    return {
        "test": result["final"]["metrics"],
        "seconds": result["final"]["seconds"],
        "epsilon": {site: spent["epsilon"] for site, spent in result["privacy"]["sites"].items()},
        "upper_bound": any(spent["upper_bound"] for spent in result["privacy"]["sites"].values()),
    }


def _adapter(run: Path) -> dict[str, np.ndarray]:
    return {name: value for path in (run / "adapter").glob("*.safetensors") for name, value in load_file(path).items()}


def in_empty_folder(runs: Path, *, part: Callable[[Path], study.Found]) -> study.Found:
    """One part of the study."""
    with tempfile.TemporaryDirectory() as folder:
        return part(Path(folder))


if __name__ == "__main__":
    asked = study.parser(__doc__, Path(__file__).parent).parse_args()
    parts: dict[str, study.Line] = {
        part.__name__: partial(in_empty_folder, part=part) for part in (overhead, warm, start, whole)
    }
    study.carry_out(__file__, parts, None, asked=asked)
