"""Bytes and time of a run, from the model and made-up examples: nothing here reads a record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedtune.data import Batch
from fedtune.model import TaskModel
from fedtune.privacy.plan import Plan
from fedtune.training.per_example import attached

_BYTES_A_VALUE = 4  # released tensors are float32
_MOST_EXAMPLES = 8
_ENOUGH_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a run takes on this machine and on the wire, spare rounds left out.

    Attributes:
        values: trained parameters.
        bytes_each_way: of one adapter, to a site or back from it, without headers of a few kB.
        bytes_total: both ways, all sites and rounds.
        seconds_per_example: one example's gradient at full length on this machine.
        step_seconds: of one step, by site.
        round_seconds: of one round, by site; sites of their own work at the same time.
        seconds_one_after_another: of all training where one machine plays all sites, as a simulation does.

    Times are upper estimates for this machine: every example has full length, and nothing is kept of frozen layers.
    Evaluation, start-up and the way over a network are not in them.
    """

    values: int
    bytes_each_way: int
    bytes_total: int
    seconds_per_example: float
    step_seconds: Mapping[str, float]
    round_seconds: Mapping[str, float]
    seconds_one_after_another: float


def forecast(plan: Plan, model: TaskModel, *, expected_batches: Mapping[str, float], max_length: int) -> Forecast:
    """Bytes and time for `plan` at sites with these expected batches.

    Args:
        plan: the run's.
        model: lies on the device that trains.
        expected_batches: site -> units in a step.
        max_length: tokens of a full example.
    """
    values = sum(parameter.numel() for parameter in model.trainable().values())
    per_example = seconds_per_example(model, max_length=max_length)
    steps = {site: batch * per_example for site, batch in expected_batches.items()}
    rounds = {site: plan.local_steps * seconds for site, seconds in steps.items()}
    return Forecast(
        values=values,
        bytes_each_way=values * _BYTES_A_VALUE,
        bytes_total=2 * values * _BYTES_A_VALUE * len(expected_batches) * plan.num_rounds,
        seconds_per_example=per_example,
        step_seconds=steps,
        round_seconds=rounds,
        seconds_one_after_another=plan.num_rounds * sum(rounds.values()),
    )


def seconds_per_example(model: TaskModel, *, max_length: int) -> float:
    """Time of one per-example gradient at full length: the least of a few passes over made-up examples."""
    batch = _made_up(model, max_length)
    passes: list[float] = []
    with attached(model) as gradients:
        # The first pass also warms up; where it alone takes long, that hardly matters.
        while sum(passes) < _ENOUGH_S and len(passes) < 4:
            begun = time.perf_counter()
            gradients.of(batch)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            passes.append(time.perf_counter() - begun)
    return min(passes) / len(batch)


def _made_up(model: TaskModel, max_length: int) -> Batch:
    """Examples of full length, of token ids that every vocabulary has, each token of them supervised."""
    count = max(1, min(_MOST_EXAMPLES, 1024 // max_length))
    token_ids = 1 + torch.arange(count * max_length).reshape(count, max_length) % 3
    classes = model.spec.task == "classification"
    targets = torch.zeros(count, dtype=torch.int64) if classes else token_ids
    return Batch(token_ids, torch.ones_like(token_ids), targets).to(model.device)
