"""Epsilon by another program than fedtune's: losses on a grid, added up by a Fourier transform."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH, _MOST = 1e-4, 30.0
_Masses = npt.NDArray[np.float64]
_EDGES = np.arange(-_MOST, _MOST + WIDTH / 2, WIDTH)
_CDF = np.vectorize(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)))


def epsilon(charges: Iterable[Mapping[str, Any]], delta: float) -> float:
    """The least epsilon at `delta` of the charges of a report.json; too large by `WIDTH` for each of them at most."""
    both = [1.0 + 0j, 1.0 + 0j]
    for charge in charges:
        event = charge["event"]
        rate, gaussian = event.get("sampling_probability", 1.0), event.get("event", event)
        for way in (0, 1):
            masses = _losses(rate, gaussian["noise_multiplier"], removed=way == 0)
            both[way] = both[way] * np.fft.rfft(np.roll(masses, -(len(masses) // 2))) ** charge["count"]
    return max(_epsilon(np.fft.irfft(one, len(_EDGES)), delta) for one in both)


def _losses(rate: float, sigma: float, *, removed: bool) -> _Masses:
    """How likely each privacy loss of one step is, for a record that was removed or added (Abadi et al. 2016)."""
    # Where the densities of (1 - rate) N(0, sigma^2) + rate N(1, sigma^2) and of N(0, sigma^2) have this log ratio.
    edges = _EDGES if removed else -_EDGES
    ratios = (np.exp(edges) - (1 - rate)) / rate
    points = np.where(ratios > 0, sigma**2 * np.log(np.maximum(ratios, 1e-300)) + 0.5, -np.inf)
    below = _CDF(points / sigma)
    if removed:
        below = (1 - rate) * below + rate * _CDF((points - 1) / sigma)
    masses: _Masses = np.abs(np.diff(below, prepend=below[0] if removed else 1.0))
    return masses


def _epsilon(masses: _Masses, delta: float) -> float:
    losses = np.roll(_EDGES, -(len(_EDGES) // 2))
    low, high = 0.0, _MOST
    while high - low > 1e-6:
        middle = (low + high) / 2
        above = losses > middle
        rest = float((masses[above] * -np.expm1(middle - losses[above])).sum())
        low, high = (middle, high) if rest > delta else (low, middle)
    return high
