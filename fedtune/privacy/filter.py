"""Renyi filter: a bound on a population's total privacy loss under adaptive composition.

PLD gives a valid epsilon for one plan, because the plan is fixed before anything is released. Over the life of a ledger
this does not hold: the rate, noise and steps of the next run may depend on earlier releases. A Renyi filter remains
valid (Feldman and Zrnic 2021, arXiv 2008.11193, Theorem 3.1): fix one order before the first event, add up each event's
Renyi divergence at that order, and stop before the sum exceeds a bound that was fixed in advance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import lru_cache
from itertools import count

from fedtune.privacy import accountant
from fedtune.privacy.dp_library import ComposedDpEvent, DpEvent
from fedtune.privacy.events import Spent, count_mechanisms
from fedtune.spec import ConfigError

ORDERS = tuple(
    sorted({1 + x / 20 for x in range(2, 100)} | {*map(float, range(6, 65))} | {80.0, 96.0, 128.0, 192.0, 256.0, 512.0})
)
"""Candidate orders for a new ledger: 1.1, 1.15, ... 5.95, then integers."""
_MAX_DIGITS = 12  # maximum number of decimals of a cap


def compute_total_divergence(spent: Spent, order: float) -> float:
    """Add up the Renyi divergences of all events at `order`, in nats. Equal events are evaluated only once.

    The sum is infinite if a mechanism has no noise.
    """
    # fsum does not depend on the order of its terms, so neither does the charge for a history.
    counted = count_mechanisms(spent).items()
    return math.fsum(count * accountant.compute_renyi_divergence(event, order) for event, count in counted)


def compute_epsilon_conversion_term(order: float, delta: float) -> float:
    """Compute the term that is added to a Renyi divergence at `order` to convert it to an epsilon at `delta`.

    Source: Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), Proposition 12.
    """
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def epsilon_filter(spent: Spent, *, order: float, delta: float) -> float:
    """Compute the epsilon of adaptively selected events at `delta` with a Renyi filter of fixed order.

    Guarantee: an upper bound even if each event was selected after seeing the outputs of earlier events, provided that
    `order` was fixed before the first event, and that a cap on this epsilon was fixed in advance and is never exceeded.
    """
    divergence_sum = compute_total_divergence(spent, order)
    return 0.0 if divergence_sum == 0 else max(0.0, divergence_sum + compute_epsilon_conversion_term(order, delta))


def compute_max_divergence(epsilon: float, *, order: float, delta: float) -> float:
    """Convert a cap on epsilon at `delta` to a cap on the Renyi divergence at `order`.

    A negative result means that the cap allows no event.
    """
    return epsilon - compute_epsilon_conversion_term(order, delta)


def compute_max_repeats(event: DpEvent, room: float, *, order: float) -> int | None:
    """Compute how many repetitions of `event` fit into the remaining divergence `room`.

    The result is None if `room` is infinite.
    """
    if math.isinf(room):
        return None
    count = max(0, math.floor(room / compute_total_divergence([event], order)))
    return max(0, count - (compute_total_divergence({event: count}, order) > room))  # the division rounds


@lru_cache(maxsize=256)  # evaluated for each policy note of a ledger
def find_best_order(reference: DpEvent, *, epsilon: float, delta: float) -> float:
    """Find the Renyi order at which `reference` uses the smallest fraction of the cap (`epsilon`, `delta`).

    If `reference` only just fits the cap, this order yields the smallest epsilon. For a smaller reference run, this
    order allows the most repetitions. The order that minimizes the reference run's own epsilon would waste the rest of
    the cap.

    Raises:
        ConfigError: the cap leaves no divergence at any order.
    """
    if math.isinf(epsilon):  # no cap: minimize the reference run's own epsilon
        return find_smallest_cap(reference, delta=delta)[1]
    room = {order: compute_max_divergence(epsilon, order=order, delta=delta) for order in ORDERS}
    usable = {order: left for order, left in room.items() if left > 0}
    if not usable:
        raise ConfigError("max_epsilon", epsilon, f"is too small for any mechanism at delta {delta:g}")
    return _minimize_over_orders(reference, usable, lambda order, divergence: divergence / usable[order])[1]


def find_smallest_cap(plan: DpEvent, *, delta: float) -> tuple[float, float]:
    """Find the smallest cap on epsilon that covers the whole plan, and the Renyi order that attains this cap."""
    return _minimize_over_orders(
        plan, ORDERS, lambda order, divergence: divergence + compute_epsilon_conversion_term(order, delta)
    )


def find_tightest_cap(spent: DpEvent, *, more: DpEvent, reference: DpEvent, delta: float, digits: int = 1) -> float:
    """Find the smallest cap on epsilon that admits `spent`, but not `spent` together with `more`.

    The ledger is assumed to be created for the reference run `reference`. A ledger limits the number of runs only by
    its cap. The cap has `digits` decimals, or as many more as needed to exclude `more`.
    """
    cap, least, both = math.inf, find_smallest_cap(spent, delta=delta)[0], ComposedDpEvent((spent, more))

    def fits(event: DpEvent, cap: float) -> bool:
        order = find_best_order(reference, epsilon=cap, delta=delta)
        return compute_total_divergence([event], order) <= compute_max_divergence(cap, order=order, delta=delta)

    for scale in (10**number for number in range(digits, _MAX_DIGITS)):
        # a cap with one digit less is known to fit
        below = 0 if math.isinf(cap) else math.floor((cap - 10 / scale) * scale)
        caps = (number / scale for number in count(max(math.ceil(least * scale), below)))
        cap = next(candidate for candidate in caps if fits(spent, candidate))
        if not fits(both, cap):
            break
    return cap


def _minimize_over_orders(
    plan: DpEvent, orders: Collection[float], cost: Callable[[float, float], float]
) -> tuple[float, float]:
    """Minimize `cost(order, divergence)` over `orders`, and return the minimum and its order (the smallest on a tie).

    `cost` must rise with the divergence, and the divergence rises with the order. Integer orders are cheap to evaluate,
    and yield lower bounds that rule out most of the fractional orders above them.
    """
    whole = {order: compute_total_divergence([plan], order) for order in orders if order.is_integer()}
    least = min(((cost(order, divergence), order) for order, divergence in whole.items()), default=(math.inf, math.inf))
    for order in orders:
        below = whole.get(math.floor(order), 0.0)
        if order not in whole and cost(order, below) <= least[0] + 1e-9 * (1 + abs(least[0])):  # slack for rounding
            least = min(least, (cost(order, compute_total_divergence([plan], order)), order))
    return least
