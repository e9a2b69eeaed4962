"""A report that was changed in one place and not in the others is found, whatever its figures come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy.site_policy import Policy
from fedtune.report import from_ledger, one_run, recompute
from fedtune.report.audit_findings import Audit, AuditBound
from fedtune.report.derive import profile, rules
from fedtune.report.model import Assumption, Cap, Report, Spent, Verdict

from .shown import where, with_site
from .site_ledgers import Books

Make = Callable[..., Report]
WITHIN = Verdict(state="within")


def within(report: Report) -> Report:
    """The same, with a verdict that it may not have."""
    return replace(report, verdict=WITHIN, sites=tuple(replace(site, verdict=WITHIN) for site in report.sites))


def test_reports_as_they_are_made_contradict_nothing(of_run: Report, of_ledger: Report) -> None:
    assert recompute.problems(of_run) == recompute.problems(of_ledger) == []


@pytest.mark.parametrize(
    "fact",
    [
        "epsilon",
        "verdict",
        "right_of_100_ceiling",
        "right_of_100_mechanism",
        "singling_out_bound",
        "expected_failures",
        "sampling_run",
        "technologies_on",
        "randomness",
        "released",
        "known_limits",
        "date",
        "unit",
        "ledger_verified",
        "rollback_excluded",
    ],
)
def test_a_cell_says_what_the_figures_say(fact: str, of_run: Report, of_ledger: Report) -> None:
    for report in (of_run, of_ledger):
        having = [cell for cell in report.cells if cell.facts.get(fact)]
        if not having and report is of_run:
            continue  # a run knows of no ledger
        assert having
        cells = tuple(
            replace(cell, facts={**cell.facts, fact: "0.010"}) if cell in having else cell for cell in report.cells
        )
        assert where(replace(report, cells=cells)) == {f"cells.{cell.code}.{fact}" for cell in having}
        # Calling it something else than a fact from the record does not help.
        by_design = tuple(replace(cell, state="design") if cell in having else cell for cell in cells)
        assert where(replace(report, cells=by_design)) == {f"cells.{cell.code}.{fact}" for cell in having}


def test_a_simulation_cannot_be_made_a_run_of_real_sites(of_run: Report) -> None:
    for other in ("", "deployment"):
        cells = tuple(
            replace(cell, facts={name: other if name == "runtime" else fact for name, fact in cell.facts.items()})
            for cell in of_run.cells
        )
        assert "cells.dpia_description.runtime" in where(replace(of_run, cells=cells))


def test_an_exceeded_budget_is_not_within_in_a_cell(of_run: Report) -> None:
    exceeded = Verdict(state="exceeded", reasons=("above_target",))
    report = replace(
        of_run,
        target_epsilon=0.1,
        verdict=exceeded,
        sites=tuple(replace(site, verdict=exceeded) for site in of_run.sites),
    )
    assert "cells.dpia_advice.verdict" in where(report)


def verified(report: Report) -> Report:
    return replace(report, assumptions=tuple(replace(one, status="verified") for one in report.assumptions))


def test_nothing_can_be_called_verified_that_nobody_checks(of_run: Report, of_ledger: Report) -> None:
    both = {"one_record_is_one_unit", "units_at_one_site_only"}
    both |= {"noise_in_every_step", "poisson_sampling", "unpredictable_randomness", "clipping_exact"}
    for report, codes in (
        (of_run, both),
        (of_ledger, both | {"no_event_missing", "runs_fixed_beforehand", "ends_independent_of_releases"}),
    ):
        assert where(verified(report)) == {f"assumptions.{code}.status" for code in codes}


@pytest.mark.parametrize(
    "code", ["noise_in_every_step", "poisson_sampling", "unpredictable_randomness", "clipping_exact"]
)
def test_what_the_program_ensures_was_not_recomputed(code: str, of_run: Report, of_ledger: Report) -> None:
    for report in (of_run, of_ledger):
        one = tuple(replace(one, status="verified") if one.code == code else one for one in report.assumptions)
        assert where(replace(report, assumptions=one)) == {f"assumptions.{code}.status"}


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("noise_in_every_step", lambda site: {"mechanisms": (replace(site.mechanisms[0], noise_multiplier=0.0),)}),
        ("every_site_answered", lambda site: {"spent": replace(site.spent, upper_bound=True)}),
        ("receipts_signed", lambda site: {"source": "run_record"}),
        ("delta_below_one_over_size", lambda _: {"declared_size": 200_000}),
    ],
)
def test_a_status_follows_from_the_figures(code: str, change: Any, of_run: Report) -> None:
    one = Assumption(code="every_site_answered", status="verified", evidence="")
    report = replace(of_run, assumptions=(*of_run.assumptions, one))
    assert f"assumptions.{code}.status" not in where(report)
    assert f"assumptions.{code}.status" in where(with_site(report, **change(report.sites[0])))


def test_a_seed_is_predictable(of_run: Report) -> None:
    seeded = replace(of_run, seeded_noise=True, randomness="seeded")
    assert "assumptions.unpredictable_randomness.status" in where(seeded)


@pytest.mark.parametrize("code", ["configuration_unchanged", "receipts_signed", "accountants_agree"])
def test_what_the_figures_rest_on_being_violated_leaves_no_promise(code: str, of_run: Report) -> None:
    assumptions = tuple(replace(one, status="violated") if one.code == code else one for one in of_run.assumptions)
    report = replace(of_run, assumptions=assumptions)
    assert where(report) == {"verdict.state"}
    nothing = Verdict(state="no_guarantee", reasons=("configuration_changed",))
    cells = {name.split(".")[0] for name in where(replace(report, verdict=nothing))}
    assert "verdict" not in cells


def test_a_ledger_without_a_cap_or_a_check_is_not_within(
    site_policy: Callable[..., Policy], run_proposal: Any, tmp_path: Path
) -> None:
    without = Books.made(tmp_path / "a", site_policy(budget={"max_epsilon": float("inf")}))
    without.charge(run_proposal(), 1)
    assert "sites.a.verdict.state" in where(within(from_ledger.build(without.ledger)))
    without.edit(budget={"max_epsilon": 5.0})
    later = from_ledger.build(without.ledger)
    assert recompute.problems(later) == []
    broken = Books.made(tmp_path / "b", site_policy())
    broken.charge(run_proposal(), 1)
    broken.tamper("UPDATE replies SET reply = x'00'")
    report = from_ledger.build(broken.ledger)
    assert "sites.a.verdict.state" in where(within(report))
    assert "verdict.state" in where(within(report))


def test_a_charge_between_two_limits_of_which_the_first_was_none_is_found(a_ledger_report: Make) -> None:
    (site,) = a_ledger_report().sites
    first, second = site.steps
    caps = (Cap(time="2025-01-01T08:00:00+00:00", max_epsilon=None), Cap(time="2026-01-15T00:00:00", max_epsilon=6.0))
    assert first.time < caps[1].time < second.time
    report = with_site(a_ledger_report(), lifetime=replace(site.lifetime, caps=caps))
    assert where(report) == {"sites.north-hospital.verdict.state"}


def test_a_seeded_run_in_a_ledger_is_said_of_the_ledger(of_ledger: Report) -> None:
    (site,) = of_ledger.sites
    one, *others = site.lifetime.runs
    runs = (replace(one, seeded_noise=True), *others)
    assert where(with_site(of_ledger, lifetime=replace(site.lifetime, runs=runs))) == {"sites.a.lifetime.seeded"}
    ledger = with_site(of_ledger, lifetime=replace(site.lifetime, runs=runs, seeded=True))
    assert {"sites.a.lifetime.seeded", "sites.a.verdict.state"} <= where(ledger)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"randomness": "seeded"}, "randomness"),
        ({"neighbouring_relation": "replace_one"}, "neighbouring_relation"),
        ({"unit": "site"}, "unit"),
        ({"kind": "ledger"}, "kind"),
        ({"sites": (), "epsilon": 0.0}, "sites"),
    ],
)
def test_what_the_report_is_about_is_said_rightly(changes: Any, place: str, of_run: Report) -> None:
    assert place in where(replace(of_run, **changes))


def test_a_ledgers_report_is_no_runs(of_ledger: Report) -> None:
    assert "kind" in where(replace(of_ledger, kind="run", target_epsilon=50.0))


def test_a_site_stands_once(of_run: Report) -> None:
    assert "sites" in where(replace(of_run, sites=(*of_run.sites, of_run.sites[0])))


def test_what_left_was_charged(of_run: Report) -> None:
    (site, _) = of_run.sites
    more = tuple(replace(one, count=one.count + 7) for one in site.releases)
    assert where(with_site(of_run, releases=more)) == {"sites.site-1.spent.rounds"}


def test_a_period_holds_what_its_rounds_spent(of_ledger: Report, a_ledger_report: Make) -> None:
    for report in (of_ledger, a_ledger_report()):
        (site,) = report.sites
        place = f"sites.{site.site}.lifetime.period_epsilon"
        for less in (0.0, 0.01):
            assert place in where(with_site(report, lifetime=replace(site.lifetime, period_epsilon=less)))
    # By month, the second of two whole runs is the newest; what it spent before its last day is not known.
    made = a_ledger_report(date="2026-02-28", cells=())
    (site,) = made.sites
    place = f"sites.{site.site}.lifetime.period_epsilon"
    monthly = replace(site.lifetime, period="month", period_epsilon=0.0)
    assert place in where(with_site(made, lifetime=monthly))
    assert where(with_site(made, lifetime=replace(monthly, period_epsilon=1.5))) == {"cells"}


def test_a_rollback_is_excluded_by_an_anchor_at_the_end_only(of_ledger: Report) -> None:
    (site,) = of_ledger.sites
    claimed = replace(site.verification, rollback_excluded=True, anchor_sequence=3)
    assert "sites.a.verification.rollback_excluded" in where(with_site(of_ledger, verification=claimed))


def with_clipping(report: Report, *codes: str, status: Any = "assumed") -> Report:
    """The report with these assumptions about clipping in place of its own."""
    others = [one for one in report.assumptions if one.code not in rules.CLIPPING]
    stated = [Assumption(code=code, status=status, evidence="") for code in codes]
    return replace(report, assumptions=(*others, *stated))


def test_a_report_that_was_made_before_clipping_was_exact_stays_consistent(of_run: Report, of_ledger: Report) -> None:
    for report in (of_run, of_ledger):
        assert not where(with_clipping(report, "clipping_but_for_rounding"))
        both = with_clipping(report, *rules.CLIPPING)
        assert where(both) == {"assumptions"}
        measured = with_clipping(report, "clipping_but_for_rounding", status="verified")
        assert where(measured) == {"assumptions.clipping_but_for_rounding.status"}


def test_no_assumption_is_left_out_and_none_made_up(of_run: Report, of_ledger: Report) -> None:
    both = {
        "noise_in_every_step", "poisson_sampling", "unpredictable_randomness", "clipping_exact",
        "delta_below_one_over_size", "accountants_agree", "one_record_is_one_unit", "units_at_one_site_only",
    }  # fmt: skip
    optional = {"policy_noted"}
    for report, own in (
        (of_run, {"receipts_signed", "configuration_unchanged"}),
        (
            of_ledger,
            {
                "ledger_intact", "no_event_missing", "site_key_known", "order_fixed_beforehand", "cap_never_raised",
                "runs_fixed_beforehand", "ends_independent_of_releases",
            },
        ),
    ):  # fmt: skip
        assert {one.code for one in report.assumptions} - optional == both | own
        for code in both | own:
            left = tuple(one for one in report.assumptions if one.code != code)
            assert f"assumptions.{code}" in where(replace(report, assumptions=left))
        for code in ("every_record_names_its_person", "the_weather_is_fine"):
            more = (*report.assumptions, Assumption(code=code, status="assumed", evidence=""))
            assert where(replace(report, assumptions=more)) == {f"assumptions.{code}"}
        assert "assumptions" in where(replace(report, assumptions=(*report.assumptions, report.assumptions[0])))
    silent = with_site(of_run, spent=replace(of_run.sites[0].spent, upper_bound=True))
    assert "assumptions.every_site_answered" in where(silent)


def test_a_run_with_noise_has_a_target(of_run: Report, a_report_without_privacy: Make) -> None:
    assert where(replace(of_run, target_epsilon=None)) == {"target_epsilon"}
    assert "target_epsilon" not in where(a_report_without_privacy())


@pytest.mark.parametrize("site", ["site-1", None])
@pytest.mark.parametrize("exceeded", [True, False])
def test_an_audit_that_shows_more_leaves_no_promise(site: str | None, exceeded: bool, of_run: Report) -> None:
    bound = AuditBound(
        site=site, claimed_epsilon=0.4, lower_bound=0.5, best_possible=3.0, canaries=9, guesses=9, right=9
    )
    audit = Audit(
        method="gradient_canaries",
        confidence=0.95,
        delta=1e-5,
        seeded=False,
        exceeded=exceeded,
        bounds=(bound,),
        membership=(),
    )
    assert "sites.site-1.verdict.state" in where(replace(of_run, audit=audit))
    fine = replace(audit, exceeded=False, bounds=(counted(bound, right=5),))
    assert where(replace(of_run, audit=fine)) == set()


def counted(bound: AuditBound, **counts: int) -> AuditBound:
    """The bound with other counts, and the figures that they come to."""
    bound = replace(bound, **counts)
    m, r = bound.canaries, bound.guesses
    return replace(
        bound,
        lower_bound=one_run.epsilon_lower_bound(m, r, bound.right, delta=1e-5, confidence=0.95),
        best_possible=one_run.best_possible(m, guesses=r, delta=1e-5, confidence=0.95),
    )


def counted_bound(right: int) -> float:
    return one_run.epsilon_lower_bound(200, 200, right, delta=1e-5, confidence=0.95)


@pytest.fixture
def audited(of_run: Report) -> Report:
    """With an audit of 200 canaries at each site, most of which were guessed wrong."""
    bounds = tuple(
        counted(
            AuditBound(site=site.site, claimed_epsilon=site.spent.epsilon, lower_bound=0.0, best_possible=0.0,
                       canaries=200, guesses=200, right=101)
        )
        for site in of_run.sites
    )  # fmt: skip
    audit = Audit(method="gradient_canaries", confidence=0.95, delta=1e-5, seeded=False, exceeded=False, bounds=bounds,
                  membership=())  # fmt: skip
    return replace(of_run, audit=audit)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"lower_bound": 0.5}, {"audit.bounds.0.lower_bound"}),
        ({"best_possible": 9.0}, {"audit.bounds.0.best_possible"}),
        ({"claimed_epsilon": 8.0}, {"audit.bounds.0.claimed_epsilon"}),
        ({"claimed_epsilon": float("nan")}, {"audit.bounds.0.claimed_epsilon"}),
        ({"claimed_epsilon": float("inf")}, {"audit.bounds.0.claimed_epsilon"}),
        ({"lower_bound": float("nan")}, {"audit.bounds.0.lower_bound"}),
        # Counts that refute the claim are found although what is claimed is no number.
        (
            {"right": 200, "claimed_epsilon": float("nan"), "lower_bound": counted_bound(200)},
            {"audit.bounds.0.claimed_epsilon", "audit.exceeded", "sites.site-1.verdict.state"},
        ),
        ({"right": 201}, {"audit.bounds.0.right"}),
        ({"site": "site-2"}, {"audit.bounds"}),
        ({"site": "nowhere"}, {"audit.bounds"}),
        # Counts that refute the report's own epsilon, however small the bound and however large the claim beside them.
        (
            {"right": 200, "claimed_epsilon": 99.0},
            {"audit.bounds.0.claimed_epsilon", "audit.bounds.0.lower_bound", "audit.exceeded",
             "sites.site-1.verdict.state"},
        ),
    ],
)  # fmt: skip
def test_an_audits_bounds_are_computed_again(changes: Any, found: set[str], audited: Report) -> None:
    assert where(audited) == set()
    first, *others = audited.audit.bounds
    audit = replace(audited.audit, bounds=(replace(first, **changes), *others))
    assert where(replace(audited, audit=audit)) == found


@pytest.mark.parametrize(("key", "value"), [("delta", 1e-4), ("confidence", 0.5)])
def test_an_audit_at_another_delta_or_of_little_confidence_is_found(key: str, value: float, audited: Report) -> None:
    assert f"audit.{key}" in where(replace(audited, audit=replace(audited.audit, **{key: value})))


def test_one_bound_above_its_claim_by_chance_refutes_nothing_among_many(audited: Report) -> None:
    """By itself the bound is above its claim; of two bounds, it is asked for 97.5 % confidence."""
    epsilon = audited.sites[0].spent.epsilon
    first, second = audited.audit.bounds
    above = next(one for right in range(100, 200) if (one := counted(first, right=right)).lower_bound > epsilon)
    both = replace(audited, audit=replace(audited.audit, bounds=(above, second)))
    assert where(both) == set()
    alone = replace(audited, audit=replace(audited.audit, bounds=(above,)))
    assert where(alone) == {"sites.site-1.verdict.state", "audit.exceeded"}


def test_a_time_that_is_none_is_a_problem_and_no_crash(of_ledger: Report) -> None:
    (site,) = of_ledger.sites
    steps = tuple(replace(step, time="yesterday") for step in site.steps)
    assert "report" in where(with_site(of_ledger, steps=steps))


@pytest.mark.parametrize(
    ("pld", "rdp", "steps", "agree"),
    [(1.0, 1.5, 100, True), (1.0, 0.98, 100, False), (0.2065, 0.0769, 50_000, True), (2.0, 1.0, 50_000, False)],
)
def test_accountants_may_differ_by_the_width_of_their_buckets(pld: float, rdp: float, steps: int, agree: bool) -> None:
    spent = Spent(
        epsilon=pld,
        epsilon_pld=pld,
        epsilon_rdp=rdp,
        planned_epsilon=None,
        upper_bound=False,
        rounds=0,
        steps=steps,
    )
    assert profile.accountants_agree(spent, width=0.001) == agree


@pytest.mark.parametrize(
    ("covers", "released"),
    [
        (("noised_scores",), ("noised_scores_by_group",)),
        (("noised_scores", "noised_scores_by_group"), ("noised_scores", "noised_scores_by_group")),
        ((), ("noised_scores_by_group",)),
    ],
)
def test_a_run_s_scores_are_by_group_or_not_wherever_it_says_so(
    of_run: Report, covers: tuple[str, ...], released: tuple[str, ...]
) -> None:
    other = replace(of_run, covers=(*of_run.covers, *covers), released=(*of_run.released, *released))
    assert {"covers", "released"} <= {problem.where for problem in recompute.problems(other)}
