"""Rounds at sites that train a part of the adapter: the first rows of A and columns of B."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from fedtune.model.adapter import Adapter
from fedtune.model.ranks import cut_to_rank
from fedtune.model.spec import LoraSpec
from fedtune.training import dp_step
from fedtune.training.algorithms.algorithm_registry import get_algorithm
from fedtune.training.spec import TrainingSpec
from fedtune.training.users import UserExamples

from .conftest import build_trained, make_dummy_examples, make_examples, make_plan, make_work, release_round

BOTH = LoraSpec(rank=4, alpha=8.0)
SGD = TrainingSpec(local_steps=2, optimizer="sgd", learning_rate=0.1)


def release(rank: int | None, *, lora: LoraSpec = BOTH, units: Any = None, **changes: Any) -> tuple[Adapter, Adapter]:
    """Return the adapter that a site received and the adapter that it releases."""
    model = build_trained(lora=lora)
    start = Adapter.from_task_model(model)
    examples = make_dummy_examples("classification") if units is None else units
    return start, release_round(model, examples, make_work(rank=rank, **changes))


@pytest.mark.parametrize("noise", [0.5, 0.0], ids=["private", "plain"])
def test_whole_rank_releases_the_same_bits_as_no_rank(noise: float) -> None:
    plan = make_plan(sampling_rate=0.6, noise_multiplier=noise)
    assert release(4, plan=plan)[1].digest() == release(None, plan=plan)[1].digest()


@pytest.mark.parametrize("noise", [0.5, 0.0], ids=["private", "plain"])
def test_site_releases_only_the_part_of_its_rank(noise: float) -> None:
    start, after = release(1, plan=make_plan(sampling_rate=0.6, noise_multiplier=noise))
    part = Adapter(cut_to_rank(start.tensors, 1))
    assert after.has_same_shapes(part)
    assert all((value != part.tensors[name]).any() for name, value in after.tensors.items())


def test_plain_step_moves_the_part_as_the_whole_adapter() -> None:
    plan = make_plan(sampling_rate=0.6, local_steps=1)
    full = cut_to_rank(release(None, plan=plan, training=SGD)[1].tensors, 2)
    for name, value in release(2, plan=plan, training=SGD)[1].tensors.items():
        np.testing.assert_array_equal(value, full[name])


def test_smaller_rank_clips_and_noises_its_part_only(monkeypatch: pytest.MonkeyPatch) -> None:
    noised: list[dict[str, Any]] = []

    def pass_sums(sums: dict[str, Any], **_: Any) -> dict[str, Any]:
        noised.append(sums)
        return sums

    monkeypatch.setattr(dp_step, "add_gaussian_noise", pass_sums)
    plan = make_plan(noise_multiplier=0.5, max_grad_norm=1e-3, local_steps=1)
    sgd = dataclasses.replace(SGD, learning_rate=1e3)
    start, after = release(1, units=make_dummy_examples("classification", 1), plan=plan, training=sgd, declared_size=1)
    part = cut_to_rank(start.tensors, 1)
    assert {name: value.shape for name, value in noised[0].items()} == {n: v.shape for n, v in part.items()}
    norms = [np.linalg.norm(value - part[name]) for name, value in after.tensors.items()]
    assert np.linalg.norm(norms) == pytest.approx(1.0, rel=1e-4), "one record must use the full clip norm"


def test_later_rounds_of_one_model_train_their_own_ranks() -> None:
    """The sites of a simulation share a model, which must keep nothing of the previous site's rank."""
    model, dataset = build_trained(lora=BOTH), make_dummy_examples("classification")
    start = Adapter.from_task_model(model)
    separate = {rank: release(rank)[1].digest() for rank in (1, None, 3)}
    assert {
        rank: release_round(model, dataset, make_work(rank=rank), adapter=start).digest() for rank in separate
    } == separate


def test_users_and_alternating_factors_train_their_rank() -> None:
    dataset = make_dummy_examples("classification")
    users = UserExamples(make_examples(dataset), [np.array([n]) for n in range(9)], most_records=1, most_users=2)
    plan = dataclasses.replace(make_work().plan, unit="user", records_per_user=1)
    assert release(2, units=users, plan=plan)[1].digest() == release(2)[1].digest()
    start, after = release(2, lora=dataclasses.replace(BOTH, alternate=True))
    unchanged = {n for n, v in cut_to_rank(start.tensors, 2).items() if np.array_equal(v, after.tensors[n])}
    assert unchanged == {name for name in after.tensors if ".lora_A." in name}


def test_fedprox_pulls_the_part_of_the_rank() -> None:
    pulled = release(2, algorithm=get_algorithm("fedprox", {"mu": 0.5}), training=SGD)[1]
    assert pulled.digest() != release(2, training=SGD)[1].digest()
