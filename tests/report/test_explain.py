"""The formulae against a table that was computed elsewhere, and against what they must obey."""

import math
import re
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.report.derive import profile
from fedtune.report.page.catalogue import catalogue

from . import gaussian

# At delta 1e-6, in percent.  "gen" is from (epsilon, delta) alone, "gau" of a Gaussian mechanism with just that pair.
# One cell is corrected: the source has 99.995 for 99.99551 (epsilon 10, hit rate at 1 % false alarms).
_TABLE = """\
eps | e^eps | mu | p=.5 | p=.1 | p=.01 | p=.001 | gen 1% | gau 1% | gen .1% | gau .1% | gen right | gau right
0.5 | 1.65 | 0.124 | 62.2 | 15.5 | 1.64 | 0.16 | 1.65 | 1.38 | 0.16 | 0.15 | 62.2 | 52.5
1 | 2.72 | 0.237 | 73.1 | 23.2 | 2.67 | 0.27 | 2.72 | 1.83 | 0.27 | 0.22 | 73.1 | 54.7
2 | 7.39 | 0.448 | 88.1 | 45.1 | 6.95 | 0.73 | 7.39 | 3.02 | 0.74 | 0.41 | 88.1 | 58.9
3 | 20.1 | 0.648 | 95.3 | 69.1 | 16.9 | 1.97 | 20.1 | 4.66 | 2.01 | 0.73 | 95.3 | 62.7
8 | 2981 | 1.532 | 99.97 | 99.7 | 96.8 | 74.9 | 99.97 | 21.3 | 99.97 | 5.95 | 99.97 | 77.8
10 | 22026 | 1.848 | 99.995 | 99.96 | 99.55 | 95.7 | 99.996 | 31.6 | 99.995 | 10.7 | 99.995 | 82.2
"""
_DELTA = 1e-6


@pytest.mark.parametrize("line", _TABLE.splitlines()[1:], ids=lambda line: line.split(" ")[0])
def test_every_cell_of_the_table(line: str) -> None:
    printed = line.split(" | ")
    epsilon = float(printed[0])
    mu = gaussian.gaussian_mu(epsilon, _DELTA)
    row = [epsilon, math.exp(epsilon), mu, *(100 * profile.posterior(epsilon, prior=prior) for prior in profile.PRIORS)]
    for alarms in profile.FALSE_ALARMS:
        row.append(100 * profile.hit_rate_ceiling(epsilon, _DELTA, false_alarms=alarms))
        row.append(100 * gaussian.gaussian_hit_rate(mu, false_alarms=alarms))
    row += [profile.right_of_100_ceiling(epsilon, _DELTA), gaussian.gaussian_right_of_100(mu)]
    assert len(printed) == len(_TABLE.splitlines()[0].split(" | "))
    for cell, value in zip(printed, row, strict=True):
        assert round(value, len(cell.partition(".")[2])) == float(cell), (cell, value)


def test_the_chance_to_pass_the_posterior_can_be_many_times_delta() -> None:
    # Of a Gaussian with just this pair, the chance that the loss of an outcome is above epsilon: Phi(mu/2 - eps/mu).
    epsilon = 0.5
    mu = gaussian.gaussian_mu(epsilon, _DELTA)
    assert NormalDist().cdf(mu / 2 - epsilon / mu) > 30 * _DELTA
    for language, words in (("en", "many times delta"), ("de", "ein Vielfaches von Delta")):
        texts = catalogue(language).texts
        for text in (texts["meaning"]["posterior_note"], texts["formulae"]["posterior"]):
            assert words in text
            assert not re.search("about delta|etwa delta", text, re.IGNORECASE)


def test_many_records_of_one_person_end_in_no_promise() -> None:
    for one, digits, of_five in ((1, 6, 8.6e-5), (3, 2, 0.17)):
        epsilon, delta = profile.group(one, _DELTA, members=5)
        assert (epsilon, round(delta, digits)) == (5 * one, of_five)
    assert profile.group(1, _DELTA, members=1) == (1, _DELTA)
    assert profile.group(8, _DELTA, members=1000) == (8000, 1.0)
    assert profile.group(0, _DELTA, members=3) == (0, 3 * _DELTA)
    assert profile.group(2, 0, members=3) == (6, 0)
    assert profile.group(5, 0.01, members=4) == (20, 1.0)


def test_nothing_bounds_an_epsilon_that_is_next_to_unbounded_and_nothing_spent_is_coin_tossing() -> None:
    assert profile.posterior(1e5, prior=0.001) == 1
    assert profile.hit_rate_ceiling(1e5, 1e-5, false_alarms=0.001) == 1
    assert profile.right_of_100_ceiling(1e5, 1e-5) == 100
    assert profile.posterior(0, prior=0.1) == pytest.approx(0.1)
    assert profile.hit_rate_ceiling(0, 0, false_alarms=0.01) == pytest.approx(0.01)
    assert profile.right_of_100_ceiling(0, 0) == 50


@given(epsilon=st.floats(0, 50), delta=st.floats(0, 0.5), alarms=st.floats(1e-6, 0.999), more=st.floats(0, 5))
def test_ceilings_only_grow(epsilon: float, delta: float, alarms: float, more: float) -> None:
    rate = profile.hit_rate_ceiling(epsilon, delta, false_alarms=alarms)
    assert alarms <= rate <= 1
    assert rate <= profile.hit_rate_ceiling(epsilon + more, delta, false_alarms=alarms) + 1e-12
    assert rate <= profile.hit_rate_ceiling(epsilon, min(1, delta + more), false_alarms=alarms) + 1e-12
    right = profile.right_of_100_ceiling(epsilon, delta)
    assert 50 <= right <= 100
    # An attack with these rates, half of whose records were used, is right no more often than that.
    assert 100 * (rate + 1 - alarms) / 2 <= right + 1e-9


@given(epsilon=st.floats(0.01, 20), delta=st.floats(1e-9, 1e-3), alarms=st.floats(1e-4, 0.5))
def test_a_gaussian_never_passes_the_ceiling_of_its_pair(epsilon: float, delta: float, alarms: float) -> None:
    mu = gaussian.gaussian_mu(epsilon, delta)
    ceiling = profile.hit_rate_ceiling(epsilon, delta, false_alarms=alarms)
    assert gaussian.gaussian_hit_rate(mu, false_alarms=alarms) <= ceiling + 1e-9
    assert gaussian.gaussian_right_of_100(mu) <= profile.right_of_100_ceiling(epsilon, delta) + 1e-9


def test_an_epsilon_has_a_word_for_its_strength() -> None:
    codes = [profile.strength_band(epsilon) for epsilon in (0.0, 1.0, 1.0001, 10.0, 10.0001, math.inf, None)]
    assert codes == ["strong", "strong", "reasonable", "reasonable", "weak", "none", "none"]
