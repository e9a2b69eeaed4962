"""The adapter stays within the site's bound on values: what is sent, after every step, and what is released."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.model import Adapter
from fedtune.privacy.randomness import SeededRandomness
from fedtune.training import local
from fedtune.training.local import RoundOfTraining, project, train_round
from fedtune.training.spec import TrainingSpec

BOUND = 0.25


def of_values(start: Adapter, value: float) -> Adapter:
    return Adapter({name: np.full_like(tensor, value) for name, tensor in start.tensors.items()})


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The largest absolute value of the adapter that each step starts from; NaN where there is one."""
    seen: list[float] = []

    def watch(name: str) -> None:
        original = getattr(local, name)

        def step(*args: Any, **settings: Any) -> None:
            held = args[0].trainable() if name == "plain_step" else settings["parameters"]
            seen.append(max(float(one.detach().abs().max()) for one in held.values()))
            original(*args, **settings)

        monkeypatch.setattr(local, name, step)

    watch("dp_sgd_step")
    watch("plain_step")
    return seen


@pytest.mark.by_day("private-adamw-1000000000.0--3e+38", "private-sgd-0.01-7.0", "plain-sgd-1000000000.0-7.0")
@pytest.mark.parametrize("sent", [0.1, 7.0, -3e38])
@pytest.mark.parametrize("rate", [0.01, 1e9])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("noise", [0.5, 0.0], ids=["private", "plain"])
def test_values_never_leave_the_bound(
    trained: Any,
    examples: Any,
    plan: Any,
    site_examples: Any,
    every_step: list[float],
    sent: float,
    rate: float,
    optimizer: Any,
    noise: float,
) -> None:
    model = trained()
    work = RoundOfTraining(
        site="bank_a",
        round=1,
        attempt=1,
        plan=plan(noise_multiplier=noise, max_grad_norm=0.5, local_steps=3),
        training=TrainingSpec(local_steps=3, optimizer=optimizer, learning_rate=rate, weight_decay=0.01),
        declared_size=10,
        max_adapter_value=BOUND,
    )
    start = of_values(Adapter.of(model), sent)
    records = site_examples(examples("classification", 6))
    released = train_round(model, start, records, work, randomness=SeededRandomness(5))
    assert len(every_step) == 3
    assert max(every_step) <= BOUND
    assert every_step[0] == min(abs(sent), BOUND) or sent == pytest.approx(0.1), "what was sent is projected first"
    values = np.concatenate([tensor.ravel() for tensor in released.tensors.values()])
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= BOUND
    if rate >= 1e9:
        assert np.abs(values).max() == BOUND, "the bound was reached, so it was tested"


@pytest.mark.parametrize("most", [BOUND, float("inf")])
def test_projecting_moves_only_what_is_outside(most: float) -> None:
    values = torch.tensor([torch.inf, -torch.inf, 0.1, -9.0, BOUND])
    parameter = torch.nn.Parameter(values.clone())
    project({"a": parameter}, most)
    assert torch.equal(parameter.detach(), values.clamp(-most, most))
    assert parameter.requires_grad
