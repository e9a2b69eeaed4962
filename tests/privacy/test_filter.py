"""The Renyi filter: golden costs, the chosen order, and sums that do not depend on the grouping of events."""

import math
from collections import Counter
from typing import Any

import pytest
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.privacy import accountant, events, filter
from fedtune.privacy.ledger.history import History
from fedtune.privacy.site_policy import ReferenceRun
from fedtune.show.budget_text import compute_amount
from fedtune.spec import ConfigError

from .builders import make_policy

DELTA = 1e-5
# PITFALLS: the Renyi cost of a plan with a PLD epsilon of 8.
GOLDEN = events.build_dp_sgd_event(sampling_rate=0.2, noise_multiplier=0.949, steps=25)


@pytest.mark.parametrize(("order", "golden", "off"), [(3.0, 9.10, 0.01), (4.0, 12.9, 0.05), (8.0, 66.0, 0.5)])
def test_filter_epsilon_at_fixed_orders_matches_golden_values(order: float, golden: float, off: float) -> None:
    assert filter.epsilon_filter([GOLDEN], order=order, delta=DELTA) == pytest.approx(golden, abs=off)


def test_filter_epsilon_at_the_best_order_matches_the_golden_value() -> None:
    assert round(filter.find_smallest_cap(GOLDEN, delta=DELTA)[0], 2) == 9.06
    assert accountant.epsilon_pld([GOLDEN], DELTA) == pytest.approx(8.0, abs=0.005)


@pytest.mark.parametrize("order", [1.1, 1.5, 2.0, 3.0, 17.0, 64.0])
def test_divergence_and_conversion_term_match_their_formulas(order: float) -> None:
    # Mironov 2017, corollary 3: a Gaussian of noise multiplier s has divergence a / (2 s^2) at order a.
    assert filter.compute_total_divergence([GaussianDpEvent(2.0)], order) == pytest.approx(order / 8, rel=1e-12)
    # Canonne, Kamath and Steinke 2020, proposition 12, in the paper's terms.
    formula = math.log(1 / DELTA) / (order - 1) + math.log(1 - 1 / order) - math.log(order) / (order - 1)
    assert filter.compute_epsilon_conversion_term(order, DELTA) == pytest.approx(formula, rel=1e-12)


def test_max_divergence_is_the_cap_minus_the_conversion_term() -> None:
    max_divergence = filter.compute_max_divergence(9.1, order=3.0, delta=DELTA)
    assert max_divergence + filter.compute_epsilon_conversion_term(3.0, DELTA) == pytest.approx(9.1, rel=1e-12)
    assert filter.compute_max_divergence(1.0, order=1.5, delta=DELTA) < 0
    with pytest.raises(ConfigError, match=r"max_epsilon = 1e-06: is too small for any mechanism at delta 1e-05"):
        filter.find_best_order(GOLDEN, epsilon=1e-6, delta=DELTA)


def test_filter_epsilon_is_zero_without_events_and_infinite_without_noise() -> None:
    assert filter.epsilon_filter([], order=3.0, delta=DELTA) == 0
    assert filter.epsilon_filter([NonPrivateDpEvent()], order=3.0, delta=DELTA) == math.inf


# Reference events of very different sizes, each with a cap that is several times its cost.
REFERENCES = [
    (GOLDEN, 9.1),
    (GOLDEN, 30.0),
    (events.build_dp_sgd_event(sampling_rate=0.01, noise_multiplier=1.0, steps=500), 3.0),
    (GaussianDpEvent(20.0), 2.0),
]


def test_order_search_finds_the_minimum_over_all_orders() -> None:
    for plan in (
        GOLDEN,
        events.build_dp_sgd_event(sampling_rate=0.01, noise_multiplier=0.6, steps=3000),
        GaussianDpEvent(30.0),
    ):
        costs = (
            (filter.compute_total_divergence([plan], a) + filter.compute_epsilon_conversion_term(a, DELTA), a)
            for a in filter.ORDERS
        )
        assert filter.find_smallest_cap(plan, delta=DELTA) == min(costs)


@pytest.mark.parametrize(("reference", "cap"), REFERENCES)
def test_best_order_maximizes_repeats_of_the_reference_run(reference: DpEvent, cap: float) -> None:
    def count_repeats(order: float) -> float:
        max_divergence = filter.compute_max_divergence(cap, order=order, delta=DELTA)
        return max_divergence / filter.compute_total_divergence([reference], order) if max_divergence > 0 else 0.0

    chosen = filter.find_best_order(reference, epsilon=cap, delta=DELTA)
    assert chosen in filter.ORDERS
    assert count_repeats(chosen) == max(map(count_repeats, filter.ORDERS))
    assert count_repeats(chosen) >= 1


