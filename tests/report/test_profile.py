"""The mechanism's own curve: an upper bound on every attack, and close to the best one."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent

from fedtune.privacy import accountant, events
from fedtune.report.derive import profile

from . import gaussian

_NORMAL = NormalDist()
_SHARES = (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9)


def sampled(rate: float, sigma: float, steps: int = 1) -> dict[DpEvent, int]:
    return {PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)): steps}


def forget() -> None:
    kept = profile._pld, profile._epsilon_pld, profile._hit_rate_of, profile._right_by_mixture
    for cached in (*kept, accountant.composed_rdp):
        cached.cache_clear()


_MECHANISMS = {
    "one Gaussian": {GaussianDpEvent(2.0): 1},
    "one sampled step": sampled(0.1, 1.0),
    "a run": sampled(0.05, 1.5, 40),
    "a run with scores": {**sampled(0.05, 1.5, 40), GaussianDpEvent(20.0): 4},
    "little noise": sampled(0.2, 0.6, 100),
}


@pytest.fixture(params=_MECHANISMS)
def spent(request: pytest.FixtureRequest) -> dict[DpEvent, int]:
    return dict(_MECHANISMS[request.param])


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0, 40.0])
def test_a_gaussian_s_curve_is_known_exactly(sigma: float) -> None:
    spent, mu = [GaussianDpEvent(sigma)], 1 / sigma
    for point in profile.curve(spent, 1e-5):
        # At the epsilon that is claimed, the mechanism really has no more than this delta; a bucket less, and it has.
        assert gaussian.gaussian_delta(mu, point.epsilon_pld) <= point.delta * (1 + 1e-9)
        if point.epsilon_pld > 0.01:
            assert gaussian.gaussian_delta(mu, point.epsilon_pld - 2e-3) > point.delta
        assert point.epsilon_rdp >= point.epsilon_pld
    for alarms in _SHARES:
        rate, exact = profile.hit_rate(spent, false_alarms=alarms), gaussian.gaussian_hit_rate(mu, false_alarms=alarms)
        assert exact - 1e-12 <= rate <= exact * (1 + 1e-5)
    right = profile.right_of_100(spent)
    assert gaussian.gaussian_right_of_100(mu) - 1e-9 <= right <= gaussian.gaussian_right_of_100(mu) + 1e-3


def best_attacks(rate: float, sigma: float, alarms: float) -> tuple[float, float]:
    """Exact hit rates of the best tests for, and against, a record in one sampled step."""
    over = sigma * _NORMAL.inv_cdf(1 - alarms)
    for_it = (1 - rate) * alarms + rate * (1 - _NORMAL.cdf((over - 1) / sigma))
    low, high = -50.0 * sigma, 50.0 * sigma  # below it, so many outcomes with the record lie
    while high - low > 1e-12 * sigma:
        middle = (low + high) / 2
        with_it = (1 - rate) * _NORMAL.cdf(middle / sigma) + rate * _NORMAL.cdf((middle - 1) / sigma)
        low, high = (middle, high) if with_it < alarms else (low, middle)
    return for_it, _NORMAL.cdf(low / sigma)


@pytest.mark.parametrize(("rate", "sigma"), [(0.01, 0.8), (0.1, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("alarms", _SHARES)
def test_one_sampled_step_s_best_attacks_are_known_exactly(rate: float, sigma: float, alarms: float) -> None:
    bound = profile.hit_rate(sampled(rate, sigma), false_alarms=alarms)
    best = max(best_attacks(rate, sigma, alarms))
    assert best * (1 - 1e-9) <= bound
    # The curve that covers add and remove at once is the convex one above both.
    assert bound <= best * 1.05


def test_no_simulated_attack_does_better() -> None:
    rate, sigma, steps, draws = 0.2, 1.0, 10, 200_000
    spent, random = sampled(rate, sigma, steps), np.random.default_rng(7)

    def losses(used: bool) -> np.ndarray:
        joined = random.random((draws, steps)) < (rate if used else 0.0)
        seen = joined + sigma * random.standard_normal((draws, steps))
        return np.log1p(rate * np.expm1((2 * seen - 1) / (2 * sigma**2))).sum(axis=1)

    without, with_it = losses(False), losses(True)
    for alarms in (0.001, 0.01, 0.1):
        bound = profile.hit_rate(spent, false_alarms=alarms)
        for others, sought in ((without, with_it), (-with_it, -without)):
            rate_found = (sought > np.quantile(others, 1 - alarms)).mean()
            assert rate_found <= bound + 5 * math.sqrt(bound / draws) + 5 * bound * math.sqrt(1 / (alarms * draws))
        # The test for the record is the best there is here: the bound is not far above it.
        assert bound <= 1.25 * (with_it > np.quantile(without, 1 - alarms)).mean()
    right = profile.right_of_100(spent)
    found = 50 * ((with_it > 0).mean() + (without <= 0).mean())
    assert found - 0.5 <= right <= found + 0.5


def test_the_curve_lies_below_each_of_its_points_and_epsilon_falls_with_delta(spent: dict[DpEvent, int]) -> None:
    points = profile.curve(spent, 2e-5)
    assert [point.delta for point in points] == sorted({*profile.DELTAS, 2e-5}, reverse=True)
    for figures in ([point.epsilon_pld for point in points], [point.epsilon_rdp for point in points]):
        assert figures == sorted(figure for figure in figures if figure is not None)
    for point in points:
        for alarms in _SHARES:
            rate = profile.hit_rate(spent, false_alarms=alarms)
            ceiling = profile.hit_rate_ceiling(point.epsilon_pld, point.delta, false_alarms=alarms)
            assert alarms <= rate <= ceiling + 1e-7
        right = profile.right_of_100(spent)
        assert 50 <= right <= profile.right_of_100_ceiling(point.epsilon_pld, point.delta) + 1e-6


def test_more_alarms_and_more_steps_never_mean_fewer_hits(spent: dict[DpEvent, int]) -> None:
    rates = [profile.hit_rate(spent, false_alarms=alarms) for alarms in _SHARES]
    assert rates == sorted(rate for rate in rates if rate is not None)
    twice = {event: 2 * count for event, count in spent.items()}
    for alarms, rate in zip(_SHARES, rates, strict=True):
        assert rate <= profile.hit_rate(twice, false_alarms=alarms) + 1e-9
    assert profile.right_of_100(spent) < profile.right_of_100(twice)


@pytest.mark.by_day("one sampled step", "a run with scores")
def test_figures_are_the_accountants_own(spent: dict[DpEvent, int]) -> None:
    for interval in (accountant.FINE, accountant.COARSE):
        found = profile.epsilon_pld(spent, 1e-5, interval=interval)
        assert found == pytest.approx(accountant.epsilon_pld(spent, 1e-5, interval=interval), rel=1e-9)
    assert profile.epsilon_rdp(spent, 1e-5) == pytest.approx(accountant.epsilon_rdp(spent, 1e-5), rel=1e-12)


def test_equal_histories_give_equal_digits() -> None:
    one = {**sampled(0.05, 1.5, 40), GaussianDpEvent(20.0): 4, **sampled(0.1, 2.0, 7)}
    other = [event for event, count in reversed(one.items()) for _ in range(count)]
    forget()
    first = profile.meaning(one, epsilon=2.0, delta=1e-5, declared_size=1000), profile.curve(one, 1e-5)
    forget()
    assert first == (profile.meaning(other, epsilon=2.0, delta=1e-5, declared_size=1000), profile.curve(other, 1e-5))


@pytest.mark.by_day("one Gaussian", "a run")
def test_what_it_means(spent: dict[DpEvent, int]) -> None:
    epsilon = profile.epsilon_pld(spent, 1e-5)
    meant = profile.meaning(spent, epsilon=epsilon, delta=1e-5, declared_size=2000)
    assert meant.right_of_100_ceiling == profile.right_of_100_ceiling(epsilon, 1e-5)
    assert meant.right_of_100_mechanism == profile.right_of_100(spent)
    assert meant.expected_failures == pytest.approx(0.02)
    assert [(one.prior, one.ceiling) for one in meant.posterior] == [
        (prior, profile.posterior(epsilon, prior=prior)) for prior in profile.PRIORS
    ]
    assert [one.false_alarms for one in meant.hit_rates] == list(profile.FALSE_ALARMS)
    for one in meant.hit_rates:
        assert one.false_alarms < one.mechanism <= one.ceiling


def test_the_mechanism_never_looks_worse_than_its_ceiling() -> None:
    # An epsilon by the fine grid may be a little below what the coarse one, of the curve, says.
    meant = profile.meaning([GaussianDpEvent(1.0)], epsilon=0.0, delta=1e-5, declared_size=None)
    assert meant.right_of_100_mechanism == meant.right_of_100_ceiling
    assert all(one.mechanism == one.ceiling for one in meant.hit_rates)


@pytest.mark.parametrize("spent", [[NonPrivateDpEvent()], {**sampled(0.1, 1.0), NonPrivateDpEvent(): 2}])
def test_without_noise_nothing_is_bounded(spent: events.Spent) -> None:
    meant = profile.meaning(spent, epsilon=None, delta=1e-5, declared_size=None)
    assert (meant.right_of_100_ceiling, meant.right_of_100_mechanism) == (100, None)
    assert [one.ceiling for one in meant.posterior] == [1, 1, 1, 1]
    assert [(one.ceiling, one.mechanism) for one in meant.hit_rates] == [(1, None), (1, None)]
    assert meant.expected_failures is None
    assert {(point.epsilon_pld, point.epsilon_rdp) for point in profile.curve(spent, 1e-5)} == {(None, None)}


def test_hardly_any_noise_is_bounded_all_the_same_and_nothing_spent_helps_no_attacker() -> None:
    assert profile.hit_rate([GaussianDpEvent(0.05)], false_alarms=0.01) == pytest.approx(1.0)
    assert profile.right_of_100([GaussianDpEvent(0.05)]) == pytest.approx(100.0)
    assert (profile.hit_rate([], false_alarms=0.01), profile.right_of_100([])) == (0.01, 50)
    assert profile.epsilon_pld([], 1e-5) == profile.epsilon_rdp([], 1e-5) == 0


def of_several(spent: dict[DpEvent, int], members: int) -> float:
    return profile.right_of_several(spent, profile.right_of_100(spent), epsilon=8.0, delta=1e-5, members=members)


def mixture(rate: float, sigma: float, members: int) -> Callable[[np.ndarray], np.ndarray]:
    """Density of one step's noise, moved by as many records of the person as a Poisson sample takes."""
    shares = [math.comb(members, n) * rate**n * (1 - rate) ** (members - n) for n in range(members + 1)]
    return lambda x: sum(
        share * np.exp(-(((x - n) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        for n, share in enumerate(shares)
    )


@pytest.mark.by_day("0.05-0.9-2", "0.3-2.0-5", "1.0-3.0-2", "1.0-1.0-5")
@pytest.mark.parametrize("members", [2, 5])
@pytest.mark.parametrize(("rate", "sigma"), [(0.05, 0.9), (0.3, 2.0), (1.0, 3.0), (1.0, 1.0)])
def test_of_several_records_no_attacker_guesses_better(rate: float, sigma: float, members: int) -> None:
    """The best one's share is (1 + total variation) / 2: here summed over the outcomes of two steps, without losses."""
    points, width = np.linspace(-12 * sigma, members + 12 * sigma, 4001, retstep=True)
    without, having = (mixture(rate, sigma, of)(points) * width for of in (0, members))
    variation = np.abs(np.outer(without, without) - np.outer(having, having)).sum() / 2
    best = 50 * (1 + float(variation))
    assert best - 1e-6 <= of_several(sampled(rate, sigma, 2), members) <= best + 0.2


def test_two_records_at_epsilon_8_are_no_certain_hit() -> None:
    """By dividing likelihoods of drawn outcomes: 91.6 of 100 for two records and 99.93 for five, at 76 for one."""
    rate, sigma, steps = 0.1, 1.1297368779778485, 200
    assert 7.99 < profile.epsilon_pld(sampled(rate, sigma, steps), 1e-5, interval=accountant.FINE) <= 8
    drawn = np.random.default_rng(7).normal(0, sigma, (20_000, steps))
    without = np.log(mixture(rate, sigma, 0)(drawn)).sum(axis=1)
    for members, about in ((1, 76.1), (2, 91.6), (5, 99.94)):
        ratio = np.exp(np.log(mixture(rate, sigma, members)(drawn)).sum(axis=1) - without)
        apart = np.maximum(0, 1 - ratio)
        best, error = 50 * (1 + apart.mean()), 50 * apart.std() / math.sqrt(len(apart))
        found = of_several(sampled(rate, sigma, steps), members)
        assert best - 4 * error <= found <= best + 4 * error + 0.2
        assert found == pytest.approx(about, abs=0.1)


def test_of_several_records_without_a_plan_epsilon_and_the_triangle_bound() -> None:
    """(1.6, 1e-5) for one record is (3.2, 6e-5) for two: 96 of 100, where the triangle inequality allows 100."""
    for epsilon, members in ((1.6, 2), (1.6, 5), (0.1, 2), (8.0, 2)):
        right = profile.right_of_100_ceiling(epsilon, 1e-5)
        found = profile.right_of_several(None, right, epsilon=epsilon, delta=1e-5, members=members)
        for_all = profile.right_of_100_ceiling(*profile.group(epsilon, 1e-5, members=members))
        assert found == min(100, 50 + members * (right - 50), for_all)
        assert right < found
    many = {PoissonSampledDpEvent(0.01, GaussianDpEvent(1 + number)): 1 for number in range(9)}
    assert of_several(many, 2) == 50 + 2 * (profile.right_of_100(many) - 50), "of so many plans no curve is computed"
    assert profile._right_by_mixture(((GaussianDpEvent(0.1), 1),), 2) is None, "nor of next to no noise"


def test_twenty_settings_are_composed_once_for_each_purpose() -> None:
    spent = {PoissonSampledDpEvent(0.01 + number / 500, GaussianDpEvent(1 + number / 10)): 250 for number in range(20)}
    forget()
    profile.meaning(spent, epsilon=5.0, delta=1e-5, declared_size=1000)
    profile.curve(spent, 1e-5)
    # The composition is what takes time; each point of a curve is read off it.
    assert profile._pld.cache_info().misses <= 2
    assert accountant.composed_rdp.cache_info().misses == 1
