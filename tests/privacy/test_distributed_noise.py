"""A site's noise shares: the theorem behind them in exact numbers, and tests of the sampler against it."""

import dataclasses
import math
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedtune.privacy import distributed_noise
from fedtune.privacy.distributed_noise import MIN_CELLS, DistributedNoise, SecureAggregationSpec, add_noise_share
from fedtune.privacy.mechanism import GRID_BITS, add_gaussian_noise
from fedtune.privacy.randomness import RandomStream, SeededRandomness
from fedtune.spec import ConfigError

from .exact_sums import (
    HALF_UP,
    compute_rounded_outcomes,
    compute_sum_outcomes,
    compute_total_variation,
    passes_chi_square,
)

Whole = npt.NDArray[np.int64]
COUNT = 100_000
CLIP_NORM = 2**GRID_BITS

FOUR = DistributedNoise(num_sites=4, threshold=4, colluders=0, noise_multiplier=0.5, cell_bits=4, bound=100)
"""In the widest cells that are allowed: a share has a standard deviation of 8."""


def stream(*purpose: str | int) -> RandomStream:
    return SeededRandomness(17).stream("shares", *purpose)


def share(shared: DistributedNoise = FOUR, *purpose: str | int, sums: Whole | None = None) -> Whole:
    """Draw what one site sends for one tensor."""
    values = np.zeros(COUNT, dtype=np.int64) if sums is None else sums
    return add_noise_share({"a": values}, shared, stream(*purpose))["a"]


