"""What a real deployment costs beside a simulation: time of a round without training, warm models, the same adapter.

python simulations/deployment/run.py             everything, into results.json
python simulations/deployment/run.py overhead    one part; the others are kept
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from local_federation import SITES, LocalFederation
from safetensors.numpy import load_file

from fedtune.privacy.durable import write_durably

SEEDED = ("runtime.seeded_noise=true", "runtime.num_threads=1")
HERE = Path(__file__).parent
STARTS = 5


def overhead(folder: Path) -> dict[str, Any]:
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


def warm(folder: Path) -> dict[str, Any]:
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


def start(folder: Path) -> dict[str, Any]:
    """A site's process alone, beside a server: from its command to "the site is up", one start after the other."""
    made = LocalFederation(folder, ["experiment=debug", *SEEDED], sites=SITES[:2])
    with made.server_up():
        seconds = [made.start_alone(SITES[0]) for _ in range(STARTS)]
    return {"starts": len(seconds), "seconds_median": statistics.median(seconds), "seconds_max": max(seconds)}


def whole(folder: Path) -> dict[str, Any]:
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


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "overhead": overhead,
    "warm": warm,
    "start": start,
    "whole": whole,
}

if __name__ == "__main__":
    results = json.loads((HERE / "results.json").read_text()) if (HERE / "results.json").exists() else {}
    for part in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            results[part] = PARTS[part](Path(scratch)) | {
                "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}"
            }
        print(part, json.dumps(results[part], indent=1))
        write_durably(HERE / "results.json", json.dumps(results, indent=1).encode() + b"\n")
