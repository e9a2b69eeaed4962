"""From events to epsilon, and from a target epsilon to the least noise.

Two accountants of dp-accounting look at the same events: PLD, which a run's figures use, and RDP beside it.
Both are upper bounds.  The GDP/CLT accountant is absent on purpose: it under-reports
(0.29 for a true 1.21 at rate .001, noise .6, 500 steps).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache
from typing import Any

import numpy as np
from dp_accounting import DpEvent, GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant

from fedtune.privacy import events
from fedtune.spec import ConfigError

Counted = tuple[tuple[DpEvent, int], ...]
"""Mechanisms, and how often each ran."""
_WIDE = Context(prec=330)  # any float to three decimals
NEIGHBOURING_RELATION = NeighboringRelation.ADD_OR_REMOVE_ONE
"""The one neighbouring relation of fedtune: two data sets are neighbours if one has one unit more."""

# Width of the buckets that privacy loss is rounded up to.  Coarser is faster and only ever reports more epsilon.
FINE, COARSE = 1e-4, 1e-3
MOST_NOISE = 1e4
"""Largest noise multiplier of a plan; what asks for more asks for nothing."""


def epsilon_pld(spent: events.Spent, delta: float, *, interval: float = FINE) -> float:
    """Epsilon at `delta` of everything in `spent` by privacy loss distributions; infinite without noise.

    Guarantee: an upper bound, since losses are rounded up to multiples of `interval` (pessimistic estimate;
    Doroshenko et al. 2022, arXiv 2207.04380), for a plan that was fixed before its first output was seen.
    """
    return _epsilon_pld(tuple(events.grouped(spent).items()), delta, interval)


# The same question comes again and again: a run's sites spend alike, and gate, ledger and report all ask.
@lru_cache(maxsize=4096)
def _epsilon_pld(counted: Counted, delta: float, interval: float) -> float:
    return float(composed_pld(counted, interval).get_epsilon(delta))


def composed_pld(counted: Counted, interval: float) -> PLDAccountant:
    """Privacy loss distributions of all mechanisms together, in buckets of width `interval`."""
    accountant = _PLDAccountant(NEIGHBOURING_RELATION, value_discretization_interval=interval)
    for event, count in counted:
        accountant.compose(event, count)
    return accountant


class _PLDAccountant(PLDAccountant):  # type: ignore[misc]  # dp-accounting has no types
    """dp-accounting's own; it computes the distribution of one DP-SGD step once for all numbers of steps."""

    _pld: PrivacyLossDistribution

    def _maybe_compose(self, event: DpEvent, count: int, do_compose: bool) -> Any:
        match event:
            case PoissonSampledDpEvent(sampling_probability=rate, event=GaussianDpEvent(noise_multiplier=noise)) if (
                rate > 0 and noise > 0
            ):
                if do_compose:
                    step = _one_step(noise, rate, self._value_discretization_interval)
                    self._pld = self._pld.compose(step.self_compose(count))
                return None
        return super()._maybe_compose(event, count, do_compose)


@lru_cache(maxsize=64)
def _one_step(noise: float, rate: float, interval: float) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(
        standard_deviation=noise,
        value_discretization_interval=interval,
        sampling_prob=rate,
        neighboring_relation=NEIGHBOURING_RELATION,
    )


def epsilon_above(spent: events.Spent, delta: float, *, limit: float) -> float | None:
    """Epsilon by PLD where it is above `limit`, else None.

    The coarse grid never says less than the fine one, and only a little more: a close call alone is worth the fine one.
    """
    epsilon = epsilon_pld(spent, delta, interval=COARSE)
    if limit < epsilon < 1.01 * limit:
        epsilon = epsilon_pld(spent, delta)
    return None if epsilon <= limit else epsilon  # also if it is no number


def epsilon_rdp(spent: events.Spent, delta: float) -> float:
    """Epsilon at `delta` by Renyi differential privacy: looser than PLD, an independent check beside it.

    Guarantee: an upper bound (Mironov 2017, arXiv 1702.07476; the best of dp-accounting's default orders).
    """
    return _epsilon_rdp(tuple(events.grouped(spent).items()), delta)


@lru_cache(maxsize=4096)
def _epsilon_rdp(counted: Counted, delta: float) -> float:
    with without_notes_on_skipped_orders():
        return float(composed_rdp(counted).get_epsilon(delta))


