"""The number format that `model.dtype=auto` stands for: float32, or mixed if this machine multiplies faster in it.

A short measurement decides, because no list of CPU features does: two threads of one process can lose what one thread
gains, and CPUs without instructions for bfloat16 round in vain.  The format changes the rounding of a run and not its
guarantee: whether examples are computed alone is tested afterwards, in the chosen format
(`fedtune.training.batch_invariance`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from fedtune.model.base_model import count_frozen_products
from fedtune.model.frozen_linear import convert_to_bfloat16, switch_to_onednn
from fedtune.model.spec import ModelSpec
from fedtune.training.machine import count_threads, micro_batch_tokens, resolve_device, use_threads
from fedtune.training.spec import RuntimeSpec

FLOAT32, MIXED = "float32", "mixed"
_LEAST_GAIN = 1.05  # float32's time over mixed's above which mixed is taken
_MOST_SECONDS = 0.3  # of all passes
_MOST_OPERATIONS = 6e9  # of a pass over both formats, for the fewest tokens of a large model's products
_FEWEST_TOKENS = 16

Seconds = Mapping[str, float]


def choose_number_format(
    model: ModelSpec,
    runtime: RuntimeSpec,
    *,
    allowed: Container[str] = (FLOAT32, MIXED),
    told: Callable[[str], None] = lambda text: None,
) -> str:
    """Return the format that `auto` stands for on this machine: "float32" or "mixed".

    The measurement runs once for each model and machine setting in a process, so that runs which are compared get the
    same answer.

    Args:
        model: the base, whose products are measured.
        runtime: the run's settings, with the number of devices that share a step.
        allowed: the formats that every site accepts; a format outside is not measured, and float32 is the answer if
            neither is inside.
        told: receives a sentence for people about the choice.

    Raises:
        ConfigError: for `model.path` or `model.sha256`: the base cannot be read.
    """
    if MIXED not in allowed or resolve_device(runtime.device).type != "cpu":
        return FLOAT32
    if FLOAT32 not in allowed:
        return MIXED
    tokens = runtime.micro_batch_tokens
    seconds = _measure_model(model, count_threads(runtime), runtime.onednn, tokens)
    chosen = choose_faster(seconds)
    ratio = seconds[FLOAT32] / seconds[MIXED]
    told(f"Number format: {chosen} (model.dtype=auto; products in mixed run at {ratio:.2f} times the speed of float32)")
    return chosen


def choose_faster(seconds: Seconds) -> str:
    """Return "mixed" if float32 takes more than 5 % longer, and "float32" otherwise."""
    return MIXED if seconds[FLOAT32] > _LEAST_GAIN * seconds[MIXED] else FLOAT32


@cache
def _measure_model(model: ModelSpec, threads: int, onednn: bool, tokens: int | None) -> Seconds:
    """Measure a model's products in the shape of a full micro-batch, on as many threads as a step has."""
    with use_threads(threads):
        rows = micro_batch_tokens(RuntimeSpec(micro_batch_tokens=tokens), torch.device("cpu"))
        return measure_products(count_frozen_products(model), tokens=rows, onednn=onednn)


def measure_products(
    shapes: Mapping[tuple[int, int], int],
    *,
    tokens: int,
    onednn: bool = True,
    formats: Sequence[str] = (FLOAT32, MIXED),
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Measure the seconds of a model's frozen products, forward and backward, by number format.

    The formats take turns, so that other work on the machine slows both, and the fastest pass of each product counts.

    Args:
        shapes: the number of products by (outputs, inputs).
        tokens: the rows of each product; a large model's products get fewer rows.
        onednn: whether float32 products use oneDNN, as `runtime.onednn`.
        formats: the formats to measure.
        clock: returns the time in seconds.
    """
    operations = 8 * sum(outputs * inputs for outputs, inputs in shapes)  # of one token, both ways, in two formats
    rows = min(tokens, max(_FEWEST_TOKENS, int(_MOST_OPERATIONS / max(1, operations))))
    products = {name: _build_products(shapes, name, onednn=onednn) for name in formats}
    inputs = [torch.ones(rows, size, requires_grad=True) for _, size in shapes]
    gradients = [torch.ones(rows, size) for size, _ in shapes]
    fastest = {name: [math.inf] * len(shapes) for name in formats}
    began = now = clock()
    while True:
        pass_began = now
        for place, (values, gradient) in enumerate(zip(inputs, gradients, strict=True)):
            for name in formats:
                begun = clock()
                torch.autograd.grad(products[name][place](values), values, gradient)
                fastest[name][place] = min(fastest[name][place], clock() - begun)
        now = clock()
        if 2 * now - pass_began - began > _MOST_SECONDS:  # another pass like this one would take too long
            break
    return {
        name: sum(count * seconds for count, seconds in zip(shapes.values(), best, strict=True))
        for name, best in fastest.items()
    }


def _build_products(shapes: Mapping[tuple[int, int], int], name: str, *, onednn: bool) -> nn.ModuleList:
    """Build one frozen module for each shape, which computes as those of a base in the format `name`."""
    build: Any = nn.utils.skip_init  # torch gives it no types
    layers = nn.ModuleList(build(nn.Linear, inputs, outputs) for outputs, inputs in shapes)
    layers.requires_grad_(False)
    for parameter in layers.parameters():
        parameter.fill_(0.01)  # an ordinary number: products of denormal ones are slower
    if name == MIXED:
        convert_to_bfloat16(layers)
    if onednn:
        switch_to_onednn(layers)
    return layers
