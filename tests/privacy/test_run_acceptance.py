"""Spending, remaining budget, and the largest acceptable run, all derived from the events."""

import math
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from fedtune.privacy import accountant, filter
from fedtune.privacy.ledger import run_acceptance
from fedtune.privacy.ledger.history import History
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason

from .builders import make_policy, make_proposal, read_refusal_reason, train

DELTA = 1e-5


def test_spent_epsilon_matches_the_charged_events(open_ledger: Any) -> None:
    ledger = open_ledger()
    assert ledger.history.epsilon() == 0
    train(ledger, make_proposal(), 1, 2)
    second_run = make_proposal(run="2", plan={"noise_multiplier": 2.0, "num_rounds": 3})
    train(ledger, second_run, 1)
    history, charged = ledger.history, [*[make_proposal().plan.event()] * 2, second_run.plan.event()]
    assert history.epsilon() == filter.epsilon_filter(charged, order=2.7, delta=DELTA)
    reserved = [*[make_proposal().plan.event()] * 3, *[second_run.plan.event()] * 2]
    total = filter.epsilon_filter([*charged, *reserved], order=2.7, delta=DELTA)
    assert history.epsilon(
        history.count_total_charges() + history.count_remaining_charges(history.now())
    ) == pytest.approx(total)


def test_spent_fraction_is_measured_in_divergence(open_ledger: Any) -> None:
    ledger = open_ledger()
    train(ledger, make_proposal(plan={"num_rounds": 10}), 1)
    history = ledger.history
    max_divergence = filter.compute_max_divergence(11.0, order=history.order, delta=DELTA)
    single_run = history.divergence([make_proposal().plan.event()])
    assert run_acceptance.compute_spent_fraction(history, history.count_total_charges(), cap=11.0) == pytest.approx(
        single_run / max_divergence
    )
    assert run_acceptance.compute_spent_fraction(history, history.count_total_charges(), cap=math.inf) is None
    # At a small order, converting divergence to epsilon costs more than such a cap.
    assert filter.compute_max_divergence(3.0, order=history.order, delta=DELTA) < 0
    assert run_acceptance.compute_spent_fraction(history, history.count_total_charges(), cap=3.0) == 1


def test_nan_divergence_does_not_fit_the_budget(open_ledger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger()
    monkeypatch.setattr(accountant, "compute_renyi_divergence", lambda event, order: math.nan)
    assert read_refusal_reason(ledger.require_acceptable, make_proposal()) is Reason.MAX_EPSILON


def test_remaining_budget_matches_accepted_runs(open_ledger: Any) -> None:
    ledger = open_ledger()
    five = make_proposal().plan.event(rounds=5)
    now = datetime.now(UTC)
    assert run_acceptance.count_remaining_runs(ledger.history, make_policy(), five, now) == 2
    assert run_acceptance.count_remaining_runs(History.empty(make_policy()), make_policy(), five, now) == 2, (
        "a new site without a ledger must get the same figure"
    )
    train(ledger, make_proposal(), 1)
    assert run_acceptance.count_remaining_runs(ledger.history, make_policy(), five, now) == 1, (
        "the first run must reserve its whole plan"
    )
    train(ledger, make_proposal(run="2"), 1)
    assert run_acceptance.count_remaining_runs(ledger.history, make_policy(), five, now) == 0
    remaining = run_acceptance.compute_remaining_divergence(ledger.history, make_policy(), now)
    assert 0 < remaining < ledger.history.divergence([make_proposal().plan.event()])
    assert (
        run_acceptance.count_remaining_runs(ledger.history, make_policy(budget={"max_epsilon": math.inf}), five, now)
        is None
    )
    assert (
        run_acceptance.compute_remaining_divergence(ledger.history, make_policy(budget={"max_epsilon": 6.0}), now) == 0
    )
    ledger.freeze("for this test")
    assert (
        run_acceptance.compute_remaining_divergence(ledger.history, make_policy(budget={"max_epsilon": math.inf}), now)
        == 0
    )


@pytest.mark.parametrize("fits", [0, 1, 2, 6, 19, 20, 21])
def test_max_rounds_is_the_largest_accepted_number(fits: int) -> None:
    tried, proposal = list[int](), make_proposal(plan={"num_rounds": 20, "spare_rounds": 2})

    def accepts(candidate: Proposal) -> bool:
        rounds = candidate.plan.num_rounds
        tried.append(rounds)
        assert candidate == replace(proposal, plan=replace(proposal.plan, num_rounds=rounds))
        return rounds <= fits

    assert run_acceptance.find_max_rounds(proposal, accepts) == min(fits, 20)
    assert len(tried) <= 5


@pytest.mark.parametrize("bound", [0.0, 1.0, 1.00005, 1.23456, 7.0, 8000.0])
def test_min_noise_is_accepted_and_nearly_minimal(bound: float) -> None:
    found = run_acceptance.find_min_noise(make_proposal(), lambda each: each.plan.noise_multiplier >= bound)
    assert found >= max(bound, 1.0), "the noise must not be below the requested minimum"
    assert found <= max(bound, 1.0) * 1.0002 + 1e-4
    assert found == round(found, 4)


def test_min_noise_is_none_if_no_noise_is_accepted() -> None:
    assert run_acceptance.find_min_noise(make_proposal(), lambda each: False) is None
    silent = make_proposal(plan={"noise_multiplier": 0.0})
    found = run_acceptance.find_min_noise(silent, lambda each: each.plan.noise_multiplier >= 0.5)
    assert found == pytest.approx(0.5, abs=2e-4)
