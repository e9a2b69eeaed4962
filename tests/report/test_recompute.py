"""Epsilon again from the events: what agrees has no problem, and whatever is changed is found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from fedtune.report import recompute
from fedtune.report.model import (
    Assumption,
    Charge,
    Problem,
    Report,
    SiteReport,
    State,
    Verdict,
    from_json,
    to_json,
)
from fedtune.report.recompute import charges_of, problems

from .shown import where as everywhere
from .shown import with_site

Make = Callable[..., Report]


def where(report: Report) -> set[str]:
    """Where problems are found, but for cells, which repeat what stands elsewhere."""
    return {place for place in everywhere(report) if not place.startswith("cells.")}


@pytest.fixture(params=["a_report", "a_ledger_report", "a_report_without_privacy"])
def any_report(request: pytest.FixtureRequest) -> Report:
    made: Report = request.getfixturevalue(request.param)()
    return made


def with_spent(report: Report, **changes: Any) -> Report:
    spent = report.sites[0].spent
    return with_site(report, spent=replace(spent, **changes))


def edited(report: Report, *path: Any, to: Any) -> Report:
    """The report with the value at `path` in its JSON replaced, or changed by a function."""
    data: Any = to_json(report)
    part = data
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to(part[path[-1]]) if callable(to) else to
    return from_json(json.dumps(data))


def test_a_report_that_agrees_has_no_problem(any_report: Report) -> None:
    assert problems(any_report) == []


# What no event says: how the run went, who did what when, what a policy allows, plans of which part was charged.
_NOT_FROM_EVENTS = (
    r"(utility\.(before|final|rounds\.\d+\.(round|seconds|bytes_\w+|scores\..*))"
    r"|target_epsilon|schema_version"
    r"|sites\.1\..*"  # is like the first
    r"|sites\.\d+\.(steps\.\d+\.(round|epsilon)|releases\.\d+\.count|mechanisms\.\d+\.max_grad_norm|spent\.planned_epsilon)"
    r"|sites\.\d+\.approved\.max_epsilon_per_run"
    r"|sites\.\d+\.verification\.num_events"
    r"|sites\.\d+\.lifetime\.(period_epsilon|reference_runs_left|restored|runs\.\d+\.(most_rounds|planned_epsilon)))"
)


def numbers(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], float]]:
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from numbers(data[key], (*path, key))
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield path, data


@pytest.mark.parametrize("made", ["a_report", "a_ledger_report"])
def test_each_figure_that_events_give_is_compared(made: str, request: pytest.FixtureRequest) -> None:
    report, checked = request.getfixturevalue(made)(), 0
    for path, value in numbers(to_json(report)):
        name = ".".join(map(str, path))
        if re.match(_NOT_FROM_EVENTS, name) or not value:
            continue
        # What is left may be stated as less, and anything else as more, by a millionth.
        factors = (1.001 if name.endswith("delta") else 1.00001, 0.99999 if name.endswith("left") else 0.9999999)
        if re.search(r"curve\.[5-9]\.epsilon_pld", name):  # at deltas below 1e-7, which machines round otherwise
            factors = (1.0002, 0.9998)
        for factor in factors if isinstance(value, float) else (2, 0):
            assert problems(edited(report, *path, to=value * factor)), (name, factor)
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("factor", "fine"), [(1 + 9e-7, True), (1 + 2e-6, False), (1 - 1e-8, False), (1 - 1e-12, True)]
)
def test_an_epsilon_may_be_a_little_larger_and_never_smaller(a_report: Make, factor: float, fine: bool) -> None:
    report = edited(a_report(), "sites", 1, "spent", "epsilon_rdp", to=lambda epsilon: epsilon * factor)
    assert (problems(report) == []) == fine


def test_a_changed_epsilon_says_both_figures(a_report: Make) -> None:
    report = a_report()
    right = report.sites[0].spent
    (problem,) = problems(with_spent(report, epsilon_pld=1.0))
    assert problem == Problem("sites.north-hospital.spent.epsilon_pld", 1.0, pytest.approx(right.epsilon_pld))


def of_many_plans(report: Report, count: int) -> Report:
    """The first site with so many runs, each with another plan and with noised scores."""
    (row, *_), gaussian = report.sites[0].mechanisms, {"kind": "gaussian"}
    rows = (
        replace(
            row,
            run=f"r{number}",
            charges=(
                Charge(
                    event={
                        "kind": "poisson_sampled",
                        "sampling_probability": 0.05,
                        "event": gaussian | {"noise_multiplier": 1 + number / 1000},
                    },
                    count=30,
                ),
                Charge(event=gaussian | {"noise_multiplier": 20 + number / 1000}, count=3),
            ),
        )
        for number in range(count)
    )
    return with_site(report, mechanisms=tuple(rows))


def test_the_work_that_a_small_report_asks_for_is_bounded(
    a_report: Make, a_ledger_report: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute.profile, "epsilon_rdp", lambda *_: 50.0)  # of so many it takes a minute
    for report in (of_many_plans(a_ledger_report(), 1000), of_many_plans(a_report(), 500)):
        (problem,) = recompute._too_much_work(report)
        assert (problem.where, problem.found) == ("sites.mechanisms", "that would take hours to compute")
        assert problems(report) == [problem]
    assert list(recompute._too_much_work(of_many_plans(a_ledger_report(), 200))) == []
    assert list(recompute._too_much_work(of_many_plans(a_report(), 2))) == []


def test_a_curve_and_a_run_stand_in_a_report_once(a_report: Make, a_ledger_report: Make) -> None:
    curve = a_report().sites[0].curve
    assert where(with_site(a_report(), curve=curve * 1000)) == {"sites.north-hospital.curve"}
    life = a_ledger_report().sites[0].lifetime
    assert life
    twice = with_site(a_ledger_report(), lifetime=replace(life, runs=life.runs * 1000))
    assert "sites.north-hospital.lifetime.runs" in where(twice)


def test_an_epsilon_that_something_bounds_is_not_unbounded_and_the_other_way_round(
    a_report: Make, a_report_without_privacy: Make
) -> None:
    assert "sites.north-hospital.spent.epsilon_pld" in where(with_spent(a_report(), epsilon_pld=None))
    for zero in (0.0, 3.0):
        assert "sites.north-hospital.spent.epsilon_pld" in where(
            with_spent(a_report_without_privacy(), epsilon_pld=zero)
        )


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("event", "event", "event", "noise_multiplier"), 1.6),
        (("event", "event", "sampling_probability"), 0.04),
        (("event", "count"), 39),
        (("count",), 2),
    ],
)
def test_a_changed_event_is_found(a_report: Make, path: tuple[str, ...], to: float) -> None:
    report = a_report()
    charge = report.sites[0].mechanisms[0].charges[0]
    wrapped = {"kind": "self_composed", "count": charge.count, "event": charge.event}
    as_one = edited(report, "sites", 0, "mechanisms", 0, "charges", 0, to={"event": wrapped, "count": 1})
    assert problems(as_one) == []  # another spelling of the same
    found = where(edited(as_one, "sites", 0, "mechanisms", 0, "charges", 0, *path, to=to))
    assert "sites.north-hospital.spent.epsilon" in found
    assert "sites.north-hospital.mechanisms.diagnosis-0123456789abcdef" in found


def test_a_removed_event_is_found(a_ledger_report: Make) -> None:
    report = a_ledger_report()
    rows = report.sites[0].mechanisms
    assert [len(row.charges) for row in rows] == [1, 2]
    for other in (
        rows[:1],
        rows[1:],
        (rows[0], replace(rows[1], charges=rows[1].charges[:1])),
        (rows[0], replace(rows[1], charges=rows[1].charges[1:])),
        (),
    ):
        found = where(with_site(report, mechanisms=other))
        assert {"sites.north-hospital.spent.epsilon", "sites.north-hospital.lifetime.epsilon_pld"} <= found | {
            place.replace("spent", "lifetime") for place in found
        }


def test_an_event_under_another_run_is_found(a_ledger_report: Make) -> None:
    report = a_ledger_report()
    one, other = report.sites[0].mechanisms
    swapped = (replace(one, charges=other.charges), replace(other, charges=one.charges))
    assert "sites.north-hospital.lifetime.runs.triage.epsilon" in where(with_site(report, mechanisms=swapped))


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "laplace", "noise_multiplier": 1.0},
        {"kind": "gaussian", "noise_multiplier": 0},
        {"kind": "gaussian", "noise_multiplier": 1e-9},
        {"kind": "gaussian", "noise_multiplier": 1e12},
        {
            "kind": "poisson_sampled",
            "sampling_probability": 1e-300,
            "event": {"kind": "gaussian", "noise_multiplier": 1},
        },
        {"kind": "poisson_sampled", "sampling_probability": 2, "event": {"kind": "gaussian", "noise_multiplier": 1}},
        {"kind": "poisson_sampled", "sampling_probability": 0.1, "event": {"kind": "non_private"}},
        {"kind": "self_composed", "count": 10**400, "event": {"kind": "gaussian", "noise_multiplier": 1}},
        {"kind": "self_composed", "count": 10**8, "event": {"kind": "gaussian", "noise_multiplier": 0.1}},
        {},
    ],
)
def test_an_event_that_cannot_be_computed_is_a_problem_and_no_crash(a_report: Make, event: Any) -> None:
    report = edited(a_report(), "sites", 0, "mechanisms", 0, "charges", 0, "event", to=event)
    assert "sites.north-hospital.mechanisms" in where(report)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("delta",), 0.0),
        (("delta",), 1.0),
        (("delta",), -1e-5),
        (("sites", 0, "curve", 0, "delta"), 0.0),
        (("sites", 0, "curve", 0, "delta"), 2.0),
        (("sites", 0, "mechanisms", 0, "charges", 0, "count"), 0),
        (("sites", 0, "mechanisms", 0, "charges", 0, "count"), -3),
        (("sites", 0, "mechanisms", 0, "rounds"), -4),
        (("sites", 0, "mechanisms", 0, "sampling_rate"), -0.1),
        (("sites", 0, "mechanisms", 0, "noise_multiplier"), -1.5),
    ],
)
def test_figures_out_of_range_are_problems(a_report: Make, path: tuple[Any, ...], to: float) -> None:
    assert problems(edited(a_report(), *path, to=to))


@pytest.mark.parametrize("order", [0.0, 1.0, -3.0, 1e300])
def test_an_order_that_is_none_is_a_problem(a_ledger_report: Make, order: float) -> None:
    assert problems(edited(a_ledger_report(), "sites", 0, "lifetime", "order", to=order))


def test_the_worst_site_s_epsilon_counts(a_report: Make) -> None:
    epsilons = [site.spent.epsilon for site in a_report().sites if site.spent]
    assert epsilons[0] != epsilons[1]
    assert where(a_report(epsilon=min(epsilon for epsilon in epsilons if epsilon))) >= {"epsilon"}
    assert where(a_report(epsilon=None)) == {"epsilon"}


def test_a_site_without_figures_must_have_released_none(a_report: Make) -> None:
    silent: dict[str, Any] = {"spent": None, "meaning": None, "curve": (), "steps": ()}
    report = a_report()
    assert where(with_site(report, **silent)) >= {"sites.north-hospital.spent"}
    one, other = with_site(report, **silent, mechanisms=(), source="not_released").sites
    assert where(replace(report, sites=(one, other), epsilon=other.spent.epsilon, utility=None)) == set()


def test_what_was_planned_is_no_less_than_what_was_spent(a_report: Make) -> None:
    found = where(with_spent(a_report(), planned_epsilon=1.0))
    assert found == {"sites.north-hospital.spent.planned_epsilon"}


def test_steps_lead_up_to_the_whole(a_report: Make) -> None:
    report = a_report()
    steps = report.sites[0].steps
    for wrong in (
        (replace(steps[0], epsilon=9.0), *steps[1:]),
        (*steps[:-1], replace(steps[-1], epsilon=None)),
        (steps[1], steps[0], *steps[2:]),
        steps[:-1],
    ):
        assert any("steps" in place for place in where(with_site(report, steps=wrong)))


def test_a_round_s_epsilon_is_that_of_the_worst_site(a_report: Make) -> None:
    utility = a_report().utility
    for wrong in (None, 0.5):
        rounds = (replace(utility.rounds[0], epsilon=wrong), *utility.rounds[1:])
        report = a_report(utility=replace(utility, rounds=rounds))
        assert where(report) == {"utility.rounds.0.epsilon"}


def judged(report: Report, state: State, *reasons: str) -> set[str]:
    verdict = Verdict(state=state, reasons=reasons)
    return where(replace(with_site(report, verdict=verdict), verdict=verdict))


def test_a_run_s_verdict_follows_from_its_target(a_report: Make, a_report_without_privacy: Make) -> None:
    place = "sites.north-hospital.verdict.state"
    over = a_report(target_epsilon=1.0)
    assert judged(over, "within") >= {place}
    assert place not in judged(over, "exceeded") | judged(over, "no_guarantee")
    assert place in judged(a_report(), "exceeded")
    assert judged(a_report_without_privacy(), "within") == {place}
    assert judged(a_report_without_privacy(), "exceeded") == {place}
    seeded = a_report(seeded_noise=True)
    assert judged(seeded, "within") >= {place}


def test_a_plan_above_the_target_is_exceeded_although_less_was_charged(a_report: Make) -> None:
    report = with_spent(a_report(), planned_epsilon=2.5)
    assert judged(report, "within") >= {"sites.north-hospital.verdict.state"}
    assert judged(report, "exceeded") == set()


def test_a_ledger_s_verdict_follows_from_its_caps(a_ledger_report: Make) -> None:
    report, place = a_ledger_report(), "sites.north-hospital.verdict.state"
    site = report.sites[0]
    life, approved = site.lifetime, site.approved
    assert judged(report, "exceeded", "above_lifetime_cap") == {place}
    assert judged(report, "exceeded", "above_run_cap") == set()  # the cap then in force is not in the report
    assert judged(report, "no_guarantee", "ledger_in_doubt") == set()
    low = with_cap(report, 1.5)
    assert judged(low, "within") == {place}
    assert judged(low, "exceeded", "above_lifetime_cap") == set()
    period = with_site(report, approved=replace(approved, max_epsilon_per_period=1.0))
    assert judged(period, "within") == {place}
    for flag in ("seeded", "in_doubt"):
        left = 0.0 if flag == "in_doubt" else life.left
        marked = with_site(report, lifetime=replace(life, **{flag: True, "left": left}), left=left)
        if flag == "seeded":
            marked = replace(marked, seeded_noise=True, randomness="seeded")
        code = "unpredictable_randomness" if flag == "seeded" else "no_event_missing"
        marked = replace(
            marked,
            assumptions=tuple(
                replace(one, status="violated") if one.code == code else one for one in marked.assumptions
            ),
        )
        assert judged(marked, "within") == {place}
        assert judged(marked, "no_guarantee") == set()


def with_cap(report: Report, cap: float) -> Report:
    site = report.sites[0]
    life = site.lifetime
    left = max(0.0, cap - life.epsilon)
    caps = (replace(life.caps[0], max_epsilon=cap),)
    return with_site(
        report,
        approved=replace(site.approved, max_epsilon=cap),
        lifetime=replace(life, caps=caps, left=left),
        left=left,
    )


def test_the_worst_site_s_verdict_counts(a_report: Make) -> None:
    report = with_site(a_report(), verdict=Verdict(state="no_guarantee", reasons=("ledger_in_doubt",)))
    assert where(report) == {"verdict.state"}
    assert where(replace(report, verdict=Verdict(state="exceeded"))) == {"verdict.state"}
    assert where(replace(report, verdict=Verdict(state="no_guarantee"))) == set()


def test_what_is_left_is_never_more_than_the_cap_leaves(a_ledger_report: Make) -> None:
    report = a_ledger_report()
    site = report.sites[0]
    assert site.left
    for wrong in (site.left + 0.1, site.left + 1e-6, None):
        both = with_site(report, left=wrong, lifetime=replace(site.lifetime, left=wrong))
        assert where(both) == {"sites.north-hospital.lifetime.left"}
    assert where(with_site(report, left=1.0)) == {"sites.north-hospital.lifetime.left"}


def test_a_joined_ledger_s_lifetime_is_taken_as_it_is_signed(a_ledger_report: Make, a_report: Make) -> None:
    # The lead's report holds the events of its own run only; those of the others stayed at the site.
    own, run = a_ledger_report().sites[0], a_report()
    report = with_site(
        run,
        source="signed_site_report",
        approved=own.approved,
        lifetime=own.lifetime,
        left=own.left,
        verification=own.verification,
    )
    told = ("site_reports_agree", "site_reports_are_newest")
    told_of = tuple(Assumption(code=code, status="assumed", evidence="") for code in told)
    assert where(report) == {"unprotected_figures", *(f"assumptions.{code}" for code in told)}
    report = replace(
        report,
        assumptions=(*report.assumptions, *told_of),
        unprotected_figures=(*report.unprotected_figures, "counts_of_events"),
    )
    assert where(report) == set()
    assert where(with_spent(report, epsilon=1.0)) >= {"sites.north-hospital.spent.epsilon"}


def test_charges_of_a_site_are_counted(a_ledger_report: Make) -> None:
    site: SiteReport = a_ledger_report().sites[0]
    charged = charges_of(site)
    assert sorted(charged.values()) == [3, 30, 40]
