"""The lead's optimizer step in secure aggregation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.federation.lead import Checkpoints, LeadState
from fedtune.model.adapter import Adapter
from fedtune.privacy.distributed_noise import SecureAggregationSpec
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.privacy.run_plan import Plan
from fedtune.training.optimizer import compute_learning_rate_factor, make_optimizer, set_learning_rate
from fedtune.training.secure_server_step import limit_sum_length, take_secure_server_step
from fedtune.training.spec import TrainingSpec

SIZE = 60
TOGETHER = SecureAggregationSpec(num_sites=3, threshold=3, colluders=0)
PLAN = Plan.from_privacy(PrivacySpec(noise_multiplier=1.0), local_steps=1, num_rounds=4, together=TOGETHER)
CELL = PLAN.max_grad_norm * 2.0**-PLAN.shared.cell_bits


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizer_state_continues_after_a_checkpoint(optimizer: str, tmp_path: Path) -> None:
    """Two steps equal one step and another step from its checkpointed state."""
    training = TrainingSpec(optimizer=optimizer, learning_rate=0.1, momentum=0.9 if optimizer == "sgd" else 0.0)  # type: ignore[arg-type]
    adapter = Adapter({"a": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "head": np.ones(2, np.float32)})
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in adapter.tensors.items()}
    uninterrupted = make_optimizer(parameters, training)
    draws = np.random.default_rng(3)
    state: Any = {}
    for number in range(1, 5):
        total = draws.integers(-60, 60, 8)
        saved = Checkpoints(tmp_path / "checkpoints", "x")
        saved.save(LeadState(round=number, adapter=adapter, strategy=state))
        state = saved.load().strategy
        adapter, state = take_secure_server_step(
            adapter, total, state, training=training, plan=PLAN, step=number - 1, sites=3, most=50.0, declared_size=SIZE
        )
        set_learning_rate(uninterrupted, compute_learning_rate_factor(training, step=number - 1, total_steps=4))
        scale = CELL / (PLAN.sampling_rate * SIZE)
        parameters["a"].grad = torch.tensor(total[:6].reshape(2, 3) * scale, dtype=torch.float32)
        parameters["head"].grad = torch.tensor(total[6:] * scale, dtype=torch.float32)
        uninterrupted.step()
    for name, value in adapter.tensors.items():
        np.testing.assert_allclose(value, parameters[name].detach().numpy(), rtol=1e-6)


def sum_honest_sites(*, values: int, agreeing: float, seed: int) -> np.ndarray:
    """Make a sum of three sites whose sampled gradients agree to this degree."""
    draws, units = np.random.default_rng(seed), PLAN.sampling_rate * SIZE
    signal = np.zeros(values)
    signal[0] = agreeing * units
    total = signal + draws.normal(0, PLAN.noise_multiplier * math.sqrt(3), values) * PLAN.max_grad_norm
    return np.rint(total / CELL).astype(np.int64)


@pytest.mark.parametrize("values", [1, 50, 100_000])
@pytest.mark.parametrize("agreeing", [0.0, 1.0])
def test_honest_aggregate_is_not_limited(values: int, agreeing: float) -> None:
    for seed in range(50 if values < 1000 else 3):
        total = sum_honest_sites(values=values, agreeing=agreeing, seed=seed)
        assert limit_sum_length(total, PLAN, sites=3, declared_size=SIZE) is total


def test_excessive_aggregate_is_scaled_to_the_bound() -> None:
    total = sum_honest_sites(values=1000, agreeing=0.5, seed=1)
    total[7] += round(1e6 / CELL)  # a million clip norms, which no units could contribute
    limited = limit_sum_length(total, PLAN, sites=3, declared_size=SIZE)
    length = float(np.sqrt(np.square(limited, dtype=np.float64).sum())) * CELL
    sampled = PLAN.sampling_rate * SIZE
    max_length = sampled + 8 * (math.sqrt(sampled) + 1) + PLAN.noise_multiplier * math.sqrt(3) * (math.sqrt(1000) + 8)
    assert length == pytest.approx(max_length, rel=1e-3)
    assert limited[7] > 0.99 * max_length / CELL, "scaling must keep the direction"
