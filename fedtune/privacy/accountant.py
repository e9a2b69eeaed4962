"""From events to epsilon, and from a target epsilon to the least noise.

Two accountants of dp-accounting look at the same events: PLD, which a run's figures use, and RDP beside it.
Both are upper bounds.  The GDP/CLT accountant is absent on purpose: it under-reports
(0.29 for a true 1.21 at rate .001, noise .6, 500 steps).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache

from dp_accounting import DpEvent, NeighboringRelation
from dp_accounting.pld import PLDAccountant
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
    accountant = PLDAccountant(NEIGHBOURING_RELATION, value_discretization_interval=interval)
    for event, count in counted:
        accountant.compose(event, count)
    return accountant


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
            accountant.compose(event, count)
    return accountant


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

    def within(sigma: float) -> bool:
        event = events.dp_sgd(sampling_rate=sampling_rate, noise_multiplier=sigma, steps=steps)
        return epsilon_pld([event, *also], delta, interval=COARSE) <= epsilon

    if also and epsilon_pld(also, delta, interval=COARSE) > epsilon:
        raise ConfigError("privacy.epsilon", epsilon, "is spent by the released metrics alone; give them more noise")
    low, high = 0.0, 1.0
    while not within(high):
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise ConfigError("privacy.epsilon", epsilon, f"cannot be reached in {steps} steps by any noise")
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return math.ceil(high * 1e4) / 1e4


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
