"""What (epsilon, delta) means as frequencies: formulae that anybody can check by hand.

The ceilings hold for an attacker who knows every other record and everything that was released.  Real attacks do worse;
only the ceiling is guaranteed.  An epsilon of infinity, which nothing bounds, gives the trivial ceiling.
"""

from __future__ import annotations

import math
from statistics import NormalDist

PRIORS = (0.5, 0.1, 0.01, 0.001)
"""How sure an attacker may be beforehand, in the reports' tables."""
FALSE_ALARMS = (0.01, 0.001)
"""Shares of false alarms in the reports' tables."""
TIERS_SOURCE = "arXiv 2303.00654"
_TIERS = ((1.0, "strong"), (10.0, "reasonable"))
_LARGEST_EXPONENT = 700.0  # e to it is still a number
_NORMAL = NormalDist()


def posterior(epsilon: float, *, prior: float) -> float:
    """How sure an attacker can become that a record was used, from epsilon alone.

    Posterior odds are e^epsilon times the `prior` odds.  With a delta above 0 this bounds no single outcome: the chance
    of an outcome that passes it is at least delta, and can be many times delta.
    """
    factor = _inverse_exponential(epsilon)
    return prior / (prior + (1 - prior) * factor)


def hit_rate_ceiling(epsilon: float, delta: float, *, false_alarms: float) -> float:
    """Of the records that were used, the share that any attack finds: at most, from (epsilon, delta) alone.

    Args:
        epsilon: of the guarantee.
        delta: of the guarantee.
        false_alarms: share of the records that were not used which the attack takes for used ones.
    """
    other_way = 1 - (1 - delta - false_alarms) * _inverse_exponential(epsilon)
    return max(false_alarms, min(_exponential(epsilon) * false_alarms + delta, other_way, 1.0))


def precision_ceiling(hit_rate: float, *, false_alarms: float, prior: float) -> float:
    """Of the records that an attack with such rates takes for used ones, the share that was used: at most.

    Args:
        hit_rate: a ceiling on it.
        false_alarms: as for the hit rate.
        prior: share of used records among all that are guessed about.
    """
    hits, misses = prior * hit_rate, (1 - prior) * false_alarms
    return hits / (hits + misses)


def right_of_100_ceiling(epsilon: float, delta: float) -> float:
    """Of 100 guesses whether a record was used, half of which were: at most so many are right on average.

    From (epsilon, delta) alone; 50 is coin-tossing.
    """
    factor = _inverse_exponential(epsilon)  # (e^epsilon + delta) / (1 + e^epsilon), without the large number
    return 100 * (1 + delta * factor) / (1 + factor)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The least delta at which a mechanism that is exactly mu-Gaussian has `epsilon`.

    Dong, Roth and Su 2019 (arXiv 1905.02383), Corollary 2.13.
    """
    if mu == 0:
        return 0.0
    near, far = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    # e^epsilon Phi(-far), as a product of two numbers that neither overflow nor vanish.
    return max(0.0, _tail(near) - math.exp(-near * near / 2) * _scaled_tail(far))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu at which a Gaussian mechanism has exactly (epsilon, delta), rounded up in its last digits.

    Training on sampled records is not exactly Gaussian: of it this mu says what a Gaussian with the same pair allows,
    and bounds nothing.
    """
    if math.isinf(epsilon):
        return math.inf
    low, high = 0.0, 1.0
    while gaussian_delta(high, epsilon) < delta:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, epsilon) < delta else (low, middle)
    return high


def gaussian_hit_rate(mu: float, *, false_alarms: float) -> float:
    """The share of used records that the best attack on a mu-Gaussian mechanism finds at a share of false alarms."""
    if not 0 < false_alarms < 1:
        return false_alarms
    return _tail(-_NORMAL.inv_cdf(false_alarms) - mu)


def gaussian_right_of_100(mu: float) -> float:
    """Of 100 guesses, half of them about used records, so many are right for the best attack on such a mechanism."""
    return 100 * _tail(-mu / 2)


def group(epsilon: float, delta: float, *, members: int) -> tuple[float, float]:
    """What (epsilon, delta) for one record comes to for `members` records of one person.

    Delta grows so fast that this seldom promises anything: the unit has to be the person while training.
    """
    if delta == 0 or epsilon == 0:
        return members * epsilon, min(1.0, members * delta)
    if members * epsilon > _LARGEST_EXPONENT:
        return members * epsilon, 1.0
    return members * epsilon, min(1.0, delta * math.expm1(members * epsilon) / math.expm1(epsilon))


def expected_failures(delta: float, *, declared_size: int) -> float:
    """Of `declared_size` records, on how many the bound by epsilon may fail at worst, on average."""
    return delta * declared_size


def strength_band(epsilon: float | None) -> str:
    """A word for the size of `epsilon` (None: unbounded), by the tiers of `TIERS_SOURCE`; no regulator sets one."""
    if epsilon is None or math.isinf(epsilon):
        return "none"
    return next((code for most, code in _TIERS if epsilon <= most), "weak")


def _exponential(epsilon: float) -> float:
    return math.inf if epsilon > _LARGEST_EXPONENT else math.exp(epsilon)


def _inverse_exponential(epsilon: float) -> float:
    return 0.0 if epsilon > _LARGEST_EXPONENT else math.exp(-epsilon)


def _tail(value: float) -> float:
    """Probability that a standard normal exceeds `value`; accurate also where it is tiny."""
    return 0.5 * math.erfc(value / math.sqrt(2))


def _scaled_tail(value: float) -> float:
    """`_tail(value)` times e^(value^2 / 2), for a `value` of any size above 0."""
    if value < 20:
        return math.exp(value * value / 2) * _tail(value)
    inverse = 1 / (value * value)  # the asymptotic series, whose next term is below 1e-9 of the sum
    return (1 - inverse * (1 - 3 * inverse * (1 - 5 * inverse))) / (value * math.sqrt(2 * math.pi))
