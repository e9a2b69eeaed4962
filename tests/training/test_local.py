"""Complete rounds of local training."""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch

from fedtune.data import Shapes, collate
from fedtune.model.adapter import Adapter
from fedtune.model.spec import LoraSpec
from fedtune.privacy.distributed_noise import SecureAggregationSpec
from fedtune.privacy.mechanism import draw_poisson_sample
from fedtune.privacy.randomness import SeededRandomness
from fedtune.training import dp_step, optimizer
from fedtune.training.examples import SiteExamples
from fedtune.training.local import compute_round_share
from fedtune.training.spec import TrainingSpec

from .conftest import KINDS, build_fresh, make_dummy_examples, make_examples, make_plan, make_work, release_round

kinds = pytest.mark.parametrize(("path", "task"), KINDS[:4])


def watch_cuts(target: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[int]]]:
    """Record the indices of each cut into micro-batches."""
    cut = create_autospec(target.cut, side_effect=target.cut)
    monkeypatch.setattr(target, "cut", cut)
    return lambda: [np.asarray(call.args[1]).tolist() for call in cut.call_args_list]


@kinds
def test_only_trainable_tensors_change_in_a_round(path: str, task: str) -> None:
    # opacus#820: with the wrong order the loss falls and epsilon grows, and the adapters never change.
    model = build_fresh(path, task)
    start = Adapter.from_task_model(model)
    other_tensors = {
        name: tensor.clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not tensor.requires_grad
    }
    after = release_round(model, make_dummy_examples(task), make_work())
    assert list(after.tensors) == list(start.tensors) == list(model.trainable())
    for name, tensor in after.tensors.items():
        assert (tensor != start.tensors[name]).any(), name
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in other_tensors:
            assert torch.equal(tensor, other_tensors[name]), name


def share(records: int, plan: Any, **changes: Any) -> dict[str, np.ndarray]:
    """Return a site's share of secure aggregation over this number of records."""
    model, units = build_fresh(), make_examples(make_dummy_examples("classification", records))
    work = make_work(plan=plan, **changes)
    return compute_round_share(model, Adapter.from_task_model(model), units, work, randomness=SeededRandomness(5))


TOGETHER = SecureAggregationSpec(num_sites=3, threshold=3, colluders=0).with_share(0.5)


@pytest.mark.parametrize("change", [{"site": "bank_b"}, {"round": 2}, {"attempt": 2}])
def test_secure_aggregation_share_repeats_from_its_seed(change: dict[str, Any]) -> None:
    """Changed settings draw other noise; tests below cover the streams of a round."""
    plan = dataclasses.replace(make_work().plan, local_steps=1, shared=TOGETHER)
    first, repeated, second = share(0, plan), share(0, plan), share(0, plan, **change)
    for name in first:
        np.testing.assert_array_equal(first[name], repeated[name])
        assert (first[name] != second[name]).any(), name