def composed_rdp(counted: Counted) -> RdpAccountant:
    """Renyi divergences of all mechanisms together."""
    accountant = RdpAccountant(neighboring_relation=NEIGHBOURING_RELATION)
    with without_notes_on_skipped_orders():
        for event, count in counted:
            accountant._rdp = accountant._rdp + count * _divergences(event)
    return accountant


@lru_cache(maxsize=256)
def _divergences(event: DpEvent) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Renyi divergences of one event at dp-accounting's default orders."""
    accountant = RdpAccountant(neighboring_relation=NEIGHBOURING_RELATION)
    accountant.compose(event)
    found: np.ndarray[Any, np.dtype[np.float64]] = accountant._rdp
    return found


def calibrate_noise(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, also: Sequence[DpEvent] = ()
) -> float:
    """The least noise multiplier, to four digits, at which `steps` DP-SGD steps stay within (epsilon, delta).

    `also` are other events that the same epsilon has to pay for.

    Guarantee: `epsilon_pld` of the result never exceeds `epsilon`: the search ends on the side of more noise, on a
    coarser and so more pessimistic grid, and rounds the noise up.

    Raises:
        ConfigError: no noise multiplier up to 10,000 reaches the target.
    """

    def spent(sigma: float) -> float:
        event = events.dp_sgd(sampling_rate=sampling_rate, noise_multiplier=sigma, steps=steps)
        return epsilon_pld([event, *also], delta, interval=COARSE)

    if also and epsilon_pld(also, delta, interval=COARSE) > epsilon:
        raise ConfigError("privacy.epsilon", epsilon, "is spent by the released metrics alone; give them more noise")
    low, high = 0.0, 1.0
    while spent(high) > epsilon:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise ConfigError("privacy.epsilon", epsilon, f"cannot be reached in {steps} steps by any noise")
    while low == 0 and spent(high / 2) <= epsilon:
        high /= 2
    least, enough = _crossing(spent, epsilon, low or high / 2, high)
    # What a bisection alone would give, which noise of 0.1.0 was: it is asked again only between the two ends.
    found = _bisected(lambda sigma: sigma >= enough or (sigma > least and spent(sigma) <= epsilon), low, high)
    if spent(found) > epsilon:  # where rounding makes epsilon rise with noise
        found = _bisected(lambda sigma: spent(sigma) <= epsilon, low, high)
    return found


def _bisected(within: Callable[[float], bool], low: float, high: float) -> float:
    """The least noise between `low` and `high` that is `within`, rounded up to four digits."""
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return math.ceil(high * 1e4) / 1e4


def _crossing(spent: Callable[[float], float], epsilon: float, low: float, high: float) -> tuple[float, float]:
    """Two noise multipliers close together, of which the first spends more than `epsilon` and the second does not.

    Regula falsi with the Illinois rule in log-log coordinates, where epsilon is nearly a straight line.
    """
    ends = {True: (math.log(low), _log(spent(low) / epsilon)), False: (math.log(high), _log(spent(high) / epsilon))}
    last: bool | None = None
    while ends[False][0] - ends[True][0] > 2e-6:
        (x0, y0), (x1, y1) = ends[True], ends[False]
        share = min(max(y0 / (y0 - y1), 0.0), 1.0)
        margin = min(5e-7 / (x1 - x0), 0.5)
        x = x0 + (x1 - x0) * min(max(share, margin), 1 - margin)
        y = _log(spent(math.exp(x)) / epsilon)
        above = y > 0
        if above is last:  # the other end stays: half its weight, so that the next point lies nearer to it
            other = ends[not above]
            ends[not above] = (other[0], other[1] / 2)
        ends[above], last = (x, y), above
    return math.exp(ends[True][0]), math.exp(ends[False][0])


def _log(ratio: float) -> float:
    """Its logarithm, finite where delta alone covers the loss or nothing bounds it."""
    return math.log(min(max(ratio, 1e-9), 1e9))


def epsilon_text(epsilon: float | None) -> str:
    """Three decimals, rounded up: an epsilon that is shown is never below the one that was derived."""
    if epsilon is None or not math.isfinite(epsilon):
        return "unbounded"
    shown = Decimal(repr(float(epsilon)))  # the digits that a person would see, so that 1.1 stays 1.100
    return str(shown.quantize(Decimal("0.001"), rounding=ROUND_CEILING, context=_WIDE))


@contextlib.contextmanager
def without_notes_on_skipped_orders() -> Iterator[None]:
    """dp-accounting notes each order whose series does not converge; leaving one out only raises the bound."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "_compute_log_a_frac failed to converge" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
