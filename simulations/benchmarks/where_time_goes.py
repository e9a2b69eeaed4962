"""Where the time of a private step goes: by phase, by layer and by kind of work.

    python simulations/benchmarks/where_time_goes.py                into where_time_goes.json and the README's table
    python simulations/benchmarks/where_time_goes.py --only MiniLM  cases whose names hold this; others are kept

The cases are those of step.py, with one thread.  A layer's forward pass is timed by hooks around it, its backward pass
from when its output's gradient is known until that of the layer below is.  Kinds of work are torch's own operators
by their own time (torch.profiler), in steps of their own, since being watched slows a step down.  All are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import readme_table
import torch
from step import CASES, prepared
from torch.profiler import ProfilerActivity, profile

from fedtune.data import Batch
from fedtune.model.layers import layer_stack
from fedtune.privacy.durable import write_durably
from fedtune.tasks.task_model import TaskModel
from fedtune.training.dp_step import add_clipped, zeros
from fedtune.training.per_example import attached

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- where: written by where_time_goes.py -->", "<!-- end of where -->"
KINDS = {
    "products with frozen weights": ("mkldnn::_linear_pointwise",),
    "attention": ("_attention",),
    "products of adapters and head, gradients by example": ("::mm", "::addmm", "::bmm", "::baddbmm"),
    "norms and activations": ("norm", "gelu", "silu", "tanh", "rsqrt", "softmax"),
}
"""By what the names of torch's operators hold."""
REST = "copies, sums, single steps on values"
Parts = dict[str, float]
"""Seconds of a step, by part."""


class Layers:
    """Times the layers of a model while it takes steps.

    Attributes:
        seconds: of each layer's passes so far.
    """

    def __init__(self, model: TaskModel) -> None:
        self.seconds: Counter[str] = Counter()
        self._began = 0.0
        self._known: list[tuple[int, float]] = []
        for number, layer in enumerate(layer_stack(model.base.get_base_model())[1]):
            layer.register_forward_pre_hook(self._begins)
            layer.register_forward_hook(partial(self._ends, number))

    def backward_is_over(self) -> None:
        """Count what the backward pass took from layer to layer."""
        ends = [when for _, when in self._known[1:]] + [time.perf_counter()]
        for (number, began), end in zip(self._known, ends, strict=False):
            self.seconds[f"backward, layer {number + 1}"] += end - began
        self._known.clear()

    def _begins(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _ends(self, number: int, layer: Any, inputs: Any, output: Any) -> None:
        self.seconds[f"forward, layer {number + 1}"] += time.perf_counter() - self._began
        states = output if isinstance(output, torch.Tensor) else output[0]
        if states.requires_grad:
            states.register_hook(lambda _: self._known.append((number, time.perf_counter())))


def step(model: TaskModel, batches: list[Batch], clip_norm: float, over: Callable[[], None]) -> Parts:
    """A private step by phase; `over` is called after each backward pass."""
    parts: Counter[str] = Counter()
    sums = zeros(model.trainable())
    with attached(model) as gradients:
        for batch in batches:
            times = [time.perf_counter()]
            loss = model.losses(batch).sum()
            times.append(time.perf_counter())
            loss.backward()
            over()
            times.append(time.perf_counter())
            rows = len(batch.input_ids)
            found = {name: gradients.found[one][:rows] for name, one in model.trainable().items()}
            add_clipped(sums, found, clip_norm)
            gradients.found.clear()
            times.append(time.perf_counter())
            for name, began, end in zip(("forward", "backward", "clipping"), times, times[1:], strict=False):
                parts[name] += end - began
    return parts


def by_kind(take_step: Callable[[], object]) -> Parts:
    """A step by torch's operators, by their own time; what an operator calls counts for itself."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        take_step()
    parts: Counter[str] = Counter()
    for event in seen.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(one in event.key for one in names)), REST)
        parts[kind] += event.self_cpu_time_total / 1e6
    return parts


def measured(case: str, *, runs: int) -> dict[str, Parts]:
    """Medians of a case: "phases", "layers" and "kinds"."""
    model, batches, clip_norm = prepared(case)
    torch.set_num_threads(1)
    plain = partial(step, model, batches, clip_norm, lambda: None)
    plain()
    phases = [plain() for _ in range(runs)]
    kinds = [by_kind(plain) for _ in range(runs)]
    watched = Layers(model)
    layers = []
    for _ in range(runs):
        watched.seconds.clear()
        step(model, batches, clip_norm, watched.backward_is_over)
        layers.append(dict(watched.seconds))
    return {"phases": medians(phases), "layers": medians(layers), "kinds": medians(kinds)}


def medians(each: list[Parts]) -> Parts:
    """Of each part."""
    return {name: round(statistics.median(one.get(name, 0.0) for one in each), 4) for name in each[0]}


def table(cases: dict[str, dict[str, Parts]]) -> str:
    """The Markdown table: shares of the step in percent."""
    phases = ["forward", "backward", "clipping"]
    kinds = [*KINDS, REST]
    rows = [["", "seconds", *phases, "a layer, forward", "backward", *kinds], ["---", *["---:"] * (9 + len(KINDS) - 2)]]
    for name, case in cases.items():
        whole, watched = sum(case["phases"].values()), sum(case["kinds"].values())
        # Not those below the first adapter, whose states are kept.
        trained = [part.partition(", ")[2] for part in case["layers"] if part.startswith("backward")]
        ways = [[case["layers"][f"{way}, {layer}"] for layer in trained] for way in phases[:2]]
        shares = [case["phases"][phase] / whole for phase in phases]
        shares += [statistics.median(way) / whole for way in ways]
        shares += [case["kinds"].get(kind, 0.0) / watched for kind in kinds]
        rows.append([name, f"{whole:.2f}", *(f"{100 * share:.{0 if share > 0.02 else 1}f} %" for share in shares)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    path = FOLDER / "where_time_goes.json"
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    for name in CASES:
        if asked.only in name:
            cases[name] = measured(name, runs=asked.runs)
            print(name, json.dumps(cases[name], indent=1), flush=True)
    cases = {name: cases[name] for name in CASES if name in cases}
    result = {"runs": asked.runs, "hardware": readme_table.machine(1), "cases": cases}
    write_durably(path, json.dumps(result, indent=1).encode() + b"\n")
    readme_table.put(BEGIN, END, f"{table(cases)}\n\nMedians of {asked.runs} steps, {readme_table.machine(1)}.")


if __name__ == "__main__":
    main()
