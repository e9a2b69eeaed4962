"""Privacy accounting: the epsilon of composed events, and noise calibration for a target epsilon.

Two accountants evaluate the same events: PLD computes the epsilon of a run, and dp-accounting's RDP accountant checks
it. Both give upper bounds. The GDP/CLT accountant is omitted on purpose, because it underestimates epsilon (0.29
instead of 1.21 at sampling rate 0.001, noise multiplier 0.6 and 500 steps).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache
from numbers import Real

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
from fedtune.privacy.loss_distribution import MIN_DELTA_PER_STEP, Composition, Rate
from fedtune.spec import ConfigError, check_fraction

Counted = tuple[tuple[DpEvent, int], ...]  # (mechanism, count) pairs
_WIDE = Context(prec=330)  # represents any float to three decimals
_MAX_AS_FACTOR = 20.0  # e^20 has nine digits; larger factors are formatted as a power of ten
NEIGHBORING_RELATION = NeighboringRelation.ADD_OR_REMOVE_ONE
"""The neighboring relation of all guarantees: neighbors differ in the presence of exactly one unit."""

# Grid widths of privacy loss, in nats. Losses are rounded up, so the faster coarse grid only reports more epsilon.
FINE, COARSE = 1e-4, 1e-3
MAX_NOISE = 1e4  # noise multiplier above which a model learns nothing
MIN_NOISE = 1e-2  # below, a privacy loss distribution takes gigabytes of memory
MIN_SOUGHT = 0.1  # lower end of calibration; delta alone may cover the loss at any noise
_TOLERANCE = 1e-5  # relative
MAX_STEPS = 10**8  # summed over all rounds of a plan
_RDP_ROUNDING = 2.0**-48  # relative and absolute error of dp-accounting's log A, per unit of the order
_TYPICAL_SLOPE = 1.2  # initial slope of log epsilon over log noise or log rate; a wrong guess costs one or two steps

# Drop dp-accounting's warnings about orders at which its series diverges; `compute_renyi_divergence` handles them.
logging.getLogger("absl").addFilter(lambda note: "_compute_log_a_frac failed to converge" not in note.getMessage())


def check_noise(key: str, value: float, *, none: bool = False) -> None:
    """Check that a noise multiplier is in the accountant's range, 0.01 to 10,000.

    Args:
        key: name of the setting, for the error message.
        value: the noise multiplier.
        none: also allow 0, training without noise.

    Raises:
        ConfigError: the noise multiplier is out of range.
    """
    right = isinstance(value, Real) and (MIN_NOISE <= value <= MAX_NOISE or (none and value == 0))
    require(key, value, right, f"must be in [{MIN_NOISE:g}, {MAX_NOISE:g}]{', or be 0' if none else ''}")


def check_delta(key: str, value: float, *, steps: int) -> None:
    """Check that the accountant can compute epsilon at this delta for `steps` composed steps.

    Args:
        key: name of the setting, for the error message.
        value: delta.
        steps: number of noisy steps of the whole plan.

    Raises:
        ConfigError: delta is not between 0 and 1, or is so small that the truncation error of each step would matter,
            or the number of steps exceeds the accountant's memory limit.
    """
    check_fraction(key, value)
    require("steps", steps, steps <= MAX_STEPS, f"must be at most {MAX_STEPS:,}, summed over all rounds")
    least = MIN_DELTA_PER_STEP * steps
    bound = f"must be at least {least:g}: epsilon cannot be computed at a smaller delta for {steps} steps"
    require(key, value, value >= least, bound)


def epsilon_pld(spent: events.Spent, delta: float, *, interval: float = FINE) -> float:
    """Compute the epsilon of composed events at `delta` from privacy loss distributions (PLD).

    The result is infinite if an event adds no noise.

    Args:
        spent: the events, optionally with counts.
        delta: delta of the guarantee, in (0, 1).
        interval: grid width of the privacy losses, in nats. With `FINE`, the result is the smaller of the epsilons on
            the fine and the coarse grid: the fine grid has less discretization error, but more rounding error. Searches
            and per-round epsilons use only `COARSE`, which is fast.

    Guarantee: an upper bound under add-or-remove-one-unit adjacency, for a plan that was fixed before its first output
    was seen. Losses are rounded up to multiples of `interval`, and all floating-point error is added to delta
    (`loss_distribution`).
    """
    return _epsilon_pld(tuple(events.count_mechanisms(spent).items()), delta, interval)


# Cached, because the sites of a run have equal charges, and gate, ledger and report compute the same epsilon.
@lru_cache(maxsize=4096)
def _epsilon_pld(counted: Counted, delta: float, interval: float) -> float:
    epsilon = compose_pld(counted, interval).epsilon(delta)
    return min(epsilon, _epsilon_pld(counted, delta, COARSE)) if interval == FINE else epsilon


def compose_pld(counted: Counted, interval: float) -> Composition:
    """Compose the privacy loss distributions of all mechanisms on a grid.

    Args:
        counted: (mechanism, count) pairs.
        interval: grid width of the privacy losses, in nats.

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


