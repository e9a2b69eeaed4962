"""What a search costs: against other formulas, against an exact best of many, and where no bound is claimed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent, GaussianDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy import special, stats

from fedtune.privacy import accountant, filter
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import best_of_poisson, draw_number, price_of, price_of_drawn
from fedtune.spec import ConfigError

ORDERS = range(2, 65)


def rdp_of_step(order: int, *, rate: float, noise: float) -> float:
    """Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), equation 30: a sampled Gaussian at a whole order."""
    terms = [
        math.log(math.comb(order, k))
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]
    return float(special.logsumexp(terms)) / (order - 1)


def epsilon_of(rdp: dict[int, float], delta: float) -> float:
    """Canonne, Kamath, Steinke 2020, Proposition 12."""
    return min(rho + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a, rho in rdp.items())


def delta_of(rdp: dict[int, float], epsilon: float) -> float:
    """The same the other way round."""
    logs = [(a - 1) * (rho - epsilon + math.log1p(-1 / a)) - math.log(a) for a, rho in rdp.items()]
    # Bretagnolle and Huber 1978: no delta is above the total variation that the least divergence allows.
    return min(math.exp(min(0.0, *logs)), math.sqrt(-math.expm1(-min(rdp.values()))))


def theorem_6(rdp: dict[int, float], mean: float) -> dict[int, float]:
    """Papernot and Steinke 2022, Theorem 6, by hand."""
    return {a: rho + mean * delta_of(rdp, math.log1p(1 / (a - 1))) + math.log(mean) / (a - 1) for a, rho in rdp.items()}


def of_plan(plan: Plan) -> dict[int, float]:
    steps = plan.local_steps * plan.most_rounds
    return {a: steps * rdp_of_step(a, rate=plan.sampling_rate, noise=plan.noise_multiplier) for a in ORDERS}


def test_trials_cost_what_all_their_steps_cost_together(run_plan: Plan) -> None:
    other = replace(run_plan, local_steps=5, noise_multiplier=3.0)
    price = price_of([run_plan, other, run_plan])
    both = {a: 2 * one + of_plan(other)[a] for a, one in of_plan(run_plan).items()}
    assert price.epsilon_rdp == pytest.approx(epsilon_of(both, run_plan.delta), rel=1e-3)
    assert price.epsilon < price.epsilon_rdp < price.epsilon_filter * (1 + 1e-9)
    assert price.epsilon_of_one == accountant.epsilon_pld([other.whole], other.delta) < price.epsilon
    assert price.epsilon == accountant.epsilon_pld({run_plan.whole: 2, other.whole: 1}, run_plan.delta)
    assert price.epsilon_filter == filter.filter_cost(
        ComposedDpEvent((run_plan.whole, other.whole, run_plan.whole)), delta=1e-5
    )
    assert (price.trials, price.mean, price.epsilon_of_picked) == (3, None, None)


def test_without_noise_nothing_is_bounded(run_plan: Plan) -> None:
    price = price_of([replace(run_plan, noise_multiplier=0.0)] * 2)
    assert not price.private
    assert math.isinf(price.epsilon)


@pytest.mark.parametrize("mean", [1.0, 2.5, 12.0])
def test_the_best_of_a_random_number_agrees_with_theorem_6(run_plan: Plan, mean: float) -> None:
    plan = replace(run_plan, local_steps=10)
    by_hand = epsilon_of(theorem_6(of_plan(plan), mean), plan.delta / 2)
    same_orders = RdpAccountant(orders=list(ORDERS), neighboring_relation=accountant.NEIGHBOURING_RELATION)
    same_orders.compose(RepeatAndSelectDpEvent(plan.whole, mean, math.inf))
    assert same_orders.get_epsilon(plan.delta / 2) == pytest.approx(by_hand, rel=1e-6)
    found, most = best_of_poisson(plan.whole, mean=mean, delta=plan.delta)
    assert 0.8 * by_hand < found <= by_hand * (1 + 1e-9), "more orders are tried"
    all_orders = RdpAccountant(neighboring_relation=accountant.NEIGHBOURING_RELATION)
    all_orders.compose(RepeatAndSelectDpEvent(plan.whole, mean, math.inf))
    assert found == pytest.approx(all_orders.get_epsilon(plan.delta / 2), rel=1e-9), "the other half is for the cut"
    assert most is not None
    spent_on_the_cut = [stats.poisson.sf(number, mean) * (1 + math.exp(found)) for number in (most, most - 1)]
    assert spent_on_the_cut[0] <= plan.delta / 2 < spent_on_the_cut[1]


def hockey_stick(one: np.ndarray, other: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(one - math.exp(epsilon) * other, 0).sum())


def best_of(number_of_trials: Callable[[np.ndarray], np.ndarray], shift: float, noise: float) -> np.ndarray:
    """Probabilities of the largest of many noisy values, in small cells; the last cell: there was none."""
    edges = np.linspace(-12 * noise, 12 * noise, 200_001)
    reached = number_of_trials(stats.norm.cdf(edges, loc=shift, scale=noise))
    none = number_of_trials(np.zeros(1))
    return np.append(np.diff(reached), none)


@pytest.mark.parametrize(("mean", "noise"), [(4.0, 3.0), (12.0, 6.0)])
def test_the_claim_holds_for_the_largest_of_many_noisy_sums(mean: float, noise: float) -> None:
    """One of the worst choices that there are: the trial whose sum is largest is picked."""
    delta = 1e-5
    claimed, most = best_of_poisson(GaussianDpEvent(noise), mean=mean, delta=delta)
    assert most is not None

    def cut(x: np.ndarray) -> np.ndarray:
        """Probability generating function of the number, cut off at `most`."""
        chances = [stats.poisson.pmf(number, mean) for number in range(most)]
        chances.append(stats.poisson.sf(most - 1, mean))
        return np.polynomial.polynomial.polyval(x, chances)

    with_unit, without = (best_of(cut, shift, noise) for shift in (1.0, 0.0))
    for one, other in ((with_unit, without), (without, with_unit)):
        assert hockey_stick(one, other, claimed) <= delta
    alone = accountant.epsilon_pld([GaussianDpEvent(noise)], delta)
    told = max(hockey_stick(one, other, alone) for one, other in ((with_unit, without), (without, with_unit)))
    assert told > delta, "so that the choice itself counts"


def test_a_number_is_drawn_as_poisson_says_and_cut_off() -> None:
    drawn = [draw_number(3.0, most=5) for _ in range(4000)]
    assert set(drawn) == {0, 1, 2, 3, 4, 5}
    expected = sum(min(number, 5) * stats.poisson.pmf(number, 3.0) for number in range(60))
    assert np.mean(drawn) == pytest.approx(expected, abs=6 * 1.5 / math.sqrt(4000))
    assert drawn.count(0) == pytest.approx(4000 * math.exp(-3), abs=6 * math.sqrt(4000 * 0.05))


def test_the_price_of_a_drawn_number_is_that_of_the_most_there_can_be(run_plan: Plan) -> None:
    price = price_of_drawn(run_plan, mean=4, key="k")
    picked, most = best_of_poisson(run_plan.whole, mean=4, delta=run_plan.delta)
    assert most is not None
    assert (price.trials, price.epsilon_of_picked, price.mean) == (most, picked, 4)
    assert price.epsilon == price_of([run_plan] * most).epsilon
    assert price.epsilon_of_one < picked < price.epsilon


@pytest.mark.parametrize(
    ("mean", "noise", "message"),
    [
        (0.5, 4.0, "k = 0.5: must be a finite number of at least 1"),
        (math.nan, 4.0, "k = nan: must be a finite number of at least 1"),
        (501, 4.0, "k = 501: must be at most 500"),
        (4, 0.0, "k = 4: is for private trials"),
        (4, 0.2, "k = 4: gives no bound for who sees the picked adapter alone"),
    ],
)
def test_no_bound_is_claimed_where_there_is_none(run_plan: Plan, mean: float, noise: float, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        price_of_drawn(replace(run_plan, noise_multiplier=noise), mean=mean, key="k")
    assert str(caught.value).startswith(message)
