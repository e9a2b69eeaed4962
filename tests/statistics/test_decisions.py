"""The decisions themselves: their false alarms and their power are what they state, at rates that can be counted."""

import numpy as np
import pytest
from scipy import stats

from .decisions import Rate, Scale, Shape, Unrelated

REPEATS = 2000
ONCE_IN_A_MILLION = 1e-6


def is_consistent_with_rate(rate: float, times: int) -> bool:
    return bool(stats.binomtest(times, REPEATS, rate).pvalue > ONCE_IN_A_MILLION)


@pytest.fixture
def draws() -> np.random.Generator:
    return np.random.default_rng(11)


def test_scale_test_has_its_stated_error_and_power(draws: np.random.Generator) -> None:
    test = Scale(200, 0.1)
    assert is_consistent_with_rate(0.1, sum(not test.accepts(draws.normal(0, 3, 200), 3.0) for _ in range(REPEATS)))
    for factor in (0.9, 1.1):
        rejected = sum(not test.accepts(draws.normal(0, 3 * factor, 200), 3.0) for _ in range(REPEATS))
        assert is_consistent_with_rate(test.power(factor), rejected)
        assert 0.3 < test.power(factor) < 0.9, "neither rate is counted in vain"


@pytest.mark.nightly
def test_shape_test_has_its_stated_error_and_power(draws: np.random.Generator) -> None:
    test = Shape(300, 0.1)
    assert is_consistent_with_rate(0.1, sum(not test.accepts(draws.normal(0, 3, 300), 3.0) for _ in range(REPEATS)))
    # Massart's bound is on the safe side.
    shifted = 2 * stats.norm.cdf(0.2) - 1  # the distance of N(0.4, 1)
    rejected = sum(not test.accepts(3 * draws.normal(0.4, 1, 300), 3.0) for _ in range(REPEATS))
    assert 0.8 < test.power(shifted) <= rejected / REPEATS


def test_independence_test_has_its_stated_error_and_power(draws: np.random.Generator) -> None:
    test = Unrelated(64, 0.1)
    alarms = related = 0
    for _ in range(REPEATS):
        left, right = draws.normal(size=(2, 64))
        alarms += not test.accepts(left, 5 * right)
        shared = 0.6 * left + 0.8 * right
        related += not test.accepts(left, np.roll(shared, 17))
    # Shifts are not independent of each other, so that they share the false alarm makes it smaller, if anything.
    assert 0.05 < alarms / REPEATS < 0.1 + 5 * np.sqrt(0.1 * 0.9 / REPEATS)
    assert 0.5 < test.power(0.6) <= related / REPEATS
    assert not test.accepts(left, left)


def test_rate_test_has_its_stated_error_and_power(draws: np.random.Generator) -> None:
    test = Rate(400, 0.3, 0.1)
    size = test.power(0.3)
    assert 0.05 < size <= 0.1, "a binomial count is discrete, so its false alarms are at most those stated"
    assert is_consistent_with_rate(size, sum(not test.accepts(int(draws.binomial(400, 0.3))) for _ in range(REPEATS)))
    for rate in (0.27, 0.33):
        assert is_consistent_with_rate(
            test.power(rate), sum(not test.accepts(int(draws.binomial(400, rate))) for _ in range(REPEATS))
        )
