"""The noise that a whole step adds: its scale, its count, and that an empty sample gets it too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data import TextDataset
from fedtune.model import LoraSpec
from fedtune.tasks import TaskModel
from fedtune.training import dp_step


def silent(examples: Any, count: int) -> TextDataset:
    """Causal examples without a supervised token: each has a gradient of zero."""
    dataset = examples("causal_lm", count)
    return TextDataset(dataset.input_ids, tuple(np.full_like(target, -100) for target in dataset.targets))


def moves(before: TaskModel, after: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """How far each tensor went, in float64."""
    return {name: (after[name] - p.detach()).double().numpy() for name, p in before.trainable().items()}


SIGMA, CLIP, RATE, DECLARED, LEARNING_RATE = 1.3, 0.7, 0.5, 40, 100.0
SCALE = LEARNING_RATE * SIGMA * CLIP / (RATE * DECLARED)


@pytest.fixture
def noisy(plan: Any) -> Any:
    return plan(noise_multiplier=SIGMA, max_grad_norm=CLIP, sampling_rate=RATE)


def test_a_model_without_gradient_moves_by_noise_of_the_right_scale(
    fresh: Any, examples: Any, noisy: Any, records: Any, stepper: Any, has_scale: Any
) -> None:
    def model() -> TaskModel:
        return fresh("random:llama", "causal_lm", lora=LoraSpec(rank=24))

    cut_small = records(silent(examples, 30), declared_size=DECLARED, max_tokens=1)
    after = stepper(model(), learning_rate=LEARNING_RATE).step(cut_small, noisy)
    by_tensor = moves(model(), after)
    groups = {
        part: np.concatenate([move.ravel() for name, move in by_tensor.items() if part in name])
        for part in ("lora_A", "lora_B")
    }
    assert all(values.size > 5000 for values in groups.values())
    for values in groups.values():
        assert has_scale(values, SCALE)
        # Scales that plausible mistakes give: sigma alone, once for each of some 15 micro-batches, per tensor norms,
        # the true or the sampled size in the denominator.
        wrong = (1.1, 0.9, 1 / CLIP, 1 / SIGMA, np.sqrt(15), np.sqrt(len(by_tensor)), DECLARED / 30, RATE)
        for factor in wrong:
            assert not has_scale(values, factor * SCALE)


def test_lora_and_head_get_noise_alike(
    fresh: Any, examples: Any, noisy: Any, records: Any, stepper: Any, has_scale: Any
) -> None:
    nobody = records(examples("classification", 0), declared_size=DECLARED)
    after = stepper(fresh(), learning_rate=LEARNING_RATE).step(nobody, noisy)
    for name, move in moves(fresh(), after).items():
        assert has_scale(move, SCALE), name


@pytest.mark.parametrize("count", [0, 6])
def test_an_empty_sample_adds_noise_and_steps(
    fresh: Any, examples: Any, plan: Any, records: Any, stepper: Any, count: int
) -> None:
    nearly_never = plan(sampling_rate=1e-12, noise_multiplier=1.0)
    dataset = examples("classification", count)
    one = stepper(fresh())
    after = one.step(records(dataset, declared_size=10), nearly_never)
    assert all((move != 0).all() for move in moves(fresh(), after).values())
    twice = one.step(records(dataset, declared_size=10), nearly_never)
    assert all((twice[name] != after[name]).all() for name in after), "the second step drew other noise"


def test_noise_does_not_depend_on_how_the_batch_is_cut(
    fresh: Any, examples: Any, plan: Any, records: Any, stepper: Any
) -> None:
    everyone = plan(noise_multiplier=1.0)
    one_by_one, together = (
        stepper(fresh("random:llama", "causal_lm")).step(records(silent(examples, 12), max_tokens=tokens), everyone)
        for tokens in (1, 10_000)
    )
    for name, tensor in one_by_one.items():
        assert torch.equal(tensor, together[name]), name


def test_noise_is_added_once_for_each_logical_batch(
    fresh: Any, examples: Any, plan: Any, records: Any, stepper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, float]] = []  # in clip norms, which is the unit of the sums
    original = dp_step.add_gaussian_noise

    def counted(sums: Any, **settings: Any) -> Any:
        calls.append({key: settings[key] for key in settings if key != "stream"})
        assert list(sums) == list(model.trainable()), "noise covers every released tensor"
        assert {total.dtype for total in sums.values()} == {np.dtype(np.int64)}
        return original(sums, **settings)

    monkeypatch.setattr(dp_step, "add_gaussian_noise", counted)
    model = fresh()
    stepper(model).step(
        records(examples("classification", 9), max_tokens=1), plan(noise_multiplier=1.5, max_grad_norm=0.4), steps=3
    )
    assert calls == [{"noise_multiplier": 1.5}] * 3


def test_released_noise_is_no_grid_of_float32(
    fresh: Any, examples: Any, noisy: Any, records: Any, stepper: Any
) -> None:
    # B starts at zero, so its first step is raw noise: no two values may coincide as they would on a coarse grid.
    model = fresh(lora=LoraSpec(rank=16))
    after = stepper(model).step(records(examples("classification", 0), declared_size=DECLARED), noisy)
    values = np.concatenate([tensor.numpy().ravel() for name, tensor in after.items() if "lora_B" in name])
    assert len(np.unique(np.abs(values))) > 0.999 * values.size