def compute_epsilon_above_limit(spent: events.Spent, delta: float, *, limit: float) -> float | None:
    """Compute the PLD epsilon of composed events, and return it only if it exceeds `limit`, else None.

    The slow fine grid is evaluated only near the limit: the coarse grid overestimates epsilon by at most about its
    width, plus the square of its width for each step.
    """
    epsilon, steps = epsilon_pld(spent, delta, interval=COARSE), sum(events.count_mechanisms(spent).values())
    if limit < epsilon < max(1.01 * limit, limit + COARSE + COARSE**2 * steps):
        epsilon = epsilon_pld(spent, delta)
    return None if epsilon <= limit else epsilon  # NaN counts as above the limit


def epsilon_rdp(spent: events.Spent, delta: float) -> float:
    """Compute the epsilon of composed events at `delta` with Renyi DP, as an independent check of the PLD epsilon.

    Guarantee: an upper bound, looser than PLD (Mironov 2017, arXiv 1702.07476), minimized over dp-accounting's default
    orders.
    """
    return compose_rdp(tuple(events.count_mechanisms(spent).items()))(delta)


@lru_cache(maxsize=4096)
def compose_rdp(counted: Counted) -> Callable[[float], float]:
    """Compose all mechanisms by their Renyi divergences, and return the function that converts delta to epsilon."""
    orders = RdpAccountant().orders
    divergences = np.zeros_like(orders)
    for event, count in counted:
        divergences += count * np.array([compute_renyi_divergence(event, order) for order in orders.tolist()])
    return lambda delta: float(compute_epsilon(orders, divergences, delta)[0])


@lru_cache(maxsize=16384)
def compute_renyi_divergence(event: DpEvent, order: float) -> float:
    """Compute an upper bound on the Renyi divergence of one mechanism at `order`, in nats.

    The result is infinite for a mechanism without noise.

    dp-accounting computes log A = (order - 1) * divergence; `_RDP_ROUNDING` bounds the floating-point error of log A.

    Where the series for a fractional order does not converge, the bound is the chord between the two neighboring
    integer orders, because log A is a convex function of the order and is 0 at order 1 (docs/guarantee.md).
    """
    assert not isinstance(event, ComposedDpEvent | SelfComposedDpEvent), "rounding error is bounded per mechanism"
    accounted = RdpAccountant(orders=[order], neighboring_relation=NEIGHBORING_RELATION)
    accounted.compose(event)
    divergence, below = float(accounted.rdp[0]), math.floor(order)
    if math.isinf(divergence) and below < order:
        ends = [
            (whole - 1) * compute_renyi_divergence(event, whole) if whole > 1 else 0.0 for whole in (below, below + 1)
        ]
        return (ends[0] * (below + 1 - order) + ends[1] * (order - below)) / (order - 1)
    lost = _RDP_ROUNDING * order
    return divergence * (1 + lost) + lost / (order - 1)


