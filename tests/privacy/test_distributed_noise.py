"""The shares of noise that a site adds: the theorem behind them in exact numbers, and the sampler against it."""

import dataclasses
import itertools
import math
from fractions import Fraction
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedtune.privacy.distributed_noise import (
    FINER,
    FINER_BITS,
    LEAST_CELLS,
    SharedNoise,
    Together,
    add_share,
    least_cell_bits,
    together,
)
from fedtune.privacy.mechanism import GRID_BITS, add_gaussian_noise
from fedtune.privacy.randomness import RandomStream, SeededRandomness
from fedtune.spec import ConfigError

from .exact_sums import HALF_UP, of_a_sum, of_rounded_total, sent_by_one, total_variation

Whole = npt.NDArray[np.int64]
COUNT = 100_000
ONCE_IN_A_MILLION = 1e-6
CLIP_NORM = 2**GRID_BITS

FOUR = SharedNoise(num_sites=4, threshold=4, colluders=0, noise_multiplier=0.5, cell_bits=4, bound=100)
"""With the widest cells that are allowed: a share has a standard deviation of 8."""


def stream(*purpose: str | int) -> RandomStream:
    return SeededRandomness(17).stream("shares", *purpose)


def share(shared: SharedNoise = FOUR, *purpose: str | int, sums: Whole | None = None) -> Whole:
    """What one site sends of one tensor."""
    values = np.zeros(COUNT, dtype=np.int64) if sums is None else sums
    return add_share({"a": values}, shared, stream(*purpose))["a"]


# The theorem.


