"""Real optimizers on the largest gradients of a plan stay within the update bound."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.model.adapter import Adapter
from fedtune.model.spec import LoraSpec
from fedtune.privacy.run_plan import Plan
from fedtune.training.algorithms.fedavg import FEDAVG
from fedtune.training.local import list_frozen_tensors
from fedtune.training.optimizer import compute_learning_rate_factor, make_optimizer, set_learning_rate
from fedtune.training.spec import TrainingSpec
from fedtune.training.update_bound import UpdateBound, bound_round_update

PLAN = Plan(
    unit="record", delta=1e-5, sampling_rate=0.1, noise_multiplier=1.0, max_grad_norm=1.0, local_steps=5, num_rounds=4
)
SIZE = 200
SPECS: list[dict[str, Any]] = [
    {"optimizer": "sgd", "learning_rate": 2.0, "head_learning_rate": 0.5},
    {"optimizer": "sgd", "learning_rate": 2.0, "momentum": 0.9, "weight_decay": 0.1},
    {"optimizer": "adamw", "learning_rate": 1e-2},
    {"optimizer": "adamw", "learning_rate": 1e-2, "betas": (0.0, 0.999), "head_learning_rate": 0.1},
    {"optimizer": "adamw", "learning_rate": 0.5, "weight_decay": 5.0, "schedule": "cosine", "warmup_steps": 3},
    {"optimizer": "adamw", "learning_rate": 1e-2, "betas": (0.5, 0.0)},
]


@pytest.fixture
def sent_adapter() -> Adapter:
    draws, shapes = np.random.default_rng(0), {"a.lora_A": (4, 30), "head.weight": (3, 8)}
    tensors = {name: draws.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Adapter(tensors | {"a.lora_B": np.zeros((30, 4), np.float32)})


def train_optimizer(spec: TrainingSpec, sent: Adapter, gradients: Any, *, round: int) -> dict[str, np.ndarray]:
    """Run the real optimizer on gradients given as a function of step, name and shape."""
    parameters = {n: torch.nn.Parameter(torch.from_numpy(np.array(v))) for n, v in sent.tensors.items()}
    optimizer = make_optimizer(parameters, spec)
    first, total = (round - 1) * PLAN.local_steps, PLAN.local_steps * PLAN.num_rounds
    for step in range(PLAN.local_steps):
        set_learning_rate(optimizer, compute_learning_rate_factor(spec, step=first + step, total_steps=total))
        for name, parameter in parameters.items():
            parameter.grad = torch.as_tensor(gradients(step, name, parameter.shape), dtype=torch.float32)
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


@pytest.mark.parametrize("settings", SPECS, ids=str)
@pytest.mark.parametrize("round", [1, 3])
def test_honest_training_stays_within_the_update_bound(
    settings: dict[str, Any], sent_adapter: Adapter, round: int
) -> None:
    spec = TrainingSpec(**settings)
    bound = bound_round_update(spec, PLAN, round=round, declared_size=SIZE, sent=sent_adapter)
    denominator = PLAN.sampling_rate * SIZE
    draws = np.random.default_rng(round)
    direction = {name: draws.normal(size=value.shape) for name, value in sent_adapter.tensors.items()}
    length = math.sqrt(sum(float(np.square(value).sum()) for value in direction.values()))

    def make_honest_gradient(step: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        # Three times the declared units, with equal gradients, and the plan's noise.
        return 3 * direction[name] / length + draws.normal(size=shape) / denominator

    def make_growing_gradient(step: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, 10.0 ** (step - 5))  # Adam moves furthest when gradients grow

    for gradients in (make_honest_gradient, make_growing_gradient):
        assert bound.allows(train_optimizer(spec, sent_adapter, gradients, round=round), sent=sent_adapter), (
            gradients.__name__
        )
    for name in sent_adapter.tensors if settings in SPECS[:5] else ():
        for value in (1e30, -1e30, 1e4):
            update = {key: np.array(tensor) for key, tensor in sent_adapter.tensors.items()}
            update[name].flat[3] = value
            assert not bound.allows(update, sent=sent_adapter), f"an update far beyond training must be refused: {name}"


def test_norm_bound_limits_many_small_changes(sent_adapter: Adapter) -> None:
    bound = bound_round_update(
        TrainingSpec(optimizer="sgd", learning_rate=1.0), PLAN, round=1, declared_size=SIZE, sent=sent_adapter
    )
    size = bound.value["a.lora_A"] * 0.99
    values_moved = {name: np.array(value) for name, value in sent_adapter.tensors.items()}
    values_moved["a.lora_B"].flat[0] = size
    assert bound.allows(values_moved, sent=sent_adapter)
    all_moved = {name: value + np.copysign(np.float32(size), value) for name, value in sent_adapter.tensors.items()}
    assert not bound.allows(all_moved, sent=sent_adapter)


def test_changes_toward_zero_are_always_allowed(sent_adapter: Adapter) -> None:
    no_bound = UpdateBound(value=dict.fromkeys(sent_adapter.tensors, 0.0), norm=0.0)
    for factor in (1.0, 0.5, 0.0):
        smaller = {name: (factor * value).astype(np.float32) for name, value in sent_adapter.tensors.items()}
        assert no_bound.allows(smaller, sent=sent_adapter)
    other_sign = {name: (-0.01 * value).astype(np.float32) for name, value in sent_adapter.tensors.items()}
    assert not no_bound.allows(other_sign, sent=sent_adapter)


def test_unclipped_or_fast_forgetting_training_has_no_bound(sent_adapter: Adapter) -> None:
    plain, long = replace(PLAN, noise_multiplier=0.0), replace(PLAN, local_steps=400)
    forgets = TrainingSpec(betas=(0.9, 0.1), local_steps=400)
    norms = [
        bound_round_update(spec, plan, round=1, declared_size=SIZE, sent=sent_adapter).norm
        for spec, plan in ((TrainingSpec(optimizer="sgd"), plain), (forgets, long), (TrainingSpec(), plain))
    ]
    assert norms[:2] == [math.inf, math.inf]
    assert norms[2] < math.inf, "Adam's steps must have a bound"


SGD = TrainingSpec(optimizer="sgd", learning_rate=1.0)


@pytest.mark.parametrize("settings", [SGD, TrainingSpec(weight_decay=0.1)], ids=["sgd", "adamw"])
def test_frozen_tensors_may_only_shrink(settings: TrainingSpec, sent_adapter: Adapter) -> None:
    """With lora.alternate, A is frozen in round 1 and never counts towards the bound of the other tensors."""
    sent_adapter = Adapter(
        {name.replace("lora_A", "lora_A.weight"): value for name, value in sent_adapter.tensors.items()}
    )
    resting = "a.lora_A.weight"
    frozen = list_frozen_tensors(LoraSpec(alternate=True), FEDAVG, sent_adapter.tensors, round=1, sent={})
    assert frozen == {resting}
    bound = bound_round_update(settings, PLAN, round=1, declared_size=SIZE, sent=sent_adapter, frozen=frozen)
    for step in (0.01, -0.01):
        moved = sent_adapter.tensors[resting] + np.copysign(np.float32(step), step * sent_adapter.tensors[resting])
        assert not bound.allows({**sent_adapter.tensors, resting: moved}, sent=sent_adapter)
    assert bound.allows({**sent_adapter.tensors, resting: sent_adapter.tensors[resting] / 2}, sent=sent_adapter), (
        "shrinking must stay allowed"
    )
    others = Adapter({name: value for name, value in sent_adapter.tensors.items() if name != resting})
    assert bound.norm == bound_round_update(settings, PLAN, round=1, declared_size=SIZE, sent=others).norm
    plain = replace(PLAN, noise_multiplier=0.0)
    still = bound_round_update(settings, plain, round=1, declared_size=SIZE, sent=sent_adapter, frozen=frozen)
    assert not still.allows({**sent_adapter.tensors, resting: sent_adapter.tensors[resting] * 1.01}, sent=sent_adapter)
