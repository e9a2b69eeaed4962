"""Privacy loss distributions for compositions of Gaussian and Laplace mechanisms, with rigorous rounding errors.

Each mechanism becomes a loss distribution on a grid that dominates the exact one ("connect the dots", Doroshenko et al.
2022, arXiv 2207.04380). A Fourier transform composes the distributions. Its rounding error is about as large as the
largest probability at every point, while delta is a tail probability and may be far smaller. So each distribution is
tilted first: probabilities are multiplied by e^(tilt x loss), which moves the mass of the composition to the epsilon of
interest. After the tilt is undone, the rounding error is small compared with e^(log moment - tilt x epsilon),
Chernoff's bound on the tail. Each delta returned here includes that rounding error; docs/guarantee.md has the proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import fft, special

Floats = npt.NDArray[np.float64]
# the sampling rate of a Gaussian mechanism; "laplace": Laplace noise, and no sampling
Rate = float | Literal["laplace"]

UNIT = 2.0**-53  # unit roundoff: relative error of one floating-point operation
_FFT_ROUNDING = 12 * UNIT  # relative error of a transform, per factor of 2 in its length; see docs/guarantee.md
_REACH = 10.0  # truncation in standard deviations; the tail (8e-24) counts as an infinite loss
MIN_DELTA_PER_STEP = 1e-21  # per step; a smaller delta would consist mostly of truncated tails
_TAIL = 1e-15  # mass of a tilted distribution outside the computed window, on each side
_MIN_PROBABILITY = 1e-50  # smaller probabilities count as an infinite loss
_LARGEST_EXPONENT = 700.0  # exp(700) is finite in float64
_MAX_ROUNDING = 0.1  # above, second-order terms of the error bound matter


@dataclass(frozen=True)
class StepLosses:
    """Discretized loss distribution of one mechanism, for one direction of the add-or-remove relation.

    Args:
        lowest: the smallest loss, in units of the grid width.
        log_probabilities: (losses,), log probabilities of consecutive losses from `lowest` upwards.
        infinite: probability of an infinite loss.
        rounding: relative rounding error: at each epsilon, delta is too small by at most this fraction of the
            probability of a larger loss.
    """

    lowest: int
    log_probabilities: Floats
    infinite: float
    rounding: float

    def losses(self, width: float) -> Floats:
        return _make_loss_grid(self.lowest, self.log_probabilities.size, width)


@lru_cache(maxsize=8)  # one entry takes up to 500 MB at the smallest noise
def discretize_sampled_gaussian(rate: float, noise: float, width: float, *, adding: bool) -> StepLosses:
    """Discretize the privacy loss of a Poisson-sampled Gaussian mechanism.

    Args:
        rate: sampling rate, in (0, 1].
        noise: noise multiplier.
        width: grid width of the losses, in nats.
        adding: the direction: a unit is added, instead of removed.
    """
    reach = (2 * _REACH * noise + (-1 if adding else 1)) / (2 * noise**2), -(2 * _REACH * noise + 1) / (2 * noise**2)
    # Largest and smallest loss within the truncation: log(1 - rate + rate e^gain).
    stays = math.log1p(-rate) if rate < 1 else -math.inf
    most, least = (float(np.logaddexp(stays, math.log(rate) + gain)) for gain in reach)
    ends = (-most, -least) if adding else (least, most)
    lowest, highest = math.floor(ends[0] / width), math.ceil(ends[1] / width)
    deltas = compute_hockey_stick(rate, noise, _make_loss_grid(lowest, highest + 2 - lowest, width), adding=adding)
    return _connect_dots(lowest, deltas, width, noise=noise, beyond=float(special.ndtr(-_REACH)))


@lru_cache(maxsize=8)
def discretize_laplace(noise: float, width: float) -> StepLosses:
    """Discretize the privacy loss of a Laplace mechanism, which is equal for adding and removing a unit.

    No loss exceeds 1 / noise, and half of all outputs have exactly this loss.

    Args:
        noise: scale divided by the L1 sensitivity.
        width: grid width of the losses, in nats.
    """
    highest = math.ceil(1 / noise / width)
    epsilons = _make_loss_grid(-highest, 2 * highest + 2, width)
    # Below -1 / noise the first term is smaller: every output has a larger loss.
    deltas = np.maximum(-np.expm1(np.minimum(epsilons, (epsilons - 1 / noise) / 2)), 0.0)
    return _connect_dots(-highest, deltas, width, noise=noise, beyond=0.0)


def _discretize(rate: Rate, noise: float, width: float, *, adding: bool) -> StepLosses:
    if rate == "laplace":
        return discretize_laplace(noise, width)
    return discretize_sampled_gaussian(rate, noise, width, adding=adding)


def _connect_dots(lowest: int, deltas: Floats, width: float, *, noise: float, beyond: float) -> StepLosses:
    """Build the loss distribution whose hockey-stick divergence equals `deltas` on the grid.

    Between grid points, its divergence is an upper bound.

    Args:
        lowest: the smallest loss, in units of the grid width.
        deltas: (losses,), hockey-stick divergence at consecutive losses from `lowest` upwards.
        width: grid width of the losses, in nats.
        noise: noise multiplier, for the rounding error.
        beyond: probability of the truncated outputs, which is added to the infinite loss.
    """
    deltas = np.maximum.accumulate(deltas[::-1])[::-1]  # monotone up to rounding
    falls = np.diff(deltas)
    per_width = math.expm1(width)
    probabilities = np.empty_like(deltas)
    probabilities[0] = 1 - deltas[0] + falls[0] / per_width
    # In this order of operations differences are exact where delta changes little, and errors add up to one of delta's.
    probabilities[1:-1] = np.diff(falls) / per_width - falls[:-1]
    probabilities[-1] = falls[-1] / math.expm1(-width)
    probabilities = np.maximum(probabilities, 0.0)
    tiny = probabilities < _MIN_PROBABILITY
    infinite = float(deltas[-1] + probabilities[tiny].sum() + beyond)
    probabilities[tiny] = 0.0
    with np.errstate(divide="ignore"):
        return StepLosses(lowest, np.log(probabilities), infinite, (512 + 4 * (_REACH + 1 / noise) ** 2) * UNIT)


def _make_loss_grid(lowest: int, size: int, width: float) -> Floats:
    return np.arange(lowest, lowest + size, dtype=np.float64) * width


def compute_hockey_stick(rate: float, noise: float, epsilons: Floats, *, adding: bool) -> Floats:
    """Compute delta of one Poisson-sampled Gaussian mechanism at each epsilon. Epsilons may be negative.

    P - e^epsilon Q equals share x (N(1) - ratio N(0)), with N(0) and N(1) exchanged if a unit is added. So delta is a
    fraction of the delta of the Gaussian mechanism without sampling at log(ratio).
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # at impossible losses, overwritten below
        growth = np.expm1(epsilons)
        if adding and rate < 1:
            share = np.maximum(rate - growth * (1 - rate), 0.0)
            delta = share * _compute_gaussian_delta(noise, epsilons + math.log(rate) - np.log(share))
            return np.clip(np.where(share > 0, delta, 0.0), 0.0, 1.0)
        large = epsilons - math.log(rate) + np.log(rate * np.exp(-epsilons) - np.expm1(-epsilons))
        log_ratio = np.where(epsilons > 0, large, np.log((growth + rate) / rate))
        return np.clip(np.where(growth + rate > 0, rate * _compute_gaussian_delta(noise, log_ratio), -growth), 0.0, 1.0)