@pytest.mark.parametrize("deviation", [0.45, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("values", [(0.0, 0.0), (0.3, -1.7), (0.1, 0.25, 7.5), (0.5, 0.5, 0.0, 0.9, -3.1)])
def test_a_sum_of_rounded_shares_is_the_rounded_sum_but_for_the_stated_gap(
    values: tuple[float, ...], deviation: float
) -> None:
    """At deviations so small that there is a gap, and for sums that are no whole numbers."""
    most = 30
    for shift in (HALF_UP, 0.5 + 1 / 16):
        exact = of_a_sum(values, deviation, most=most, shift=shift)
        rounded = of_rounded_total(sum(values), deviation, len(values), most=most, shift=shift)
        assert rounded.sum() == pytest.approx(1, abs=1e-9)
        gap = total_variation(exact, rounded)
        assert gap <= (len(values) - 1) * math.exp(-((math.pi * deviation) ** 2)) + 1e-12


def test_at_the_widest_cells_there_is_no_gap_to_see() -> None:
    for values in ((0.0, 0.0), (0.3, 0.45, -8.2, 5.5)):
        exact = of_a_sum(values, LEAST_CELLS, most=100)
        rounded = of_rounded_total(sum(values), LEAST_CELLS, len(values), most=100)
        assert total_variation(exact, rounded) < 1e-12
    assert Fraction(2) ** 70 * Fraction(math.exp(-((math.pi * LEAST_CELLS) ** 2))) < Fraction(1, 10**250)


# The sampler.


def fits(values: Whole, deviation: float, *, mean: float = 0.0, shift: float = HALF_UP) -> bool:
    """Pearson's chi-square against the exact probability of each cell that is expected 20 times or more."""
    most = int(20 * deviation)
    exact = sent_by_one(mean, deviation, most=most, shift=shift)
    often = np.flatnonzero(exact * values.size >= 20)
    first, last = often[0], often[-1]
    held = np.clip(values + most, first, last) - first
    expected = np.concatenate([[exact[: first + 1].sum()], exact[first + 1 : last], [exact[last:].sum()]])
    counts = np.bincount(held, minlength=len(expected))
    return bool(stats.chisquare(counts, expected / expected.sum() * values.size).pvalue > ONCE_IN_A_MILLION)


@pytest.mark.parametrize(("noise", "bits"), [(0.5, 4), (0.75635, 4), (0.01, 10), (4.05, 1), (10.0, 0)])
def test_a_share_has_the_exact_probability_of_every_cell(noise: float, bits: int) -> None:
    shared = dataclasses.replace(FOUR, noise_multiplier=noise, cell_bits=bits)
    values = share(shared, "cells", str(noise))
    assert values.dtype == np.int64
    deviation = noise * 2**bits
    shift = 0.5 + 0.5 / 2 ** (GRID_BITS - bits)
    assert fits(values, deviation, shift=shift)
    for wrong in (0.95, 1.05):
        assert not fits(values, wrong * deviation, shift=shift)
    assert not fits(values, deviation, shift=shift - 0.5), "rounded down"


@pytest.mark.parametrize("sites", [2, 4, 20])
def test_the_sum_of_all_shares_is_what_is_accounted(sites: int) -> None:
    """Against the Gaussian mechanism's own distribution, rounding included."""
    total = sum((share(FOUR, "site", site) for site in range(sites)), start=np.zeros(COUNT, dtype=np.int64))
    deviation = 8 * math.sqrt(sites)
    with_rounding = math.sqrt(sites * (64 + 1 / 12))
    assert fits(total, with_rounding)
    for wrong in (8.0, 8.0 * sites, 0.95 * deviation, 1.05 * deviation):
        assert not fits(total, wrong)


def test_values_of_a_share_and_shares_of_sites_and_releases_are_independent() -> None:
    one, other, later = (share(FOUR, *purpose).astype(np.float64) for purpose in ((1, 1), (2, 1), (1, 2)))
    pairs = [(one, other), (one, later), *((one[:-lag], one[lag:]) for lag in (1, 2, COUNT // 2))]
    for (left, right), change in itertools.product(pairs, (np.array, np.square)):
        assert stats.pearsonr(change(left), change(right)).pvalue > ONCE_IN_A_MILLION


def test_on_the_finest_grid_a_share_is_the_gaussian_mechanism_of_one_site() -> None:
    sums = {"a": np.arange(12, dtype=np.int64).reshape(3, 4), "b": np.array([-5], dtype=np.int64)}
    fine = dataclasses.replace(FOUR, cell_bits=GRID_BITS)
    sent = add_share(sums, fine, stream("fine"))
    plain = add_gaussian_noise(sums, noise_multiplier=0.5, stream=stream("fine"))
    assert list(sent) == list(sums)
    for name, tensor in sums.items():
        assert sent[name].shape == tensor.shape
        np.testing.assert_array_equal(sent[name], plain[name])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(4, GRID_BITS), st.lists(st.integers(-(2**31), 2**31), min_size=1, max_size=40))
def test_what_is_sent_is_sum_and_noise_to_the_nearest_cell(bits: int, sums: list[int]) -> None:
    shared, width = dataclasses.replace(FOUR, cell_bits=bits, bound=1000), 2 ** (GRID_BITS - bits)
    values = {"a": np.array(sums, dtype=np.int64)}
    exact = add_gaussian_noise(values, noise_multiplier=0.5, stream=stream("nearest"))["a"]
    sent = add_share(values, shared, stream("nearest"))["a"]
    assert (2 * np.abs(sent * width - exact) <= width).all()


def test_beside_a_shorter_clip_norm_a_share_is_as_large_as_all_others_and_rounded_as_they_are() -> None:
    for finer in (1.0, 1 + 1 / FINER, 3.0):
        own = dataclasses.replace(FOUR, noise_multiplier=0.5 * finer)
        zeros = {"a": np.zeros(COUNT, dtype=np.int64)}
        assert fits(add_share(zeros, own, stream("finer", str(finer)), finer=finer)["a"], 8.0)
    # Of a width that is no whole number of fine cells the first rounding would show.
    assert not FOUR.may_be_finer(1 + 0.5 / FINER)
    assert not dataclasses.replace(FOUR, cell_bits=GRID_BITS - FINER_BITS).may_be_finer(1 + 1 / FINER)
    with pytest.raises(AssertionError, match="whole number"):
        add_share(zeros, own, stream("odd"), finer=1 + 0.5 / FINER)


def test_a_sum_is_never_rounded_before_its_noise() -> None:
    """Rounded first, sums one clip norm apart become 256 clip norms apart: of a million values each moves by a cell."""
    values, width = 2**20, 2 ** (GRID_BITS - 4)
    without = np.full(values, width // 2 - 2**14, dtype=np.int64)
    with_unit = without + 2**14  # of norm 2**14 * sqrt(2**20) = 2**24 cells: one clip norm
    assert np.linalg.norm(with_unit - without) == CLIP_NORM
    coarsely = ((with_unit + width // 2) // width - (without + width // 2) // width) * width
    assert np.linalg.norm(coarsely) > 60 * CLIP_NORM, "what a wrong implementation releases"
    # The mean difference shows it: its standard deviation is 0.011 cells.
    moved = np.mean(share(FOUR, "with", sums=with_unit) - share(FOUR, "without", sums=without))
    assert abs(moved - 2**14 / width) < 6 * 8 * math.sqrt(2 / values)


def test_sums_are_cut_off_at_the_bound_before_their_noise_and_not_after() -> None:
    shared = dataclasses.replace(FOUR, bound=2)
    for sign in (-1, 1):
        values = share(shared, "bound", sums=np.full(COUNT, sign * 50 * CLIP_NORM, dtype=np.int64))
        assert fits(values, 8.0, mean=sign * 2 * 2**4)
        assert (sign * values > 2 * 2**4).mean() == pytest.approx(0.5, abs=0.05)


def test_no_value_passes_the_largest_one() -> None:
    shared = dataclasses.replace(FOUR, bound=3)
    values = share(shared, "largest", sums=np.full(COUNT, 9 * CLIP_NORM, dtype=np.int64))
    assert np.abs(values).max() <= shared.largest_value == 3 * 16 + 16 * 8 + 1
    assert values.max() > shared.largest_value - 12 * 8, "the bound is there for some reason"
    assert stats.norm.sf(16) < 1e-56


# What a plan may say, and how large a share is.


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_sites": 1, "threshold": 1}, "num_sites"),
        ({"num_sites": 1025}, "num_sites"),
        *(({"threshold": value}, "threshold") for value in (1, 5, 3.0, "4")),
        *(({"colluders": value}, "colluders") for value in (-1, 4, True)),
        *(({"noise_multiplier": value}, "noise_multiplier") for value in (0.0, math.nan)),
        *(({"cell_bits": value}, "cell_bits") for value in (25, 3, -1)),
        *(({"bound": value}, "bound") for value in (0, 2**32 + 1)),
    ],
)
def test_a_plan_outside_what_is_proved_is_refused(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        dataclasses.replace(FOUR, **changes)  # type: ignore[arg-type]
    assert raised.value.key == key


@pytest.mark.parametrize(
    ("num_sites", "threshold", "colluders", "least"),
    [(4, 2, 0, 3), (5, 3, 1, 4), (20, 10, 0, 11), (20, 13, 6, 14), (3, 2, 1, 3), (4, 5, 0, 3)],
)
def test_sites_of_which_a_server_could_read_two_sums_make_no_noise_together(
    num_sites: int, threshold: int, colluders: int, least: int
) -> None:
    sites = {"num_sites": num_sites, "threshold": threshold, "colluders": colluders}
    for make in (partial(Together, **sites), partial(dataclasses.replace, FOUR, **sites)):
        with pytest.raises(ConfigError, match=f"from {least} to the {num_sites} sites .*, or .* two sums") as raised:
            make()
        assert raised.value.key == "threshold"
    if least <= num_sites:
        dataclasses.replace(FOUR, **{**sites, "threshold": least})  # type: ignore[arg-type]


@settings(deadline=None, derandomize=True)
@given(st.floats(0.01, 1e4))
def test_the_fewest_bits_are_accepted_and_fewer_are_not(noise: float) -> None:
    bits = least_cell_bits(noise)
    assert dataclasses.replace(FOUR, noise_multiplier=noise, cell_bits=bits).cell_bits == bits
    if bits:
        with pytest.raises(ConfigError, match=f"at least {bits}"):
            dataclasses.replace(FOUR, noise_multiplier=noise, cell_bits=bits - 1)


@settings(deadline=None, derandomize=True)
@given(st.floats(0.01, 1e4), st.integers(1, 1024))
def test_shares_together_are_never_said_to_be_more_than_their_variances(noise: float, shares: int) -> None:
    total, exact = Fraction(together(noise, shares)) ** 2, Fraction(noise) ** 2 * shares
    assert exact * (1 - Fraction(1, 2**50)) <= total <= exact
    assert together(noise, 1) == noise


@settings(deadline=None, derandomize=True)
@given(st.floats(0.02, 1e3), st.integers(2, 1024), st.data())
def test_a_share_is_enough_for_the_honest_sites_of_the_smallest_sum(
    total: float, threshold: int, data: st.DataObject
) -> None:
    colluders = data.draw(st.integers(0, threshold - 1))
    one = Together(num_sites=threshold, threshold=threshold, colluders=colluders).share_of(total)
    honest = threshold - colluders
    assert Fraction(one) ** 2 * honest >= Fraction(total) ** 2 * (1 - Fraction(1, 2**50))
    assert together(one, honest) >= total
    assert together(round(one - 2e-4, 4), honest) < total, "and not more than that, to four digits"


def test_honest_sites_of_a_sum() -> None:
    shared = dataclasses.replace(FOUR, num_sites=5, colluders=1)
    assert [shared.honest(survivors=number, colluders=1) for number in (5, 4, 2, 1)] == [4, 3, 1, 1]
    assert shared.honest(survivors=5, colluders=4) == 1
    assert shared.honest(survivors=5, colluders=0) == 5
    for impossible in (0, 6):
        with pytest.raises(AssertionError):
            shared.honest(survivors=impossible, colluders=0)
