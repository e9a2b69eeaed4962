"""Users as privacy units: sampled whole, the mean of their records' gradients clipped once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedtune.data import Batch, Shapes, TextDataset, collate
from fedtune.model import Adapter, LoraSpec
from fedtune.privacy import accountant
from fedtune.privacy.mechanism import cell, choose_records
from fedtune.privacy.randomness import RandomStream, SeededRandomness
from fedtune.training import dp_step
from fedtune.training.dp_step import SMALLEST_NORM, add_clipped
from fedtune.training.examples import SiteExamples
from fedtune.training.local import RoundOfTraining, train_round
from fedtune.training.per_example import attached
from fedtune.training.spec import TrainingSpec
from fedtune.training.users import UserBatch, UserExamples, UserGradients

KINDS = [
    ("random:bert", "classification"),
    ("random:llama", "causal_lm"),
    ("random:bert", "pairs"),
    ("random:bert", "triplets"),
]
kinds = pytest.mark.parametrize(("path", "task"), KINDS)
Gradients = dict[str, npt.NDArray[np.float64]]


def users_of_sizes(*sizes: int) -> list[npt.NDArray[np.int64]]:
    """The places of each user's records, dealt out in turns so that no user's lie side by side."""
    owners = [user for turn in range(max(sizes, default=0)) for user, size in enumerate(sizes) if turn < size]
    return [np.flatnonzero(np.array(owners) == user) for user in range(len(sizes))]


def examples_of(dataset: TextDataset, *, max_tokens: int = 40) -> SiteExamples:
    shapes = Shapes.of(max_length=20, max_tokens=max_tokens)
    return SiteExamples(dataset, pad_id=0, shapes=shapes, device="cpu")


def first(most: int) -> Callable[[int], npt.NDArray[np.int64]]:
    """The first records of a user: a choice that is the same in every step."""
    return lambda count: np.arange(min(count, most), dtype=np.int64)


def norm(gradient: Gradients) -> float:
    return float(np.sqrt(sum(np.sum(np.square(value)) for value in gradient.values())))


# The definition once more, in numpy: for each user that joins, the mean over its records that take part, clipped.


def defined(each: Sequence[Gradients], users: Sequence[Sequence[int]], *, clip: float) -> Gradients:
    """The sum before noise, from the gradient of every record and the records that each joining user brings."""
    total = {name: np.zeros_like(value) for name, value in each[0].items()}
    for records in users:
        mean = {name: sum(each[record][name] for record in records) / len(records) for name in total}
        factor = min(1.0, clip / norm(mean)) if norm(mean) else 1.0
        for name in total:
            total[name] += factor * mean[name]
    return total


def gradients_alone(model: Any, dataset: TextDataset) -> list[Gradients]:
    """By plain autograd, one record at a time."""
    parameters = model.trainable()
    found = []
    for record in range(len(dataset)):
        loss = model.losses(collate(dataset, [record], pad_id=0)).sum()
        each = torch.autograd.grad(loss, list(parameters.values()))
        found.append({name: value.double().numpy() for name, value in zip(parameters, each, strict=True)})
    return found


def users_sum(
    model: Any, examples: UserExamples, chosen: npt.NDArray[np.int64], *, clip: float, most: int
) -> Gradients:
    sums = dp_step.zeros(model.trainable())
    with attached(model) as of_each:
        for batch in examples.cut(chosen, choose=first(most)):
            add_clipped(sums, UserGradients(of_each).of(batch), clip)
    return {name: total.numpy() * cell(clip) for name, total in sums.items()}


@pytest.mark.by_day("random:bert-classification-1", "random:llama-causal_lm-3", "random:bert-triplets-100")
@pytest.mark.parametrize("most", [1, 3, 100])
@kinds
def test_the_sum_is_what_the_definition_says_however_it_is_cut(
    trained: Any, examples: Any, path: str, task: str, most: int
) -> None:
    model, dataset, users = trained(path, task), examples(task, 14), users_of_sizes(5, 1, 3, 1, 4)
    each = gradients_alone(model, dataset)
    chosen = np.array([0, 2, 3, 4])
    taking_part = [users[user][:most].tolist() for user in chosen]
    sizes = [norm(defined(each, [records], clip=1e9)) for records in taking_part]
    clip = float(np.median(sizes))
    assert min(sizes) < clip < max(sizes), "some are clipped and some are not"
    expected = defined(each, taking_part, clip=clip)
    for max_tokens in (1, 13, 40, 10_000):
        by_user = UserExamples(examples_of(dataset, max_tokens=max_tokens), users, most_records=most)
        found = users_sum(trained(path, task), by_user, chosen, clip=clip, most=most)
        assert norm({name: found[name] - expected[name] for name in expected}) <= 1e-5 * clip * len(chosen)
    assert norm(expected) > 1e-2 * clip


class Table:
    """Made-up gradients, looked up by a record's first token; stands in for `PerExampleGradients`."""

    def __init__(self, gradients: dict[str, torch.Tensor]) -> None:
        self._gradients = gradients

    def of(self, batch: Batch) -> dict[str, torch.Tensor]:
        empty = batch.input_ids[:, 0].new_tensor(range(len(batch), len(batch.input_ids)))
        return {name: value[batch.input_ids[:, 0]].index_fill(0, empty, 0.0) for name, value in self._gradients.items()}