def _compute_gaussian_delta(noise: float, epsilons: Floats) -> Floats:
    """Compute delta of a Gaussian mechanism: Q(u) - e^epsilon Q(v), where Q is the normal upper tail.

    Source: Balle and Wang 2018.

    In the tails both terms are computed as e^(-u^2/2) times a scaled term, so that the exponents lose no digits.
    """
    u, v = noise * epsilons - 0.5 / noise, noise * epsilons + 0.5 / noise
    scale = np.exp(-(u**2) / 2) / 2
    first = np.where(u > 0, scale * special.erfcx(np.maximum(u, 0) / math.sqrt(2)), special.ndtr(-u))
    second = np.where(
        v > 0,
        scale * special.erfcx(np.maximum(v, 0) / math.sqrt(2)),
        np.exp(np.minimum(epsilons, 0)) * special.ndtr(-v),
    )
    delta: Floats = first - second
    return delta


class Composition:
    """A composition of sampled Gaussian and Laplace mechanisms, in both directions of the add-or-remove relation.

    Guarantee: `epsilon` and `delta` are upper bounds, rounding included, for mechanisms that were fixed in advance.
    """

    def __init__(self, mechanisms: Iterable[tuple[Rate, float, int]], width: float) -> None:
        """Compose mechanisms on a grid of privacy losses.

        `mechanisms` contains (sampling rate or "laplace", noise multiplier, count) of each mechanism, and `width` is
        the grid width in nats.

        A mechanism without noise makes the composition unbounded.
        """
        steps = list(mechanisms)
        self._bounded = all(noise > 0 for _, noise, _ in steps)
        self._orders = [
            _Direction([(_discretize(rate, noise, width, adding=adding), count) for rate, noise, count in steps], width)
            for adding in (False, True)
            if steps and self._bounded
        ]

    def epsilon(self, delta: float) -> float:
        """Compute an upper bound on epsilon at `delta`; infinite if `delta` is below the arithmetic precision."""
        return max((order.epsilon(delta) for order in self._orders), default=0.0 if self._bounded else math.inf)

    def delta(self, epsilon: float) -> float:
        """Compute an upper bound on delta at `epsilon`, which must be nonnegative."""
        return max((order.tail(0.0).delta(epsilon) for order in self._orders), default=0.0 if self._bounded else 1.0)


