"""A calendar of runs: windows that move on, and what the people in them will have spent."""

from dataclasses import replace
from typing import Any

import pytest

from fedtune.federation import planner
from fedtune.federation.calendar import about_calendar, calendar_of, moved, runs_words
from fedtune.privacy import accountant
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.privacy.run_plan import Plan


def made(*, runs: int, first: str | None = "2025", **changes: Any) -> Plan:
    cohorts = Cohorts(period="year", first=first, last="2027")
    privacy = PrivacySpec(unit="user", epsilon=6.0, sampling_rate=0.1, runs=runs, cohorts=cohorts)
    return replace(Plan.of(privacy, local_steps=5, num_rounds=2), **changes)


def spent(plan: Plan, *runs: int) -> list[float]:
    return [accountant.epsilon_pld([plan.whole] * count, plan.delta) for count in runs]


def test_a_window_moves_on_and_keeps_its_length() -> None:
    assert str(moved(Cohorts(period="year", first="2025", last="2027"))) == "2026..2028"
    assert str(moved(Cohorts(period="month", last="2025-12"), by=2)) == "..2026-02"
    assert str(moved(Cohorts(period="month", first="2026-12", last="9999-12"))) == "2027-01..9999-12"


def test_the_oldest_owe_every_run_of_their_window_and_the_newest_one() -> None:
    plan = made(runs=4)
    rows = calendar_of(plan)
    assert [str(row.cohorts) for row in rows] == ["2025..2027", "2026..2028", "2027..2029", "2028..2030"]
    assert [row.oldest for row in rows] == spent(plan, 1, 2, 3, 3)
    assert [row.newest for row in rows] == spent(plan, 1, 1, 1, 1)
    # After two renewals those who came first have been in two runs already.
    later = planner.price(plan, {"a": 100}, before=2).calendar
    assert [(row.number, row.oldest) for row in later] == list(zip((3, 4, 5, 6), spent(plan, 3, 3, 3, 3), strict=True))


def test_where_everybody_is_admitted_runs_end_with_the_budget() -> None:
    plan = made(runs=4, cohorts=None)
    assert [row.oldest for row in calendar_of(plan)] == spent(plan, 1, 2, 3, 4)
    assert [row.newest for row in calendar_of(plan, before=3)] == spent(plan, 4)
    # A window without a beginning goes no further, either; one with it may come after more runs than share an epsilon.
    assert [row.number for row in calendar_of(made(runs=4, first=None), before=2)] == [3, 4]
    long = made(runs=2, first="1800")
    assert [row.oldest for row in calendar_of(long, before=150)] == spent(long, 151, 152)
    assert next(about_calendar(plan)).endswith("everybody is in at most 4 runs, epsilon 5.999 in all.")
    assert calendar_of(replace(plan, runs=1)) == calendar_of(replace(plan, noise_multiplier=0.0)) == ()


def test_it_is_told_what_the_noise_is_for_and_which_window_is_too_long() -> None:
    assert "people of 3 periods to more runs than privacy.runs = 2" in list(about_calendar(made(runs=2)))[-1]
    assert runs_words(made(runs=3)) == ", so that 3 runs like this one come to epsilon 6.000"
    assert runs_words(made(runs=1)) == runs_words(made(runs=3, noise_multiplier=0.0)) == ""


def test_the_target_is_for_all_runs() -> None:
    plan = made(runs=3, cohorts=None)
    for solved in (
        planner.solve_rounds(plan, epsilon=8.0),
        planner.solve_sampling_rate(plan, epsilon=8.0, least=0.01),
        replace(plan, noise_multiplier=planner.least_noise(plan, epsilon=8.0)),
    ):
        assert 6.0 < spent(solved, 3)[0] <= 8.0
    assert planner.what_if(plan, epsilon=6.0)[-1].same_noise_epsilon == pytest.approx(6.0, abs=0.02)
