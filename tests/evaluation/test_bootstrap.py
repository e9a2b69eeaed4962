from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from fedtune.evaluation.bootstrap import FEWEST_UNITS, compared
from fedtune.spec import DataError


def mean(figures: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {"accuracy": float(figures["right"].mean())}


def loss(figures: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {"loss": float(figures["right"].mean())}


def figures(values: np.ndarray) -> dict[str, np.ndarray]:
    return {"right": np.asarray(values, dtype=np.float64)}


def test_scores_are_those_of_all_records_and_the_difference_is_theirs() -> None:
    base, tuned = np.arange(20) < 5, np.arange(20) < 15
    found = compared(figures(base), figures(tuned), scores=mean)["accuracy"]
    assert (found.base.value, found.tuned.value, found.difference.value) == (0.25, 0.75, 0.5)
    assert found.base.low < 0.25 < found.base.high
    assert found.verdict == "better"


def test_lower_losses_are_better() -> None:
    low, high = figures(np.linspace(1, 1.1, 50)), figures(np.linspace(2, 2.1, 50))
    assert compared(high, low, scores=loss)["loss"].verdict == "better"
    assert compared(low, high, scores=loss)["loss"].verdict == "worse"
    assert compared(low, high, scores=mean)["accuracy"].verdict == "better"
    assert compared(low, low, scores=loss)["loss"].verdict == "cannot be told apart"


def test_the_same_units_are_drawn_for_both_models() -> None:
    """Paired: what all records have in common does not widen the interval of the difference."""
    common = np.random.default_rng(1).normal(0.0, 10.0, size=100)
    found = compared(figures(common), figures(common + 1.0), scores=mean)["accuracy"]
    assert found.difference.low == pytest.approx(1.0)
    assert found.difference.high == pytest.approx(1.0)
    assert found.tuned.high - found.tuned.low > 1.0
    assert found == compared(figures(common), figures(common + 1.0), scores=mean)["accuracy"], "and the same every time"


def test_a_draw_takes_a_user_with_all_records() -> None:
    """Records of a user that agree are no evidence of their own: by record the interval would be far too narrow."""
    users = [np.arange(first, first + 10) for first in range(0, 200, 10)]
    values = figures(np.repeat(np.random.default_rng(2).normal(size=20), 10))
    zero = figures(np.zeros(200))
    by_user = compared(zero, values, scores=mean, units=users)["accuracy"].difference
    by_record = compared(zero, values, scores=mean)["accuracy"].difference
    assert by_user.value == by_record.value
    ratio = (by_user.high - by_user.low) / (by_record.high - by_record.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.2)


def test_few_units_prove_nothing() -> None:
    zeros, ones = figures(np.zeros(FEWEST_UNITS)), figures(np.ones(FEWEST_UNITS))
    assert compared(zeros, ones, scores=mean)["accuracy"].verdict == "better"
    fewer = ({"right": one["right"][1:]} for one in (zeros, ones))
    assert compared(*fewer, scores=mean)["accuracy"].verdict == "cannot be told apart"


def test_a_draw_that_cannot_be_scored_is_left_out() -> None:
    def sometimes(drawn: Mapping[str, np.ndarray]) -> dict[str, float]:
        if not drawn["right"].any():
            raise DataError("evaluation data", "no token to predict", "needs one")
        return mean(drawn)

    rare = figures(np.arange(12) == 3)
    found = compared(rare, rare, scores=sometimes)["accuracy"]
    assert found.base.low == pytest.approx(1 / 12)


def test_a_model_that_diverged_is_worse() -> None:
    fine, diverged = figures(np.ones(30)), figures(np.full(30, np.nan))
    found = compared(fine, diverged, scores=loss)["loss"]
    assert found.verdict == "worse"
    assert math.isnan(found.difference.low)
    infinite = figures(np.full(30, np.inf))
    assert compared(infinite, infinite, scores=loss)["loss"].verdict == "cannot be told apart"


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Of two models that are right on 60 % and 70 % of all records, not independently; 95 % within 4 deviations."""
    draws, number, held = np.random.default_rng(5), 400, 0
    for _ in range(number):
        hard = draws.random(100)
        base, tuned = hard + draws.normal(0, 0.05, 100) < 0.6, hard + draws.normal(0, 0.05, 100) < 0.7
        found = compared(figures(base), figures(tuned), scores=mean, resamples=300)["accuracy"].difference
        held += found.low <= 0.1 <= found.high
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / number) < held / number < 0.95 + 4 * math.sqrt(0.95 * 0.05 / number)
