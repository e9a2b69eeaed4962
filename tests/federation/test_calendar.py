"""A calendar of runs: windows that move on, and what the people in them will have spent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedtune.federation import planner
from fedtune.federation.calendar import about_calendar, calendar_of, calendar_rows, moved, runs_words
from fedtune.privacy import accountant
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.privacy.run_plan import Plan


def made(*, runs: int, first: str | None = "2025", last: str = "2027", **changes: object) -> Plan:
    cohorts = Cohorts(period="year", first=first, last=last)
    privacy = PrivacySpec(unit="user", epsilon=6.0, runs=runs, cohorts=cohorts, sampling_rate=0.1)
    return replace(Plan.of(privacy, local_steps=5, num_rounds=2), **changes)  # type: ignore[arg-type]


def spent(plan: Plan, runs: int) -> float:
    return accountant.epsilon_pld([plan.whole] * runs, plan.delta)


@pytest.mark.parametrize(
    ("first", "last", "period", "after"),
    [
        ("2025", "2027", "year", "2026..2028"),
        ("2025-Q4", "2026-Q4", "quarter", "2026-Q1..2027-Q1"),
        ("2025-12", "2025-12", "month", "2026-01..2026-01"),
        (None, "2025-12", "month", "..2026-01"),
    ],
)
def test_a_window_moves_on_and_keeps_its_length(first: str | None, last: str, period: str, after: str) -> None:
    assert str(moved(Cohorts(period=period, first=first, last=last))) == after  # type: ignore[arg-type]


def test_the_oldest_owe_every_run_of_their_window_and_the_newest_one() -> None:
    plan = made(runs=4)
    rows = calendar_of(plan)
    assert [str(row.cohorts) for row in rows] == ["2025..2027", "2026..2028", "2027..2029", "2028..2030"]
    assert [row.oldest for row in rows] == [spent(plan, runs) for runs in (1, 2, 3, 3)]
    assert {row.newest for row in rows} == {spent(plan, 1)}
    assert max(row.oldest for row in rows) < 6.0
    # After two renewals those who came first have been in two runs already.
    later = calendar_of(plan, before=2)
    assert [row.number for row in later] == [3, 4, 5, 6]
    assert [row.oldest for row in later] == [spent(plan, 3)] * 4
    assert next(line[:2] for line in calendar_rows(plan, later)) == ("3", "2025 to 2027")
    assert planner.price(plan, {"a": 100}, before=2).calendar == later


def test_where_everybody_is_admitted_runs_end_with_the_budget() -> None:
    plan = replace(made(runs=4), cohorts=None)
    assert [row.oldest for row in calendar_of(plan)] == [spent(plan, runs) for runs in (1, 2, 3, 4)]
    assert [row.newest for row in calendar_of(plan, before=3)] == [pytest.approx(6.0, abs=0.02)]
    assert next(about_calendar(plan)).endswith("everybody is in at most 4 runs, epsilon 5.999 in all.")
    assert calendar_of(replace(plan, runs=1)) == calendar_of(replace(plan, noise_multiplier=0.0)) == ()


def test_a_window_that_is_too_long_or_has_no_beginning_is_told() -> None:
    assert len(list(about_calendar(made(runs=3)))) == 2
    assert "people of 3 periods to more runs than privacy.runs = 2" in list(about_calendar(made(runs=2)))[-1]
    assert "who has no date" in list(about_calendar(made(runs=3, first=None)))[-1]


def test_the_noise_says_how_many_runs_it_is_for() -> None:
    assert runs_words(made(runs=3)).startswith(", so that 3 runs like this one come to epsilon 6.000")
    assert runs_words(made(runs=1)) == runs_words(made(runs=3, noise_multiplier=0.0)) == ""


def test_the_target_is_for_all_runs() -> None:
    plan = made(runs=3, cohorts=None)
    for solved in (
        planner.solve_rounds(plan, epsilon=8.0),
        planner.solve_sampling_rate(plan, epsilon=8.0, least=0.01),
        replace(plan, noise_multiplier=planner.least_noise(plan, epsilon=8.0)),
    ):
        assert 6.0 < accountant.epsilon_pld([solved.whole] * 3, plan.delta) <= 8.0
    change = planner.what_if(plan, epsilon=6.0)[-1]
    assert change.same_noise_epsilon == pytest.approx(6.0, abs=0.02)
    assert change.noise_needed is not None
    assert change.noise_needed > plan.noise_multiplier
