"""Sums of integer noise, computed from their distributions without accountant, sampler or theorem.

All values are in cells as transmitted. Nothing here uses what `fedtune.privacy.distributed_noise` proves.
"""

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
from scipy import stats

Values = npt.NDArray[np.float64]

HALF_UP = 0.5


def compute_site_outcomes(value: float, deviation: float, *, most: int, shift: float = HALF_UP) -> Values:
    """Probabilities of floor(value + Z + shift) = -most, ..., most, with Z normal."""
    ends = (np.arange(-most, most + 2) - shift - value) / deviation
    # Differences are taken in the tail where both values are small, which keeps the digits of tail probabilities.
    below, above = stats.norm.cdf(ends), stats.norm.sf(ends)
    probabilities: Values = np.where(ends[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return probabilities


def compute_sum_outcomes(values: Sequence[float], deviation: float, *, most: int, shift: float = HALF_UP) -> Values:
    """Compute the probabilities of the sum of all sites' values, which are from -most to most each."""
    return reduce(np.convolve, [compute_site_outcomes(value, deviation, most=most, shift=shift) for value in values])


def compute_rounded_outcomes(mean: float, deviation: float, count: int, *, most: int, shift: float = HALF_UP) -> Values:
    """Compute probabilities of floor(Y + count shift - U_1 - ... - U_(count-1)); Y normal with variance `count` shares.

    That is the density at integers of Y plus `count` uniform values, by the inverse of its Fourier transform.
    """
    frequencies, width = np.linspace(0, 16 / deviation, 20_000, retstep=True)
    places = np.arange(-most * count, most * count + 1) - (mean + count * (shift - 0.5))
    transform = np.exp(-count * (deviation * frequencies) ** 2 / 2) * np.sinc(frequencies / 2 / np.pi) ** count
    transform[0] /= 2
    density: Values = np.cos(np.outer(places, frequencies)) @ transform * width / np.pi
    return density


def sample_outcomes(with_unit: Values, absent: Values, rate: float) -> Values:
    """Mix the outcomes with and without a unit that participates with probability `rate`."""
    return rate * with_unit + (1 - rate) * absent


def compute_delta(epsilon: float, left: Values, right: Values) -> float:
    """Compute the smallest delta at `epsilon` in both directions, exactly, from the hockey-stick divergence."""
    return max(
        float(np.maximum(one - np.exp(epsilon) * other, 0).sum()) for one, other in ((left, right), (right, left))
    )


def join_outcomes(*parts: Values) -> Values:
    """Compute joint probabilities of independent parts: tensor values or releases."""
    return reduce(lambda one, other: np.outer(one, other).ravel(), parts)


def compute_total_variation(left: Values, right: Values) -> float:
    """Compute half the sum of the absolute differences."""
    return float(np.abs(left - right).sum() / 2)


def passes_chi_square(values: npt.NDArray[np.int64], deviation: float) -> bool:
    """Whether Pearson's chi-square test at one in a million passes, over cells with at least 20 expected values."""
    most = math.ceil(20 * deviation)
    exact = compute_site_outcomes(0.0, deviation, most=most)
    often = np.flatnonzero(exact * values.size >= 20)
    first, last = often[0], often[-1]
    clipped = np.clip(values + most, first, last) - first
    expected = np.concatenate([[exact[: first + 1].sum()], exact[first + 1 : last], [exact[last:].sum()]])
    counts = np.bincount(clipped, minlength=len(expected))
    return bool(stats.chisquare(counts, expected / expected.sum() * values.size).pvalue > 1e-6)
