"""Shapes of micro-batches: fixed by public settings, and a record's shape by that record alone."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedtune.data import Shapes, TextDataset, collate
from fedtune.data.batching import isolate_example
from tests.builders import pad_length

quick = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def draw_run_shapes(draw: st.DrawFn) -> tuple[Shapes, int]:
    """Draw shapes and the length of their longest record."""
    longest = draw(st.integers(2, 600))
    positions = draw(st.one_of(st.none(), st.just(longest), st.integers(longest, longest + 20)))
    return Shapes.from_limits(max_length=longest, max_tokens=draw(st.integers(1, 5000)), positions=positions), longest


@st.composite
def draw_run_records(draw: st.DrawFn) -> tuple[Shapes, np.ndarray]:
    """Draw shapes and the lengths of some records."""
    shapes, longest = draw(draw_run_shapes())
    count = draw(st.integers(1, 60))
    lengths = draw(st.lists(st.sampled_from([1, longest // 2, longest - 1, longest]), min_size=count, max_size=count))
    others = np.random.default_rng(draw(st.integers(0, 99))).integers(1, longest, size=count, endpoint=True)
    return shapes, np.where(draw(st.booleans()), np.maximum(lengths, 1), others).astype(np.int32)


@quick
@given(run=draw_run_records(), data=st.data())
def test_each_record_is_batched_exactly_once_in_its_length_bucket(run: Any, data: st.DataObject) -> None:
    shapes, lengths = run
    ids = tuple(np.ones(length, dtype=np.int32) for length in lengths)
    dataset = TextDataset(ids, np.zeros(len(ids), dtype=np.int64))
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True) | st.just([*range(len(lengths))]))
    parts = list(shapes.cut(np.array(chosen, dtype=np.int64), lengths))
    assert sorted(int(place) for part in parts for place in part.places) == sorted(chosen)
    for part in parts:
        assert {pad_length(shapes, int(lengths[place])) for place in part.places} == {part.length}
        assert all(lengths[part.places] <= part.length)
        assert part.length in shapes.lengths
        assert part.rows in shapes.rows(part.length)
        assert 1 <= len(part.places) <= shapes.capacity(part.length, part.rows)
        batch = collate(dataset, part.places, pad_id=0, shape=(part.rows, part.length))
        assert (batch.attention_mask.sum(dim=1) >= 1).all(), "each row must attend to at least one token"
        # Without padding, attention uses another code path, which would compute a record differently.
        for part_batch in (batch, *(isolate_example(batch, row) for row in (None, 0, len(batch) - 1))):
            assert part_batch.input_ids.shape == (part.rows, part.length)
            assert (part_batch.attention_mask == 0).any()
    for length in shapes.lengths:  # records of one length keep their order
        together = [int(place) for part in parts if part.length == length for place in part.places]
        assert together == [place for place in chosen if pad_length(shapes, int(lengths[place])) == length]


@quick
@given(run=draw_run_shapes())
def test_row_counts_stay_within_the_token_budget(run: tuple[Shapes, int]) -> None:
    shapes, _ = run
    for length in shapes.lengths:
        fewest = 2 if length == shapes.full else 1
        numbers = shapes.rows(length)
        assert list(numbers) == sorted(set(numbers), reverse=True)
        assert len(numbers) <= 4, "there must be few shapes, so that a trial can cover all"
        assert all(rows * length <= shapes.max_tokens or rows == fewest for rows in numbers)
        assert all(shapes.capacity(length, rows) >= 1 for rows in numbers)


@quick
@given(longest=st.integers(1, 3000), extra=st.one_of(st.none(), st.integers(0, 30)))
def test_bucket_lengths_cover_every_record_with_little_padding(longest: int, extra: int | None) -> None:
    positions = None if extra is None else longest + extra
    shapes = Shapes.from_limits(max_length=longest, max_tokens=1024, positions=positions)
    assert list(shapes.lengths) == sorted(set(shapes.lengths))
    assert positions is None or shapes.lengths[-1] <= positions
    assert (shapes.full == longest) == (positions == longest)
    for tokens in range(1, longest + 1):
        length = pad_length(shapes, tokens)
        assert tokens < length or (tokens == length == shapes.full)
        if length != shapes.lengths[-1] and length > 12:
            assert length < 1.6 * tokens + 4, "there must be little padding"


def test_shapes_follow_from_public_settings() -> None:
    shapes = Shapes.from_limits(max_length=40, max_tokens=480)
    assert shapes == Shapes.from_limits(max_length=40, max_tokens=480)
    assert shapes.lengths == (12, 16, 20, 24, 32, 48)
    assert [shapes.rows(length) for length in (12, 48)] == [(40, 20, 10, 5), (10, 5, 2, 1)]
    assert Shapes.from_limits(max_length=40, max_tokens=480, positions=512) == shapes
    tight = Shapes.from_limits(max_length=40, max_tokens=480, positions=40)
    assert (tight.lengths, tight.full) == ((12, 16, 20, 24, 40), 40)
    assert tight.rows(40) == (12, 6, 3, 2)
    assert [tight.capacity(40, rows) for rows in tight.rows(40)] == [11, 5, 2, 1]
    public = {"lengths", "max_tokens", "full", "most_rows", "row_shares", "fixed"}
    assert {field.name for field in dataclasses.fields(Shapes)} == public
    limited = dataclasses.replace(shapes, most_rows=(17, 99, 20, 16, 15, 3))
    assert [limited.rows(length) for length in (12, 16, 48)] == [(17, 8, 4, 2), (30, 15, 7, 3), (3, 1)]
    few = dataclasses.replace(tight, most_rows=(1, 1, 1, 1, 1))
    assert [few.rows(length) for length in (12, 40)] == [(1,), (2,)]
    assert [pad_length(Shapes.from_limits(max_length=longest, max_tokens=9), longest) for longest in (1, 7)] == [8, 8]
    with pytest.raises(AssertionError):  # a record longer than the maximum must not be dropped silently
        list(Shapes.from_limits(max_length=9, max_tokens=99).cut(np.array([0, 1]), np.array([3, 99])))


@quick
@given(run=draw_run_shapes(), count=st.integers(1, 200), data=st.data())
def test_shape_cutting_minimizes_work(run: tuple[Shapes, int], count: int, data: st.DataObject) -> None:
    shapes, longest = run
    length = pad_length(shapes, data.draw(st.integers(1, longest)))
    lengths = np.full(count, 1 if length == shapes.lengths[0] else length - 1)
    assume(pad_length(shapes, int(lengths[0])) == length)

    def compute_work(numbers: list[int]) -> int:
        return sum(rows * length + 100 for rows in numbers)

    cut = [part.rows for part in shapes.cut(np.arange(count, dtype=np.int64), lengths)]
    assert cut == sorted(cut, reverse=True)
    most = shapes.rows(length)[0]
    full, rest = divmod(count, shapes.capacity(length, most))
    for rows in shapes.rows(length):
        room = shapes.capacity(length, rows)
        assert compute_work(cut) <= compute_work([rows] * -(-count // room)), "a single row count must not be cheaper"
        assert compute_work(cut) <= compute_work([most] * full + [rows] * -(-rest // room)), (
            "a single row count for the rest must not be cheaper"
        )
