"""Differences in few bits: what they are off by, and that one has a single encoding."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.privacy.few_bits import Difference, Tensors, most_level
from fedtune.privacy.release import Update
from fedtune.spec import ConfigError

BEGIN: Tensors = {"a": np.linspace(-1, 1, 7, dtype=np.float32), "b": np.zeros((2, 3), np.float32)}


def moved(by: float, begin: Tensors = BEGIN) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(1)
    return {name: value + draws.normal(0, by, value.shape).astype(np.float32) for name, value in begin.items()}


def difference(bits: int = 8, by: float = 0.1, about: str = "") -> Difference:
    return Difference.between(BEGIN, moved(by), bits=bits, about=about)


@pytest.mark.parametrize("bits", [8, 4])
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9),
    start=st.floats(-1, 1, width=32),
)
def test_every_value_is_off_by_less_than_a_step_and_none_beyond_the_largest(
    bits: int, values: list[float], start: float
) -> None:
    begin = {"a": np.full(len(values), start, np.float32)}
    end = {"a": np.array(values, np.float32)}
    found = Difference.between(begin, end, bits=bits, about="")
    wanted = end["a"].astype(np.float64) - begin["a"]
    got = found.steps["a"] * found.levels["a"].astype(np.float64)
    assert (np.abs(got - wanted) < found.steps["a"] + 1e-300).all()
    assert np.abs(found.levels["a"]).max() <= most_level(bits)
    # The step is the largest value's share, to a float32's precision.
    assert np.abs(got).max() <= np.abs(wanted).max() * (1 + 3e-7) + 4e-43
    assert (found.steps["a"] == 0) == (not wanted.any())


@pytest.mark.parametrize("bits", [8, 4])
def test_values_are_right_on_average(bits: int) -> None:
    begin = {"a": np.zeros(4, np.float32)}
    end = {"a": np.array([1.0, 0.333, -0.07, 0.0], np.float32)}
    found = [Difference.between(begin, end, bits=bits, about=str(n)).added_to(begin)["a"] for n in range(4000)]
    step = 1 / most_level(bits)
    # Each is one of two neighbours, so its standard deviation is at most half a step.
    assert np.abs(np.mean(found, axis=0) - end["a"]).max() < 5 * step / 2 / math.sqrt(len(found)) + 1e-6
    assert len({value[1] for value in found}) == 2, "rounded up and down"
    assert {value[3] for value in found} == {0.0}, "what did not move does not move"


def test_asked_again_it_is_the_same_and_otherwise_another() -> None:
    assert difference(about="round 1").to_bytes() == difference(about="round 1").to_bytes()
    assert difference(about="round 1").to_bytes() != difference(about="round 2").to_bytes()


@pytest.mark.parametrize(("bits", "size"), [(8, 7 + 6), (4, 4 + 3)])
def test_bytes_are_as_few_as_the_bits(bits: int, size: int) -> None:
    data = difference(bits).to_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    assert len(data) == 8 + header + size
    again = Difference.from_bytes(data)
    assert again.to_bytes() == data
    assert again.fits(BEGIN)
    for name, value in difference(bits).added_to(BEGIN).items():
        np.testing.assert_array_equal(again.added_to(BEGIN)[name], value)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(wrong: float) -> None:
    end = moved(0.1)
    end["a"][3] = wrong
    found = Difference.between(BEGIN, end, bits=4, about="")
    assert not found.fits(BEGIN)
    assert not np.isfinite(found.added_to(BEGIN)["a"]).all()
    assert np.isfinite(found.added_to(BEGIN)["b"]).all()
    assert Difference.from_bytes(found.to_bytes()).to_bytes() == found.to_bytes()


def test_a_step_beyond_float32_is_seen_in_what_comes_out() -> None:
    found = difference()
    beyond = Difference(bits=8, steps={"a": 3e38, "b": 0.0}, levels=found.levels)
    assert beyond.fits(BEGIN)
    assert not np.isfinite(beyond.added_to(BEGIN)["a"]).all()


@pytest.mark.parametrize(
    "begin",
    [
        {"b": BEGIN["b"], "a": BEGIN["a"]},
        {"a": BEGIN["a"]},
        {"a": BEGIN["a"], "b": BEGIN["b"].reshape(3, 2)},
        {"a": BEGIN["a"], "c": BEGIN["b"]},
    ],
)
def test_it_fits_its_own_shapes_alone(begin: Tensors) -> None:
    assert difference().fits(BEGIN)
    assert not difference().fits(begin)


@pytest.mark.parametrize("step", [-0.1, math.nan, math.inf])
def test_a_step_that_is_none_fits_nothing(step: float) -> None:
    found = difference()
    assert not Difference(bits=8, steps={**found.steps, "b": step}, levels=found.levels).fits(BEGIN)


def edited(of: int = 4, **fields: Any) -> bytes:
    """A difference's bytes with other words in its header."""
    data = difference(of).to_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + size]) | fields).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