def calibrate_noise(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, also: Sequence[DpEvent] = ()
) -> float:
    """Find the smallest noise multiplier with which `steps` DP-SGD steps satisfy (epsilon, delta)-DP, to four decimals.

    Args:
        epsilon: target epsilon of the steps together with the events in `also`.
        delta: delta of the target.
        sampling_rate: probability with which each unit joins a step.
        steps: number of noisy steps.
        also: additional events that the target epsilon must cover.

    Guarantee: `epsilon_pld` of the result never exceeds `epsilon`. The search runs on the coarse grid, ends on the side
    of more noise, rounds the noise up, and checks the result.

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
        bound = "is used up by the released metrics alone; set a higher privacy.metrics_noise_multiplier"
        raise ConfigError("privacy.epsilon", epsilon, bound)
    find_boundary(compute_epsilon, epsilon, start=1.0, bounds=(MIN_SOUGHT, MAX_NOISE), rising=False)
    # Only the bisection determines the result, so that equal targets get equal noise; the search above saves trials.
    low, high = 0.0, 1.0
    while not is_within_target(high):
        if high == MAX_NOISE:
            raise ConfigError("privacy.epsilon", epsilon, f"cannot be reached in {steps} steps with any noise")
        low, high = high, min(2 * high, MAX_NOISE)
    while high - max(low, MIN_SOUGHT) > 1e-5 * high:
        middle = max((low + high) / 2, MIN_SOUGHT)
        low, high = (low, middle) if is_within_target(middle) else (middle, high)
    noise = math.ceil(high * 1e4) / 1e4
    while compute_epsilon(noise) > epsilon:
        noise = round(noise + 1e-4, 4)
    return noise


def find_boundary(
    epsilon_at: Callable[[float], float], epsilon: float, *, start: float, bounds: tuple[float, float], rising: bool
) -> float | None:
    """Find the argument at which the monotonic function `epsilon_at` reaches, but does not exceed, `epsilon`.

    Args:
        epsilon_at: epsilon as a function of the argument.
        epsilon: the target.
        start: first trial.
        bounds: smallest and largest argument.
        rising: whether epsilon rises with the argument. If so, the result is the largest argument within the target,
            otherwise the smallest.

    Returns:
        An argument at which `epsilon_at` was evaluated; None if no argument in `bounds` is within the target.

    The search steps in log-log coordinates until it has bracketed the boundary, then applies regula falsi with the
    Illinois rule.
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
            # Overshoot a little, to bracket the boundary sooner.
            step = math.copysign(min(max(1.2 * abs(y / slope), 0.01), 2.0), -y * slope)
            tried, x = x, min(max(x + step, lowest), highest)
            if x == tried:  # at the bound toward which the search moves
                break
        elif abs(outside[0] - inside[0]) <= _TOLERANCE:
            break
        else:
            x = _interpolate(inside, outside)
    return None if inside is None else clamp_value(inside[0])


def _interpolate(inside: tuple[float, float], outside: tuple[float, float]) -> float:
    """Return the zero of the chord through both ends of the bracket, at least half a tolerance away from the ends."""
    width = outside[0] - inside[0]
    least = _TOLERANCE / 2 / abs(width)
    share = inside[1] / (inside[1] - outside[1])
    return inside[0] + width * min(max(share, least), 1 - least)


def _halve_weight(end: tuple[float, float] | None, again: bool) -> tuple[float, float] | None:
    """Apply the Illinois rule: halve the weight of an end that was retained twice in a row."""
    return (end[0], end[1] / 2) if again and end is not None else end


def format_epsilon(epsilon: float | None) -> str:
    """Format epsilon with three decimals, rounded up so that the text never understates the privacy loss."""
    if epsilon is None or not math.isfinite(epsilon):
        return "unbounded"
    shown = Decimal(repr(float(epsilon)))  # the shortest decimal representation, so that 1.1 becomes 1.100
    return str(shown.quantize(Decimal("0.001"), rounding=ROUND_CEILING, context=_WIDE))


def format_share(share: float | None) -> str:
    """Format the spent share of a cap in percent, rounded up; "all" without noise, and empty without a cap.

    >>> [format_share(share) for share in (None, 0.1001, math.inf)]
    ['', '11 %', 'all']
    """
    if share is None:
        return ""
    return f"{math.ceil(share * 100 - 1e-9)} %" if math.isfinite(share) else "all"


def format_factor(epsilon: float | None) -> str:
    """Format e^epsilon, the bound on the ratio of two probabilities, rounded up.

    >>> [format_factor(epsilon) for epsilon in (0.0, 0.1, 3.0, 8.0, 50.0, None)]
    ['1.00', '1.11', '20.1', '2,981', '10^22', 'unbounded']
    """
    if epsilon is None or not math.isfinite(epsilon):
        return "unbounded"
    if epsilon > _MAX_AS_FACTOR:
        return f"10^{math.ceil(epsilon / math.log(10))}"
    factor = Decimal(repr(float(epsilon))).exp()
    places = max(0, 2 - factor.adjusted())
    return f"{factor.quantize(Decimal(1).scaleb(-places), rounding=ROUND_CEILING, context=_WIDE):,}"
