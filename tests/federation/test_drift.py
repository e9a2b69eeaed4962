"""Held-out scores over runs: pooled mean and deviation, computed by hand and by simulation, and detected drops."""

import math

import numpy as np
import pytest

from fedtune.federation.drift import HeldOut, detect_score_drop, pool_held_out_scores
from fedtune.federation.lead import RoundResult

from .conftest import round_of


def make_scored_round(number: int, **scores: tuple[float, float]) -> RoundResult:
    return round_of(number, sites=tuple(scores), site_scores=scores, ended=f"2026-01-0{number}")


def make_runs(*means: float, deviation: float = 0.01) -> list[HeldOut]:
    return [HeldOut(run=str(n), date="", mean=mean, deviation=deviation) for n, mean in enumerate(means)]


def test_held_out_scores_are_pooled_over_sites_and_rounds() -> None:
    rounds = [
        make_scored_round(1, a=(0.5, 1.0), b=(0.9, 1.1)),
        make_scored_round(2, a=(0.7, 0.9)),
        make_scored_round(3),
    ]
    pooled = pool_held_out_scores(rounds, {"a": 100.0, "b": 50.0}, noise=2.0, run="r")
    # 50 + 45 + 70 correct of 100 + 55 + 90; three releases, each with noise of 2 root 2 units on both sums.
    units, mean, noise = 245.0, 165 / 245, 2.0 * math.sqrt(6)
    deviation = math.sqrt((1 + mean**2) * (noise / units) ** 2 + mean * (1 - mean) / (units / 2))
    assert pooled == HeldOut(run="r", date="2026-01-03", mean=mean, deviation=deviation)
    assert pool_held_out_scores(rounds, {"a": 100.0, "b": 50.0}, noise=21.0, run="r") is None, (
        "the noise is too large for so few units"
    )
    assert pool_held_out_scores([make_scored_round(1)], {"a": 100.0}, noise=1.0, run="r") is None


def test_reported_deviation_matches_simulated_runs() -> None:
    rng, means, deviations = np.random.default_rng(5), [], []
    for _ in range(2000):
        correct = np.full((4, 1), rng.binomial(100, 0.7)) / 100
        noise = rng.normal(0, 10 * math.sqrt(2), (4, 2)) / 100
        rounds = [make_scored_round(n + 1, a=(correct[n, 0] + noise[n, 0], 1 + noise[n, 1])) for n in range(4)]
        pooled = pool_held_out_scores(rounds, {"a": 100.0}, noise=10.0, run="r")
        means.append(pooled.mean)
        deviations.append(pooled.deviation)
    assert np.mean(means) == pytest.approx(0.7, abs=0.01)
    assert np.std(means) == pytest.approx(np.mean(deviations), rel=0.06)


def test_newest_two_runs_are_compared_with_all_earlier_runs() -> None:
    assert detect_score_drop([]) is detect_score_drop(make_runs(0.8)) is None
    two, five = detect_score_drop(make_runs(0.8, 0.7)), detect_score_drop(make_runs(0.8, 0.8, 0.8, 0.8, 0.76))
    assert (two.change, two.significant) == (pytest.approx(-0.1), True)
    # 0.02 is above 1.645 x 0.01 x root of 1/3 + 1/2
    assert (five.change, five.significant) == (pytest.approx(-0.02), True)
    assert five.min_detectable == pytest.approx((1.6449 + 0.8416) * 0.01 * math.sqrt(1 / 3 + 1 / 2), rel=1e-3)
    assert not detect_score_drop(make_runs(0.8, 0.8, 0.8, 0.79, 0.79)).significant  # type: ignore[union-attr]
    assert not detect_score_drop(make_runs(0.7, 0.8)).significant  # type: ignore[union-attr]
    # A run with little information has little weight.
    imprecise = HeldOut(run="v", date="", mean=0.1, deviation=1.0)
    drop = detect_score_drop([*make_runs(0.8, 0.8), imprecise, *make_runs(0.8, 0.8)])
    assert abs(drop.change) < 1e-3


def test_drift_test_has_a_false_alarm_rate_of_five_percent() -> None:
    rng = np.random.default_rng(7)
    drops = [detect_score_drop(make_runs(*rng.normal(0.8, 0.01, 6))) for _ in range(4000)]
    assert np.mean([drop.significant for drop in drops if drop]) == pytest.approx(0.05, abs=0.012)
