"""Audit bounds: figures from the paper, golden values of another implementation, and error rates."""

from functools import cache

import numpy as np
import pytest
from scipy import stats
from scipy.spatial import ConvexHull

from fedtune.evaluation import audit_bound
from fedtune.evaluation.audit_bound import compute_epsilon_lower_bound, compute_max_lower_bound, compute_p_value
from fedtune.lab.audit.guesses import count_right_guesses
from fedtune.privacy.accountant import calibrate_noise

DELTA = 1e-5
CHANCE = 1e-4
"""Probability that a correct auditor fails a test below."""


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "published"),
    [
        (100, 100, 75, 0.0, 0.702),  # appendix D
        (100, 100, 75, 1e-4, 0.699),
        (1000, 100, 75, 1e-4, 0.673),
        (100_000, 1510, 1439, 1e-5, 2.675),  # section 7, which truncates the last digit
    ],
)
def test_lower_bounds_match_the_published_figures(
    canaries: int, guesses: int, right: int, delta: float, published: float
) -> None:
    actual = compute_epsilon_lower_bound(canaries, guesses, right, delta=delta, confidence=0.95)
    assert actual == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize(("canaries", "most"), [(1000, 5.78), (5000, 7.28), (15_000, 8.08)])
def test_largest_possible_bound_depends_on_the_number_of_canaries(canaries: int, most: float) -> None:
    assert compute_max_lower_bound(canaries, delta=DELTA, confidence=0.95) == pytest.approx(most, abs=5e-3)
    one_wrong = compute_epsilon_lower_bound(canaries, canaries, canaries - 1, delta=DELTA, confidence=0.95)
    assert one_wrong < compute_max_lower_bound(canaries, delta=DELTA, confidence=0.95) - 0.1


@pytest.mark.parametrize("canaries", [10, 100, 1000])
@pytest.mark.parametrize("delta", [0.0, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_p_value_matches_its_definition(canaries: int, delta: float, epsilon: float) -> None:
    for guesses in (1, canaries // 2, canaries):
        for right in {0, 1, guesses // 2, guesses}:
            trials = stats.binom(guesses, 1 / (1 + np.exp(-epsilon)))
            beta = trials.sf(right - 1)
            shares = [(trials.cdf(right - 1) - trials.cdf(right - i - 1)) / i for i in range(1, right + 1)]
            defined = min(1.0, beta + 2 * canaries * delta * max(shares, default=0.0))
            assert compute_p_value(canaries, guesses, right, epsilon=epsilon, delta=delta) == pytest.approx(
                defined, abs=1e-9
            )


def test_random_guessing_has_bound_zero_and_p_value_grows_with_epsilon() -> None:
    assert compute_epsilon_lower_bound(1000, 1000, 500, delta=DELTA, confidence=0.95) == 0
    assert compute_epsilon_lower_bound(1000, 1000, 0, delta=DELTA, confidence=0.95) == 0
    for right in (60, 80, 100):
        values = [compute_p_value(100, 100, right, epsilon=epsilon, delta=1e-3) for epsilon in np.linspace(0, 8, 81)]
        assert np.diff(values).min() > -1e-12


@cache
def bound_epsilon(canaries: int, guesses: int, right: int, delta: float) -> float:
    return compute_epsilon_lower_bound(canaries, guesses, right, delta=delta, confidence=0.95)


def max_failures(trials: int) -> int:
    """Return the number of failures of a 95 % bound that is exceeded only with probability `CHANCE`."""
    return int(stats.binom(trials, 0.05).isf(CHANCE))


def test_bound_on_randomized_response_fails_five_percent_of_the_time() -> None:
    generator, trials, canaries = np.random.default_rng(1), 4000, 200
    right = generator.binomial(canaries, 1 / (1 + np.exp(-1.0)), size=trials)
    wrong = sum(bound_epsilon(canaries, canaries, int(count), 0.0) > 1.0 for count in right)
    assert wrong <= max_failures(trials)
    # The test is not too loose, either: the mechanism is the worst with epsilon = 1, so the bound is nearly exact.
    assert wrong >= 0.025 * trials


@pytest.mark.parametrize("guesses", [40, 400])
def test_bound_on_a_gaussian_mechanism_keeps_its_confidence(guesses: int) -> None:
    epsilon, trials, canaries = 2.0, 400, 400
    sigma = calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=1.0, steps=1)
    wrong = sum(bound > epsilon for bound in simulate_gaussian_bounds(sigma, trials, canaries, guesses))
    assert wrong <= max_failures(trials)
    # A mechanism with a tenth of the noise is refuted.
    assert min(simulate_gaussian_bounds(sigma / 10, 20, canaries, guesses)) > epsilon


def simulate_gaussian_bounds(sigma: float, trials: int, canaries: int, guesses: int) -> list[float]:
    generator, bounds = np.random.default_rng(2), []
    for _ in range(trials):
        inserted = generator.random(canaries) < 0.5
        scores = inserted + sigma * generator.normal(size=canaries)
        bounds.append(bound_epsilon(*count_right_guesses(scores - 0.5, inserted, guesses=guesses), DELTA))
    return bounds


@pytest.mark.parametrize(("shift", "golden"), [(1, 1.13346), (2, 2.311945), (4, 4.395568)])
def test_bounds_match_jax_privacy_golden_values(shift: int, golden: float) -> None:
    """The other auditor used exact normal scores: "in" above the best threshold on the ROC's hull, with Bonferroni."""
    quantiles = stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000)
    thresholds = np.concatenate([np.sort(np.concatenate([quantiles, quantiles + shift])), [np.inf]])
    actual = 10_000 - np.searchsorted(quantiles + shift, thresholds)
    false_positive_rate = 10_000 - np.searchsorted(quantiles, thresholds)
    corners = ConvexHull(np.stack([false_positive_rate, actual], axis=1)).vertices.tolist()
    error, best = 0.05 / len(corners), 0.0
    precision = {place: actual[place] / max(1, actual[place] + false_positive_rate[place]) for place in corners}
    for place in sorted(corners, key=lambda place: -precision[place]):
        if precision[place] <= 1 / (1 + np.exp(-best)):
            break  # no later threshold can refute more
        right, guesses = int(actual[place]), int(actual[place] + false_positive_rate[place])
        if compute_p_value(20_000, guesses, right, epsilon=best, delta=1e-6) < error:
            best = compute_epsilon_lower_bound(20_000, guesses, right, delta=1e-6, confidence=1 - error)
    assert best == pytest.approx(golden, rel=1e-5)


@pytest.mark.parametrize("sites", [[], ["a"], [None], ["a", None], ["a", "b", "c", None]], ids=str)
def test_simultaneous_bounds_share_the_allowed_error(sites: list[str | None]) -> None:
    errors = audit_bound.split_error_probability(0.95, sites)
    assert len(errors) == len(sites)
    assert sum(errors) == pytest.approx(0.05 if sites else 0.0)
    assert all(0 < error <= 0.05 + 1e-12 for error in errors)
    site_error, _ = audit_bound.split_error_probability(0.95, ["a", None])
    assert compute_p_value(15_000, 15_000, 15_000, epsilon=8.0, delta=1e-5) < site_error, (
        "a claim of 8 must still be refutable"
    )
