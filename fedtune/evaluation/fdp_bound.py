"""Lower bounds on epsilon from correct membership guesses, for mechanisms with a known trade-off curve.

Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-Differential Privacy in One Run" (arXiv 2410.22235).  The experiment
and the counts are those of `audit_bound`: m canaries, each included by its own fair coin toss, r guesses, v of them
right.  `audit_bound` uses only (epsilon, delta), and therefore allows for the worst mechanism with this pair:
randomized response, which reveals the maximum about every canary.  A Gaussian mechanism reveals that much about very
few canaries.  This module tests a complete trade-off curve, so its bound is about twice as large.

The larger bound requires an assumption.  `compute_fdp_lower_bound` returns the epsilon of the *Gaussian mechanism* that
the counts refute; for another mechanism it is an estimate.  `refutes_profile` tests a given curve, such as that of a
plan's privacy loss distribution, without this assumption.  As in `audit_bound`, r is fixed before anybody looks at
results.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from fedtune.privacy.loss_distribution import compute_hockey_stick

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_MAX_MU = 40.0  # mu of a Gaussian mechanism with an epsilon of about 1,000, which no audit reaches
_CANDIDATES = 64  # values tested at once; each search divides its interval by this number minus 1
_SEARCHES = 5  # 40 / 63^5: mu to eight digits
_MAX_EPSILON = 1000.0


def compute_fdp_lower_bound(canaries: int, guesses: int, right: int, *, delta: float, confidence: float) -> float:
    """Return the largest epsilon, at `delta`, of a Gaussian mechanism that the number of correct guesses refutes, or 0.

    Guarantee: if training is mu-Gaussian differentially private, the bound exceeds its epsilon with probability at most
    1 - confidence.

    Args:
        canaries: m, the number of canaries, each included by its own fair coin toss.
        guesses: r, the number of canaries for which the attacker did not abstain.
        right: v, the number of correct guesses.
        delta: the delta at which epsilon is computed, above 0.
        confidence: the confidence of the bound.

    >>> round(compute_fdp_lower_bound(20_000, 2099, 1818, delta=1e-6, confidence=0.95), 2)
    2.68
    """
    low, high = 0.0, _MAX_MU
    for _ in range(_SEARCHES):
        candidates = np.linspace(low, high, _CANDIDATES)
        refuted = refutes_gaussian(canaries, guesses, right, candidates, error=1 - confidence)
        held = int(np.argmin(refuted))  # the first value that is not refuted; 0 if all are refuted
        if held == 0:
            return compute_gaussian_epsilon(low if not refuted[0] else high, delta)
        low, high = float(candidates[held - 1]), float(candidates[held])
    return compute_gaussian_epsilon(low, delta)


def refutes_gaussian(
    canaries: int, guesses: npt.ArrayLike, right: npt.ArrayLike, mu: npt.ArrayLike, *, error: float
) -> npt.NDArray[np.bool_]:
    """Return whether counts refute mu-Gaussian differential privacy, for arrays of counts and of mu that broadcast.

    Guarantee: a true claim is refuted with probability at most `error`.

    Args:
        canaries: m.
        guesses: r, at most m.
        right: v, at most r.
        mu: one over the noise multiplier of a Gaussian mechanism without sampling; at least 0.
        error: the allowed probability of refuting a true claim.
    """
    all_guesses, all_right, all_mu = np.broadcast_arrays(guesses, right, mu)

    def inverse_blow_up(probabilities: Floats, places: Integers) -> Floats:
        shifted: Floats = ndtr(ndtri(probabilities) - all_mu.ravel()[places])
        return shifted

    refuted = _refute(canaries, all_guesses.ravel(), all_right.ravel(), inverse_blow_up, error=error)
    return refuted.reshape(all_mu.shape)


def refutes_profile(canaries: int, guesses: int, right: int, *, epsilons: Floats, deltas: Floats, error: float) -> bool:
    """Return whether counts refute that training is (epsilon, delta)-DP for every pair of a privacy profile at once.

    Guarantee: a true claim is refuted with probability at most `error`.  The test makes no assumption about the
    mechanism; a profile with few points only makes it weaker.

    Args:
        canaries: m.
        guesses: r, at most m.
        right: v, at most r.
        epsilons: (points,) epsilons of the profile.
        deltas: (points,) upper bounds of delta at each epsilon.
        error: the allowed probability of refuting a true claim.
    """
    shrunk = np.exp(-epsilons)

    def inverse_blow_up(probabilities: Floats, places: Integers) -> Floats:
        # P[E] <= e^epsilon Q[E] + delta bounds Q[E] from below; the second line applies it to the complement of E.
        first = (probabilities[:, None] - deltas) * shrunk
        second = 1 - deltas - (1 - probabilities[:, None]) / shrunk
        least: Floats = np.maximum(first, second).max(axis=1)
        return np.maximum(0.0, least)

    return bool(_refute(canaries, np.array([guesses]), np.array([right]), inverse_blow_up, error=error)[0])


def _refute(
    canaries: int,
    guesses: Integers,
    right: Integers,
    inverse_blow_up: Callable[[Floats, Integers], Floats],
    *,
    error: float,
) -> npt.NDArray[np.bool_]:
    """Test, for each pair of counts, whether P[at least v right] = `error` contradicts the trade-off curve.

    Let p_j be the probability of exactly j right guesses, and, over j >= i,

        hit_i = sum of j p_j / m    and    miss_i = sum of (r - j) p_j / m.

    These are the probabilities that a random canary is guessed right, or wrong, in an outcome with i or more right
    guesses.  The curve requires miss_i >= `inverse_blow_up(hit_i)` (the paper's Theorem 9): this many right guesses
    imply a minimum of wrong guesses.  The recursion starts at i = v and computes the minimum of both at i = 0, where
    they add up to r / m exactly.  If the minimum exceeds r / m, the claim is refuted.

    Args:
        canaries: m.
        guesses: (tests,) r.
        right: (tests,) v.
        inverse_blow_up: maps probabilities, and the indices of their tests, to the minimum probability that the curve
            allows for the same event if the canary's coin had landed on the other side.
        error: the probability under test.
    """
    refuted = np.zeros(right.shape, dtype=bool)
    going = np.arange(right.size)
    guessed, left = guesses.astype(np.float64), right.astype(np.float64)
    hits, misses = error * left / canaries, error * (guessed - left) / canaries
    while going.size:
        refuted[going] = hits + misses > guessed / canaries
        left = left - 1
        grown = np.maximum(misses, inverse_blow_up(hits, going)) - misses
        # A test without growth never grows again, so its claim is not refuted.  Refuted claims stay refuted.
        more = (grown > 0) & (left >= 0) & ~refuted[going]
        if not more.all():
            going, guessed, left = going[more], guessed[more], left[more]
            hits, misses, grown = hits[more], misses[more], grown[more]
        misses = misses + grown
        hits = np.minimum(hits + left / (guessed - left) * grown, 1.0)
    return refuted


def compute_gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon at `delta` of a Gaussian mechanism with noise multiplier 1 / `mu`."""

    def excess(epsilon: float) -> float:
        return float(compute_hockey_stick(1.0, 1 / mu, np.array([epsilon]), adding=False)[0]) - delta

    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    from scipy.optimize import brentq  # slow to import

    return float(brentq(excess, 0.0, _MAX_EPSILON, xtol=1e-9))
