"""Users as privacy units: sampled as a whole, with the mean of their gradients clipped once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedtune.model.adapter import Adapter
from fedtune.privacy.mechanism import choose_records, compute_cell_width
from fedtune.privacy.randomness import RandomStream, SeededRandomness
from fedtune.training import dp_step
from fedtune.training.dp_step import add_clipped
from fedtune.training.local import TrainingRound
from fedtune.training.per_example import record_gradients
from fedtune.training.spec import TrainingSpec
from fedtune.training.users import UserExamples, UserGradients

from .conftest import (
    KINDS,
    build_trained,
    make_dummy_examples,
    make_examples,
    make_plan,
    make_work,
    release_round,
    take_private_steps,
)
from .test_dp_step import compute_loop_gradient
from .test_step_faults import make_numbered_records

kinds = pytest.mark.parametrize(("path", "task"), KINDS[:4])
Gradients = dict[str, npt.NDArray[np.float64]]


def make_users(*sizes: int) -> list[npt.NDArray[np.int64]]:
    """Return each user's record indices, interleaved so that no user's records are adjacent."""
    owners = [user for turn in range(max(sizes, default=0)) for user, size in enumerate(sizes) if turn < size]
    return [np.flatnonzero(np.array(owners) == user) for user in range(len(sizes))]


def compute_norm(gradient: Gradients) -> float:
    return float(np.sqrt(sum(np.sum(np.square(value)) for value in gradient.values())))


# The definition in numpy: for each sampled user, the mean over its sampled records, clipped.
def define_sum(gradients: Sequence[Gradients], users: Sequence[Sequence[int]], *, clip: float) -> Gradients:
    """Compute the sum before noise from all record gradients and the sampled records of each participating user."""
    total = {name: np.zeros_like(value) for name, value in gradients[0].items()}
    for records in users:
        mean = {name: sum(gradients[record][name] for record in records) / len(records) for name in total}
        factor = min(1.0, clip / compute_norm(mean)) if compute_norm(mean) else 1.0
        for name in total:
            total[name] += factor * mean[name]
    return total


@pytest.mark.by_day("random:bert-classification-1", "random:llama-causal_lm-3", "random:bert-triplets-100")
@pytest.mark.parametrize("max_records", [1, 3, 100])
@kinds
def test_user_level_sum_matches_its_definition(path: str, task: str, max_records: int) -> None:
    model, dataset, users = build_trained(path, task), make_dummy_examples(task, 14), make_users(5, 1, 3, 1, 4)
    record_gradients_all = [compute_loop_gradient(model, dataset, record) for record in range(14)]
    chosen = [0, 2, 3, 4]
    taking_part = [users[user][:max_records].tolist() for user in chosen]
    sizes = [compute_norm(define_sum(record_gradients_all, [records], clip=1e9)) for records in taking_part]
    clip = float(np.median(sizes))
    assert min(sizes) < clip < max(sizes), "some users must be clipped, and some not"
    expected = define_sum(record_gradients_all, taking_part, clip=clip)
    for max_tokens in (1, 13, 40, 10_000):
        by_user = UserExamples(make_examples(dataset, max_tokens=max_tokens), users, most_records=max_records)
        sums = dp_step.make_zero_sums(model.trainable())
        with record_gradients(model) as recorder:
            for batch in by_user.batch_units([users[user][:max_records] for user in chosen]):
                add_clipped(sums, UserGradients(recorder).compute_gradients(batch), clip)
        found = {name: total.numpy() * compute_cell_width(clip) for name, total in sums.items()}
        assert compute_norm({name: found[name] - expected[name] for name in expected}) <= 1e-5 * clip * len(chosen)
    assert compute_norm(expected) > 1e-2 * clip


def test_micro_batches_keep_users_whole_within_the_limit() -> None:
    sizes = (30, 1, 2, 7, 1, 4)
    users, lengths = make_users(*sizes), [3 + number % 9 for number in range(sum(sizes))]
    for most_users in (1, 4, 64):
        by_user = UserExamples(
            make_examples(make_numbered_records(*lengths), max_tokens=60),
            users,
            most_records=100,
            most_users=most_users,
        )
        batch_sizes: list[int] = []
        batches = list(by_user.batch_units(users))
        assert [len(batch) for batch in batches] == [
            min(most_users, len(sizes) - start) for start in range(0, len(sizes), most_users)
        ], "the number of open means must depend on memory alone"
        for batch in batches:
            shares = np.zeros(len(batch))
            for micro_batch, rows, share in batch.parts():
                assert micro_batch.input_ids.numel() <= 60
                assert len(rows) == len(share) == len(micro_batch)
                np.add.at(shares, rows, share)
                batch_sizes += micro_batch.input_ids[: len(rows), 0].tolist()
            np.testing.assert_allclose(shares, 1.0)
        assert sorted(batch_sizes) == list(range(sum(sizes))), "each record must occur once"


def stream(*purpose: str | int) -> RandomStream:
    return SeededRandomness(17).stream(*purpose)


def test_group_sampling_matches_its_definition() -> None:
    # A user is sampled if its 64 bits are below the rate; for a user with more than `most` records, those with the
    # smallest fresh random values are used.
    sizes, max_records, rate = (5, 1, 3, 2, 4, 1, 6), 3, 0.6
    dataset, users = make_dummy_examples("classification", sum(sizes)), make_users(*sizes)
    by_user = UserExamples(make_examples(dataset), users, most_records=max_records)
    chosen_records: list[list[tuple[int, ...]]] = []

    def cut(chosen: npt.NDArray[np.int64]) -> Any:
        batches = list(by_user.make_batcher(choosing)(chosen))
        chosen_records.append(sorted(tuple(records.tolist()) for batch in batches for records in batch.contributions))
        return batches

    choosing, record_bits = stream("choosing"), stream("choosing")
    records = dp_step.Records(count=len(by_user), declared_size=10, cut=cut)
    plan, users_bits = make_plan(sampling_rate=rate, unit="user", records_per_user=max_records), stream("sampling")
    take_private_steps(build_trained(), records, plan, steps=5, units=UserGradients, sampling=stream("sampling"))

    for step in chosen_records:
        expected = []
        for user, bits in enumerate(users_bits.uniform64(len(sizes))):
            if int(bits) >= int(rate * 2**64):
                continue
            sampled = list(range(sizes[user]))
            if sizes[user] > max_records:
                draws = [int(value) for value in record_bits.uniform64(sizes[user])]
                sampled = sorted(sorted(sampled, key=draws.__getitem__)[:max_records])
            expected.append(tuple(int(users[user][index]) for index in sampled))
        assert step == sorted(expected)
    assert len({tuple(step) for step in chosen_records}) > 1
    first_stream, untouched = stream("all"), stream("all")
    for count, max_records in ((1, 1), (3, 3), (3, 8)):  # with so few records nothing is drawn
        assert choose_records(count, max_records, first_stream).tolist() == list(range(count))
    assert first_stream.uniform64(1) == untouched.uniform64(1)


def make_round(*, unit: str = "user", max_records: int = 3, **changes: Any) -> TrainingRound:
    values = {"sampling_rate": 0.6, "noise_multiplier": 0.5, "max_grad_norm": 0.5} | changes
    planned = make_plan(unit=unit, records_per_user=max_records if unit == "user" else 1, **values)
    return make_work(plan=planned, training=TrainingSpec(local_steps=2, optimizer="sgd", learning_rate=0.5))


@pytest.mark.by_day(
    "random:bert-classification-private", "random:bert-classification-plain", "random:llama-causal_lm-private"
)
@pytest.mark.parametrize("noise", [0.5, 0.0], ids=["private", "plain"])
@kinds
def test_users_with_one_record_train_like_records(path: str, task: str, noise: float) -> None:
    dataset = make_dummy_examples(task, 9)
    user_level = UserExamples(make_examples(dataset), make_users(*[1] * 9), most_records=3)
    changes = {"noise_multiplier": noise}
    by_user = release_round(build_trained(path, task), user_level, make_round(**changes))
    by_record = release_round(build_trained(path, task), make_examples(dataset), make_round(unit="record", **changes))
    assert by_user.digest() == by_record.digest(), "both must have the same bits, sums, noise and steps"
    assert by_user.digest() != Adapter.from_task_model(build_trained(path, task)).digest()


def test_plain_training_also_averages_per_user() -> None:
    dataset, users = make_dummy_examples("causal_lm", 9), make_users(5, 3, 1)
    quiet = {"noise_multiplier": 0.0, "sampling_rate": 1.0, "local_steps": 1}
    model = build_trained("random:llama", "causal_lm")
    record_gradients_all = [compute_loop_gradient(model, dataset, record) for record in range(9)]
    expected = define_sum(record_gradients_all, [records.tolist() for records in users], clip=1e9)
    for max_tokens in (1, 10_000):
        model = build_trained("random:llama", "causal_lm")
        before = Adapter.from_task_model(model)
        by_user = UserExamples(make_examples(dataset, max_tokens=max_tokens), users, most_records=9)
        after = release_round(model, by_user, make_round(max_records=9, **quiet))
        for name, total in expected.items():
            actual_move = after.tensors[name].astype(np.float64) - before.tensors[name]
            np.testing.assert_allclose(actual_move, -0.5 * total / 10, rtol=2e-3, atol=1e-6)


def test_mismatched_units_and_shared_records_are_rejected() -> None:
    dataset = make_dummy_examples("classification", 4)
    by_user = UserExamples(make_examples(dataset), make_users(3, 1), most_records=2)
    for examples, unit in ((by_user, "record"), (make_examples(dataset), "user")):
        with pytest.raises(AssertionError, match="the sampled unit differs from the plan's privacy unit"):
            release_round(build_trained(), examples, make_round(unit=unit))
    for users in ([np.arange(3)], [np.arange(4), np.array([], dtype=np.int64)]):
        with pytest.raises(AssertionError):
            UserExamples(make_examples(dataset), users, most_records=2)
