"""What the best attack on a Gaussian mechanism does exactly, by scipy: a reference for the reports' upper bounds."""

import math

from scipy.optimize import brentq
from scipy.stats import norm


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The least delta at which a mu-Gaussian mechanism has `epsilon` (arXiv 1905.02383, Corollary 2.13)."""
    if mu == 0:
        return 0.0
    near, far = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    return max(0.0, float(norm.sf(near) - math.exp(epsilon + norm.logsf(far))))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu at which a Gaussian mechanism has exactly (epsilon, delta); of training on sampled records no bound."""
    if math.isinf(epsilon):
        return math.inf
    return float(brentq(lambda mu: gaussian_delta(mu, epsilon) - delta, 0.0, 2 * epsilon + 50, xtol=1e-14, rtol=1e-13))


def gaussian_hit_rate(mu: float, *, false_alarms: float) -> float:
    """The share of used records that the best attack on a mu-Gaussian mechanism finds at a share of false alarms."""
    return float(norm.sf(norm.isf(false_alarms) - mu))


def gaussian_right_of_100(mu: float) -> float:
    """Of 100 guesses, half of them about used records, so many are right for the best attack on such a mechanism."""
    return 100 * float(norm.cdf(mu / 2))
