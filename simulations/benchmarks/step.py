"""What a private step costs beside a plain one on the same micro-batches: time, memory, and where the time goes.

    python simulations/benchmarks/step.py                    every case, into step.json and the README's table
    python simulations/benchmarks/step.py --only MiniLM      cases whose names hold this; others are kept

Kinds of step take turns in one process, so that whatever else the machine does meets all alike: a plain one, the
private one, a private one whose gradients by example come from Opacus's own hooks, and the private one with a frozen
base that multiplies in bfloat16 (`model.dtype=mixed`).  So do all products of a base's layers with 1,024 rows, there
and back, by torch, by oneDNN and in bfloat16.  Medians are written down.
The most memory of each kind of step is that of a process that takes no other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import readme_table
import torch
from opacus.grad_sample import GradSampleHooks

from fedtune.api.compose import compose_run
from fedtune.data import Batch
from fedtune.model.layers import find_layer_stack
from fedtune.privacy.durable import write_durably
from fedtune.privacy.mechanism import add_gaussian_noise
from fedtune.privacy.randomness import SystemRandomness
from fedtune.sites import shared_model
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.tasks.task_model import TaskModel
from fedtune.training.dp_step import add_clipped, apply_gradient_sum, make_zero_sums
from fedtune.training.per_example import record_gradients

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
MIXED = "private, mixed"
ROWS = 1024
Step = Callable[[], dict[str, float]]
"""Takes one, and says how many seconds each part of it took."""


def prepared(case: str, *, onednn: bool = True, dtype: str = "float32") -> tuple[TaskModel, list[Batch], float]:
    """The model, one step's micro-batches, and the clip norm."""
    count, settings = CASES[case]
    ours = ["privacy.epsilon=8", f"runtime.onednn={str(onednn).lower()}", f"model.dtype={dtype}"]
    config = compose_run([*settings, *ours])
    with patch.object(shared_model, "max_batch_influence", lambda *_, **__: 0.0):
        shared = RunModel(LoadedModel(config), config)
    examples = shared.make_site_examples(
        shared.tokenize_records(shared.records.dealt.sites[0].training[:count], lenient=True)
    )
    if shared.model.has_frozen_prefix:
        examples.cache_frozen_states(shared.model)
    return shared.model, list(examples.cut(np.arange(count))), config.privacy.max_grad_norm


def plain(model: TaskModel, batches: list[Batch]) -> dict[str, float]:
    """Forward and backward passes as torch does them, gradients added up in the parameters, and a step."""
    parts = {"forward": 0.0, "backward": 0.0, "the step itself": 0.0}
    optimizer = standing(model)
    optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        with timed(parts, "forward"):
            loss = model.losses(batch).sum()
        with timed(parts, "backward"):
            loss.backward()
    with timed(parts, "the step itself"):
        optimizer.step()
    return parts


def standing(model: TaskModel) -> torch.optim.Optimizer:
    """SGD that leaves everything where it is, so that all steps are of one adapter."""
    return torch.optim.SGD(model.trainable().values(), lr=0.0)


def private(model: TaskModel, batches: list[Batch], clip_norm: float) -> dict[str, float]:
    """The same with gradients by example, clipped and added up in whole numbers, and with noise."""
    with record_gradients(model) as gradients:
        return clipped(model, batches, clip_norm, found=gradients.found.__getitem__, forget=gradients.found.clear)


def by_hooks(model: TaskModel, batches: list[Batch], clip_norm: float) -> dict[str, float]:
    """The private step with Opacus's hooks on the model."""

    def forget() -> None:
        for parameter in model.trainable().values():
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]

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
    parts = {"forward": 0.0, "backward": 0.0, "clipping": 0.0, "noise": 0.0, "the step itself": 0.0}
    parameters, optimizer = model.trainable(), standing(model)
    sums = make_zero_sums(parameters)
    for batch in batches:
        forget()
        with timed(parts, "forward"):
            loss = model.losses(batch).sum()
        with timed(parts, "backward"):
            loss.backward()
        with timed(parts, "clipping"):
            rows = len(batch.input_ids)
            add_clipped(sums, {name: found(one)[:rows] for name, one in parameters.items()}, clip_norm)
    forget()
    with timed(parts, "noise"):
        compute_all_gradients = {name: total.numpy() for name, total in sums.items()}
        noisy = add_gaussian_noise(
            compute_all_gradients, noise_multiplier=1.0, stream=SystemRandomness().stream("noise")
        )
    with timed(parts, "the step itself"):
        apply_gradient_sum(noisy, parameters, optimizer, denominator=1.0)
    return parts


