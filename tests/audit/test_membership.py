"""AUROC, hit rates at few false alarms, and their intervals."""

import numpy as np
import pytest
from scipy import stats

from fedtune.audit.record_attack import auroc, hit_rate

TRIALS = 600
FEW = stats.binom(TRIALS, 0.05).isf(1e-4)


def test_auroc_is_mann_whitney_s() -> None:
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 9, 80).astype(float), generator.integers(0, 8, 120).astype(float)
    wanted = stats.mannwhitneyu(members, others).statistic / (80 * 120)
    assert auroc(members, others, confidence=0.95)[0] == pytest.approx(wanted)


def test_auroc_of_what_is_told_apart_and_what_is_not() -> None:
    low, high = np.arange(50.0), np.arange(50.0) + 100
    assert auroc(high, low, confidence=0.95) == (1.0, 1.0, 1.0)
    assert auroc(low, high, confidence=0.95)[0] == 0.0
    assert auroc(low, low, confidence=0.95)[0] == 0.5


def test_the_interval_of_auroc_covers() -> None:
    generator, shift = np.random.default_rng(1), 0.5
    truth = stats.norm.cdf(shift / np.sqrt(2))
    outside = 0
    for _ in range(TRIALS):
        _, low, high = auroc(generator.normal(size=150) + shift, generator.normal(size=100), confidence=0.95)
        outside += not low <= truth <= high
    assert 0.02 * TRIALS < outside <= FEW + 0.01 * TRIALS  # normal by approximation only


def test_hit_rates_at_few_false_alarms() -> None:
    members, others = np.concatenate([np.full(30, 2000.0), np.zeros(70)]), np.arange(1000.0)
    share, low, high = hit_rate(members, others, false_alarms=0.01, confidence=0.95) or (0, 0, 0)
    assert share == 0.3
    assert low < 0.3 < high
    assert hit_rate(others, others, false_alarms=0.01, confidence=0.95) == pytest.approx(
        (0.01, 0.0048, 0.0183), abs=1e-3
    )
    assert hit_rate(members, others, false_alarms=0.0001, confidence=0.95) is None, "no tenth of a false alarm"
