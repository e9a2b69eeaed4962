"""Lower bounds on epsilon from correct membership guesses: privacy auditing with one training run.

Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846).  Each of m canaries is included in the training data or left out,
by its own fair coin toss.  After training, an attacker who sees the released model guesses the membership of r of the
canaries.  If training is (epsilon, delta)-differentially private, the attacker is hardly more often right than r tosses
of a coin with bias e^epsilon / (1 + e^epsilon).  The module needs only numpy, so that it can be audited alone.

The number of guesses r must be fixed before anybody looks at the results; the choice of the r canaries and of the
guesses may depend on everything that was released. fedtune uses one r per audit (`audit.guesses`), so no correction for
multiple tests is needed.  A caller who computes bounds for k values of r and keeps the largest needs confidence 1 - (1
- confidence) / k each time (Bonferroni), and so does a caller who judges a run by the worst of its k sites
(`split_error_probability`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MIN_CONFIDENCE = 0.9  # with less confidence, audits would too often reject a sound implementation
_PRECISION = 1e-6
_SHARE_OF_SITES = 0.9


def compute_p_value(canaries: int, guesses: int, right: int, *, epsilon: float, delta: float) -> float:
    """Bound the probability of `right` or more correct guesses if training is (epsilon, delta)-DP.

    Theorem 5.2 of the paper, in the form with abstentions (Corollary 5.4).  Let W be Binomial(r, q) with q = e^epsilon
    / (1 + e^epsilon).  With delta = 0, each guess is right with probability at most q for any outcome of the other
    coins, so the number of right guesses is stochastically dominated by W.  With delta > 0, the theorem gives the bound
    W + F.  Here F counts the coins for which training failed to be epsilon-DP; for any fixed outcome of training, F is
    an integer independent of W.  Each of the m coins fails with probability at most delta on either of its sides, so
    the mean of F is at most 2 m delta; all m coins count, guessed or not.  Hence

        P[right >= v]  <=  P[W + F >= v]  =  P[W >= v] + sum_i P[F = i] P[v > W >= v - i]
                       <=  beta + E[F] max_i P[v > W >= v - i] / i  <=  beta + 2 m delta alpha

    with beta = P[W >= v] and alpha the maximum over i = 1 ... v, the worst case for a given mean of F.

    Args:
        canaries: m, the number of canaries, each included by its own fair coin toss.
        guesses: r, the number of canaries for which the attacker did not abstain.
        right: v, the number of correct guesses.
        epsilon: the epsilon under test.
        delta: the delta under test.
    """
    assert 0 <= right <= guesses <= canaries
    chances = compute_binomial_probabilities(guesses, log_odds=epsilon)
    beta = float(chances[right:].sum())
    below = np.cumsum(chances[:right][::-1])  # P[v > W >= v - i] for i = 1, 2, ... v
    alpha = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def compute_epsilon_lower_bound(canaries: int, guesses: int, right: int, *, delta: float, confidence: float) -> float:
    """Return the largest epsilon that the number of correct guesses refutes, or 0.

    Guarantee: if training is (epsilon, delta)-DP, the bound exceeds epsilon with probability at most 1 - confidence.

    >>> round(compute_epsilon_lower_bound(1000, 100, 75, delta=1e-4, confidence=0.95), 3)  # Appendix D of the paper
    0.673
    """
    error = 1 - confidence

    def is_refuted(epsilon: float) -> bool:
        return compute_p_value(canaries, guesses, right, epsilon=epsilon, delta=delta) < error

    if not is_refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while is_refuted(high):
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low


def split_error_probability(confidence: float, sites: Sequence[str | None]) -> list[float]:
    """Split the error probability 1 - `confidence` over several bounds, so that all of them hold together (Bonferroni).

    An attacker at a site sees most of the released information, so the sites share nine tenths of the error
    probability, and the averaged adapter (None) gets the rest. The split does not depend on any result.

    >>> [round(error, 4) for error in split_error_probability(0.95, ["a", "b", None])]
    [0.0225, 0.0225, 0.005]
    """
    error, num_sites = 1 - confidence, sum(site is not None for site in sites)
    of_sites = error if num_sites == len(sites) else _SHARE_OF_SITES * error
    of_average = error - of_sites if num_sites else error
    return [of_average / (len(sites) - num_sites) if site is None else of_sites / num_sites for site in sites]


def compute_max_lower_bound(canaries: int, *, delta: float, confidence: float, guesses: int | None = None) -> float:
    """Return the largest bound that an audit with `canaries` can prove, which it reaches if all guesses are correct.

    >>> [round(compute_max_lower_bound(m, delta=1e-5, confidence=0.95), 2) for m in (1000, 5000, 15000)]
    [5.78, 7.28, 8.08]
    """
    guesses = canaries if guesses is None else guesses
    return compute_epsilon_lower_bound(canaries, guesses, guesses, delta=delta, confidence=confidence)


def compute_binomial_probabilities(count: int, *, log_odds: float) -> npt.NDArray[np.float64]:
    """Return the binomial probabilities of 0 to `count` hits, shape (count + 1,), computed in log space.

    The success probability is 1 / (1 + e^-log_odds).
    """
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    hits = np.arange(count + 1)
    log_hit, log_miss = -np.logaddexp(0.0, -log_odds), -np.logaddexp(0.0, log_odds)
    ways = log_factorials[count] - log_factorials - log_factorials[::-1]
    return np.exp(ways + hits * log_hit + (count - hits) * log_miss)  # type: ignore[no-any-return]
