"""Privacy accounting: epsilon from events, and the smallest noise for a target epsilon.

Two accountants read the same events: PLD computes the epsilon of a run, and dp-accounting's RDP accountant checks it.
Both are upper bounds.  The GDP/CLT accountant is left out on purpose, because it under-reports epsilon (0.29 instead of
1.21 at sampling rate 0.001, noise multiplier 0.6 and 500 steps).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache

import numpy as np

from fedtune.codec import require
from fedtune.privacy import events
from fedtune.privacy.dp_library import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NeighboringRelation,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    RdpAccountant,
    SelfComposedDpEvent,
    compute_epsilon,
)
from fedtune.privacy.loss_distribution import LEAST_DELTA_A_STEP, Composition, Rate
from fedtune.spec import ConfigError, check_fraction

Counted = tuple[tuple[DpEvent, int], ...]  # mechanisms, and how often each ran
_WIDE = Context(prec=330)  # any float to three decimals
_MOST_AS_FACTOR = 20.0  # e^20 has nine digits; beyond it a power of ten is shown
NEIGHBORING_RELATION = NeighboringRelation.ADD_OR_REMOVE_ONE
"""The one neighboring relation of fedtune: two data sets are neighbors if one has exactly one unit more."""

# Width of the buckets that privacy loss is rounded up to.  Coarser is faster and only ever reports more epsilon.
FINE, COARSE = 1e-4, 1e-3
MOST_NOISE = 1e4  # of a plan: with more, nothing is left to learn
LEAST_NOISE = 1e-2  # of a plan, but for none: below it, a privacy loss distribution takes gigabytes
LEAST_SOUGHT = 0.1  # by calibration: where delta alone covers the loss, any noise would do
_TOLERANCE = 1e-5  # relative
MOST_STEPS = 10**8  # of all rounds of a plan together
_RDP_ROUNDING = 2.0**-48  # of dp-accounting's log A, for each unit of the order: of log A itself, and absolutely
_TYPICAL_SLOPE = 1.2  # of log epsilon over the log of noise or rate; a wrong guess costs a step or two

# dp-accounting's notes on orders at which its series does not converge; `compute_renyi_divergence` bounds these
# otherwise.
logging.getLogger("absl").addFilter(lambda note: "_compute_log_a_frac failed to converge" not in note.getMessage())


def check_noise(key: str, value: float, *, none: bool = False) -> None:
    """Require a noise multiplier for which epsilon can be computed (0.01 to 10,000); `none` also allows 0.

    Raises:
        ConfigError: the noise multiplier is out of range.
    """
    right = LEAST_NOISE <= value <= MOST_NOISE or (none and value == 0)
    require(key, value, right, f"must be in [{LEAST_NOISE:g}, {MOST_NOISE:g}]{', or be 0' if none else ''}")


def check_delta(key: str, value: float, *, steps: int) -> None:
    """Require a delta at which epsilon can be computed for `steps` steps.

    Raises:
        ConfigError: delta is not between 0 and 1, or is so small that the truncation error of each step would matter,
            or the number of steps exceeds what the accountant can handle in memory.
    """
    check_fraction(key, value)
    require("steps", steps, steps <= MOST_STEPS, f"must be at most {MOST_STEPS:,}, summed over all rounds")
    least = LEAST_DELTA_A_STEP * steps
    bound = f"must be at least {least:g}: below, no epsilon can be computed for {steps} steps"
    require(key, value, value >= least, bound)


def epsilon_pld(spent: events.Spent, delta: float, *, interval: float = FINE) -> float:
    """Return the epsilon of all events in `spent` at `delta`, by privacy loss distributions; infinite without noise.

    With `interval=FINE` the result is the smaller of the epsilons on the fine and the coarse grid: the fine grid has
    smaller discretization error, but more rounding error.  Searches and per-round figures use `COARSE` alone, which is
    fast.

    Guarantee: an upper bound under add-or-remove-one-unit adjacency, for a plan that was fixed before its first output
    was seen.  Losses are rounded up to multiples of `interval`, and all floating-point error is added to delta
    (`loss_distribution`).
    """
    return _epsilon_pld(tuple(events.count_mechanisms(spent).items()), delta, interval)


# Cached, because a run's sites spend alike, and the gate, the ledger and the report ask for the same epsilon.
@lru_cache(maxsize=4096)
def _epsilon_pld(counted: Counted, delta: float, interval: float) -> float:
    found = compose_pld(counted, interval).epsilon(delta)
    return min(found, _epsilon_pld(counted, delta, COARSE)) if interval == FINE else found


def compose_pld(counted: Counted, interval: float) -> Composition:
    """Compose the privacy loss distributions of all mechanisms on a grid of width `interval`.

    Raises:
        TypeError: an event has a type that fedtune never produces.
    """
    mechanisms: list[tuple[Rate, float, int]] = []
    for event, count in counted:
        match event:
            case GaussianDpEvent(noise):  # n Gaussians compose to one with noise / sqrt(n)
                mechanisms.append((1.0, noise / math.sqrt(count), 1))
            case PoissonSampledDpEvent(rate, GaussianDpEvent(noise)):
                mechanisms.append((rate, noise, count))
            case LaplaceDpEvent(noise):
                mechanisms.append(("laplace", noise, count))
            case NonPrivateDpEvent():
                mechanisms.append((1.0, 0.0, count))
            case _:
                raise TypeError(f"unsupported privacy event {type(event).__name__}")
    return Composition(mechanisms, interval)


def compute_epsilon_if_above(spent: events.Spent, delta: float, *, limit: float) -> float | None:
    """Return the PLD epsilon if it is above `limit`, else None.

    The slower fine grid is used only near the limit: the coarse grid overestimates epsilon by at most about its width,
    plus the square of its width for each step.
    """
    epsilon, steps = epsilon_pld(spent, delta, interval=COARSE), sum(events.count_mechanisms(spent).values())
    if limit < epsilon < max(1.01 * limit, limit + COARSE + COARSE**2 * steps):
        epsilon = epsilon_pld(spent, delta)
    return None if epsilon <= limit else epsilon  # NaN counts as above the limit


def epsilon_rdp(spent: events.Spent, delta: float) -> float:
    """Return epsilon at `delta` by Renyi differential privacy: a looser bound than PLD, and an independent check of it.

    Guarantee: an upper bound (Mironov 2017, arXiv 1702.07476; the best of dp-accounting's default orders).
    """
    return compose_rdp(tuple(events.count_mechanisms(spent).items()))(delta)


@lru_cache(maxsize=4096)
def compose_rdp(counted: Counted) -> Callable[[float], float]:
    """Sum the Renyi divergences of all mechanisms, and return the resulting function from delta to epsilon."""
    orders = RdpAccountant().orders
    divergences = np.zeros_like(orders)
    for event, count in counted:
        divergences += count * np.array([compute_renyi_divergence(event, order) for order in orders.tolist()])
    return lambda delta: float(compute_epsilon(orders, divergences, delta)[0])


@lru_cache(maxsize=16384)
def compute_renyi_divergence(event: DpEvent, order: float) -> float:
    """Return an upper bound on the Renyi divergence of one mechanism, in nats; infinite if it has no guarantee.

    dp-accounting computes log A = (order - 1) * divergence.  `_RDP_ROUNDING` covers its floating-point error.

    Where the series for a fractional order does not converge, the bound is the chord between the two neighboring
    integer orders: log A is a convex function of the order, and is 0 at order 1 (docs/guarantee.md).
    """
    assert not isinstance(event, ComposedDpEvent | SelfComposedDpEvent), "each mechanism has rounding of its own"
    accounted = RdpAccountant(orders=[order], neighboring_relation=NEIGHBORING_RELATION)
    accounted.compose(event)
    found, below = float(accounted.rdp[0]), math.floor(order)
    if math.isinf(found) and below < order:
        ends = [
            (whole - 1) * compute_renyi_divergence(event, whole) if whole > 1 else 0.0 for whole in (below, below + 1)
        ]
        return (ends[0] * (below + 1 - order) + ends[1] * (order - below)) / (order - 1)
    lost = _RDP_ROUNDING * order
    return found * (1 + lost) + lost / (order - 1)


def calibrate_noise(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, also: Sequence[DpEvent] = ()
) -> float:
    """Return the smallest noise multiplier with which `steps` DP-SGD steps stay within (epsilon, delta), to four
    decimals.

    `also` lists other events that the same epsilon must cover.

    Guarantee: `epsilon_pld` of the result never exceeds `epsilon`.  The search runs on the coarse grid, ends on the
    side of more noise, rounds the noise up, and checks the result.

    Raises:
        ConfigError: the events in `also` alone exceed `epsilon`, or no noise multiplier up to 10,000 reaches it.
    """
    tried: dict[float, float] = {}

    def make_event(sigma: float) -> DpEvent:
        return events.build_dp_sgd_event(sampling_rate=sampling_rate, noise_multiplier=sigma, steps=steps)

    def compute_epsilon(sigma: float) -> float:
        if sigma not in tried:
            tried[sigma] = epsilon_pld([make_event(sigma), *also], delta, interval=COARSE)
        return tried[sigma]

    def is_within_target(sigma: float) -> bool:
        # Epsilon never rises with the noise, so earlier trials answer most of the search below.
        if any(spent <= epsilon for noise, spent in tried.items() if noise <= sigma):
            return True
        if any(spent > epsilon for noise, spent in tried.items() if noise >= sigma):
            return False
        return compute_epsilon(sigma) <= epsilon

    if also and epsilon_pld(also, delta, interval=COARSE) > epsilon:
        raise ConfigError(
            "privacy.epsilon",
            epsilon,
            "is used up by the released metrics alone; set a higher privacy.metrics_noise_multiplier",
        )
    find_boundary(compute_epsilon, epsilon, start=1.0, bounds=(LEAST_SOUGHT, MOST_NOISE), rising=False)
    # Bisection alone decides, so that equal targets get equal noise; the search above only saves it trials.
    low, high = 0.0, 1.0
    while not is_within_target(high):
        if high == MOST_NOISE:
            raise ConfigError("privacy.epsilon", epsilon, f"cannot be reached in {steps} steps with any noise")
        low, high = high, min(2 * high, MOST_NOISE)
    while high - max(low, LEAST_SOUGHT) > 1e-5 * high:
        middle = max((low + high) / 2, LEAST_SOUGHT)
        low, high = (low, middle) if is_within_target(middle) else (middle, high)
    noise = math.ceil(high * 1e4) / 1e4
    while compute_epsilon(noise) > epsilon:
        noise = round(noise + 1e-4, 4)
    return noise


def find_boundary(
    epsilon_at: Callable[[float], float], epsilon: float, *, start: float, bounds: tuple[float, float], rising: bool
) -> float | None:
    """Find the boundary value at which `epsilon_at` is still at most `epsilon`; None if no value in `bounds` qualifies.

    The result is the largest such value if epsilon rises with the value (`rising`), else the smallest.  The search
    steps in log-log coordinates until it has bracketed the boundary, then applies regula falsi with the Illinois rule.
    `epsilon_at` was evaluated at the returned value itself.
    """
    lowest, highest = map(math.log, bounds)

    def clamp_value(x: float) -> float:
        return min(max(math.exp(x), bounds[0]), bounds[1])  # exp(log(bound)) may round past a bound that Plan enforces

    slope = _TYPICAL_SLOPE if rising else -_TYPICAL_SLOPE
    inside: tuple[float, float] | None = None  # (log value, log of epsilon over its bound)
    outside: tuple[float, float] | None = None
    x, before = math.log(start), None
    while True:
        # Clamped, because its logarithm must be finite: epsilon is 0 where delta alone covers the loss.
        y = math.log(min(max(epsilon_at(clamp_value(x)) / epsilon, 1e-9), 1e9))
        if y <= 0:
            inside, outside = (x, y), _halve_weight(outside, before is True)
        else:
            outside, inside = (x, y), _halve_weight(inside, before is False)
        before = y <= 0
        if inside is None or outside is None:
            if x in (lowest, highest):
                break
            # Overshoot a little, to bracket the boundary sooner.
            step = math.copysign(min(max(1.2 * abs(y / slope), 0.01), 2.0), -y * slope)
            x = min(max(x + step, lowest), highest)
        elif abs(outside[0] - inside[0]) <= _TOLERANCE:
            break
        else:
            x = _interpolate(inside, outside)
    return None if inside is None else clamp_value(inside[0])


def _interpolate(inside: tuple[float, float], outside: tuple[float, float]) -> float:
    """Return the point where the chord between both ends crosses the boundary, kept away from the ends themselves."""
    width = outside[0] - inside[0]
    least = _TOLERANCE / 2 / abs(width)
    share = inside[1] / (inside[1] - outside[1])
    return inside[0] + width * min(max(share, least), 1 - least)


def _halve_weight(end: tuple[float, float] | None, again: bool) -> tuple[float, float] | None:
    """Apply the Illinois rule: halve the weight of an end that was kept twice in a row."""
    return (end[0], end[1] / 2) if again and end is not None else end


def format_epsilon(epsilon: float | None) -> str:
    """Format epsilon with three decimals, rounded up so that the text never understates it."""
    if epsilon is None or not math.isfinite(epsilon):
        return "unbounded"
    shown = Decimal(repr(float(epsilon)))  # the digits that a person would see, so that 1.1 stays 1.100
    return str(shown.quantize(Decimal("0.001"), rounding=ROUND_CEILING, context=_WIDE))


def format_factor(epsilon: float | None) -> str:
    """Format e to the power of `epsilon`, the largest ratio of two probabilities, rounded up.

    >>> [factor_text(epsilon) for epsilon in (0.0, 0.1, 3.0, 8.0, 50.0, None)]
    ['1.00', '1.11', '20.1', '2,981', '10^22', 'unbounded']
    """
    if epsilon is None or not math.isfinite(epsilon):
        return "unbounded"
    if epsilon > _MOST_AS_FACTOR:
        return f"10^{math.ceil(epsilon / math.log(10))}"
    factor = Decimal(repr(float(epsilon))).exp()
    places = max(0, 2 - factor.adjusted())
    return f"{factor.quantize(Decimal(1).scaleb(-places), rounding=ROUND_CEILING, context=_WIDE):,}"
