"""The Renyi filter: golden costs, the order that is chosen, and sums that do not depend on how a history is told."""

import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.privacy import accountant, events, filter
from fedtune.privacy.ledger import spending
from fedtune.privacy.ledger.history import History
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.spec import ConfigError

from .builders import policy, proposal, reason_of, train

DELTA = 1e-5
# PITFALLS: what a plan of PLD epsilon 8 costs by Renyi divergence.
GOLDEN = events.dp_sgd(sampling_rate=0.2, noise_multiplier=0.949, steps=25)


@pytest.mark.parametrize(("order", "golden", "off"), [(3.0, 9.10, 0.01), (4.0, 12.9, 0.05), (8.0, 66.0, 0.5)])
def test_the_cost_at_an_order_is_golden(order: float, golden: float, off: float) -> None:
    assert filter.epsilon_filter([GOLDEN], order=order, delta=DELTA) == pytest.approx(golden, abs=off)


def test_the_cost_at_the_best_order_is_golden() -> None:
    assert round(filter.cheapest(GOLDEN, delta=DELTA)[0], 2) == 9.06
    assert accountant.epsilon_pld([GOLDEN], DELTA) == pytest.approx(8.0, abs=0.005)


@pytest.mark.parametrize("order", [1.1, 1.5, 2.0, 3.0, 17.0, 64.0])
def test_divergence_and_surcharge_agree_with_their_formulas(order: float) -> None:
    # Mironov 2017, corollary 3: a Gaussian of noise multiplier s has divergence a / (2 s^2) at order a.
    assert filter.divergence(GaussianDpEvent(2.0), order) == pytest.approx(order / 8, rel=1e-12)
    # Canonne, Kamath and Steinke 2020, proposition 12, term by term as there.
    written = math.log(1 / DELTA) / (order - 1) + math.log(1 - 1 / order) - math.log(order) / (order - 1)
    assert filter.surcharge(order, DELTA) == pytest.approx(written, rel=1e-12)


def test_room_is_what_a_cap_leaves_after_the_surcharge_and_without_any_it_is_refused() -> None:
    room = filter.most_divergence(9.1, order=3.0, delta=DELTA)
    assert room + filter.surcharge(3.0, DELTA) == pytest.approx(9.1, rel=1e-12)
    assert filter.most_divergence(1.0, order=1.5, delta=DELTA) < 0
    with pytest.raises(ConfigError, match=r"max_epsilon = 1e-06: leaves no room for anything at delta 1e-05"):
        filter.best_order(GOLDEN, epsilon=1e-6, delta=DELTA)


def test_nothing_spent_is_zero_and_no_guarantee_is_infinite() -> None:
    assert filter.epsilon_filter([], order=3.0, delta=DELTA) == 0
    assert filter.epsilon_filter([NonPrivateDpEvent()], order=3.0, delta=DELTA) == math.inf


# Reference events of very different size, each with a cap that it fits into several times.
REFERENCES = [
    (GOLDEN, 9.1),
    (GOLDEN, 30.0),
    (events.dp_sgd(sampling_rate=0.01, noise_multiplier=1.0, steps=500), 3.0),
    (GaussianDpEvent(20.0), 2.0),
]


def test_no_order_that_is_passed_over_would_cost_less() -> None:
    for plan in (GOLDEN, events.dp_sgd(sampling_rate=0.01, noise_multiplier=0.6, steps=3000), GaussianDpEvent(30.0)):
        costs = ((filter.total_divergence([plan], a) + filter.surcharge(a, DELTA), a) for a in filter.ORDERS)
        assert filter.cheapest(plan, delta=DELTA) == min(costs)


@pytest.mark.parametrize(("reference", "cap"), REFERENCES)
def test_the_best_order_is_the_one_that_lets_the_reference_repeat_most_often(reference: DpEvent, cap: float) -> None:
    def repeats(order: float) -> float:
        room = filter.most_divergence(cap, order=order, delta=DELTA)
        return room / filter.divergence(reference, order) if room > 0 else 0.0

    chosen = filter.best_order(reference, epsilon=cap, delta=DELTA)
    assert chosen in filter.ORDERS
    assert repeats(chosen) == max(map(repeats, filter.ORDERS))
    assert repeats(chosen) >= 1


