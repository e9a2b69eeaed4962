"""The optimizer of local training, and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedtune.privacy.run_plan import Plan
from fedtune.training.spec import TrainingSpec


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], spec: TrainingSpec, *, clipped: bool = True
) -> torch.optim.Optimizer:
    """Create the optimizer of a round, with one parameter group for LoRA and one for the head.

    Args:
        parameters: the trained tensors by name; names of the head's tensors begin with "head.".
        spec: optimizer and learning rates.
        clipped: False selects the learning rates for unclipped gradients.
    """
    lora_rate, head_rate = spec.compute_peak_rates(clipped=clipped)
    groups = [
        {"params": [p for name, p in parameters.items() if not name.startswith("head.")], "lr": lora_rate},
        {"params": [p for name, p in parameters.items() if name.startswith("head.")], "lr": head_rate},
    ]
    groups = [group | {"peak_lr": group["lr"]} for group in groups if group["params"]]
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=spec.momentum, weight_decay=spec.weight_decay)
    return torch.optim.AdamW(groups, betas=spec.betas, weight_decay=spec.weight_decay)


def compute_learning_rate_factor(spec: TrainingSpec, *, step: int, total_steps: int) -> float:
    """Return the learning rate at global `step` (from 0) of `total_steps`, as a fraction of its peak in [0, 1]."""
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    if spec.schedule == "constant":
        return 1.0
    # Steps past the planned end (a retried round) stay at the schedule's last value.
    done = min(1.0, (step - spec.warmup_steps) / max(1, total_steps - spec.warmup_steps))
    return 1.0 - done if spec.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def compute_round_factors(spec: TrainingSpec, plan: Plan, *, round: int) -> list[float]:
    """Return the learning rate at each step of a round, as a fraction of its peak; rounds are counted from 1."""
    total, first = plan.num_rounds * plan.local_steps, (round - 1) * plan.local_steps
    steps = range(first, first + plan.local_steps)
    return [compute_learning_rate_factor(spec, step=step, total_steps=total) for step in steps]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every parameter group to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
