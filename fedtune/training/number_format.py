"""The number format for `model.dtype=auto`: float32, or mixed precision if this machine is faster with it.

A short measurement decides, because CPU feature lists do not predict the speed: two threads of one process can lose the
gain of one thread, and CPUs without bfloat16 instructions only lose time by rounding. The format changes the rounding
of a run, but not its guarantee: the batch-invariance test runs afterwards in the selected format
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
_MIN_GAIN = 1.05  # minimum speedup of mixed over float32
_MAX_GAIN = 12.0  # larger ratios, also inverted, come from other load on the machine; AMX was 6 times as fast
_MAX_SECONDS = 0.3  # time limit for all passes
_MAX_OPERATIONS = 6e9  # limit on the operations of a pass over both formats; large models get fewer tokens
_MIN_TOKENS = 16

Seconds = Mapping[str, float]


def choose_number_format(
    model: ModelSpec,
    runtime: RuntimeSpec,
    *,
    allowed: Container[str] = (FLOAT32, MIXED),
    told: Callable[[str], None] = lambda text: None,
) -> str:
    """Choose the number format for `model.dtype=auto` on this machine: "float32" or "mixed".

    The measurement runs once per process for each model and machine setting, so that compared runs use the same format.

    Args:
        model: the base model, whose matrix products are measured.
        runtime: the run's settings, with the number of devices that share a step.
        allowed: the formats that every site accepts. Only these formats are measured. The result is float32 if neither
            format is allowed.
        told: receives a one-sentence summary of the choice, for the terminal.

    Raises:
        ConfigError: for `model.path` or `model.sha256`, if the base model cannot be read.
    """
    if MIXED not in allowed or resolve_device(runtime.device).type != "cpu":
        return FLOAT32
    if FLOAT32 not in allowed:
        return MIXED
    tokens = runtime.micro_batch_tokens
    seconds = _measure_model(model, count_threads(runtime), runtime.onednn, tokens)
    chosen, ratio = choose_faster(seconds), seconds[FLOAT32] / seconds[MIXED]
    measured = f"mixed precision is {ratio:.2f} times as fast as float32"
    if not 1 / _MAX_GAIN < ratio < _MAX_GAIN:
        chosen, measured = FLOAT32, "the machine is too busy to measure mixed precision"
    told(f"Number format: {chosen} (model.dtype=auto; {measured})")
    return chosen


def choose_faster(seconds: Seconds) -> str:
    """Return "mixed" if float32 takes more than 5 % longer, and "float32" otherwise."""
    return MIXED if seconds[FLOAT32] > _MIN_GAIN * seconds[MIXED] else FLOAT32


@cache
def _measure_model(model: ModelSpec, threads: int, onednn: bool, tokens: int | None) -> Seconds:
    """Measure a model's matrix products in the shape of a full micro-batch, with a step's number of threads."""
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
    """Measure the seconds of a model's frozen matrix products, forward and backward, by number format.

    The formats take turns, so that other load on the machine slows both, and the fastest pass of each product counts.

    Args:
        shapes: the number of products by (outputs, inputs).
        tokens: the number of rows of each product; products of large models get fewer rows.
        onednn: whether float32 products use oneDNN, as in `runtime.onednn`.
        formats: the formats to measure.
        clock: returns the time in seconds.
    """
    operations = 8 * sum(outputs * inputs for outputs, inputs in shapes)  # per token: forward, backward, two formats
    rows = min(tokens, max(_MIN_TOKENS, int(_MAX_OPERATIONS / max(1, operations))))
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
        if 2 * now - pass_began - began > _MAX_SECONDS:  # another pass of the same duration would take too long
            break
    return {
        name: sum(count * seconds for count, seconds in zip(shapes.values(), best, strict=True))
        for name, best in fastest.items()
    }


def _build_products(shapes: Mapping[tuple[int, int], int], name: str, *, onednn: bool) -> nn.ModuleList:
    """Build one frozen linear module for each shape, with the arithmetic of a base model in the format `name`."""
    build: Any = nn.utils.skip_init  # has no type annotations
    layers = nn.ModuleList(build(nn.Linear, inputs, outputs) for outputs, inputs in shapes)
    layers.requires_grad_(False)
    for parameter in layers.parameters():
        parameter.fill_(0.01)  # a normal number: products of denormal numbers are slower
    if name == MIXED:
        convert_to_bfloat16(layers)
    if onednn:
        switch_to_onednn(layers)
    return layers