@contextmanager
def timed(parts: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds inside to a part."""
    began = time.perf_counter()
    yield
    parts[name] += time.perf_counter() - began


def steps(case: str, *, onednn: bool = True) -> dict[str, Step]:
    """The kinds of step on a float32 base, by name."""
    model, batches, clip_norm = prepared(case, onednn=onednn)
    return {
        "plain": partial(plain, model, batches),
        "private": partial(private, model, batches, clip_norm),
        "private, Opacus's hooks": partial(by_hooks, model, batches, clip_norm),
    }


def mixed_step(case: str) -> dict[str, Step]:
    """The private step on a base that multiplies in bfloat16, by its name."""
    return {MIXED: partial(private, *prepared(case, dtype="mixed"))}


def products(case: str) -> dict[str, Step]:
    """All products of a base's layers with `ROWS` rows, there and back, by who multiplies."""
    found = {"torch": prepared(case, onednn=False)[0], "oneDNN": prepared(case)[0]}
    found["bfloat16"] = prepared(case, dtype="mixed")[0]
    return {name: partial(multiplied, _linear(model)) for name, model in found.items()}


def _linear(model: TaskModel) -> list[torch.nn.Linear]:
    _, layers = find_layer_stack(model.base.get_base_model())
    frozen = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    return [module for module in frozen if not any(one.requires_grad for one in module.parameters())]


def multiplied(modules: list[torch.nn.Linear]) -> dict[str, float]:
    """Multiply by every module, and take the gradient back through it."""
    parts = {"forward": 0.0, "backward": 0.0}
    for module in modules:
        values = torch.ones(ROWS, module.in_features, requires_grad=True)
        with timed(parts, "forward"):
            output = module(values)
        direction = torch.ones_like(output)
        with timed(parts, "backward"):
            output.backward(direction)
    return parts


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
    step = (mixed_step(case) if kind == MIXED else steps(case))[kind]
    step()
    step()
    # Not by getrusage, which begins with what the parent had.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def measured(case: str, *, runs: int) -> dict[str, object]:
    """All there is to say of a case."""
    kinds = medians(steps(case) | mixed_step(case), runs=runs)
    torchs = medians(steps(case, onednn=False), runs=runs)
    alone = medians(products(case), runs=runs)
    memory = {kind: peak_bytes(case, kind) for kind in ("plain", "private", MIXED)}
    return {
        "records": CASES[case][0],
        "seconds": kinds,
        "seconds_without_onednn": torchs,
        "seconds_of_products": alone,
        "private_over_plain": round(kinds["private"]["step"] / kinds["plain"]["step"], 3),
        "hooks_over_plain": round(kinds["private, Opacus's hooks"]["step"] / kinds["plain"]["step"], 3),
        "torch_over_onednn": round(torchs["private"]["step"] / kinds["private"]["step"], 2),
        "mixed_over_private": round(kinds[MIXED]["step"] / kinds["private"]["step"], 2),
        "products_bfloat16_over_onednn": round(alone["bfloat16"]["step"] / alone["oneDNN"]["step"], 2),
        "peak_bytes": memory,
        "memory_private_over_plain": round(memory["private"] / memory["plain"], 3),
    }


def table(cases: dict[str, dict[str, object]]) -> str:
    """The Markdown table."""
    heads = {
        "private_over_plain": "private / plain",
        "hooks_over_plain": "by Opacus's hooks / plain",
        "torch_over_onednn": "torch's products / oneDNN",
        "mixed_over_private": "mixed / float32, private",
        "products_bfloat16_over_onednn": "products alone, bfloat16 / oneDNN",
        "memory_private_over_plain": "memory, private / plain",
    }
    rows = [["", *heads.values()], ["---"] + ["---:"] * len(heads)]
    rows += [[name, *(f"{case[key]:.2f}" if key in case else "" for key in heads)] for name, case in cases.items()]
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
            write({name: cases[name] for name in CASES if name in cases}, path, runs=asked.runs)


def write(cases: dict[str, dict[str, object]], path: Path, *, runs: int) -> None:
    """Write what is there so far into the file, and the table into the README."""
    machine = readme_table.machine(torch.get_num_threads())
    result = {"runs": runs, "hardware": machine, "cases": cases}
    write_durably(path, json.dumps(result, indent=1).encode() + b"\n")
    readme_table.put(BEGIN, END, f"{table(cases)}\n\nMedians of {runs} steps, {machine}.")


if __name__ == "__main__":
    main()
