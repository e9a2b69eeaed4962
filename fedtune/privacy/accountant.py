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

import numpy as np
import numpy.typing as npt
from dp_accounting import DpEvent, GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant, pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from dp_accounting.rdp import RdpAccountant
from scipy import fft, special

from fedtune.privacy import events
from fedtune.spec import ConfigError

Counted = tuple[tuple[DpEvent, int], ...]
"""Mechanisms, and how often each ran."""
_WIDE = Context(prec=330)  # any float to three decimals
_MOST_AS_FACTOR = 20.0  # its factor has nine digits; beyond, a power of ten says as much
NEIGHBOURING_RELATION = NeighboringRelation.ADD_OR_REMOVE_ONE
"""The one neighbouring relation of fedtune: two data sets are neighbours if one has one unit more."""

# Width of the buckets that privacy loss is rounded up to.  Coarser is faster and only ever reports more epsilon.
FINE, COARSE = 1e-4, 1e-3
MOST_NOISE = 1e4
"""Largest noise multiplier of a plan; what asks for more asks for nothing."""
LEAST_NOISE = 1e-2
"""Least noise of a plan that has any: with less, a distribution of losses takes gigabytes.  Searches end here."""
_TOLERANCE = 1e-5  # relative
_TAIL = 1e-15  # probability that a composition may count as an infinite loss, to stay short
_AT_ONCE = 100_000  # exponents of one bucket each that are computed in one go: what a processor's cache holds
_TYPICAL_SLOPE = 1.2  # of log epsilon over the log of noise or rate; a wrong guess costs a step or two


def check_noise(key: str, value: float, *, none: bool = False) -> None:
    """Require a noise multiplier whose epsilon can be computed, or 0 where `none` lets it in."""
    if not (LEAST_NOISE <= value <= MOST_NOISE or (none and value == 0)):
        raise ConfigError(key, value, f"must lie in [{LEAST_NOISE:g}, {MOST_NOISE:g}]{', or be 0' if none else ''}")


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
    accountant = _Pld(NEIGHBOURING_RELATION, value_discretization_interval=interval)
    for event, count in counted:
        accountant.compose(event, count)
    return accountant


class _Pld(PLDAccountant):  # type: ignore[misc]  # dp-accounting has no types
    """dp-accounting's, which builds the distribution of one sampled step once for all its compositions."""

    def _maybe_compose(self, event: DpEvent, count: int, do_compose: bool) -> object:
        match event:
            case PoissonSampledDpEvent(rate, GaussianDpEvent(noise)) if do_compose and 0 < rate < 1 and noise > 0:
                width = self._value_discretization_interval
                removing, adding = (
                    _self_composed(_step(rate, noise, width, adjacency), count)
                    for adjacency in (AdjacencyType.REMOVE, AdjacencyType.ADD)
                )
                self._pld: PrivacyLossDistribution = self._pld.compose(PrivacyLossDistribution(removing, adding))
                return None
            case _:
                return super()._maybe_compose(event, count, do_compose)


@lru_cache(maxsize=8)  # with next to no noise, one may take 50 MB
def _step(rate: float, noise: float, interval: float, adjacency: AdjacencyType) -> pld_pmf.PLDPmf:
    """Of one sampled step: what dp-accounting's `from_gaussian_mechanism` gives, number for number."""
    loss = _SampledGaussianLoss(noise, sampling_prob=rate, adjacency_type=adjacency)
    bounds = loss.connect_dots_bounds()
    low, high = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
    deltas = loss.get_delta_for_epsilon(np.arange(low, high + 1) * interval)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, deltas)


def _self_composed(step: pld_pmf.PLDPmf, count: int) -> pld_pmf.PLDPmf:
    """What its `self_compose` gives for `count` steps, number for number, but that Chernoff's exponents are kept."""
    if not isinstance(step, pld_pmf.DensePLDPmf):
        return step.self_compose(count, _TAIL)
    low, high = 0, (step.size - 1) * count
    for order, exponent in _chernoff_exponents(step):
        bound = (count * exponent + math.log(2 / _TAIL)) / order
        if order > 0 and math.isfinite(bound):
            high = min(high, math.ceil(bound))
        elif math.isfinite(bound):
            low = max(low, math.floor(bound))
    fast = fft.next_fast_len(max(high - low + 1, step.size))
    wrapped = np.real(fft.ifft(fft.fft(step._probs, fast) ** count))
    return pld_pmf.DensePLDPmf(
        step._discretization,
        step._lower_loss * count + low,
        np.roll(wrapped, -low)[: high - low + 1],
        _TAIL - math.expm1(count * math.log1p(-step._infinity_mass)),
        pessimistic_estimate=True,
    )


