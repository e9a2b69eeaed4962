"""Multi-year calendar of runs that share one privacy budget, with the cumulative epsilon of the people in each run.

The rule is stateless: if `privacy.planned_runs` is R, the noise of each run is calibrated so that R identical runs
compose to `privacy.epsilon`.  A person who takes part in at most R runs stays within that epsilon, whichever runs these
are.  The caps of the sites, which apply per cohort, ensure that nobody takes part in more than R runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedtune.formatting import pluralize
from fedtune.privacy import accountant, filter
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.cohorts import Cohorts, shift_window
from fedtune.privacy.run_plan import Plan

_OFTEN = {"month": "Twelve runs a year", "quarter": "Four runs a year", "year": "One run a year"}
_MAX_SHOWN = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class CalendarRun:
    """One run of a calendar, with the cohorts it admits and the cumulative epsilon after it."""

    number: int  # from 1
    cohorts: Cohorts | None  # the admitted cohorts; None: everybody
    oldest: float  # cumulative PLD epsilon of the oldest admitted cohort, which has been in the most runs
    newest: float  # cumulative PLD epsilon of the newest admitted cohort


def compute_max_runs_per_person(plan: Plan) -> int | None:
    """Return the maximum number of runs that admit the same person, if the cohort window advances one period per run.

    Returns None without cohorts, or if the window has no first cohort, because then every run admits the person.
    """
    if plan.cohorts is None or plan.cohorts.first is None:
        return None
    first, last = plan.cohorts.span
    return last - first + 1


def compute_epsilon_over_runs(plan: Plan, *, runs: int) -> float:
    """Compute the PLD epsilon of `runs` runs of this plan for a person who takes part in every one of them."""
    return accountant.epsilon_pld([plan.event(rounds=plan.max_rounds * runs)], plan.delta)


def list_calendar_runs(plan: Plan, *, before: int = 0) -> tuple[CalendarRun, ...]:
    """List the upcoming runs of a plan's calendar, at most 24.

    Without cohorts, or if the window has no first cohort, the list contains only the remaining runs.  It is empty for a
    plan without privacy or with a single run.

    Args:
        plan: the plan of the next run.
        before: the number of finished runs of the calendar.
    """
    if not plan.private or plan.runs == 1:
        return ()
    window, cohorts, runs = compute_max_runs_per_person(plan), plan.cohorts, []
    for step in range(min(_MAX_SHOWN, plan.runs if window else plan.runs - before)):
        number = before + step + 1
        oldest = compute_epsilon_over_runs(plan, runs=number if window is None else min(number, window))
        admits, newest = (
            (shift_window(cohorts, by=step), compute_epsilon_over_runs(plan, runs=1)) if cohorts else (None, oldest)
        )
        runs.append(CalendarRun(number=number, cohorts=admits, oldest=oldest, newest=newest))
    return tuple(runs)


def list_calendar_rows(plan: Plan, runs: Iterable[CalendarRun]) -> Iterator[tuple[str, ...]]:
    """Yield one table row per run: number, admitted cohorts, epsilon of the run, and cumulative epsilon of the oldest
    and the newest cohort.
    """
    for run in runs:
        admits = "everybody"
        if run.cohorts is not None:
            admits = f"{run.cohorts.first} to {run.cohorts.last}" if run.cohorts.first else f"up to {run.cohorts.last}"
        yield (
            str(run.number),
            admits,
            *map(format_epsilon, (compute_epsilon_over_runs(plan, runs=1), run.oldest, run.newest)),
        )


def describe_shared_epsilon(plan: Plan) -> str:
    """Return the clause that states the total epsilon of all planned runs, or an empty string if one run is planned.

    The clause is appended to the line with the plan's noise multiplier.
    """
    if plan.runs == 1 or not plan.private:
        return ""
    epsilon = format_epsilon(compute_epsilon_over_runs(plan, runs=plan.runs))
    return f", so that {plan.runs} runs like this one compose to epsilon {epsilon}"


def describe_calendar(plan: Plan) -> Iterator[str]:
    """Yield the sentences that describe the calendar of a plan with several runs, starting with a summary."""
    window = compute_max_runs_per_person(plan)
    most = plan.runs if window is None else min(window, plan.runs)
    often = _OFTEN[plan.cohorts.period] if plan.cohorts else pluralize(plan.runs, "run")
    who = "a person is in at most" if plan.cohorts else "everyone is in at most"
    alone, whole = (format_epsilon(compute_epsilon_over_runs(plan, runs=runs)) for runs in (1, most))
    yield f"{often} at epsilon {alone} each: {who} {pluralize(most, 'run')}, epsilon {whole} in all."
    many = plan.event(rounds=plan.max_rounds * most)
    cap = filter.find_tightest_cap(many, more=plan.full_event, reference=plan.full_event, delta=plan.delta, digits=3)
    yield f"A new ledger for these runs needs a lifetime cap (max_epsilon) of {cap:.12g}, by its privacy filter."
    if plan.cohorts and (window is None or window > plan.runs):
        who = "without a date or from earlier cohorts" if window is None else f"of {pluralize(window, 'period')}"
        yield (
            f"CAUTION: the window admits people {who} to more runs than privacy.planned_runs = {plan.runs}. "
            f"Sites with a cap for {pluralize(plan.runs, 'run')} refuse the next run: set a start for the window, "
            "or use fewer periods."
        )