# Rates and noises from useful to absurd; few of each, so that divergences are computed once.
mechanisms = st.builds(
    lambda rate, noise: events.dp_sgd(sampling_rate=rate, noise_multiplier=noise, steps=1),
    st.sampled_from([1e-9, 0.01, 0.2, 1.0]),
    st.sampled_from([0.5, 1.0, 4.0, 1e8]),
) | st.sampled_from([GaussianDpEvent(20.0)])
histories = st.lists(st.tuples(mechanisms, st.integers(1, 400)), min_size=1, max_size=12)
orders = st.sampled_from([1.1, 2.85, 6.0, 64.0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(history=histories, order=orders, shuffle=st.randoms(use_true_random=False))
def test_the_figure_depends_neither_on_order_nor_on_grouping(history: Any, order: float, shuffle: Any) -> None:
    listed = [event for event, count in history for _ in range(count % 20 + 1)]
    shuffled = shuffle.sample(listed, len(listed))
    figure = filter.epsilon_filter(listed, order=order, delta=DELTA)
    assert filter.epsilon_filter(shuffled, order=order, delta=DELTA) == figure
    assert filter.epsilon_filter(events.grouped(listed), order=order, delta=DELTA) == figure


@settings(max_examples=60, deadline=None, derandomize=True)
@given(history=histories, order=orders)
def test_every_event_raises_the_figure_or_leaves_it(history: list[tuple[DpEvent, int]], order: float) -> None:
    spent, figures = Counter[DpEvent](), list[float]()
    for event, count in history:
        spent[event] += count
        figures.append(filter.epsilon_filter(spent, order=order, delta=DELTA))
    assert figures == sorted(figures)


@pytest.mark.parametrize("order", [1.1, 2.85, 64.0])
def test_rounding_makes_no_event_a_refund(order: float) -> None:
    # dp-accounting's own sums come out a little below 0 for events of next to no cost.
    for rate in (1e-300, 1e-9, 0.1, 0.9):
        for noise in (1e3, 1e10, 1e150):
            event = events.dp_sgd(sampling_rate=rate, noise_multiplier=noise, steps=1)
            assert filter.divergence(event, order) >= 0


# A few settings and counts, so that slow loss distributions are few.
steps = [events.dp_sgd(sampling_rate=q, noise_multiplier=z, steps=1) for q, z in ((0.2, 1.0), (0.05, 0.8))]
counts = st.fixed_dictionaries({**dict.fromkeys(steps, st.integers(0, 40)), GaussianDpEvent(20.0): st.integers(0, 5)})


@settings(max_examples=4, deadline=None, derandomize=True)
@given(spent=counts, more=counts)
def test_pld_and_rdp_are_monotone_and_depend_on_neither_order_nor_grouping(spent: Any, more: Any) -> None:
    longer = {event: spent[event] + more[event] for event in spent}
    for epsilon in (
        lambda history: accountant.epsilon_pld(history, DELTA, interval=accountant.COARSE),
        lambda history: accountant.epsilon_rdp(history, DELTA),
    ):
        figure = epsilon(spent)
        told_otherwise = [event for event, count in reversed(spent.items()) for _ in range(count)]
        assert epsilon(told_otherwise) == pytest.approx(figure, abs=1e-6)
        assert epsilon(longer) >= figure - 1e-6


@settings(max_examples=8, deadline=None, derandomize=True)
@given(spent=counts)
def test_the_filter_never_reports_less_than_pld(spent: dict[DpEvent, int]) -> None:
    # A coarser grid moves a PLD figure by about 1e-3.
    pld = accountant.epsilon_pld(spent, DELTA, interval=accountant.COARSE)
    for order in (2.0, 2.85, 8.0):
        assert filter.epsilon_filter(spent, order=order, delta=DELTA) >= pld - 2e-3


# What is spent, what is left, and the largest run that still fits: figures that follow from the events alone.


def test_the_figures_are_those_of_the_charged_events(opened: Any) -> None:
    ledger = opened()
    assert ledger.history.epsilon() == 0
    train(ledger, proposal(), 1, 2)
    other = proposal(run="2", plan={"noise_multiplier": 2.0, "num_rounds": 3})
    train(ledger, other, 1)
    history, charged = ledger.history, [*[proposal().plan.event()] * 2, other.plan.event()]
    assert history.epsilon() == filter.epsilon_filter(charged, order=2.7, delta=DELTA)
    held = [*[proposal().plan.event()] * 3, *[other.plan.event()] * 2]
    whole = filter.epsilon_filter([*charged, *held], order=2.7, delta=DELTA)
    assert history.epsilon(history.charged() + history.set_aside(history.now())) == pytest.approx(whole)


def test_a_share_is_of_the_caps_divergence(opened: Any) -> None:
    ledger = opened()
    train(ledger, proposal(plan={"num_rounds": 10}), 1)
    history = ledger.history
    room = filter.most_divergence(11.0, order=history.order, delta=DELTA)
    one = filter.divergence(proposal().plan.event(), history.order)
    assert spending.share_of_cap(history, history.charged(), cap=11.0) == pytest.approx(one / room)
    assert spending.share_of_cap(history, history.charged(), cap=math.inf) is None
    # At a small order turning divergence into epsilon costs more than such a cap is.
    assert filter.most_divergence(3.0, order=history.order, delta=DELTA) < 0
    assert spending.share_of_cap(history, history.charged(), cap=3.0) == 1


def test_what_is_no_number_does_not_fit(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = opened()
    monkeypatch.setattr(filter, "divergence", lambda event, order: math.nan)
    assert reason_of(ledger.require_acceptable, proposal()) is Reason.MAX_EPSILON


def test_what_is_left_is_what_would_be_accepted(opened: Any) -> None:
    ledger = opened()
    five = proposal().plan.event(rounds=5)
    now = datetime.now(UTC)
    assert spending.runs_left(ledger.history, policy(), five, now) == 2
    assert spending.runs_left(History.before(policy()), policy(), five, now) == 2, "also before there is a ledger"
    train(ledger, proposal(), 1)
    assert spending.runs_left(ledger.history, policy(), five, now) == 1, "the first holds its whole plan"
    train(ledger, proposal(run="2"), 1)
    assert spending.runs_left(ledger.history, policy(), five, now) == 0
    left = spending.divergence_left(ledger.history, policy(), now)
    assert 0 < left < filter.divergence(proposal().plan.event(), ledger.history.order)
    assert spending.runs_left(ledger.history, policy(budget={"max_epsilon": math.inf}), five, now) is None
    assert spending.divergence_left(ledger.history, policy(budget={"max_epsilon": 6.0}), now) == 0
    ledger.freeze("for this test")
    assert spending.divergence_left(ledger.history, policy(budget={"max_epsilon": math.inf}), now) == 0


@pytest.mark.parametrize("fits", [0, 1, 2, 6, 19, 20, 21])
def test_most_rounds_is_the_largest_number_that_is_accepted(fits: int) -> None:
    tried, asked = list[int](), proposal(plan={"num_rounds": 20, "spare_rounds": 2})

    def accepts(each: Proposal) -> bool:
        rounds = each.plan.num_rounds
        tried.append(rounds)
        assert each == replace(asked, plan=replace(asked.plan, num_rounds=rounds))
        return rounds <= fits

    assert spending.most_rounds(asked, accepts) == min(fits, 20)
    assert len(tried) <= 5


@pytest.mark.parametrize("bound", [0.0, 1.0, 1.00005, 1.23456, 7.0, 8000.0])
def test_least_noise_is_accepted_and_hardly_more_than_needed(bound: float) -> None:
    found = spending.least_noise(proposal(), lambda each: each.plan.noise_multiplier >= bound)
    assert found >= max(bound, 1.0), "never less than was asked for"
    assert found <= max(bound, 1.0) * 1.0002 + 1e-4
    assert found == round(found, 4)


def test_a_plan_without_noise_is_given_some_and_where_none_is_enough_there_is_none() -> None:
    assert spending.least_noise(proposal(), lambda each: False) is None
    silent = proposal(plan={"noise_multiplier": 0.0})
    found = spending.least_noise(silent, lambda each: each.plan.noise_multiplier >= 0.5)
    assert found == pytest.approx(0.5, abs=2e-4)