@dataclass(frozen=True)
class _Tail:
    """Tail of the composed loss distribution at each loss on the grid.

    Args:
        losses: (losses,), nonnegative losses of the grid, in nats.
        mass: (losses,), probability of each loss or a larger one.
        weighted: (losses,), the tail probability with each loss l' above l weighted by e^(l - l').
        rounding: (losses,), error bound of delta from each loss up to the next.
        infinite: probability of an infinite loss.
    """

    losses: Floats
    mass: Floats
    weighted: Floats
    rounding: Floats
    infinite: float

    def epsilon(self, delta: float) -> float:
        shrink = math.exp(self.losses[0] - self.losses[1])
        at_losses = self.mass[1:] - shrink * self.weighted[1:] + self.rounding[:-1] + self.infinite
        within = np.flatnonzero(at_losses <= delta)
        if not within.size:
            return math.inf
        place = int(within[0])
        if place == 0:
            return float(self.losses[0])
        above = self.mass[place] + self.rounding[place - 1] + self.infinite - delta
        least, most = self.losses[place - 1], self.losses[place]
        if above <= 0 or self.weighted[place] <= 0:
            return float(most)
        return float(min(max(most + math.log(above / self.weighted[place]), least), most))

    def delta(self, epsilon: float) -> float:
        place = int(np.searchsorted(self.losses, epsilon, side="right"))
        place = min(place, self.losses.size - 1)
        lost = self.mass[place] - math.exp(min(epsilon - self.losses[place], 0.0)) * self.weighted[place]
        return float(min(1.0, max(lost, 0.0) + self.rounding[max(place - 1, 0)] + self.infinite))


