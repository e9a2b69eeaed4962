"""What `report verify` finds: whatever does not follow from a report's facts, and facts that deny each other."""

import copy
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.federation.drift import HeldOut
from fedtune.privacy.events import Charge
from fedtune.report import verify_report
from fedtune.report.derive.profile import accountants_agree
from fedtune.report.derive.verdicts import explain_missing_room
from fedtune.report.facts import Cap, ChargedRounds, LedgerFacts, RunFacts
from fedtune.report.model import Problem, Report, from_json, to_json
from fedtune.report.page.render import render
from fedtune.report.verify_report import derive_report, problems
from fedtune.spec import ConfigError

from .shown import (
    Make,
    add_admission,
    add_arrivals,
    add_drift,
    change_first_site,
    change_plan,
    list_problem_places,
    put,
    read_status,
    sign_by_sites,
    sign_receipt,
)

ON_FILE = ("a_report", "a_report_without_privacy", "a_secure_report", "a_ledger_report")

UNCHECKED = tomllib.loads(Path(__file__).with_name("unchecked_facts.toml").read_text())
"""Patterns of facts that one of two checks does not find changed, and why."""


def iter_places(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each value and each list; of a list's parts the first two, which is enough, but of cells all."""
    if path and not isinstance(part, dict):
        yield path, part
    if isinstance(part, dict):
        for key, value in part.items():
            yield from iter_places(value, (*path, key))
    elif isinstance(part, list):
        for number, value in enumerate(part if path[:1] == ("cells",) else part[:2]):
            yield from iter_places(value, (*path, number))


def list_other_values(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, 0]
        case float():
            return [value * 0.5, None]
        case str():
            return [f"{value}x"]
        case list():
            return [[], value[:-1]] if value else []
        case _:
            return [0.0, "2026-01-01"]


def change_values(report: Report, part: str) -> Iterator[tuple[str, Report]]:
    """The report with each value of its facts, or of what is derived, changed by itself, where it is one."""
    fields = to_json(report)
    derived = {key: value for key, value in fields.items() if key not in ("schema_version", "facts", "signature")}
    for path, value in iter_places(fields["facts"] if part == "facts" else derived):
        name = ".".join("*" if isinstance(key, int) else key for key in path)
        for altered in list_other_values(value):
            edited = copy.deepcopy(fields)
            put(edited["facts"] if part == "facts" else edited, path, altered)
            try:
                found = from_json(json.dumps(edited))
            except ConfigError:
                continue  # no report
            if altered != value:
                yield f"{name}: {value!r} -> {altered!r}", found


MADE = pytest.mark.parametrize("report", ["a_report", "a_ledger_report", "ledger_report"], indirect=True)


def is_listed(name: str, patterns: dict[str, str]) -> bool:
    return any(re.fullmatch(pattern, name.partition(":")[0]) for pattern in patterns)


CHANGED = {
    "arriving": (add_arrivals, "a_ledger_report"),
    "limited": (add_admission, "a_report"),
    "fell": (add_drift, "a_report"),
}


@pytest.fixture(params=[*ON_FILE, "run_report", "ledger_report"])
def report(request: pytest.FixtureRequest) -> Report:
    change, name = CHANGED.get(request.param, (replace, request.param))
    built = request.getfixturevalue(name)
    return change(built() if name in ON_FILE else built)


def test_unmodified_report_has_no_problems(report: Report) -> None:
    assert problems(report) == []


@pytest.mark.by_day("a_report", "a_ledger_report")
@pytest.mark.parametrize("report", ["a_report", "a_ledger_report", "ledger_report", *CHANGED], indirect=True)
def test_changed_derived_values_are_detected(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    derived_again = verify_report.derive_figures(report.facts)
    monkeypatch.setattr(verify_report, "derive_figures", lambda _: derived_again)  # the facts stay
    monkeypatch.setattr(verify_report, "_check_amount_of_work", lambda _: ())
    assert [name for name, altered in change_values(report, "derived") if not problems(altered)] == []


@MADE
def test_single_changed_facts_are_detected(report: Report) -> None:
    found = [name for name, altered in change_values(report, "facts") if not problems(altered)]
    assert [name for name in found if not is_listed(name, UNCHECKED["without_effect"])] == []


@MADE
def test_consistent_forgeries_change_only_facts_covered_by_signatures(report: Report) -> None:
    passed = []
    for name, altered in change_values(report, "facts"):
        try:
            forged = derive_report(altered.facts)
        except (ValueError, ArithmeticError, LookupError):
            continue
        passed += [] if problems(forged) else [name]
    assert [name for name in passed if not is_listed(name, UNCHECKED["signature_only"])] == []


def derive_from_facts(report: Report, **changes: Any) -> Report:
    """A report of changed facts, from which all is derived again."""
    return derive_report(replace(report.facts, **changes))


@pytest.mark.parametrize(
    ("factor", "fine"), [(1 + 9e-7, True), (1 + 2e-6, False), (1 - 1e-8, False), (1 - 1e-12, True)]
)
def test_rederived_epsilon_may_be_slightly_larger_but_never_smaller(a_report: Make, factor: float, fine: bool) -> None:
    report = a_report()
    spent = report.sites[0].spent
    larger = change_first_site(report, spent=replace(spent, epsilon_rdp=spent.epsilon_rdp * factor))
    assert (problems(larger) == []) == fine


def test_changed_epsilon_problem_shows_both_values(a_report: Make) -> None:
    spent = a_report().sites[0].spent
    (problem,) = problems(change_first_site(a_report(), spent=replace(spent, epsilon_pld=1.0)))
    assert problem == Problem("sites.north-hospital.spent.epsilon_pld", 1.0, pytest.approx(spent.epsilon_pld))


def test_tolerances_never_accept_understated_figures(a_report: Make, a_ledger_report: Make) -> None:
    tiny = change_plan(a_report(), delta=1e-13)
    site = tiny.sites[0]
    *earlier_points, last = site.curve
    for factor, fine in ((1 - 1e-5, True), (0.98, False)):
        less = replace(last, epsilon_pld=last.epsilon_pld * factor)
        assert (list_problem_places(change_first_site(tiny, curve=(*earlier_points, less))) == set()) == fine
    noisier = replace(site.mechanisms[0], noise_multiplier=1.5 * (1 + 5e-7))
    assert list_problem_places(change_first_site(tiny, mechanisms=(noisier,)))
    # Nor is more left than the cap leaves.
    report = a_ledger_report()
    used_up = derive_from_facts(report, **change_approved(report.facts, max_epsilon=1.0))
    assert (used_up.sites[0].lifetime.remaining_epsilon, list_problem_places(used_up)) == (0.0, set())
    for of, more, bad in ((used_up, 1e-10, True), (report, 1e-6, True), (report, 0.1, True), (report, -1e-7, False)):
        life = of.sites[0].lifetime
        found = list_problem_places(
            change_first_site(of, lifetime=replace(life, remaining_epsilon=life.remaining_epsilon + more))
        )
        assert found == ({"sites.north-hospital.lifetime.remaining_epsilon"} if bad else set())


def build_many_plans(report: Report, count: int) -> LedgerFacts:
    """So many runs, each with another plan and with noised scores."""
    run, noises = report.facts.runs[1], {f"r{number}": 1 + number / 1000 for number in range(count)}
    plans = [
        replace(run.plan, noise_multiplier=noise, metrics_noise_multiplier=19 + noise) for noise in noises.values()
    ]
    return replace(
        report.facts,
        verification=None,
        problem="not looked at",
        runs=tuple(replace(run, run=name, plan=plan) for name, plan in zip(noises, plans, strict=True)),
        charges=tuple(ChargedRounds(run=name, rounds=3, round=None, day="2026-01-01") for name in noises),
    )


def test_report_verification_has_a_work_limit(a_ledger_report: Any, a_report: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(verify_report.profile, "epsilon_rdp", lambda *_: 50.0)  # of so many it takes a minute
    large = build_many_plans(a_ledger_report(), 1000)
    (problem,) = verify_report._check_amount_of_work(large)
    assert (problem.where, problem.expected) == ("facts", "fewer: verifying them would take hours")
    assert problems(a_ledger_report(facts=large)) == [problem]
    assert list(verify_report._check_amount_of_work(build_many_plans(a_ledger_report(), 200))) == []
    facts = a_report().facts
    large = replace(facts, rounds=facts.rounds[:1] * 1000, sites=facts.sites[:1] * 501)
    (problem,) = verify_report._check_amount_of_work(large)
    assert problem.reported == "501000 table rows (sites times rounds)"


def test_uncomputable_charge_is_reported_without_a_crash(a_ledger_report: Make) -> None:
    facts, gaussian = a_ledger_report().facts, {"kind": "gaussian", "noise_multiplier": 1}
    of_lost = {"run": "", "rounds": 0, "round": None, "day": "2026-02-02", "entry": 9}
    for event in (
        {"kind": "exponential", "noise_multiplier": 1.0},
        {"kind": "laplace", "noise_multiplier": 0},
        {"kind": "poisson_sampled", "sampling_probability": 0.1, "event": {"kind": "laplace", "noise_multiplier": 1.0}},
        *({"kind": "gaussian", "noise_multiplier": noise} for noise in (0, 1e-9, 1e12)),
        *({"kind": "poisson_sampled", "sampling_probability": rate, "event": gaussian} for rate in (1e-300, 2)),
        {"kind": "poisson_sampled", "sampling_probability": 0.1, "event": {"kind": "non_private"}},
        {"kind": "self_composed", "count": 10**400, "event": gaussian},
        {"kind": "self_composed", "count": 10**8, "event": {"kind": "gaussian", "noise_multiplier": 0.1}},
        {},
    ):
        lost_charge = ChargedRounds(**of_lost, lost=(Charge(event=event, count=1),))
        assert list_problem_places(a_ledger_report(facts=replace(facts, charges=(*facts.charges, lost_charge)))) == {
            "facts"
        }, event


def test_out_of_range_facts_are_refused(a_report: Make) -> None:
    invalid = {"delta": (0.0, 1.0), "sampling_rate": (-0.1,), "noise_multiplier": (-1.5,)}
    plan_cases = [(("plan", key), value) for key, values in invalid.items() for value in values]
    for path, value in (*plan_cases, (("sites", 0, "receipt", "sequence"), "x")):
        fields = to_json(a_report())
        put(fields["facts"], path, value)
        with pytest.raises(ConfigError, match="facts"):
            from_json(json.dumps(fields))


SITES = ("north-hospital", "south-hospital")


def drop_other_sites(facts: RunFacts, left: tuple[str, ...] = (), *, reasons: dict[str, str]) -> dict[str, Any]:
    """A run whose rounds hold the updates of the sites in `left` alone, since of the others the lead has no receipt."""
    rounds = tuple(replace(entry, sites=left, failed_sites=reasons) for entry in facts.rounds)
    sites = tuple(site if site.site in left else replace(site, receipt=None) for site in facts.sites)
    return {"rounds": rounds, "sites": sites}


def add_round_4(facts: RunFacts, reason: str) -> dict[str, Any]:
    """What came of the site whose receipt is of three rounds, in a run that is not over."""
    last = replace(facts.rounds[3], failed_sites={SITES[1]: reason})
    return {"rounds": (*facts.rounds[:3], last), "final": {}, "files": {}}


def test_contradictory_run_facts_are_detected(a_report: Make) -> None:
    facts = a_report().facts
    north, south = facts.sites
    real, seeded = (
        tuple(replace(one, receipt=sign_receipt(one.receipt, one.site, **said)) for one in facts.sites)
        for said in ({"simulated": False}, {"seeded_noise": True})
    )
    by_itself = {"run": "another", "site": SITES[1], "plan": "12" * 32, "charged_rounds": 5}
    bad = [(key, sign_receipt(north.receipt, north.site, **{key: said})) for key, said in by_itself.items()]
    bad += [("plan", sign_receipt(north.receipt, north.site, plan=""))]
    bad += [("signature", replace(north.receipt, sequence=8))]
    bad += [("charged_rounds", sign_receipt(north.receipt, north.site, charged_rounds=3))]
    for changes, path in (
        ({"held_out": (HeldOut(run="r", date="", mean=0.5, deviation=0.1),)}, "held_out"),
        ({"sites": ()}, "sites"),
        ({"sites": (*facts.sites, north)}, "sites"),
        ({"sites": facts.sites[:1]}, "rounds.1"),  # the other one was asked
        ({"target_epsilon": None}, "target_epsilon"),
        ({"randomness": "seeded"}, "seeded_noise"),
        ({"rounds": facts.rounds * 2}, "rounds"),
        ({"rounds": facts.rounds[1:], "final": {}}, "rounds"),
        ({"rounds": facts.rounds[:3], "final": {}}, "files"),
        ({"rounds": facts.rounds[:3]}, "rounds"),  # an adapter was scored at the end
        (drop_other_sites(facts, reasons={}), "rounds.1"),
        (drop_other_sites(facts, reasons=dict.fromkeys(SITES, "max_epsilon")), "rounds.4"),
        (drop_other_sites(facts, SITES[:1], reasons={}), "rounds.2"),
        (add_round_4(facts, "beyond_plan"), f"sites.{SITES[1]}.receipt.charged_rounds"),
        (add_round_4(facts, "invalid_update"), f"sites.{SITES[1]}.receipt.charged_rounds"),
        *(({"sites": (replace(north, receipt=one), south)}, f"sites.{SITES[0]}.receipt.{key}") for key, one in bad),
        ({"settings": {"epsilon": "0.1"}}, "settings"),
        ({"settings": {"labels": "many"}}, "settings.labels"),
        ({"settings": {}}, "settings.runtime"),
        ({"settings": {"runtime": "deployment"}}, "sent"),
        ({"settings": {"runtime": "deployment"}, "sent": "{}"}, "run"),
        ({"settings": {"runtime": "deployment"}, "run": f"{facts.run}1"}, "settings.runtime"),
        ({"settings": {"runtime": "deployment"}, "sites": real}, "sent"),
        ({"sites": real}, "settings.runtime"),
        ({"sites": seeded}, "seeded_noise"),
        ({"sent": "{}"}, "sent"),
        ({"run": f"{facts.run}1"}, "run"),
    ):
        assert path in list_problem_places(a_report(facts=replace(facts, **changes))), changes


def test_secure_aggregation_plan_must_match_the_participating_sites(a_secure_report: Make) -> None:
    facts = a_secure_report().facts
    (*sites, last), lost_charge = facts.rounds[0].sites, "not_summed"
    rounds = (replace(facts.rounds[0], sites=tuple(sites), failed_sites={last: lost_charge}), *facts.rounds[1:])
    for changes, path in (({"num_sites": 6}, "num_sites"), ({"threshold": 5, "num_sites": 5}, "threshold")):
        plan = replace(facts.plan, shared=replace(facts.plan.shared, **changes))
        facts = sign_by_sites(replace(facts, plan=plan, rounds=rounds))
        assert list_problem_places(a_secure_report(facts=facts)) == {f"plan.shared.{path}"}


def change_approved(facts: LedgerFacts, **changes: Any) -> dict[str, Any]:
    return {"approved": replace(facts.approved, **changes)}


def test_contradictory_ledger_facts_are_detected(a_ledger_report: Make) -> None:
    facts = a_ledger_report().facts
    first, second = facts.charges
    rolled = replace(facts.verification, anchor_sequence=41)
    for changes, path in (
        ({"delta": 0.0}, "delta"),
        ({"delta": 1e-6}, "runs.diagnosis.plan"),
        ({"order": 1.0}, "order"),
        ({"order": 1e300}, "order"),
        ({"runs": facts.runs * 2}, "runs"),
        ({"runs": facts.runs[:1]}, "charges"),
        ({"charges": facts.charges[::-1]}, "charges"),
        ({"charges": (replace(first, rounds=5), second)}, "runs.diagnosis.plan"),
        ({"charges": (replace(first, rounds=3), second)}, "releases"),
        ({"caps": ()}, "caps"),
        ({"caps": (replace(facts.caps[0], charges_before=8),)}, "caps"),
        (change_approved(facts, max_epsilon=7.0), "approved.max_epsilon"),
        (change_approved(facts, max_epsilon=None), "approved.max_epsilon"),
        ({"verification": rolled}, "verification.num_events"),
        ({"verification": replace(facts.verification, num_events=6)}, "verification.num_events"),
    ):
        assert path in list_problem_places(a_ledger_report(facts=replace(facts, **changes))), changes


def test_ledger_verdict_is_derived_from_its_facts(a_ledger_report: Make) -> None:
    facts = a_ledger_report().facts
    for changes, state in (
        ({}, "within"),
        ({"caps": (Cap(time="2025-01-01", max_epsilon=None, charges_before=0),)}, "no_guarantee"),
        (change_approved(facts, max_epsilon=1.5), "exceeded"),
        (change_approved(facts, max_epsilon_per_period=1.0), "exceeded"),
        ({"in_doubt": True}, "no_guarantee"),
        ({"lost_seed": True}, "no_guarantee"),
        ({"verification": None}, "no_guarantee"),
    ):
        assert derive_from_facts(a_ledger_report(), **changes).verdict.state == state, changes
    # A charge between two limits, of which the first was none, is found.
    first, second_cap = (Cap(time="2026-01-01", max_epsilon=cap, charges_before=0) for cap in (None, 6.0))
    later = (first, replace(second_cap, charges_before=4))
    assert derive_from_facts(a_ledger_report(), caps=later).verdict.reasons == ("no_lifetime_cap",)
    assert derive_from_facts(a_ledger_report(), caps=(first, second_cap)).verdict.state == "within"


def test_period_epsilon_counts_only_charges_within_the_period(a_ledger_report: Make) -> None:
    charges = a_ledger_report().facts.charges
    for day, period, least in (("2026-02-28", "month", 0.1), ("2026-01-01", "month", 0.0), ("2026-01-01", "year", 1.6)):
        last = replace(charges[1], day=day)
        of_period = change_approved(a_ledger_report().facts, period=period)
        report = derive_from_facts(a_ledger_report(), charges=(charges[0], last), date="2026-02-28", **of_period)
        found = report.sites[0].lifetime.period_epsilon
        assert found >= least
        assert (found > 0) == (least > 0)


def test_remaining_budget_respects_lifetime_and_period_caps(a_ledger_report: Make) -> None:
    facts = a_ledger_report().facts
    life = a_ledger_report().sites[0].lifetime
    assert life.reference_remaining_runs == life.reference_runs_in_lifetime > 0
    cap = life.period_epsilon + 0.01
    report = derive_from_facts(a_ledger_report(), **change_approved(facts, max_epsilon_per_period=cap))
    now = report.sites[0].lifetime
    assert now.reference_runs_in_lifetime == life.reference_runs_in_lifetime
    assert (now.remaining_epsilon, now.reference_remaining_runs) == (pytest.approx(0.01), 0)
    assert explain_missing_room(report) == "no_run_now"
    some = derive_from_facts(a_ledger_report(), **change_approved(facts, max_epsilon_per_period=cap + 1))
    assert explain_missing_room(some) is None
    assert ["left in this period" in render(one, language="en") for one in (some, a_ledger_report())] == [True, False]
    assert list_problem_places(report) == set()


def test_report_of_a_seeded_run_states_no_guarantee(run_report: Report) -> None:
    report = derive_from_facts(run_report, seeded_noise=True, randomness="seeded")
    assert (read_status(report, "unpredictable_randomness"), report.verdict.state) == ("violated", "no_guarantee")


def test_plan_above_the_target_is_exceeded_despite_lower_charges(a_report: Make) -> None:
    facts = a_report().facts
    planned = replace(facts.plan, num_rounds=12)
    report = derive_report(sign_by_sites(replace(facts, plan=planned, target_epsilon=1.2)))
    spent = report.sites[0].spent
    assert spent.epsilon_pld < 1.2 < spent.planned_epsilon == report.epsilon
    assert report.verdict.state == "exceeded"


def test_simulation_report_claiming_real_sites_is_rejected(run_report: Report) -> None:
    posing = derive_from_facts(run_report, settings={**run_report.facts.settings, "runtime": "deployment"})
    assert posing.banners == run_report.banners == ("simulation",), "its sites signed that they are simulated"
    without = tuple(replace(site, receipt=None) for site in run_report.facts.sites)
    real = derive_from_facts(run_report, settings={**run_report.facts.settings, "runtime": "deployment"}, sites=without)
    for report, simulated in ((run_report, True), (real, False)):
        assert ("sites_run_their_own_software" in {one.code for one in report.assumptions}) != simulated
        assert ("simulation" in report.banners) == simulated


def test_accountants_may_differ_by_the_discretization_width(a_report: Make) -> None:
    spent = a_report().sites[0].spent
    for pld, rdp, steps, agree in (
        *((1.0, 1.5, 100, True), (1.0, 0.98, 100, False)),
        *((0.2065, 0.0769, 50_000, True), (2.0, 1.0, 50_000, False)),
    ):
        found = replace(spent, epsilon_pld=pld, epsilon_rdp=rdp, steps=steps)
        assert accountants_agree(found, width=0.001) == agree
