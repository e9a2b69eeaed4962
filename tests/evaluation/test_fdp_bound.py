"""The f-DP bound: golden values of another implementation, error rates, and bounds at a realistic size."""

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.spatial import ConvexHull

from fedtune.evaluation.audit_bound import compute_epsilon_lower_bound
from fedtune.evaluation.fdp_bound import (
    compute_fdp_lower_bound,
    compute_gaussian_epsilon,
    refutes_gaussian,
    refutes_profile,
)
from fedtune.lab.audit.guesses import count_right_guesses
from fedtune.privacy.loss_distribution import compute_hockey_stick

DELTA = 1e-5
CLAIM = 8.0
MU_AT_CLAIM = 1.6660306  # of the Gaussian mechanism with epsilon 8 at delta 1e-5


def count_gaussian_guesses(mu: float, *, canaries: int, guesses: int, seed: int) -> tuple[int, int, int]:
    """Count the correct guesses of the optimal attack on a Gaussian mechanism, a likelihood-ratio test of exact
    scores.
    """
    generator = np.random.default_rng(seed)
    inserted = generator.random(canaries) < 0.5
    scores = mu * inserted + generator.normal(size=canaries)
    return count_right_guesses(scores - mu / 2, inserted, guesses=guesses)


@pytest.mark.parametrize(("shift", "golden"), [(1, 2.164749), (2, 4.7218075), (4, 9.133752)])
def test_bounds_match_jax_privacy_golden_values(shift: int, golden: float) -> None:
    """The other auditor used exact normal scores: "in" above the best threshold on the ROC's hull, with Bonferroni.

    All corners of the hull are tested at once: some refute a claim that is smaller by 1e-5, and none a larger claim.
    """
    quantiles = stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000)
    thresholds = np.concatenate([np.sort(np.concatenate([quantiles, quantiles + shift])), [np.inf]])
    hits = 10_000 - np.searchsorted(quantiles + shift, thresholds)
    false_positive_rate = 10_000 - np.searchsorted(quantiles, thresholds)
    corners = ConvexHull(np.stack([false_positive_rate, hits], axis=1)).vertices
    right, guesses = hits[corners], (hits + false_positive_rate)[corners]
    for claim, expected in ((golden * (1 - 1e-5), True), (golden * (1 + 1e-5), False)):
        mu = calibrate_mu(claim, delta=1e-6)
        refuted = refutes_gaussian(20_000, guesses, right, mu, error=0.05 / len(corners))
        assert refuted.any() == expected


def calibrate_mu(epsilon: float, *, delta: float) -> float:
    def excess(mu: float) -> float:
        return float(compute_hockey_stick(1.0, 1 / mu, np.array([epsilon]), adding=False)[0]) - delta

    return float(optimize.brentq(excess, 0.1, 20.0, xtol=1e-12))


@pytest.mark.parametrize("seed", range(3))
def test_bound_with_15_000_canaries_reaches_half_of_epsilon_8(seed: int) -> None:
    """The optimal attack on a Gaussian mechanism, with a tenth of all guesses: 5.2 to 5.6, against 3.6 to 3.9
    before.
    """
    counts = count_gaussian_guesses(MU_AT_CLAIM, canaries=15_000, guesses=1500, seed=seed)
    bound = compute_fdp_lower_bound(*counts, delta=DELTA, confidence=0.95)
    assert 0.6 * CLAIM < bound < CLAIM
    assert bound > 1.3 * compute_epsilon_lower_bound(*counts, delta=DELTA, confidence=0.95)


@pytest.mark.parametrize("guesses", [40, 400])
def test_true_gaussian_claim_is_refuted_within_the_error_rate(guesses: int) -> None:
    trials, mu = 400, 1.0
    counts = [count_gaussian_guesses(mu, canaries=400, guesses=guesses, seed=seed) for seed in range(trials)]
    right = np.array([count[2] for count in counts])
    refuted = int(refutes_gaussian(400, guesses, right, mu, error=0.05).sum())
    assert refuted <= stats.binom(trials, 0.05).isf(1e-4)
    # A mechanism with a third of the noise is refuted, given enough guesses.
    (_, _, hits) = count_gaussian_guesses(3 * mu, canaries=400, guesses=400, seed=0)
    assert refutes_gaussian(400, 400, hits, mu, error=0.05)


def test_profile_test_matches_gaussian_test() -> None:
    mu, guesses = 1.5, 500
    epsilons = np.linspace(-12, 12, 2001)
    deltas = compute_hockey_stick(1.0, 1 / mu, epsilons, adding=False)
    right = np.arange(400, 501)
    by_curve = refutes_gaussian(4000, guesses, right, mu, error=0.05)
    limit = int(right[by_curve].min())
    for count, expected in ((limit - 1, False), (limit + 1, True)):
        profile = epsilons[epsilons >= 0], deltas[epsilons >= 0]
        refuted = refutes_profile(4000, guesses, count, epsilons=profile[0], deltas=profile[1], error=0.05)
        assert refuted == expected


def test_refutation_matches_the_recursion_of_the_paper() -> None:
    """The reference takes scalar steps, as in the paper's Algorithm 3."""

    def refutes(canaries: int, guesses: int, right: int, mu: float, error: float) -> bool:
        hits, misses = error * right / canaries, error * (guesses - right) / canaries
        for left in range(right - 1, -1, -1):
            grown = max(misses, float(stats.norm.cdf(stats.norm.ppf(hits) - mu)))
            hits, misses = hits + left / (guesses - left) * (grown - misses), grown
        return hits + misses > guesses / canaries

    for right in (30, 33, 36, 39, 40):
        for mu in (0.2, 0.8, 1.6, 2.4):
            expected = refutes(100, 40, right, mu, 0.05)
            assert bool(refutes_gaussian(100, 40, right, mu, error=0.05)) == expected


def test_random_guesses_and_few_canaries_have_bound_zero() -> None:
    assert compute_fdp_lower_bound(1000, 1000, 500, delta=DELTA, confidence=0.95) == 0
    assert compute_fdp_lower_bound(1000, 1000, 0, delta=DELTA, confidence=0.95) == 0
    assert compute_fdp_lower_bound(4, 4, 4, delta=DELTA, confidence=0.95) == 0
    assert compute_gaussian_epsilon(0.0, DELTA) == 0