STEP = 0.1
TENSORS = [["a", [7], STEP], ["b", [2, 3], STEP]]


DAMAGED = [
    b"",
    difference().to_bytes()[:-1],
    difference().to_bytes() + b"\0",
    struct.pack("<Q", 1 << 60) + b"{}",
    edited(bits=8),
    edited(bits=5),
    edited(bits=32),
    edited(bits=4.0),
    edited(bits=True),
    edited(more=1),
    edited(tensors=[["a", [7], STEP], ["a", [2, 3], STEP]]),
    edited(tensors=[["a", [7], STEP]]),
    edited(tensors=[["a", [-7], STEP], ["b", [2, 3], STEP]]),
    edited(tensors=[["a", [1 << 62], STEP], ["b", [2, 3], STEP]]),
    edited(tensors=[["a", [7.0], STEP], ["b", [2, 3], STEP]]),
    edited(tensors=[["a", [7], "0.1"], ["b", [2, 3], STEP]]),
    edited(tensors=[["a", [7], None], ["b", [2, 3], STEP]]),
    edited(tensors=[["a", [7], STEP, 1], ["b", [2, 3], STEP]]),
    edited(tensors=TENSORS)[:-4] + b"\x08" + edited(tensors=TENSORS)[-3:],  # a level of -8
    edited(tensors=TENSORS)[:-4] + b"\x11" + edited(tensors=TENSORS)[-3:],  # behind the odd seventh
    edited(8)[:-1] + b"\x80",  # a level of -128
]


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_anything_else_is_no_update(data: bytes) -> None:
    update = Update(site="a", run="r", round=1, tensors=difference())
    assert Update.from_bytes(update.to_bytes()).to_bytes() == update.to_bytes()
    whole = update.to_bytes().removesuffix(difference().to_bytes())
    with pytest.raises(ConfigError, match="must be an encoded update"):
        Update.from_bytes(whole + data)


def test_the_edits_above_begin_with_a_difference_that_is_one() -> None:
    assert Difference.from_bytes(edited(tensors=TENSORS)).levels["b"].shape == (2, 3)
    assert Difference.from_bytes(edited(8)).bits == 8


def test_the_first_of_two_numbers_lies_in_the_lower_half_of_a_byte() -> None:
    levels = {"a": np.array([[1, -2], [3, -7]], np.int8), "b": np.array([5], np.int8), "c": np.zeros(0, np.int8)}
    for bits, ends in ((4, b"\xe1\x93\x05"), (8, b"\x01\xfe\x03\xf9\x05")):
        made = Difference(bits=bits, steps=dict.fromkeys(levels, 0.5), levels=levels)
        assert made.to_bytes().endswith(b"}" + ends)
        read = Difference.from_bytes(made.to_bytes())
        assert all(np.array_equal(read.levels[name], value) for name, value in levels.items())
