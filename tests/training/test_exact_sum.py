"""Each unit's contribution to a sum has a norm of at most the clip norm, exactly, in integers."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data import Shapes, TextDataset
from fedtune.training import dp_step
from fedtune.training.dp_step import SMALLEST_NORM, add_clipped, compute_clipped_contributions
from fedtune.training.examples import SiteExamples
from fedtune.training.users import UserExamples, UserGradients

from .conftest import CELLS, Table

CLIPS = [1e-18, 1e-12, 1e-6, 1e-3, 0.1, 1.0, 2.0**-7, 3.3, 1e3, 1e6]
KINDS = ["normal", "alike", "one coordinate", "two sizes", "denormal", "largest", "odd", "steps of a cell"]
SHAPES = {"base.lora_A.weight": (3, 4), "base.lora_B.weight": (7,), "head.weight": (2, 5)}
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
MADE = {"kind": st.sampled_from(KINDS), "clip": st.sampled_from(CLIPS)}
RELATIVE, OF_USERS = st.sampled_from([1e-3, 1.0, 1e6]), st.lists(st.integers(1, 6), min_size=1, max_size=6)
Cells = dict[str, torch.Tensor]


def compute_squares(cells: Cells) -> list[int]:
    rows = torch.cat([one.flatten(1).double() for one in cells.values()], dim=1).tolist()
    assert all(value == int(value) for row in rows for value in row), "cells must be integers"
    return [sum(int(value) ** 2 for value in row) for row in rows]


def make_dummy_gradients(draws: np.random.Generator, kind: str, size: float, units: int) -> npt.NDArray[np.float32]:
    """Make gradients of a given kind, (units, values); the second-last kind has some non-finite values."""
    count = sum(SIZES.values())
    values = draws.standard_normal((units, count)) * size
    if kind == "alike":
        values[:] = draws.standard_normal((units, 1)) * size
    elif kind == "one coordinate":
        values *= np.arange(count) == draws.integers(count, size=(units, 1))
    elif kind == "two sizes":
        values *= np.where(draws.random((units, count)) < 0.5, 1.0, 1e-7)
    elif kind == "denormal":
        values = draws.integers(-9, 9, size=(units, count)) * 1.4e-45
    elif kind == "largest":
        values = np.sign(values) * draws.choice([1e29, 1e30, 3e30, 3.4e38], size=(units, 1))
    elif kind == "odd":
        special = draws.choice([np.nan, np.inf, -np.inf, 1e38, 0.0], size=(units, count))
        values = np.where(draws.random((units, count)) < 0.05, special, values)
    elif kind == "steps of a cell":
        values = np.round(values / size * 64) / CELLS * size
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def split_tensors(values: npt.NDArray[np.float32]) -> dict[str, torch.Tensor]:
    parts = torch.split(torch.from_numpy(values), list(SIZES.values()), dim=1)
    return {name: part.reshape(-1, *SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}


def empty() -> Cells:
    return {name: torch.zeros(shape, dtype=torch.int64) for name, shape in SHAPES.items()}


def sum_gradients(gradients: dict[str, torch.Tensor], clip: float) -> Cells:
    sums = empty()
    add_clipped(sums, gradients, clip)
    return sums


def are_equal(left: Cells, right: Cells) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_unit_contribution_never_exceeds_the_clip_norm(kind: str, clip: float) -> None:
    draws = np.random.default_rng(1)
    longest = 0
    for relative in (1e-9, 1e-3, 1.0, 1 + 1e-6, 1 + 1e-7, 1e3, 1e9):
        contributions = compute_clipped_contributions(
            split_tensors(make_dummy_gradients(draws, kind, clip * relative, 64)), clip
        )
        squares = compute_squares(contributions)
        assert max(squares) <= CELLS**2
        longest = max(longest, *squares)
    # Gradients that can reach the bound must reach it, or the test would prove nothing.
    reaches = {"denormal": False, "largest": True, "steps of a cell": clip * 1e9 / CELLS > clip}
    if clip >= SMALLEST_NORM and reaches.get(kind, True):
        assert longest > (CELLS * (1 - 3e-6)) ** 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=29, max_size=29),
    clip=st.one_of(MADE["clip"], st.floats(1e-18, 1e6)),
)
def test_any_float32_gradient_contributes_at_most_the_clip_norm(values: list[float], clip: float) -> None:
    gradients = split_tensors(np.array([values], dtype=np.float32))
    (square,) = compute_squares(compute_clipped_contributions(gradients, clip))
    assert square <= CELLS**2
    if not np.isfinite(values).all():
        assert square == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    **MADE, relative=RELATIVE, units=st.integers(1, 60), cuts=st.lists(st.integers(0, 60)), seed=st.integers(0, 9999)
)
def test_removing_a_unit_changes_the_sum_by_exactly_its_contribution(
    kind: str, clip: float, relative: float, units: int, cuts: list[int], seed: int
) -> None:
    draws = np.random.default_rng(seed)
    values = make_dummy_gradients(draws, kind, clip * relative, units)
    gone = int(draws.integers(units))
    larger, smaller = (sum_gradients(split_tensors(each), clip) for each in (values, np.delete(values, gone, axis=0)))
    own = compute_clipped_contributions(split_tensors(values[gone : gone + 1]), clip)
    moved = {name: larger[name] - smaller[name] for name in larger}
    assert are_equal(moved, {name: own[name].to(torch.int64).reshape(SHAPES[name]) for name in own})
    assert compute_squares({name: one[None] for name, one in moved.items()})[0] <= CELLS**2
    sums = empty()
    for part in np.split(draws.permutation(units), sorted(cut for cut in cuts if cut < units)):
        if len(part):
            add_clipped(sums, split_tensors(values[part]), clip)
    assert are_equal(sums, larger), "order and batching must not change a cell"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("values", [31, 4096, 100_003])
def test_contribution_does_not_depend_on_the_number_of_rows(threads: int, values: int) -> None:
    """With many tensors, torch's sum over tensors once depended on the number of rows in the last bit of norms."""
    torch.set_num_threads(threads)  # restored by an autouse fixture
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn((13, values), generator=generator)
    many_tensors = {str(number): torch.randn((40, 50), generator=generator) * 3.0**-number for number in range(26)}
    example_gradients = {"a": gradient, "b": gradient[:, :7] * 3}
    parts, norms = compute_clipped_contributions(example_gradients, 0.5), dp_step._compute_joint_norms(many_tensors)
    for rows in (1, 2, 3, 4, 7, 12):
        for start in {0, 1, 13 - rows}:
            part = slice(start, start + rows)
            fewer = compute_clipped_contributions({name: value[part] for name, value in example_gradients.items()}, 0.5)
            assert all(torch.equal(fewer[name], value[part]) for name, value in parts.items())
            assert torch.equal(
                dp_step._compute_joint_norms({name: value[part] for name, value in many_tensors.items()}), norms[part]
            )


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_contribution_does_not_depend_on_memory_layout(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Norms differ in the last bit unless rows have the same layout; with float32 weights this is extremely rare.
    checked = Mock(side_effect=dp_step._compute_squared_row_norms)
    monkeypatch.setattr(dp_step, "_compute_squared_row_norms", checked)
    gradient = torch.randn((5, 40_000), generator=torch.Generator().manual_seed(3))
    expected = compute_clipped_contributions({"a": gradient}, 0.5)["a"]
    by_column = gradient[:rows].t().contiguous().t()
    shifted = torch.empty(rows * 40_000 + 1)[1:].view(rows, -1).copy_(gradient[:rows])
    every_other = torch.stack([gradient, gradient], dim=1).flatten(0, 1)[::2][:rows]
    for variant in (by_column, shifted, every_other):
        assert torch.equal(compute_clipped_contributions({"a": variant}, 0.5)["a"], expected[:rows])
    assert all(call.args[0].is_contiguous() for call in checked.call_args_list)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(**MADE, relative=RELATIVE, sizes=OF_USERS, most_users=st.integers(1, 7), seed=st.integers(0, 999))
def test_user_changes_the_sum_by_only_its_contribution(
    kind: str, clip: float, relative: float, sizes: list[int], most_users: int, seed: int
) -> None:
    draws = np.random.default_rng(seed)
    count = sum(sizes)
    values = make_dummy_gradients(draws, kind, clip * relative, count)
    table = Table(split_tensors(values))
    ids = tuple(np.array([number, *[1] * draws.integers(0, 19)], dtype=np.int32) for number in range(count))
    dataset = TextDataset(ids, np.zeros(count, dtype=np.int64))
    records = SiteExamples(dataset, pad_id=0, shapes=Shapes.from_limits(max_length=20, max_tokens=60), device="cpu")
    users = np.split(draws.permutation(count), np.cumsum(sizes)[:-1])
    by_user = UserExamples(records, users, most_records=9, most_users=most_users)

    def sum_users(chosen: list[int]) -> Cells:
        sums = empty()
        for batch in by_user.batch_units([users[user] for user in chosen]):
            add_clipped(sums, UserGradients(table).compute_gradients(batch), clip)
        return sums

    everyone = list(range(len(sizes)))
    total, gone = sum_users(everyone), int(draws.integers(len(sizes)))
    assert are_equal(total, sum_users(everyone[::-1]))
    rest, own = sum_users([user for user in everyone if user != gone]), sum_users([gone])
    assert are_equal(own, {name: total[name] - rest[name] for name in total})
    assert np.isfinite(values[users[gone]]).all() or not any(one.any() for one in own.values()), "NaN must count as 0"
    assert compute_squares({name: one[None] for name, one in own.items()})[0] <= CELLS**2


@pytest.mark.parametrize("bad_value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_sum_equals_its_contributions_despite_non_finite_gradients(bad_value: float) -> None:
    """A sum processes one tensor at a time, and drops units only after the last tensor."""
    gradients = split_tensors(np.random.default_rng(6).normal(size=(9, sum(SIZES.values()))).astype(np.float32))
    gradients["base.lora_B.weight"][2, 3] = gradients["base.lora_A.weight"][7, 0, 0] = bad_value
    for clip in (0.5, 1e-9, 100.0):
        sums = sum_gradients(gradients, clip)
        for name, contributions in compute_clipped_contributions(gradients, clip).items():
            assert torch.equal(sums[name].ravel(), contributions.sum(dim=0).to(torch.int64)), name


def test_overlong_contribution_is_dropped_without_affecting_other_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = {"a": torch.randn(6, 50, generator=torch.Generator().manual_seed(2))}
    compute_norms = dp_step._compute_joint_norms

    def shorten_one(norms: Any) -> torch.Tensor:
        squares = compute_norms(norms)
        return torch.where(torch.arange(len(squares)) == 3, 0.5 * squares, squares) if len(squares) == 6 else squares

    expected = compute_clipped_contributions(gradients, 0.1)["a"]
    monkeypatch.setattr(dp_step, "_compute_joint_norms", shorten_one)
    sums = {"a": torch.zeros(50, dtype=torch.int64)}
    add_clipped(sums, gradients, 0.1)
    assert torch.equal(sums["a"], (expected.sum(dim=0) - expected[3]).to(torch.int64))
    assert not compute_clipped_contributions(gradients, 0.1)["a"][3].any()
