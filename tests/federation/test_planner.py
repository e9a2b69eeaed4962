"""Prices from public numbers, compared with reference figures and with the accountant."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.federation import planner
from fedtune.federation.calendar import describe_calendar, describe_shared_epsilon, list_calendar_runs, shift_window
from fedtune.privacy import accountant, filter
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.privacy.run_plan import Plan
from fedtune.spec import ConfigError

from ..conftest import run_plan
from ..privacy import builders

SIZES = {"a": 1200, "b": 560, "c": 320}
golden = partial(
    builders.plan, sampling_rate=0.02, noise_multiplier=1.0, max_grad_norm=1.0, local_steps=100, num_rounds=20
)
"""A plan with an epsilon of 1.43 for one round and 5.62 for all rounds."""


def test_privacy_cost_covers_one_round_and_all_rounds() -> None:
    cost = planner.compute_cost(golden(), SIZES, before=0)
    assert cost.epsilon_of_one_round == pytest.approx(1.43, abs=0.005)
    assert cost.epsilon == pytest.approx(5.62, abs=0.005)
    assert cost.steps == 2000


def test_round_costs_increase_to_the_cost_of_the_whole_plan() -> None:
    cost = planner.compute_cost(run_plan(), SIZES, before=0)
    event = run_plan().event(rounds=run_plan().max_rounds)
    assert cost.epsilon_filter == pytest.approx(filter.find_smallest_cap(event, delta=run_plan().delta)[0])
    assert cost.filter_order in filter.ORDERS
    assert [row.round for row in cost.rounds] == [1, 2, 3, 4]
    assert [row.steps for row in cost.rounds] == [2, 4, 6, 8]
    assert [row.spare for row in cost.rounds] == [False, False, False, True]
    for figures in zip(*((row.pld, row.rdp, row.filter) for row in cost.rounds), strict=True):
        assert list(figures) == sorted(figures)
    final = cost.rounds[-1]
    assert final.pld == pytest.approx(cost.epsilon, abs=1e-3)
    assert final.pld >= cost.epsilon, "the coarse grid must be the more pessimistic one"
    assert (final.rdp, final.filter) == pytest.approx((cost.epsilon_rdp, cost.epsilon_filter))
    # A site's noise depends on its declared size.
    largest = cost.sites["a"]
    assert largest.expected_batch == pytest.approx(0.2 * 1200)
    assert largest.weight == pytest.approx(1200 / 2080)
    assert largest.expected_failures == pytest.approx(0.012)
    assert largest.step_noise == pytest.approx(4.0 * 1.0 / 240)
    assert sum(site.weight for site in cost.sites.values()) == pytest.approx(1)


def test_long_round_tables_are_shortened_but_keep_both_ends() -> None:
    plan = golden(noise_multiplier=4.0, local_steps=1, num_rounds=997, spare_rounds=3)
    rounds = [row.round for row in planner.compute_cost(plan, SIZES, before=0).rounds]
    assert len(rounds) <= 22
    assert (rounds[0], rounds[-2], rounds[-1]) == (1, 997, 1000)


def test_noiseless_plan_has_infinite_epsilon() -> None:
    cost = planner.compute_cost(replace(run_plan(), noise_multiplier=0.0), SIZES, before=0)
    assert cost.rounds == ()
    assert cost.filter_order is None
    assert {cost.epsilon, cost.epsilon_rdp, cost.epsilon_filter, cost.epsilon_of_one_round} == {math.inf}
    assert cost.sites["b"].expected_batch == pytest.approx(112)


def test_alternatives_stay_within_epsilon() -> None:
    plan = golden(noise_multiplier=2.0, sampling_rate=0.1, local_steps=5, num_rounds=3)
    epsilon = planner.compute_target_epsilon(plan)
    changes = {change.what: change for change in planner.compute_alternatives(plan, epsilon=epsilon)}
    batches = ["batches x 1.5 (rate 0.15)", "batches x 2 (rate 0.2)"]
    assert list(changes) == ["5 rounds", "6 rounds", *batches, "delta 1e-06", f"epsilon {epsilon / 2:.4g}"]
    for change in changes.values():
        noised = replace(change.plan, noise_multiplier=change.noise_needed)
        assert accountant.epsilon_pld([noised.event(rounds=noised.max_rounds)], noised.delta) <= change.epsilon
        assert change.same_noise_epsilon == planner.compute_target_epsilon(change.plan)
    assert changes["5 rounds"].plan.num_rounds == 5
    assert changes["delta 1e-06"].plan.delta == pytest.approx(1e-6)
    # The effect of a larger batch on the mean gradient.
    doubled = changes["batches x 2 (rate 0.2)"]
    assert doubled.step_noise == pytest.approx(doubled.noise_needed / 0.2 / (2.0 / 0.1))
    assert doubled.noise_needed / 2.0 > 1 > doubled.noise_needed / 4.0, "more noise on the sum, less on the mean"


def test_alternative_sampling_rate_is_capped_at_one() -> None:
    plan = golden(noise_multiplier=8.0, sampling_rate=0.8, local_steps=2, num_rounds=2)
    assert {change.plan.sampling_rate for change in planner.compute_alternatives(plan, epsilon=2.0)} == {0.8, 1.0}
    full = replace(plan, sampling_rate=1.0)
    assert {change.plan.sampling_rate for change in planner.compute_alternatives(full, epsilon=3.0)} == {1.0}


def test_alternatives_without_a_computable_epsilon_are_skipped() -> None:
    plan = golden(delta=1e-21 * 2 * 4, noise_multiplier=8.0, local_steps=2, num_rounds=2)
    names = [change.what for change in planner.compute_alternatives(plan, epsilon=2.0)]
    assert names[0] == "3 rounds"
    assert not any(name.startswith("delta") for name in names)


def test_epsilon_of_zero_has_no_alternatives() -> None:
    plan = golden(noise_multiplier=1.0, sampling_rate=1e-6, local_steps=1, num_rounds=2)
    assert planner.compute_target_epsilon(plan) == 0
    assert planner.compute_alternatives(plan, epsilon=0.0) == ()


def test_signal_to_noise_matches_simulated_noise() -> None:
    plan = golden(noise_multiplier=3.0, sampling_rate=0.1, max_grad_norm=0.5, local_steps=5, num_rounds=4)
    sizes, values, rng = {"a": 300, "b": 100}, 400, np.random.default_rng(0)
    movement = np.zeros(values)
    for _ in range(plan.local_steps * plan.num_rounds):
        for size in sizes.values():
            noise = rng.normal(0, plan.noise_multiplier * plan.max_grad_norm, values) / (plan.sampling_rate * size)
            movement += size / 400 * noise / 20
    ratio = planner.compute_signal_to_noise(plan, sizes, values=values)
    assert ratio == pytest.approx(plan.max_grad_norm / np.linalg.norm(movement), rel=0.15)


def test_signal_to_noise_scales_with_rounds_noise_and_parameters() -> None:
    ratio = planner.compute_signal_to_noise(golden(), SIZES, values=1000)
    assert planner.compute_signal_to_noise(golden(), SIZES, values=4000) == pytest.approx(ratio / 2)
    assert planner.compute_signal_to_noise(golden(num_rounds=80), SIZES, values=1000) == pytest.approx(ratio * 2)
    assert planner.compute_signal_to_noise(golden(noise_multiplier=2.0), SIZES, values=1000) == pytest.approx(ratio / 2)
    assert planner.compute_signal_to_noise(golden(max_grad_norm=9.0), SIZES, values=1000) == pytest.approx(ratio)
    assert planner.compute_signal_to_noise(golden(noise_multiplier=0.0), SIZES, values=1000) == math.inf


def test_run_with_a_weak_signal_is_refused() -> None:
    ratio = planner.compute_signal_to_noise(golden(), SIZES, values=1000)
    weakest = golden(noise_multiplier=ratio / planner.MIN_SIGNAL)
    planner.check_signal(weakest, SIZES, values=1000)
    planner.check_signal(golden(noise_multiplier=0.0), SIZES, values=10**9)
    with pytest.raises(
        ConfigError, match=r"false: the signal is too weak at this size and epsilon.* set this to true to train anyway$"
    ):
        planner.check_signal(weakest, SIZES, values=1010)


# Solving for noise, rounds or rate: within the target, and closer to it than one unit in the last digit.


def compute_epsilon(plan: Plan) -> float:
    """Compute epsilon on the fine grid, as a run reports it."""
    return accountant.epsilon_pld([plan.event(rounds=plan.max_rounds)], plan.delta)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return replace(run_plan(), noise_multiplier=1.5, spare_rounds=0)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    rate=st.floats(0.01, 1), start=st.floats(0.8, 20), target=st.floats(0.3, 10), scores=st.sampled_from([0.0, 30.0])
)
def test_least_noise_meets_the_target_tightly(
    plan: Plan, rate: float, start: float, target: float, scores: float
) -> None:
    changes = {"local_steps": 4, "num_rounds": 2, "metrics_noise_multiplier": scores}
    planned = replace(plan, sampling_rate=rate, noise_multiplier=start, **changes)
    noise = planner.find_min_noise_for_target(planned, epsilon=target)
    if noise is None:
        assert compute_epsilon(replace(planned, noise_multiplier=1e4)) > target
        return
    assert compute_epsilon(replace(planned, noise_multiplier=noise)) <= target
    if noise > 0.02:
        assert compute_epsilon(replace(planned, noise_multiplier=noise * 0.998 - 1e-4)) > target


def test_least_noise_is_none_if_scores_exceed_the_target(plan: Plan) -> None:
    assert planner.find_min_noise_for_target(replace(plan, metrics_noise_multiplier=1.0), epsilon=1.0) is None


def test_solved_rounds_are_the_maximum_within_epsilon(plan: Plan) -> None:
    solved = planner.solve_rounds(plan, epsilon=5.0)
    assert compute_epsilon(solved) <= 5.0 < compute_epsilon(replace(solved, num_rounds=solved.num_rounds + 1))
    assert replace(solved, num_rounds=plan.num_rounds) == plan
    with_spares = planner.solve_rounds(replace(plan, spare_rounds=2), epsilon=5.0)
    assert with_spares.num_rounds == solved.num_rounds - 2, "spare rounds must be paid for first"
    with pytest.raises(
        ConfigError, match=r"privacy\.noise_multiplier = 1\.5: exceeds privacy\.epsilon = 0\.1 with one"
    ):
        planner.solve_rounds(plan, epsilon=0.1)
    cheap = replace(plan, noise_multiplier=9000.0, sampling_rate=1e-4, local_steps=1)
    assert planner.solve_rounds(cheap, epsilon=8.0).num_rounds > planner.MAX_ROUNDS / 2, "only MAX_ROUNDS limits it"


def test_solved_sampling_rate_is_the_largest_within_epsilon(plan: Plan) -> None:
    solved = planner.solve_sampling_rate(plan, epsilon=3.0, least=0.001)
    rate = solved.sampling_rate
    assert rate == float(f"{rate:.4g}"), "the rate must have four digits"
    assert compute_epsilon(solved) <= 3.0 < compute_epsilon(replace(plan, sampling_rate=rate * 1.001))
    # High noise allows every rate, and low noise none.
    noisy, precise = (replace(plan, noise_multiplier=noise) for noise in (50.0, 0.5))
    assert planner.solve_sampling_rate(noisy, epsilon=3.0, least=0.001).sampling_rate == 1.0
    # The search also starts at rate 1, the default recipe's, where the plan exceeds epsilon.
    assert planner.solve_sampling_rate(replace(plan, sampling_rate=1.0), epsilon=3.0, least=0.001) == solved
    with pytest.raises(ConfigError, match=r"exceeds privacy\.epsilon = 0\.1 at every sampling rate down to 0\.01"):
        planner.solve_sampling_rate(precise, epsilon=0.1, least=0.01)


# A calendar of runs: moving windows, and what their people will have spent.


def make_plan(*, runs: int, first: str | None = "2025", **changes: Any) -> Plan:
    cohorts = Cohorts(period="year", first=first, last="2027")
    privacy = PrivacySpec(unit="user", epsilon=6.0, sampling_rate=0.1, planned_runs=runs, cohorts=cohorts)
    return replace(Plan.from_privacy(privacy, local_steps=5, num_rounds=2), **changes)


def list_epsilons(plan: Plan, *runs: int) -> list[float]:
    return [accountant.epsilon_pld([plan.full_event] * count, plan.delta) for count in runs]


def test_cohort_window_moves_and_keeps_its_length() -> None:
    assert str(shift_window(Cohorts(period="year", first="2025", last="2027"))) == "2026..2028"
    assert str(shift_window(Cohorts(period="month", last="2025-12"), by=2)) == "..2026-02"
    assert str(shift_window(Cohorts(period="month", first="2026-12", last="9999-12"))) == "2027-01..9999-12"


def test_calendar_charges_oldest_and_newest_cohorts_per_run() -> None:
    plan = make_plan(runs=4)
    rows = list_calendar_runs(plan)
    assert [str(row.cohorts) for row in rows] == ["2025..2027", "2026..2028", "2027..2029", "2028..2030"]
    assert [row.oldest for row in rows] == list_epsilons(plan, 1, 2, 3, 3)
    assert [row.newest for row in rows] == list_epsilons(plan, 1, 1, 1, 1)
    # After two renewals the oldest people have already been in two runs.
    later = planner.compute_cost(plan, {"a": 100}, before=2).calendar
    assert [(row.number, row.oldest) for row in later] == list(
        zip((3, 4, 5, 6), list_epsilons(plan, 3, 3, 3, 3), strict=True)
    )


def test_calendar_without_window_ends_with_the_last_planned_run() -> None:
    plan = make_plan(runs=4, cohorts=None)
    assert [row.oldest for row in list_calendar_runs(plan)] == list_epsilons(plan, 1, 2, 3, 4)
    assert [row.newest for row in list_calendar_runs(plan, before=3)] == list_epsilons(plan, 4)
    # A window without a start does not move, either; one with a start may follow more runs than share an epsilon.
    assert [row.number for row in list_calendar_runs(make_plan(runs=4, first=None), before=2)] == [3, 4]
    old_window = make_plan(runs=2, first="1800")
    assert [row.oldest for row in list_calendar_runs(old_window, before=150)] == list_epsilons(old_window, 151, 152)
    assert next(describe_calendar(plan)).endswith("everyone is in at most 4 runs, epsilon 5.999 in all.")
    assert list_calendar_runs(replace(plan, runs=1)) == list_calendar_runs(replace(plan, noise_multiplier=0.0)) == ()


def test_calendar_explains_planned_runs_and_warns_of_long_windows() -> None:
    assert (
        "people of 3 periods to more runs than privacy.planned_runs = 2"
        in list(describe_calendar(make_plan(runs=2)))[-1]
    )
    assert describe_shared_epsilon(make_plan(runs=3)) == ", so that 3 runs like this one compose to epsilon 6.000"
    assert (
        describe_shared_epsilon(make_plan(runs=1))
        == describe_shared_epsilon(make_plan(runs=3, noise_multiplier=0.0))
        == ""
    )


def test_solved_plans_meet_the_target_over_all_planned_runs() -> None:
    plan = make_plan(runs=3, cohorts=None)
    for solved in (
        planner.solve_rounds(plan, epsilon=8.0),
        planner.solve_sampling_rate(plan, epsilon=8.0, least=0.01),
        replace(plan, noise_multiplier=planner.find_min_noise_for_target(plan, epsilon=8.0)),
    ):
        assert 6.0 < list_epsilons(solved, 3)[0] <= 8.0
    assert planner.compute_alternatives(plan, epsilon=6.0)[-1].same_noise_epsilon == pytest.approx(6.0, abs=0.02)
