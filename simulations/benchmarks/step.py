"""What a private step costs beside a plain one on the same micro-batches: time, memory, and where the time goes.

    python simulations/benchmarks/step.py                    every case, into step.json and the README's table
    python simulations/benchmarks/step.py --only MiniLM      cases whose names hold this; others are kept

Three kinds of step take turns in one process, so that whatever else the machine does meets all alike: a plain one, the
private one, and a private one whose gradients by example come from Opacus's own hooks.  Medians are written down.  The
most memory of each is that of a process that takes no other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks

from fedtune.cli.compose import compose_run
from fedtune.data import Batch
from fedtune.privacy.durable import write_durably
from fedtune.sites import shared_model
from fedtune.sites.shared_model import SharedModel
from fedtune.tasks import TaskModel
from fedtune.training.dp_step import add_clipped, zeros
from fedtune.training.per_example import attached

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- results: written by step.py -->", "<!-- end of results -->"
_BANKS = ["experiment=banks_intents", "lora.layers=null", "lora.rank=8"]
_E2E = ["experiment=smollm2_e2e", "lora.layers=null", "lora.rank=16"]
CASES = {
    "MiniLM, all linear modules, rank 8": (100, [*_BANKS, "lora.target_modules=all-linear"]),
    "MiniLM, query and value, rank 8": (100, [*_BANKS, "lora.target_modules=[query,value]"]),
    "MiniLM, the recipe of banks_intents": (400, ["experiment=banks_intents"]),
    "SmolLM2-135M, q and v, rank 16": (16, [*_E2E, "lora.target_modules=[q_proj,v_proj]"]),
    "SmolLM2-135M, all linear modules, rank 16": (16, [*_E2E, "lora.target_modules=all-linear"]),
}
"""Records in a step, and settings."""
Step = Callable[[], dict[str, float]]
"""Takes one, and says how many seconds each part of it took."""


def prepared(case: str, *, onednn: bool) -> tuple[TaskModel, list[Batch], float]:
    """The model, one step's micro-batches, and the clip norm."""
    count, settings = CASES[case]
    config = compose_run([*settings, "privacy.epsilon=8", f"runtime.onednn={str(onednn).lower()}"])
    with patch.object(shared_model, "moved_by_others", lambda *_, **__: 0.0):
        shared = SharedModel(config)
    examples = shared.examples_of(shared.tokenised(shared.records.dealt.sites[0].training[:count], lenient=True))
    if shared.model.skips_layers:
        examples.keep_frozen_states(shared.model)
    return shared.model, list(examples.cut(np.arange(count))), config.privacy.max_grad_norm


def plain(model: TaskModel, batches: list[Batch]) -> dict[str, float]:
    """Forward and backward passes as torch does them, gradients added up in the parameters."""
    parts = {"forward": 0.0, "backward": 0.0}
    for parameter in model.trainable().values():
        parameter.grad = None
    for batch in batches:
        with timed(parts, "forward"):
            loss = model.losses(batch).sum()
        with timed(parts, "backward"):
            loss.backward()
    return parts


def private(model: TaskModel, batches: list[Batch], clip_norm: float) -> dict[str, float]:
    """The same with gradients by example, clipped and added up in whole numbers; noise takes no time beside it."""
    with attached(model) as gradients:
        return clipped(model, batches, clip_norm, found=gradients.found.__getitem__, forget=gradients.found.clear)


def by_hooks(model: TaskModel, batches: list[Batch], clip_norm: float) -> dict[str, float]:
    """The private step with Opacus's hooks on the model."""

    def forget() -> None:
        for parameter in model.trainable().values():
            parameter.grad = parameter.grad_sample = None

    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        return clipped(model, batches, clip_norm, found=attrgetter("grad_sample"), forget=forget)
    finally:
        hooks.cleanup()
        forget()


