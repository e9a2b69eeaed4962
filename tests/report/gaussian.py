"""What the best attack on a Gaussian mechanism does exactly: a reference for the reports' upper bounds."""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()


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


def _tail(value: float) -> float:
    """Probability that a standard normal exceeds `value`; accurate also where it is tiny."""
    return 0.5 * math.erfc(value / math.sqrt(2))


def _scaled_tail(value: float) -> float:
    """`_tail(value)` times e^(value^2 / 2), for a `value` of any size above 0."""
    if value < 20:
        return math.exp(value * value / 2) * _tail(value)
    inverse = 1 / (value * value)  # the asymptotic series, whose next term is below 1e-9 of the sum
    return (1 - inverse * (1 - 3 * inverse * (1 - 5 * inverse))) / (value * math.sqrt(2 * math.pi))