def made_up(lengths: Sequence[int]) -> TextDataset:
    """Records of these lengths whose first token is their number."""
    ids = tuple(np.array([number, *[1] * (length - 1)], dtype=np.int32) for number, length in enumerate(lengths))
    return TextDataset(ids, np.zeros(len(ids), dtype=np.int64))


def table_sum(
    gradients: dict[str, torch.Tensor], by_user: UserExamples, chosen: Sequence[int], *, clip: float, most: int
) -> torch.Tensor:
    sums = {name: torch.zeros(value.shape[1:], dtype=torch.int64) for name, value in gradients.items()}
    of_users = UserGradients(Table(gradients))
    for batch in by_user.cut(np.array(chosen, dtype=np.int64), choose=first(most)):
        add_clipped(sums, of_users.of(batch), clip)
    return torch.cat([total.flatten() for total in sums.values()])


def length(cells: torch.Tensor) -> float:
    """The norm of a sum in clip norms."""
    return float(cells.double().norm()) / 2**24


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_all_records_of_one_user_move_the_sum_by_at_most_the_clip_norm(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5), label="records of each user")
    users = users_of_sizes(*sizes)
    total = sum(sizes)
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=total, max_size=total), label="tokens")
    exponents = data.draw(st.lists(st.integers(-20, 38), min_size=2, max_size=2), label="size of each tensor")
    clip = data.draw(st.sampled_from([1e-3, 1.0, 50.0]), label="clip norm")
    most = data.draw(st.sampled_from([1, 3, 100]), label="records of a user")
    before, after = data.draw(st.tuples(*[st.sampled_from([1, 15, 60, 10_000])] * 2), label="tokens of a micro-batch")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    gradients = {
        f"tensor {number}": torch.randn((total, 2, 3), generator=generator) * 10.0**exponent
        for number, exponent in enumerate(exponents)
    }
    dataset = made_up(lengths)
    everyone = list(range(len(sizes)))
    gone = data.draw(st.sampled_from(everyone), label="the user")
    sums = [
        table_sum(
            gradients,
            UserExamples(examples_of(dataset, max_tokens=max_tokens), users, most_records=most),
            chosen,
            clip=clip,
            most=most,
        )
        for chosen, max_tokens in (([user for user in everyone if user != gone], before), (everyone, after))
    ]
    assert sum(value**2 for value in (sums[1] - sums[0]).tolist()) <= 2**48, "exactly, in whole numbers"