@lru_cache(maxsize=8)
def _chernoff_exponents(step: pld_pmf.DensePLDPmf) -> tuple[tuple[float, float], ...]:
    """Orders, and the log of the moment generating function of a step's bucket there."""
    orders = np.concatenate((np.arange(-20, 0), np.arange(1, 21))) / step.size
    some = np.array_split(orders, math.ceil(min(orders.size, orders.size * step.size / _AT_ONCE)))
    found = [special.logsumexp(np.outer(part, np.arange(step.size)), axis=1, b=step._probs) for part in some]
    return tuple(zip(orders.tolist(), np.concatenate(found).tolist(), strict=True))


class _SampledGaussianLoss(GaussianPrivacyLoss):  # type: ignore[misc]
    """dp-accounting's, whose loop over thousands of losses is one line of numpy: the same operations in their order."""

    def get_delta_for_epsilon(self, epsilon: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Delta at each epsilon, for a sampling rate below 1."""
        adding = self.adjacency_type is AdjacencyType.ADD
        # With a unit more, no loss is above -log(1 - rate); with one less, none is below log(1 - rate).
        gain = -epsilon if adding else epsilon
        reached = gain > math.log1p(-self.sampling_prob)
        deltas = np.zeros_like(epsilon) if adding else -np.expm1(epsilon)
        cutoffs = self._cutoffs(gain[reached], adding=adding)
        deltas[reached] = self.mu_upper_cdf(cutoffs) - np.exp(epsilon[reached] + self.mu_lower_log_cdf(cutoffs))
        return np.clip(deltas, 0, 1)

    def _cutoffs(self, gain: npt.NDArray[np.float64], *, adding: bool) -> npt.NDArray[np.float64]:
        """Where the noise gives just this loss."""
        rate, edge = self.sampling_prob, math.log(1 - self.sampling_prob)
        at_edge = np.abs(gain - edge) <= 1e-9 * np.maximum(np.abs(gain), abs(edge))  # as `math.isclose`
        raised = gain + np.log(1 / rate)
        with np.errstate(divide="ignore", invalid="ignore"):  # at the edge, whose value is set below
            unsampled = raised + np.log1p(-np.exp(np.log(-(1 - 1 / rate)) - raised))
        unsampled = np.where(gain == 0, np.log(1 / rate + (1 - 1 / rate)), unsampled)
        unsampled = np.where(at_edge, -math.inf, unsampled)
        cutoffs: npt.NDArray[np.float64] = (
            self._inverse_privacy_loss_without_subsampling_add(-unsampled)
            if adding
            else self._inverse_privacy_loss_without_subsampling_remove(unsampled)
        )
        return cutoffs


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
    accountant = _Rdp(neighboring_relation=NEIGHBOURING_RELATION)
    with without_notes_on_skipped_orders():
        for event, count in counted:
            accountant.compose(event, count)
    return accountant


class _Rdp(RdpAccountant):  # type: ignore[misc]
    """dp-accounting's, which works out the divergences of one sampled step once for all its compositions."""

    def _maybe_compose(self, event: DpEvent, count: int, do_compose: bool) -> object:
        if do_compose and isinstance(event, PoissonSampledDpEvent):
            self._rdp += count * np.array([renyi_divergence(event, order) for order in self._orders.tolist()])
            return None
        return super()._maybe_compose(event, count, do_compose)


@lru_cache(maxsize=16384)
def renyi_divergence(event: DpEvent, order: float) -> float:
    """Of one `event` at `order`, in nats, as dp-accounting has it: rounding may put one of next to no cost below 0."""
    rdp = RdpAccountant(orders=[order], neighboring_relation=NEIGHBOURING_RELATION)
    with without_notes_on_skipped_orders():
        rdp.compose(event)
    return float(rdp._rdp[0])


def calibrate_noise(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, also: Sequence[DpEvent] = ()
) -> float:
    """The least noise multiplier, to four digits, at which `steps` DP-SGD steps stay within (epsilon, delta).

    `also` are other events that the same epsilon has to pay for.

    Guarantee: `epsilon_pld` of the result never exceeds `epsilon`: the search ends on the side of more noise, on a
    coarser and so more pessimistic grid, rounds the noise up, and tries what it returns.

    Raises:
        ConfigError: no noise multiplier up to 10,000 reaches the target.
    """
    tried: dict[float, float] = {}

    def epsilon_at(sigma: float) -> float:
        if sigma not in tried:
            event = events.dp_sgd(sampling_rate=sampling_rate, noise_multiplier=sigma, steps=steps)
            tried[sigma] = epsilon_pld([event, *also], delta, interval=COARSE)
        return tried[sigma]

    def within(sigma: float) -> bool:
        # More noise never costs more, so most of the search below is answered by what was tried before it.
        if any(spent <= epsilon for noise, spent in tried.items() if noise <= sigma):
            return True
        if any(spent > epsilon for noise, spent in tried.items() if noise >= sigma):
            return False
        return epsilon_at(sigma) <= epsilon

    if also and epsilon_pld(also, delta, interval=COARSE) > epsilon:
        raise ConfigError("privacy.epsilon", epsilon, "is spent by the released metrics alone; give them more noise")
    last_within(epsilon_at, epsilon, start=1.0, bounds=(LEAST_NOISE, MOST_NOISE), rising=False)
    # The bisection alone decides, so that a target has one noise, whatever was tried first.
    low, high = 0.0, 1.0
    while not within(high):
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise ConfigError("privacy.epsilon", epsilon, f"cannot be reached in {steps} steps by any noise")
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    noise = math.ceil(high * 1e4) / 1e4
    while epsilon_at(noise) > epsilon:
        noise = round(noise + 1e-4, 4)
    return noise


def last_within(
    epsilon_at: Callable[[float], float], epsilon: float, *, start: float, bounds: tuple[float, float], rising: bool
) -> float | None:
    """The largest value, or the least where epsilon is not `rising`, at which `epsilon_at` keeps within `epsilon`.

    None when none within `bounds` does.  Steps in log-log coordinates until both sides of the boundary are known, then
    regula falsi with the Illinois rule.  What is returned was tried.
    """
    lowest, highest = map(math.log, bounds)

    def value(x: float) -> float:
        return min(max(math.exp(x), bounds[0]), bounds[1])  # rounding may pass a bound that Plan holds to

    slope = _TYPICAL_SLOPE if rising else -_TYPICAL_SLOPE
    inside: tuple[float, float] | None = None  # (log value, log of epsilon over its bound)
    outside: tuple[float, float] | None = None
    x, before = math.log(start), None
    while True:
        # Nothing may be infinite in what follows; epsilon is 0 where delta alone covers the loss.
        y = math.log(min(max(epsilon_at(value(x)), 1e-9), 1e9) / epsilon)
        if y <= 0:
            inside, outside = (x, y), _halved(outside, before is True)
        else:
            outside, inside = (x, y), _halved(inside, before is False)
        before = y <= 0
        if inside is None or outside is None:
            if x in (lowest, highest):
                break
            # A little too far, so that both sides of the boundary are known soon.
            step = math.copysign(min(max(1.2 * abs(y / slope), 0.01), 2.0), -y * slope)
            x = min(max(x + step, lowest), highest)
        elif abs(outside[0] - inside[0]) <= _TOLERANCE:
            break
        else:
            x = _between(inside, outside)
    return None if inside is None else value(inside[0])


def _between(inside: tuple[float, float], outside: tuple[float, float]) -> float:
    """Where the straight line through both ends crosses the boundary, but never quite at an end."""
    width = outside[0] - inside[0]
    least = _TOLERANCE / 2 / abs(width)
    share = inside[1] / (inside[1] - outside[1])
    return inside[0] + width * min(max(share, least), 1 - least)


def _halved(end: tuple[float, float] | None, again: bool) -> tuple[float, float] | None:
    """The Illinois rule: an end that stays `again` gets half its weight, so that the next point lies nearer to it."""
    return (end[0], end[1] / 2) if again and end is not None else end


def epsilon_text(epsilon: float | None) -> str:
    """Three decimals, rounded up: an epsilon that is shown is never below the one that was derived."""
    if epsilon is None or not math.isfinite(epsilon):
        return "unbounded"
    shown = Decimal(repr(float(epsilon)))  # the digits that a person would see, so that 1.1 stays 1.100
    return str(shown.quantize(Decimal("0.001"), rounding=ROUND_CEILING, context=_WIDE))


def factor_text(epsilon: float | None) -> str:
    """The largest factor between two chances, e to the power of `epsilon`: three digits or a whole number, rounded up.

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
