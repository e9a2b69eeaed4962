"""Opacus's own recipe beside fedtune's step: examples a second on the records of three experiments.

    python simulations/benchmarks/recipe.py                        into recipe.json and the README's table
    python simulations/benchmarks/recipe.py --times 1 --only Bank  whether it works; cases whose names begin so

Opacus's is `make_private`, its Poisson loader, and `BatchMemoryManager` with the fastest of three physical batch sizes,
with the same model, adapters and sample size.  fedtune's is its private step in float32 and with `model.dtype=mixed`.
The three take turns in one process; medians are written down.

Where adapters begin behind frozen layers, fedtune runs these once over each record.  That time is measured beside the
steps and spread over how often the experiment takes a record: `examples_a_second` has both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import readme_table
import torch
from opacus_recipe import Peer, Private, Work, made_private, prepare, take_steps

from fedtune.api.compose import compose_run
from fedtune.privacy.durable import write_durably
from fedtune.privacy.randomness import SystemRandomness
from fedtune.sites import shared_model
from fedtune.sites.shared_model import SharedModel
from fedtune.training.dp_step import Records, dp_sgd_step
from fedtune.training.machine import usable_cores
from fedtune.training.optimizer import make_optimizer
from fedtune.training.per_example import attached

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- recipe: written by recipe.py -->", "<!-- end of recipe -->"
CASES = {
    "Banking77, MiniLM": (400, "experiment=banks_intents"),
    "medical abstracts, MiniLM": (160, "experiment=hospitals_abstracts"),
    "E2E, SmolLM2-135M": (24, "experiment=smollm2_e2e"),
}
"""Examples in a step, in expectation, and the experiment."""
SHARE = 0.25
"""Of the records that a step samples."""
ROWS = (8, 16, 32)
Timed = Callable[[], float]
"""Takes a step, and says how many seconds an example took."""


def ours(setting: str, count: int, dtype: str) -> tuple[Timed, float]:
    """Steps of fedtune, and the seconds that an example's frozen layers take for each time that it is sampled."""
    config = compose_run([setting, "privacy.epsilon=8", f"model.dtype={dtype}"])
    with patch.object(shared_model, "moved_by_others", lambda *_, **__: 0.0):
        shared = SharedModel(config)
    records = shared.records.dealt.sites[0].training[: round(count / SHARE)]
    examples, model = shared.examples_of(shared.tokenised(records, lenient=True)), shared.model
    began = time.perf_counter()
    if model.skips_layers:
        examples.keep_frozen_states(model)
    once = (time.perf_counter() - began) / len(examples)
    plan = replace(config.plan(), sampling_rate=SHARE)
    optimizer = make_optimizer(model.trainable(), config.training)
    randomness, rows = SystemRandomness(), []

    def cut(chosen: Any) -> Any:
        rows.append(len(chosen))
        return examples.cut(chosen)

    def step() -> float:
        with attached(model) as gradients:
            began = time.perf_counter()
            dp_sgd_step(
                gradients,
                Records(count=len(examples), declared_size=len(examples), cut=cut),
                plan,
                parameters=model.trainable(),
                optimizer=optimizer,
                sampling=randomness.stream("sampling"),
                noise=randomness.stream("noise"),
            )
            return (time.perf_counter() - began) / rows[-1]

    of_run = config.plan()
    return step, once / (of_run.sampling_rate * of_run.local_steps * of_run.num_rounds)


def theirs(setting: str, count: int, folder: Path) -> tuple[Timed, int]:
    """Steps of Opacus's recipe, and its physical batch size."""
    prepare([setting], folder)
    work = Work.read(folder)
    private = made_private(Peer(work), work.sites[0][: round(count / SHARE)], SHARE)
    _timed(private, most_rows=ROWS[0])  # not counted
    fastest = min(ROWS, key=lambda most_rows: _timed(private, most_rows=most_rows))
    return partial(_timed, private, most_rows=fastest), fastest


def _timed(private: Private, *, most_rows: int) -> float:
    began = time.perf_counter()
    rows = take_steps(private, steps=1, most_rows=most_rows)
    return (time.perf_counter() - began) / rows


def measured(case: str, *, times: int) -> dict[str, Any]:
    """Seconds an example of each, and what follows."""
    count, setting = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        opacus, rows = theirs(setting, count, Path(folder))
    (float32, once), (mixed, mixed_once) = (ours(setting, count, dtype) for dtype in ("float32", "mixed"))
    kinds = {"opacus": opacus, "fedtune": float32, "fedtune, mixed": mixed}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(times + 1):
        for name, step in kinds.items():
            found = step()
            if number:
                seconds[name].append(found)
    step_alone = {name: statistics.median(each) for name, each in seconds.items()}
    beside = {"opacus": 0.0, "fedtune": once, "fedtune, mixed": mixed_once}
    whole = {name: step_alone[name] + beside[name] for name in kinds}
    return {
        "examples_a_step": count,
        "opacus_physical_rows": rows,
        "seconds_an_example": step_alone,
        "seconds_an_example_of_frozen_layers": beside,
        "examples_a_second": {name: round(1 / one, 1) for name, one in whole.items()},
        "times_opacus": {name: round(whole["opacus"] / one, 2) for name, one in whole.items() if name != "opacus"},
    }


def table(cases: dict[str, dict[str, Any]]) -> str:
    """The Markdown table."""
    rows = [
        ["examples a second", "Opacus's recipe", "fedtune", "times Opacus's", "fedtune, mixed", "times Opacus's"],
        ["---", *["---:"] * 5],
    ]
    for name, case in cases.items():
        cells, speed = [f"{case['examples_a_second']['opacus']:.0f}"], case["examples_a_second"]
        for kind, ratio in case["times_opacus"].items():
            cells += [f"{speed[kind]:.0f}", f"{ratio:.1f}"]
        rows.append([name, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(cases: dict[str, dict[str, Any]], into: Path, *, times: int) -> None:
    """Write the file, and the README's table where the file is the one beside it."""
    machine = readme_table.machine(usable_cores())
    write_durably(into, json.dumps({"steps": times, "hardware": machine, "cases": cases}, indent=1).encode() + b"\n")
    if into == FOLDER / "recipe.json":
        readme_table.put(BEGIN, END, f"{table(cases)}\n\nMedians of {times} steps, {machine}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--into", type=Path, default=FOLDER / "recipe.json")
    asked = parser.parse_args()
    torch.set_num_threads(usable_cores())
    known = json.loads(asked.into.read_text())["cases"] if asked.into.exists() else {}
    for name in CASES:
        if name.startswith(asked.only):
            known[name] = measured(name, times=asked.times)
            print(name, json.dumps(known[name], indent=1), flush=True)
            write({name: known[name] for name in CASES if name in known}, asked.into, times=asked.times)


if __name__ == "__main__":
    main()