@pytest.mark.parametrize("deviation", [0.45, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("values", [(0.0, 0.0), (0.3, -1.7), (0.1, 0.25, 7.5), (0.5, 0.5, 0.0, 0.9, -3.1)])
def test_sum_of_rounded_shares_matches_the_rounded_sum_within_the_gap(values: Any, deviation: float) -> None:
    """Covers deviations small enough for a visible gap, and sums that are not integers."""
    max_value = 30
    for shift in (HALF_UP, 0.5 + 1 / 16):
        exact = compute_sum_outcomes(values, deviation, most=max_value, shift=shift)
        rounded = compute_rounded_outcomes(sum(values), deviation, len(values), most=max_value, shift=shift)
        assert rounded.sum() == pytest.approx(1, abs=1e-9)
        gap = compute_total_variation(exact, rounded)
        assert gap <= (len(values) - 1) * math.exp(-((math.pi * deviation) ** 2)) + 1e-12


def test_rounding_gap_is_negligible_at_the_coarsest_cell_size() -> None:
    for values in ((0.0, 0.0), (0.3, 0.45, -8.2, 5.5)):
        exact = compute_sum_outcomes(values, MIN_CELLS, most=100)
        rounded = compute_rounded_outcomes(sum(values), MIN_CELLS, len(values), most=100)
        assert compute_total_variation(exact, rounded) < 1e-12
    assert Fraction(2) ** 70 * Fraction(math.exp(-((math.pi * MIN_CELLS) ** 2))) < Fraction(1, 10**250)


@pytest.mark.parametrize("sites", [2, 4, 20])
def test_total_noise_matches_the_accounted_distribution(sites: int) -> None:
    """The reference is the Gaussian mechanism's own distribution, including rounding."""
    total = sum((share(FOUR, "site", site) for site in range(sites)), start=np.zeros(COUNT, dtype=np.int64))
    deviation = 8 * math.sqrt(sites)
    with_rounding = math.sqrt(sites * (64 + 1 / 12))
    assert passes_chi_square(total, with_rounding)
    for wrong_deviation in (8.0, 8.0 * sites, 0.95 * deviation, 1.05 * deviation):
        assert not passes_chi_square(total, wrong_deviation)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(4, GRID_BITS),
    st.sampled_from([0.5, 0.75635, 4.05]),
    st.lists(st.integers(-(2**31), 2**31), min_size=1, max_size=40),
)
def test_noised_sum_is_rounded_once_to_the_nearest_cell(bits: int, noise: float, sums: list[int]) -> None:
    """A sum is clipped before noise is added, and never rounded before it.

    With rounding first, sums one clip norm apart could end 256 clip norms apart: a million values move by a cell each.
    """
    shared, width = dataclasses.replace(FOUR, noise_multiplier=noise, cell_bits=bits, bound=64), 2 ** (GRID_BITS - bits)
    values = {"a": np.array([sums], dtype=np.int64), "b": np.array([-5], dtype=np.int64)}
    bounded = {name: np.clip(value, -64 * CLIP_NORM, 64 * CLIP_NORM) for name, value in values.items()}
    exact = add_gaussian_noise(bounded, noise_multiplier=noise, stream=stream("nearest"))
    sent = add_noise_share(values, shared, stream("nearest"))
    assert list(sent) == ["a", "b"]
    for name, value in sent.items():
        assert (value.shape, value.dtype) == (values[name].shape, np.int64)
        assert (2 * np.abs(value * width - exact[name]) <= width).all()


def test_shared_values_never_exceed_the_largest_value() -> None:
    shared = dataclasses.replace(FOUR, bound=3)
    values = share(shared, "largest", sums=np.full(COUNT, 9 * CLIP_NORM, dtype=np.int64))
    assert np.abs(values).max() <= shared.largest_value == 3 * 16 + 16 * 8 + 1
    assert values.max() > shared.largest_value - 12 * 8, "some values must come close to the bound"
    assert stats.norm.sf(16) < 1e-56


@pytest.mark.parametrize(
    ("num_sites", "threshold", "colluders", "min_threshold"),
    [(4, 2, 0, 3), (5, 3, 1, 4), (20, 10, 0, 11), (20, 13, 6, 14), (3, 2, 1, 3), (4, 5, 0, 3)],
)
def test_threshold_allowing_two_unmasked_sums_is_refused(
    num_sites: int, threshold: int, colluders: int, min_threshold: int
) -> None:
    sites = {"num_sites": num_sites, "threshold": threshold, "colluders": colluders}
    for build in (partial(SecureAggregationSpec, **sites), partial(dataclasses.replace, FOUR, **sites)):
        with pytest.raises(
            ConfigError, match=f"from {min_threshold} to {num_sites}, the number of sites: .* two sums"
        ) as raised:
            build()
        assert raised.value.key == "threshold"
    if min_threshold <= num_sites:
        dataclasses.replace(FOUR, **{**sites, "threshold": min_threshold})  # type: ignore[arg-type]


@settings(deadline=None, derandomize=True)
@given(st.floats(0.01, 1e4))
def test_cell_bits_below_the_minimum_are_refused(noise: float) -> None:
    bits = distributed_noise.compute_min_cell_bits(noise)
    assert dataclasses.replace(FOUR, noise_multiplier=noise, cell_bits=bits).cell_bits == bits
    if bits:
        with pytest.raises(ConfigError, match=f"at least {bits}"):
            dataclasses.replace(FOUR, noise_multiplier=noise, cell_bits=bits - 1)


@settings(deadline=None, derandomize=True)
@given(st.floats(0.01, 1e4), st.integers(1, 1024))
def test_combined_noise_never_exceeds_the_sum_of_variances(noise: float, shares: int) -> None:
    total, exact = Fraction(distributed_noise.combine_noise_shares(noise, shares)) ** 2, Fraction(noise) ** 2 * shares
    assert exact * (1 - Fraction(1, 2**50)) <= total <= exact
    assert distributed_noise.combine_noise_shares(noise, 1) == noise


@settings(deadline=None, derandomize=True)
@given(st.floats(0.02, 1e3), st.integers(2, 1024), st.data())
def test_noise_share_suffices_for_the_honest_sites_of_the_smallest_sum(total: float, threshold: int, data: Any) -> None:
    colluders = data.draw(st.integers(0, threshold - 1))
    secure = SecureAggregationSpec(
        num_sites=threshold, threshold=threshold, colluders=colluders
    ).compute_share_for_total(total)
    honest = threshold - colluders
    assert Fraction(secure) ** 2 * honest >= Fraction(total) ** 2 * (1 - Fraction(1, 2**50))
    assert distributed_noise.combine_noise_shares(secure, honest) >= total
    assert distributed_noise.combine_noise_shares(round(secure - 2e-4, 4), honest) < total, (
        "the noise must be minimal to four digits"
    )


def test_honest_site_count_subtracts_colluders_from_survivors() -> None:
    shared = dataclasses.replace(FOUR, num_sites=5, colluders=1)
    assert [shared.count_honest_shares(survivors=number, colluders=1) for number in (5, 4, 2, 1)] == [4, 3, 1, 1]
    assert shared.count_honest_shares(survivors=5, colluders=4) == 1
    assert shared.count_honest_shares(survivors=5, colluders=0) == 5
    for impossible in (0, 6):
        with pytest.raises(AssertionError):
            shared.count_honest_shares(survivors=impossible, colluders=0)