def clipped(
    model: TaskModel,
    batches: list[Batch],
    clip_norm: float,
    *,
    found: Callable[[torch.nn.Parameter], torch.Tensor],
    forget: Callable[[], None],
) -> dict[str, float]:
    """A private step, wherever gradients by example are `found`, and forgotten before the next micro-batch."""
    parts = {"forward": 0.0, "backward": 0.0, "clipping": 0.0}
    parameters = model.trainable()
    sums = zeros(parameters)
    for batch in batches:
        forget()
        with timed(parts, "forward"):
            loss = model.losses(batch).sum()
        with timed(parts, "backward"):
            loss.backward()
        with timed(parts, "clipping"):
            rows = len(batch.input_ids)
            add_clipped(sums, {name: found(one)[:rows] for name, one in parameters.items()}, clip_norm)
    return parts


@contextmanager
def timed(parts: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds inside to a part."""
    began = time.perf_counter()
    yield
    parts[name] += time.perf_counter() - began


def steps(case: str, *, onednn: bool) -> dict[str, Step]:
    """The kinds of step, by name."""
    model, batches, clip_norm = prepared(case, onednn=onednn)
    return {
        "plain": partial(plain, model, batches),
        "private": partial(private, model, batches, clip_norm),
        "private, Opacus's hooks": partial(by_hooks, model, batches, clip_norm),
    }


def medians(kinds: dict[str, Step], *, runs: int) -> dict[str, dict[str, float]]:
    """Seconds of each kind and part, after one step of each that does not count."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for number in range(runs + 1):
        for name, step in kinds.items():
            parts = step()
            if number:
                taken[name].append(parts | {"step": sum(parts.values())})
    return {
        name: {part: round(statistics.median(one[part] for one in each), 4) for part in each[0]}
        for name, each in taken.items()
    }


def peak_bytes(case: str, kind: str) -> int:
    """The most memory of a process that takes two steps of a kind."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (case, kind))


def _peak(case: str, kind: str) -> int:
    step = steps(case, onednn=True)[kind]
    step()
    step()
    # Not by getrusage, which begins with what the parent had.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def measured(case: str, *, runs: int) -> dict[str, object]:
    """All there is to say of a case."""
    kinds = medians(steps(case, onednn=True), runs=runs)
    torchs = medians(steps(case, onednn=False), runs=runs)
    memory = {kind: peak_bytes(case, kind) for kind in ("plain", "private")}
    return {
        "records": CASES[case][0],
        "seconds": kinds,
        "seconds_without_onednn": torchs,
        "private_over_plain": round(kinds["private"]["step"] / kinds["plain"]["step"], 3),
        "hooks_over_plain": round(kinds["private, Opacus's hooks"]["step"] / kinds["plain"]["step"], 3),
        "torch_over_onednn": round(torchs["private"]["step"] / kinds["private"]["step"], 2),
        "peak_bytes": memory,
        "memory_private_over_plain": round(memory["private"] / memory["plain"], 3),
    }


def table(cases: dict[str, dict[str, object]]) -> str:
    """The Markdown table."""
    heads = ["", "private / plain", "by Opacus's hooks / plain", "torch's products / oneDNN", "memory, private / plain"]
    keys = ("private_over_plain", "hooks_over_plain", "torch_over_onednn", "memory_private_over_plain")
    rows = [heads, ["---"] + ["---:"] * len(keys)]
    rows += [[name, *(f"{case[key]:.2f}" for key in keys)] for name, case in cases.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    path = FOLDER / "step.json"
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    for name in CASES:
        if asked.only in name:
            cases[name] = measured(name, runs=asked.runs)
            print(name, json.dumps(cases[name], indent=1), flush=True)
    cases = {name: cases[name] for name in CASES if name in cases}
    machine = f"{torch.get_num_threads()} CPU cores ({platform.machine()}), torch {torch.__version__}"
    result = {"runs": asked.runs, "hardware": machine, "cases": cases}
    write_durably(path, json.dumps(result, indent=1).encode() + b"\n")
    readme = FOLDER / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    body = f"{BEGIN}\n{table(cases)}\n\nMedians of {asked.runs} steps, {machine}.\n{END}"
    write_durably(readme, (before + body + rest.split(END)[1]).encode())


if __name__ == "__main__":
    main()
