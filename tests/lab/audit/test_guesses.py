"""Guesses from canary scores; AUROC and hit rates with confidence intervals."""

import numpy as np
import pytest
from scipy import stats

from fedtune.lab.audit.guesses import compute_centered_ranks, compute_likelihood_ratios, count_right_guesses
from fedtune.lab.audit.record_attack import estimate_auroc, estimate_hit_rate


def test_count_right_guesses_uses_the_strongest_evidence() -> None:
    evidence = np.array([5.0, -4.0, 3.0, -0.1, 0.2])
    inserted = np.array([True, False, False, True, True])
    assert count_right_guesses(evidence, inserted, guesses=3) == (5, 3, 2)


def test_evidence_matches_the_exact_likelihood_ratio() -> None:
    """A single step with all canaries: a normal distribution against a shifted one."""
    generator = np.random.default_rng(3)
    controls = generator.normal(size=200_000)
    inserted = generator.random(20_000) < 0.5
    scores = 3.0 * inserted + generator.normal(size=20_000)
    evidence = compute_likelihood_ratios(scores, controls, steps=1, sampling_rate=1.0)
    assert evidence == pytest.approx(3 * scores - 4.5, abs=0.4)


@pytest.mark.parametrize("draw", [1.0, 1000.0])
def test_noiseless_guesses_are_always_right(draw: float) -> None:
    """Includes a canary that was sampled once, while most were sampled often."""
    generator = np.random.default_rng(4)
    inserted = generator.random(5000) < 0.5
    drawn = np.maximum(1, generator.binomial(50, 0.1, size=5000)) * inserted
    rounding = 1e-6 * draw * generator.normal(size=6000)
    evidence = compute_likelihood_ratios(draw * drawn + rounding[:5000], rounding[5000:], steps=50, sampling_rate=0.1)
    assert count_right_guesses(evidence, inserted, guesses=5000) == (5000, 5000, 5000)


def test_uninformative_scores_are_guessed_at_random() -> None:
    generator = np.random.default_rng(5)
    noise, inserted = generator.normal(size=(2, 4000)), generator.random(4000) < 0.5
    evidence = compute_likelihood_ratios(noise[0], noise[1], steps=4, sampling_rate=0.2, least=1.0)
    *_, num_right = count_right_guesses(evidence, inserted, guesses=4000)
    assert abs(num_right - 2000) < 5 * np.sqrt(1000)


def test_ranks_are_centered_on_the_median() -> None:
    assert compute_centered_ranks(np.array([7.0, -1.0, 3.0, 3.5])).tolist() == [1.5, -1.5, -0.5, 0.5]


# Membership.

TRIALS = 600
FEW = stats.binom(TRIALS, 0.05).isf(1e-4)


def test_auroc_matches_mann_whitney_with_ties() -> None:
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 9, 80).astype(float), generator.integers(0, 8, 120).astype(float)
    expected = stats.mannwhitneyu(members, others).statistic / (80 * 120)
    assert estimate_auroc(members, others, confidence=0.95)[0] == pytest.approx(expected)
    low, high = np.arange(50.0), np.arange(50.0) + 100
    assert estimate_auroc(high, low, confidence=0.95) == (1.0, 1.0, 1.0)
    assert estimate_auroc(low, high, confidence=0.95)[0] == 0.0
    assert estimate_auroc(low, low, confidence=0.95)[0] == 0.5


def test_auroc_interval_has_its_nominal_coverage() -> None:
    generator, shift = np.random.default_rng(1), 0.5
    truth = stats.norm.cdf(shift / np.sqrt(2))
    num_outside = 0
    for _ in range(TRIALS):
        _, low, high = estimate_auroc(generator.normal(size=150) + shift, generator.normal(size=100), confidence=0.95)
        num_outside += not low <= truth <= high
    assert 0.02 * TRIALS < num_outside <= FEW + 0.01 * TRIALS  # normal by approximation only


def test_hit_rate_has_a_clopper_pearson_interval() -> None:
    members, others = np.concatenate([np.full(30, 2000.0), np.zeros(70)]), np.arange(1000.0)
    share, low, high = estimate_hit_rate(members, others, false_positive_rate=0.01, confidence=0.95) or (0, 0, 0)
    assert share == 0.3
    assert low < 0.3 < high
    equal_rates = estimate_hit_rate(others, others, false_positive_rate=0.01, confidence=0.95)
    assert equal_rates == pytest.approx((0.01, 0.0048, 0.0183), abs=1e-3)
    assert estimate_hit_rate(members, others, false_positive_rate=0.0001, confidence=0.95) is None, (
        "no tenth of a false alarm"
    )
