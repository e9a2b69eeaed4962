"""Solving for noise, rounds and rate: within the target, and no further from it than the last digit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.federation import planner
from fedtune.privacy import accountant
from fedtune.privacy.run_plan import Plan
from fedtune.spec import ConfigError


def epsilon(plan: Plan) -> float:
    """By the fine grid, as a run reports it."""
    return accountant.epsilon_pld([plan.event(rounds=plan.most_rounds)], plan.delta)


@pytest.fixture(scope="module")
def plan(run_plan: Plan) -> Plan:
    return replace(run_plan, noise_multiplier=1.5, spare_rounds=0)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    rate=st.floats(0.01, 1), start=st.floats(0.8, 20), target=st.floats(0.3, 10), scores=st.sampled_from([0.0, 30.0])
)
def test_the_least_noise_never_overshoots(plan: Plan, rate: float, start: float, target: float, scores: float) -> None:
    changes = {"local_steps": 4, "num_rounds": 2, "metrics_noise_multiplier": scores}
    planned = replace(plan, sampling_rate=rate, noise_multiplier=start, **changes)
    noise = planner.least_noise(planned, epsilon=target)
    if noise is None:
        assert epsilon(replace(planned, noise_multiplier=1e4)) > target
        return
    assert epsilon(replace(planned, noise_multiplier=noise)) <= target
    if noise > 0.02:
        assert epsilon(replace(planned, noise_multiplier=noise * 0.998 - 1e-4)) > target


def test_no_noise_suffices_where_scores_alone_pass_the_target(plan: Plan) -> None:
    assert planner.least_noise(replace(plan, metrics_noise_multiplier=1.0), epsilon=1.0) is None


def test_the_most_rounds_are_within_and_one_more_is_not(plan: Plan) -> None:
    solved = planner.solve_rounds(plan, epsilon=5.0)
    assert epsilon(solved) <= 5.0 < epsilon(replace(solved, num_rounds=solved.num_rounds + 1))
    assert replace(solved, num_rounds=plan.num_rounds) == plan


def test_spare_rounds_are_paid_for_first(plan: Plan) -> None:
    without = planner.solve_rounds(plan, epsilon=5.0)
    assert planner.solve_rounds(replace(plan, spare_rounds=2), epsilon=5.0).num_rounds == without.num_rounds - 2


def test_one_round_that_is_too_much_is_said(plan: Plan) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.noise_multiplier = 1\.5: passes privacy\.epsilon = 0\.1 with one"):
        planner.solve_rounds(plan, epsilon=0.1)


def test_rounds_without_end_end_somewhere(plan: Plan) -> None:
    endless = replace(plan, noise_multiplier=9000.0, sampling_rate=1e-4, local_steps=1)
    assert planner.solve_rounds(endless, epsilon=8.0).num_rounds > planner.MOST_ROUNDS / 2


def test_the_largest_rate_is_within_and_the_next_digit_is_not(plan: Plan) -> None:
    solved = planner.solve_sampling_rate(plan, epsilon=3.0, least=0.001)
    rate = solved.sampling_rate
    assert rate == float(f"{rate:.4g}"), "four digits"
    assert epsilon(solved) <= 3.0 < epsilon(replace(plan, sampling_rate=rate * 1.001))
    # Much noise allows every rate, and little none.
    loud, quiet = (replace(plan, noise_multiplier=noise) for noise in (50.0, 0.5))
    assert planner.solve_sampling_rate(loud, epsilon=3.0, least=0.001).sampling_rate == 1.0
    with pytest.raises(ConfigError, match=r"passes privacy\.epsilon = 0\.1 at every sampling rate down to 0\.01"):
        planner.solve_sampling_rate(quiet, epsilon=0.1, least=0.01)