@pytest.mark.parametrize("noise", [0.5, 0.0], ids=["private", "plain"])
def test_each_step_draws_a_new_poisson_sample(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    # One sample for all local steps would be accounted as four independent ones.
    sampled = watch_cuts(SiteExamples, monkeypatch)
    planned = make_plan(sampling_rate=0.5, noise_multiplier=noise, local_steps=4, num_rounds=2)
    release_round(build_fresh(), make_dummy_examples("classification", 30), make_work(plan=planned))
    stream = SeededRandomness(5).stream("bank_a", 1, 1, "sampling")
    assert sampled() == [draw_poisson_sample(30, 0.5, stream).tolist() for _ in range(4)]
    assert len({tuple(sample) for sample in sampled()}) == 4


def test_sampling_and_noise_use_separate_streams() -> None:
    recording = Mock(wraps=SeededRandomness(5), seeded=True)
    release_round(
        build_fresh(), make_dummy_examples("classification"), make_work(round=3, attempt=2), randomness=recording
    )
    assert sorted(call.args for call in recording.stream.call_args_list) == [
        ("bank_a", 3, 2, purpose) for purpose in ("noise", "records", "sampling")
    ]


def test_added_record_changes_no_noise_or_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = watch_cuts(Shapes, monkeypatch)
    one_step = make_work(plan=dataclasses.replace(make_work().plan, local_steps=1))
    for count in (12, 13):
        release_round(build_fresh(), make_dummy_examples("classification", count), one_step)
    assert [index for index in sampled()[1] if index < 12] == sampled()[0]


@pytest.mark.parametrize(("steps", "noise"), [(1, 0.5), (3, 0.5), (3, 0.0)])
def test_learning_rate_schedule_continues_across_rounds(
    monkeypatch: pytest.MonkeyPatch, steps: int, noise: float
) -> None:
    factor = Mock(return_value=1.0)
    monkeypatch.setattr(optimizer, "compute_learning_rate_factor", factor)
    # The charged plan determines the schedule, not the training settings.
    planned = make_plan(local_steps=steps, num_rounds=4, noise_multiplier=noise, sampling_rate=0.5)
    release_round(build_fresh(), make_dummy_examples("classification"), make_work(plan=planned, round=2))
    calls = [call.kwargs for call in factor.call_args_list]
    assert calls == [{"step": steps + number, "total_steps": 4 * steps} for number in range(steps)]


def test_round_keeps_no_optimizer_state_from_the_previous_round() -> None:
    """Neither optimizer state nor earlier model values remain: a fresh process gives the same bytes."""
    model, dataset = build_fresh(), make_dummy_examples("classification")
    first = release_round(model, dataset, make_work())
    second, anew = (release_round(one, dataset, make_work(round=2), adapter=first) for one in (model, build_fresh()))
    assert second.digest() == anew.digest() != first.digest()


TURNS = LoraSpec(rank=2, alpha=4.0, alternate=True)


@pytest.mark.parametrize("noise", [0.5, 0.0])
def test_alternating_rounds_train_a_and_b_in_turn(noise: float) -> None:
    planned = make_plan(sampling_rate=0.6, noise_multiplier=noise, local_steps=2, num_rounds=3)
    model, dataset = build_fresh(lora=TURNS), make_dummy_examples("classification")
    before = Adapter.from_task_model(model)
    for round, rests in ((1, ".lora_A."), (2, ".lora_B."), (3, ".lora_A.")):
        after = release_round(model, dataset, make_work(plan=planned, round=round), adapter=before)
        unchanged = {name for name, value in after.tensors.items() if np.array_equal(value, before.tensors[name])}
        assert unchanged == {name for name in after.tensors if rests in name}
        before = after


def test_b_round_matches_training_with_frozen_a() -> None:
    # Only trained tensors are clipped and noised. Up to rounding, because frozen weights use other kernels.
    sgd = make_work(training=TrainingSpec(local_steps=2, optimizer="sgd", learning_rate=0.1))
    frozen_a = dataclasses.replace(TURNS, alternate=False, train_a=False)
    turns, frozen = (
        release_round(build_fresh(lora=lora), make_dummy_examples("classification"), sgd) for lora in (TURNS, frozen_a)
    )
    assert any(".lora_B." in name for name in frozen.tensors)
    for name, value in frozen.tensors.items():
        np.testing.assert_allclose(turns.tensors[name], value, rtol=1e-5, atol=1e-6)


def test_a_round_clips_only_lora_a_and_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_step, "add_gaussian_noise", lambda sums, **_: sums)
    one_record = make_plan(noise_multiplier=0.5, max_grad_norm=1e-3, local_steps=1, num_rounds=2)
    dataset = make_dummy_examples("classification", 1)
    model = build_fresh(lora=TURNS)
    before = release_round(model, dataset, make_work(round=1))  # otherwise no A has a gradient
    sgd = TrainingSpec(local_steps=1, optimizer="sgd", learning_rate=1e3)
    after = release_round(
        model, dataset, make_work(round=2, plan=one_record, training=sgd, declared_size=1), adapter=before
    )
    norms_moved = [np.linalg.norm(after.tensors[name] - before.tensors[name]) for name in after.tensors]
    assert np.linalg.norm(norms_moved) == pytest.approx(1.0, rel=1e-4)


def test_noiseless_round_matches_plain_training() -> None:
    silent = make_plan(sampling_rate=0.5, max_grad_norm=1e-9)  # a private step would clip this to nothing
    sgd = TrainingSpec(local_steps=2, optimizer="sgd", learning_rate=0.1)
    dataset = make_dummy_examples("classification")
    after = release_round(build_fresh(), dataset, make_work(plan=silent, training=sgd))
    model = build_fresh()
    parameters = model.trainable()
    stream = SeededRandomness(5).stream("bank_a", 1, 1, "sampling")
    for _ in range(2):
        chosen = draw_poisson_sample(len(dataset), 0.5, stream)
        loss = model.losses(collate(dataset, chosen, pad_id=0)).sum() / (0.5 * 10)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for name, tensor in after.tensors.items():
        np.testing.assert_allclose(tensor, parameters[name].detach().numpy(), rtol=1e-4, atol=1e-6)
        assert np.abs(tensor - Adapter.from_task_model(build_fresh()).tensors[name]).max() > 1e-3 or "lora_A" in name