_CAPS = (0.5, 1.0, 2.0, 5.0, 8.0, 20.0, 50.0, 100.0, 200.0, 500.0, math.inf)
_REFERENCES = [
    *((0.2, 0.949, 25), (0.01, 1.0, 500), (0.5, 0.4, 100), (0.5, 2.0, 100)),
    *((0.1, 0.3, 40), (0.3, 1.5, 2000), (0.9, 1.0, 20), (1.0, 3.0, 1)),
]
_PLANS = [
    (rate, noise, steps)
    for rate in (1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    for noise, steps in ((0.4, 1), (0.8, 20), (2.0, 100), (10.0, 1000), (100.0, 10_000))
]
"""Sampling rate, noise multiplier, steps."""


@pytest.mark.parametrize("cap", _CAPS)
@pytest.mark.parametrize("reference", _REFERENCES, ids=str)
def test_ledger_accepts_as_many_runs_as_its_policy_promises(reference: tuple[float, float, int], cap: float) -> None:
    """Regression: at caps of 50 and above, the chosen order could make a plan of epsilon 2 cost infinity."""
    rate, noise, steps = reference
    typical = ReferenceRun(sampling_rate=rate, noise_multiplier=noise, steps=steps)
    caps = {"max_epsilon": cap, "max_epsilon_per_period": cap if math.isfinite(cap) else None}
    site = make_policy(budget={"reference": typical, **caps})
    history, amount = History.empty(site), compute_amount(site)
    room = filter.compute_max_divergence(cap, order=history.order, delta=history.delta)
    for rate, noise, steps in _PLANS:
        event = events.build_dp_sgd_event(sampling_rate=rate, noise_multiplier=noise, steps=steps)
        assert 0 < history.divergence([event]) < math.inf, (event, history.order)
    assert amount.runs_in_lifetime == amount.runs_in_period
    if (runs := amount.runs_in_lifetime) is not None:
        assert history.divergence({typical.event: runs}) <= room < history.divergence({typical.event: runs + 1})


# Rates and noise multipliers from typical to extreme; few of each, so that divergences are computed once.
mechanisms = st.builds(
    lambda rate, noise: events.build_dp_sgd_event(sampling_rate=rate, noise_multiplier=noise, steps=1),
    st.sampled_from([1e-9, 0.01, 0.2, 1.0]),
    st.sampled_from([0.5, 1.0, 4.0, 1e8]),
) | st.sampled_from([GaussianDpEvent(20.0)])
histories = st.lists(st.tuples(mechanisms, st.integers(1, 400)), min_size=1, max_size=12)
orders = st.sampled_from([1.1, 2.85, 6.0, 64.0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(history=histories, order=orders, shuffle=st.randoms(use_true_random=False))
def test_filter_epsilon_is_independent_of_order_and_grouping(history: Any, order: float, shuffle: Any) -> None:
    listed = [event for event, count in history for _ in range(count % 20 + 1)]
    shuffled = shuffle.sample(listed, len(listed))
    figure = filter.epsilon_filter(listed, order=order, delta=DELTA)
    assert filter.epsilon_filter(shuffled, order=order, delta=DELTA) == figure
    assert filter.epsilon_filter(events.count_mechanisms(listed), order=order, delta=DELTA) == figure


@settings(max_examples=60, deadline=None, derandomize=True)
@given(history=histories, order=orders)
def test_filter_epsilon_never_decreases_with_further_events(history: list[tuple[DpEvent, int]], order: float) -> None:
    spent, figures = Counter[DpEvent](), list[float]()
    for event, count in history:
        spent[event] += count
        figures.append(filter.epsilon_filter(spent, order=order, delta=DELTA))
    assert figures == sorted(figures)


@pytest.mark.parametrize("order", [1.1, 2.85, 64.0])
def test_event_divergence_stays_positive_despite_rounding(order: float) -> None:
    # For events of almost no cost, dp-accounting's own sums are slightly below 0.
    for rate in (1e-300, 1e-9, 0.1, 0.9):
        for noise in (1e3, 1e10, 1e150):
            event = events.build_dp_sgd_event(sampling_rate=rate, noise_multiplier=noise, steps=1)
            assert filter.compute_total_divergence([event], order) > 0


# Few settings and counts, because loss distributions are slow to compute.
steps = [events.build_dp_sgd_event(sampling_rate=q, noise_multiplier=z, steps=1) for q, z in ((0.2, 1.0), (0.05, 0.8))]
counts = st.fixed_dictionaries({**dict.fromkeys(steps, st.integers(0, 40)), GaussianDpEvent(20.0): st.integers(0, 5)})


@settings(max_examples=4, deadline=None, derandomize=True)
@given(spent=counts, added=counts)
def test_pld_and_rdp_epsilons_are_monotone_and_order_independent(spent: Any, added: Any) -> None:
    longer = {event: spent[event] + added[event] for event in spent}
    for epsilon in (
        lambda history: accountant.epsilon_pld(history, DELTA, interval=accountant.COARSE),
        lambda history: accountant.epsilon_rdp(history, DELTA),
    ):
        figure = epsilon(spent)
        reordered = [event for event, count in reversed(spent.items()) for _ in range(count)]
        assert epsilon(reordered) == pytest.approx(figure, abs=1e-6)
        assert epsilon(longer) >= figure - 1e-6


@settings(max_examples=8, deadline=None, derandomize=True)
@given(spent=counts)
def test_filter_epsilon_is_never_below_pld_epsilon(spent: dict[DpEvent, int]) -> None:
    # A coarser grid changes a PLD figure by about 1e-3.
    pld = accountant.epsilon_pld(spent, DELTA, interval=accountant.COARSE)
    for order in (2.0, 2.85, 8.0):
        assert filter.epsilon_filter(spent, order=order, delta=DELTA) >= pld - 2e-3