def test_a_user_of_many_large_gradients_reaches_the_bound_and_not_beyond() -> None:
    users, gradients = users_of_sizes(40, 1), {"a": torch.full((41, 3), 7.0)}
    for max_tokens in (1, 50, 10_000):
        by_user = UserExamples(examples_of(made_up([5] * 41), max_tokens=max_tokens), users, most_records=40)
        moved = length(table_sum(gradients, by_user, [0], clip=2.0, most=40))
        assert 1 - 1e-5 < moved <= 1.0


def test_the_mean_is_clipped_and_not_each_record() -> None:
    # Opposite records: clipped one by one they would leave half of a unit behind; their mean is short and stays whole.
    gradients = {"a": torch.tensor([[30.0, 0.0], [-29.5, 0.0]])}
    by_user = UserExamples(examples_of(made_up([1, 1])), users_of_sizes(2), most_records=2)
    assert table_sum(gradients, by_user, [0], clip=1.0, most=2).tolist() == pytest.approx([0.25 * 2**24, 0], rel=2e-6)


@pytest.mark.parametrize("clip", [1e-6, 1.0])
def test_what_is_left_of_records_that_cancel_counts_as_a_gradient_of_its_size(clip: float) -> None:
    # 1e-7 is what rounding leaves of two opposite gradients of size 1.  A mean is a function of that user's records
    # bit for bit, so this moves with nobody else; and no mean below a thousandth counts for a whole clip norm.
    def moved(left: float) -> torch.Tensor:
        gradients = {"a": torch.tensor([[1.0, left], [-1.0, left]])}
        by_user = UserExamples(examples_of(made_up([1, 1])), users_of_sizes(2), most_records=2)
        return table_sum(gradients, by_user, [0], clip=clip, most=2)

    assert length(moved(1e-7)) <= 1.1e-7 / max(clip, SMALLEST_NORM)
    # There is no jump at a thousandth.
    for below, above in ((9.99e-4, 1.001e-3), (1e-5, 1.01e-5)):
        assert length(moved(above) - moved(below)) <= 1e-2 * min(1, above / clip) + 2**-24
    assert length(moved(2e-3)) == pytest.approx(min(1, 2e-3 / clip), rel=1e-3 if clip == 1 else 2e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_user_with_a_gradient_that_is_not_finite_counts_as_zero_and_no_other_does(bad: float) -> None:
    users = users_of_sizes(2, 2, 1)
    gradients = {"a": torch.tensor([[0.1, 0.2]] * 5), "b": torch.full((5, 1), 0.3)}
    gradients["b"][int(users[1][1])] = bad
    for max_tokens in (1, 10_000):
        by_user = UserExamples(examples_of(made_up([1] * 5), max_tokens=max_tokens), users, most_records=9)
        total = table_sum(gradients, by_user, [0, 1, 2], clip=1.0, most=9)
        assert total.tolist() == pytest.approx([0.2 * 2**24, 0.4 * 2**24, 0.6 * 2**24], rel=2e-6)


def test_micro_batches_keep_their_budget_and_users_whole() -> None:
    sizes = (30, 1, 2, 7, 1, 4)
    users, lengths = users_of_sizes(*sizes), [3 + number % 9 for number in range(sum(sizes))]
    for most_users in (1, 4, 64):
        by_user = UserExamples(
            examples_of(made_up(lengths), max_tokens=60), users, most_records=100, most_users=most_users
        )
        seen: list[int] = []
        batches = list(by_user.cut(np.arange(len(sizes)), choose=first(100)))
        assert [len(batch) for batch in batches] == [
            min(most_users, len(sizes) - start) for start in range(0, len(sizes), most_users)
        ], "as many means are open at a time as memory was set aside for, whatever the records are"
        for batch in batches:
            shares = torch.zeros(len(batch), dtype=torch.float64)
            for micro_batch, rows, share in batch.parts():
                assert micro_batch.input_ids.numel() <= 60
                assert len(rows) == len(share) == len(micro_batch)
                shares.index_add_(0, rows, share)
                seen += micro_batch.input_ids[: len(rows), 0].tolist()
            torch.testing.assert_close(shares, torch.ones_like(shares))
        assert sorted(seen) == list(range(sum(sizes))), "each record once"


def test_each_row_belongs_to_its_user() -> None:
    users = users_of_sizes(3, 1, 5)
    owner = {int(record): user for user, records in enumerate(users) for record in records}
    for max_tokens in (1, 20, 10_000):
        by_user = UserExamples(
            examples_of(made_up([4, 1, 2, 3, 5, 2, 1, 6, 3]), max_tokens=max_tokens), users, most_records=9
        )
        found = {
            int(token): {owner[int(other)] for other in batch.contributions[int(row)]}
            for batch in by_user.cut(np.arange(3), choose=first(9))
            for part, rows, _ in batch.parts()
            for token, row in zip(part.input_ids[: len(part), 0], rows, strict=True)
        }
        assert found == {record: {user} for record, user in owner.items()}


# Who takes part.


def stream(*purpose: str | int) -> RandomStream:
    return SeededRandomness(17).stream(*purpose)


def test_group_sampling_equals_its_definition_on_the_same_bits(plan: Any, trained: Any, examples: Any) -> None:
    # A user joins where its 64 bits are below the rate; of a user with more than `most` records those with the
    # smallest of their own fresh draws take part.
    sizes, most, rate = (5, 1, 3, 2, 4, 1, 6), 3, 0.6
    dataset, users = examples("classification", sum(sizes)), users_of_sizes(*sizes)
    by_user = UserExamples(examples_of(dataset), users, most_records=most)
    taken: list[list[tuple[int, ...]]] = []

    def cut(chosen: npt.NDArray[np.int64]) -> Any:
        batches = list(by_user.cut_with(choosing)(chosen))
        taken.append(sorted(tuple(records.tolist()) for batch in batches for records in batch.contributions))
        return batches

    model, choosing, sampling = trained(), stream("choosing"), stream("sampling")
    records = dp_step.Records(count=len(by_user), declared_size=10, cut=cut)
    optimizer = torch.optim.SGD(list(model.trainable().values()), lr=0.0)
    for _ in range(5):
        with attached(model) as of_each:
            dp_step.dp_sgd_step(
                UserGradients(of_each),
                records,
                plan(sampling_rate=rate, unit="user", records_per_user=most),
                parameters=model.trainable(),
                optimizer=optimizer,
                sampling=sampling,
                noise=stream("noise"),
            )

    users_bits, record_bits = stream("sampling"), stream("choosing")
    for step in taken:
        expected = []
        for user, bits in enumerate(users_bits.uniform64(len(sizes))):
            if int(bits) >= int(rate * 2**64):
                continue
            drawn = list(range(sizes[user]))
            if sizes[user] > most:
                draws = [int(value) for value in record_bits.uniform64(sizes[user])]
                drawn = sorted(sorted(drawn, key=draws.__getitem__)[:most])
            expected.append(tuple(int(users[user][place]) for place in drawn))
        assert step == sorted(expected)
    assert len({tuple(step) for step in taken}) > 1


def test_of_a_users_records_each_has_the_same_chance_in_every_step() -> None:
    one, counts, pairs = stream("records"), np.zeros(10, dtype=int), np.zeros((10, 10), dtype=int)
    for _ in range(4000):
        drawn = choose_records(10, 4, one)
        assert len(set(drawn.tolist())) == 4
        counts[drawn] += 1
        pairs[np.ix_(drawn, drawn)] += 1
    # Ten records at 1e-6 each; a chance 10 % off is rejected on the sum over two of them.
    assert all(stats.binomtest(int(count), 4000, 0.4).pvalue > 1e-6 for count in counts)
    together = [pairs[left, right] for left in range(10) for right in range(left)]
    assert all(stats.binomtest(int(count), 4000, 0.4 * 3 / 9).pvalue > 1e-6 for count in together)


@pytest.mark.parametrize(("count", "most"), [(1, 1), (3, 3), (3, 8)])
def test_of_few_records_all_take_part_and_nothing_is_drawn(count: int, most: int) -> None:
    one, untouched = stream("all"), stream("all")
    assert choose_records(count, most, one).tolist() == list(range(count))
    assert one.uniform64(1) == untouched.uniform64(1)


def test_fresh_draws_let_every_record_have_its_turn() -> None:
    by_user = UserExamples(examples_of(made_up([1] * 12)), users_of_sizes(12), most_records=2)
    cut = by_user.cut_with(stream("turns"))
    seen = {int(record) for _ in range(60) for batch in cut(np.array([0])) for record in batch.contributions[0]}
    assert seen == set(range(12))
    assert all(len(batch.contributions[0]) == 2 for batch in cut(np.array([0])))


# A whole round.


@pytest.fixture
def work(plan: Any) -> Any:
    def make(*, unit: str = "user", most: int = 3, **changes: Any) -> RoundOfTraining:
        values = {"sampling_rate": 0.6, "noise_multiplier": 0.5, "max_grad_norm": 0.5} | changes
        return RoundOfTraining(
            site="bank_a",
            round=1,
            attempt=1,
            plan=plan(unit=unit, records_per_user=most if unit == "user" else 1, **values),
            training=TrainingSpec(local_steps=2, optimizer="sgd", learning_rate=0.5),
            declared_size=10,
            max_adapter_value=100.0,
        )

    return make


def released(model: Any, examples: Any, work: RoundOfTraining, *, seed: int = 5) -> Adapter:
    return train_round(model, Adapter.of(model), examples, work, randomness=SeededRandomness(seed))


@pytest.mark.by_day(
    "random:bert-classification-private", "random:bert-classification-plain", "random:llama-causal_lm-private"
)
@pytest.mark.parametrize("noise", [0.5, 0.0], ids=["private", "plain"])
@kinds
def test_users_with_one_record_each_train_as_records_do(
    trained: Any, examples: Any, work: Any, path: str, task: str, noise: float
) -> None:
    dataset = examples(task, 9)
    alone = UserExamples(examples_of(dataset), users_of_sizes(*[1] * 9), most_records=3)
    changes = {"noise_multiplier": noise}
    by_user = released(trained(path, task), alone, work(**changes))
    by_record = released(trained(path, task), examples_of(dataset), work(unit="record", **changes))
    assert by_user.digest() == by_record.digest(), "the same bits, sums, noise and steps"
    assert by_user.digest() != Adapter.of(trained(path, task)).digest()


def test_the_denominator_is_the_declared_number_of_users(
    trained: Any, examples: Any, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accountant, "LEAST_NOISE", 0.0)  # so little that the sum itself is seen; no plan may have it
    dataset, users = examples("classification", 9), users_of_sizes(4, 3, 2)
    quiet = {"noise_multiplier": 1e-9, "sampling_rate": 1.0, "local_steps": 1, "max_grad_norm": 0.1}
    model = trained()
    before = Adapter.of(model)
    after = released(model, UserExamples(examples_of(dataset), users, most_records=9), work(most=9, **quiet))
    each = gradients_alone(trained(), dataset)
    expected = defined(each, [records.tolist() for records in users], clip=0.1)
    for name, total in expected.items():
        moved = after.tensors[name].astype(np.float64) - before.tensors[name]
        np.testing.assert_allclose(moved, -0.5 * total / 10, rtol=1e-3, atol=1e-7)


def test_without_privacy_the_mean_of_each_user_counts_once_too(trained: Any, examples: Any, work: Any) -> None:
    dataset, users = examples("causal_lm", 9), users_of_sizes(5, 3, 1)
    quiet = {"noise_multiplier": 0.0, "sampling_rate": 1.0, "local_steps": 1}
    each = gradients_alone(trained("random:llama", "causal_lm"), dataset)
    expected = defined(each, [records.tolist() for records in users], clip=1e9)
    for max_tokens in (1, 10_000):
        model = trained("random:llama", "causal_lm")
        before = Adapter.of(model)
        by_user = UserExamples(examples_of(dataset, max_tokens=max_tokens), users, most_records=9)
        after = released(model, by_user, work(most=9, **quiet))
        for name, total in expected.items():
            moved = after.tensors[name].astype(np.float64) - before.tensors[name]
            np.testing.assert_allclose(moved, -0.5 * total / 10, rtol=2e-3, atol=1e-6)


def test_an_empty_sample_adds_noise_and_counts(trained: Any, examples: Any, work: Any) -> None:
    dataset = examples("classification", 4)
    by_user = UserExamples(examples_of(dataset), users_of_sizes(3, 1), most_records=2)
    model = trained()
    before = Adapter.of(model)
    after = released(model, by_user, work(most=2, sampling_rate=1e-12))
    assert all((after.tensors[name] != before.tensors[name]).any() for name in before.tensors)
    nobody = UserExamples(examples_of(examples("classification", 0)), [], most_records=2)
    assert released(trained(), nobody, work(most=2)).digest() == released(trained(), nobody, work(most=2)).digest(), (
        "a site without anybody answers as any other"
    )


def test_a_plan_of_one_unit_never_trains_on_another(trained: Any, examples: Any, work: Any) -> None:
    dataset = examples("classification", 4)
    by_user = UserExamples(examples_of(dataset), users_of_sizes(3, 1), most_records=2)
    for wrong, unit in ((by_user, "record"), (examples_of(dataset), "user")):
        with pytest.raises(AssertionError, match="what is sampled and what the plan counts differ"):
            released(trained(), wrong, work(unit=unit))


def test_kept_states_of_frozen_layers_change_nothing(trained: Any, examples: Any) -> None:
    model = trained(lora=LoraSpec(rank=2, alpha=4.0, layers=(-1,)))
    dataset, users = examples("classification", 9), users_of_sizes(5, 1, 3)
    plain, keeping = (UserExamples(examples_of(dataset, max_tokens=25), users, most_records=4) for _ in range(2))
    keeping.keep_frozen_states(model)
    sums = [users_sum(model, each, np.arange(3), clip=0.5, most=4) for each in (plain, keeping)]
    assert norm({name: sums[0][name] - sums[1][name] for name in sums[0]}) <= 1e-5 * 0.5 * 3


def test_every_record_has_one_user_and_every_user_a_record(examples: Any) -> None:
    dataset = examples("classification", 3)
    for users in ([np.array([0, 1])], [np.array([0, 1, 2]), np.array([], dtype=np.int64)]):
        with pytest.raises(AssertionError):
            UserExamples(examples_of(dataset), users, most_records=2)


def test_a_cut_that_loses_a_user_stops_the_step(trained: Any, examples: Any, plan: Any) -> None:
    # A cut that lost a user would make the sum smaller than what the denominator stands for.
    dataset, model = examples("classification", 4), trained()
    by_user = UserExamples(examples_of(dataset), users_of_sizes(2, 2), most_records=2)
    records = dp_step.Records(count=2, declared_size=2, cut=lambda chosen: by_user.cut(chosen[:1], choose=first(2)))
    optimizer = torch.optim.SGD(list(model.trainable().values()), lr=0.0)
    with attached(model) as of_each, pytest.raises(AssertionError, match="counts exactly once"):
        dp_step.dp_sgd_step(
            UserGradients(of_each),
            records,
            plan(unit="user"),
            parameters=model.trainable(),
            optimizer=optimizer,
            sampling=stream("s"),
            noise=stream("n"),
        )


def test_what_a_micro_batch_of_users_holds() -> None:
    batch = UserBatch([np.array([2, 0]), np.array([1])], examples_of(made_up([1, 2, 3])))
    assert len(batch) == 2
    found = {
        int(token): int(row)
        for part, rows, _ in batch.parts()
        for token, row in zip(part.input_ids[: len(part), 0], rows, strict=True)
    }
    assert found == {0: 0, 1: 1, 2: 0}