class _Direction:
    """A composition of mechanisms, in one direction of the add-or-remove relation."""

    def __init__(self, steps: list[tuple[StepLosses, int]], width: float) -> None:
        self._steps, self._width = steps, width
        self._lowest = sum(count * step.lowest for step, count in steps)
        self._highest = sum(count * (step.lowest + step.log_probabilities.size - 1) for step, count in steps)
        self._moments: dict[float, list[float]] = {}
        self._at_zero: _Tail | None = None

    def epsilon(self, delta: float) -> float:
        if delta >= 1:
            return 0.0
        if delta <= 0:
            return math.inf
        # The order of the best Chernoff bound, where the mean of the tilted distribution equals the bound.
        tilt = self._find_best_tilt_order(lambda order: (self._log_moment(order) - math.log(delta)) / order)
        return self.tail(tilt).epsilon(delta)

    def tail(self, tilt: float) -> _Tail:
        if tilt or self._at_zero is None:
            tail = self._compute_tail(tilt)
            if tilt:
                return tail
            self._at_zero = tail
        return self._at_zero

    def _log_moments(self, order: float) -> list[float]:
        """Compute the log moment log E[e^(order x loss)] of each mechanism over its finite losses."""
        if order not in self._moments:
            self._moments[order] = [
                _log_sum_exp(order * step.losses(self._width) + step.log_probabilities) for step, _ in self._steps
            ]
        return self._moments[order]

    def _log_moment(self, order: float) -> float:
        return math.fsum(count * value for (_, count), value in zip(self._steps, self._log_moments(order), strict=True))

    def _find_best_tilt_order(self, bound: Callable[[float], float]) -> float:
        """Find the power of sqrt(2) that minimizes the unimodal function `bound`."""
        most = math.floor(2 * math.log2(1 / self._width))
        place, least = 4, bound(4.0)
        for direction in (1, -1):
            while -24 < place < most and (value := bound(2.0 ** ((place + direction) / 2))) < least:
                place, least = place + direction, value
        return float(2.0 ** (place / 2))

    def _find_loss_window(self, tilt: float) -> tuple[int, int]:
        """Find a range of losses outside which the tilted distribution has at most `_TAIL` mass on each side.

        The bounds are in grid widths, and follow from Chernoff's bound.
        """
        here, to_spare = self._log_moment(tilt), -math.log(_TAIL)

        def reach(sign: int) -> float:
            def bound(shift: float) -> float:
                return (self._log_moment(tilt + sign * shift) - here + to_spare) / shift

            return bound(self._find_best_tilt_order(bound))

        return max(self._lowest, math.floor(-reach(-1) / self._width)), min(
            self._highest, math.ceil(reach(1) / self._width)
        )

    def _compute_tail(self, tilt: float) -> _Tail:
        low, high = self._find_loss_window(tilt)
        sizes = [step.log_probabilities.size for step, _ in self._steps]
        length = 1 << (max(high - low + 1, 2, *sizes) - 1).bit_length()
        of_fft = _FFT_ROUNDING * math.log2(length)
        product = np.ones(length // 2 + 1, dtype=complex)
        largest = np.ones(length // 2 + 1)  # upper bound on the product, exact or computed
        errors = np.zeros(length // 2 + 1)  # error of the product, relative to `largest`
        before = 0.0  # relative error of the tilted distributions
        for (step, count), log_moment in zip(self._steps, self._log_moments(tilt), strict=True):
            exponents = tilt * step.losses(self._width) - log_moment
            transform = fft.rfft(np.exp(exponents + step.log_probabilities), length)
            size = np.abs(transform) + of_fft
            product *= _raise_to_power(transform, count)
            largest *= size**count
            errors += count * (of_fft / size + 3 * UNIT)
            before += count * (step.rounding + 4 * UNIT * (float(np.abs(exponents).max()) + 116))
        # Summed over the whole spectrum, which bounds the sum over the window (Cauchy-Schwarz, Parseval).
        composing = math.sqrt(2 * float(np.sum((largest * errors) ** 2)))
        going_back = of_fft * math.sqrt(2 * float(np.sum(largest**2)))
        composed = np.roll(fft.irfft(product, length), -((low - self._lowest) % length))[: high - low + 1]
        return self._undo_tilt(tilt, low, composed, 1.1 * (composing + going_back + before + _TAIL + 4 * length * UNIT))

    def _undo_tilt(self, tilt: float, low: int, tilted: Floats, rounding: float) -> _Tail:
        """Undo the tilt, and return the tail at nonnegative losses.

        Args:
            tilt: exponent of the tilt.
            low: loss of the first tilted probability, in grid widths.
            tilted: (losses,), tilted probabilities of consecutive losses from `low` upwards.
            rounding: error bound of the tilted probabilities.
        """
        log_moment = self._log_moment(tilt)
        # The factor overflows at losses far below any epsilon, so they are dropped.
        first = max(0, math.ceil((log_moment - _LARGEST_EXPONENT) / (tilt * self._width))) if tilt else 0
        begin, end = max(first, low), max(first, low + tilted.size) + 1
        kept = np.zeros(end - begin)
        kept[: max(low + tilted.size - begin, 0)] = tilted[begin - low :]
        losses = _make_loss_grid(begin, end - begin, self._width)
        exponents = log_moment - tilt * losses
        rounding += 4 * UNIT * (abs(log_moment) + float(np.abs(tilt * losses).max()))
        probabilities = kept * np.exp(exponents)
        lost = rounding * np.exp(np.minimum(exponents + tilt * self._width, _LARGEST_EXPONENT))
        lost[max(self._highest - begin, 0) :] = 0.0  # no finite loss is above
        without = math.fsum(count * math.log1p(-step.infinite) for step, count in self._steps)
        return _Tail(
            losses,
            np.cumsum(probabilities[::-1])[::-1],
            _accumulate(probabilities[::-1], self._width)[::-1],
            lost if rounding < _MAX_ROUNDING else np.full_like(lost, math.inf),
            -math.expm1(without),
        )


def _accumulate(values: Floats, width: float) -> Floats:
    """Compute running sums of nonnegative `values` that decay by the factor e^-width at each step.

    Rows of about 1 nat are summed with growing weights, at most e, and then carried into the next row. The relative
    error is below that of the step-by-step recurrence, 2 UNIT per value.
    """
    row = max(1, int(1 / width))
    growth = np.exp(np.arange(row) * width)
    sums = np.cumsum(np.pad(values, (0, -values.size % row)).reshape(-1, row) * growth, axis=1)
    carried, decay = 0.0, math.exp(-width)
    for total in sums:
        total += carried * decay  # in units of the row's first value
        carried = total[-1] / growth[-1]
    running: Floats = (sums / growth).ravel()[: values.size]
    return running


def _log_sum_exp(exponents: Floats) -> float:
    largest = float(exponents.max())
    exponents -= largest
    return largest + math.log(np.exp(exponents, out=exponents).sum())


def _raise_to_power(base: npt.NDArray[np.complex128], count: int) -> npt.NDArray[np.complex128]:
    """Raise `base` to the power of `count` by repeated squaring. Each factor adds the error of at most one product."""
    result = base
    for bit in f"{count:b}"[1:]:
        result = result * result
        if bit == "1":
            result = result * base
    return result
