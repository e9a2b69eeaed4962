"""What follows from facts and sites: a report's assumptions, and the whole of it; and where a report denies itself.

Its builders call these rules; `report verify` calls them again with a report's own facts.  An assumption is "verified"
where it was computed or compared again for the report, "ensured" where the program does it in every run (by the version
and the test named), "asserted" where somebody states it, "assumed" where nobody does; "violated" is known not to hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from fedtune.privacy import filter
from fedtune.privacy.accountant import NEIGHBOURING_RELATION
from fedtune.privacy.release import METRICS
from fedtune.privacy.site_policy import period_of
from fedtune.report.audit_findings import Audit
from fedtune.report.derive import cells, profile, reliance, verdicts
from fedtune.report.derive.facts import NOT_RECORDED, LedgerFacts, RunFacts, updates_of
from fedtune.report.model import Assumption, Lifetime, Problem, Report, SiteReport, Utility, Verification
from fedtune.spec import REPORT_SCHEMA

LEAVES_OUT = (
    "other_runs",
    "tuning_trials",
    "other_ledgers",
    "lead_evaluation",
    "preprocessing",
    "pretraining_data",
    "unreleased_statistics",
    "refusals_and_receipts",
    "side_channels",
)
"""What the epsilon of a report does not add up."""
NOT_PROTECTED = (
    "facts_about_people_in_general",
    "outside_training",
    "several_records",
    "several_sites",
    "reply_time_and_absence",
    "public_choices",
    "ledger_length",
    "lead_files",
    "pretraining_data",
    "site_administrator",
    "model_against_malicious_sites",
)
UNPROTECTED_FIGURES = (
    "scores_on_lead_files",
    "declared_sizes",
    "times",
    "bytes",
    "who_took_part",
    "attack_on_real_records",
    "counts_of_events",
)
"""Exact figures of a report that no noise covers."""
_NOT_OF_A_LEDGER = {
    "other_runs",
    "tuning_trials",
    "lead_evaluation",
    "lead_files",
    "model_against_malicious_sites",
    "scores_on_lead_files",
    "bytes",
    "who_took_part",
}
_Status = Literal["violated", "assumed", "asserted", "ensured", "verified"]
_WORST_FIRST: tuple[_Status, ...] = ("violated", "assumed", "asserted", "ensured", "verified")
CLIPPING = ("clipping_exact", "clipping_but_for_rounding")
"""A report states one of these.  The second is for machines that a site accepts although they round a record by its
neighbours."""

FOUNDATIONS = (
    "configuration_unchanged",
    "receipts_signed",
    "accountants_agree",
    "ledger_intact",
    "site_reports_agree",
)
"""Where one of these is violated, nothing is promised."""

_Found = tuple[str, _Status, str]
_SAMPLED = "tests/training/test_dp_step.py"
_UNPREDICTABLE = "tests/privacy/test_randomness.py"
_EXACT = "tests/training/test_preflight.py; allow.inexact_gradients=false; docs/guarantee.md"
_MOST_NAMED = 5  # runs; report.json lists all of them


def report_of(
    facts: RunFacts | LedgerFacts,
    sites: tuple[SiteReport, ...],
    *,
    known: Mapping[str, str | None],
    utility: Utility | None = None,
    audit: Audit | None = None,
) -> Report:
    """The report of a run or a ledger.

    Args:
        facts: of its record.
        sites: judged.
        known: facts of its cells that do not follow from the rest of the report.
        utility: of a run.
        audit: of a run, where there was one.
    """
    of_run = isinstance(facts, RunFacts)
    assert facts.provenance is not None, "facts of a record"
    report = Report(
        kind="run" if of_run else "ledger",
        name=facts.name,
        date=facts.date,
        verdict=verdicts.worst(site.verdict for site in sites),
        unit=facts.unit,
        neighbouring_relation=NEIGHBOURING_RELATION.name.lower(),
        delta=facts.delta,
        epsilon=profile.largest(profile.claimed(site.spent) if site.spent else None for site in sites),
        target_epsilon=facts.target if isinstance(facts, RunFacts) else None,
        seeded_noise=facts.seeded,
        randomness=_randomness(facts, sites),
        released=facts.released,
        sites=sites,
        covers=facts.covers,
        **_fixed_codes(of_run=of_run, unit=facts.unit, sites=sites, audit=audit),
        assumptions=assumptions(facts, sites),
        cells=(),
        provenance=facts.provenance,
        utility=utility,
        audit=audit,
        schema_version=REPORT_SCHEMA,
    )
    return replace(report, cells=cells.rows({**known, **cells.of_report(report)}))


def _fixed_codes(*, of_run: bool, unit: str, sites: Sequence[SiteReport], audit: Audit | None) -> dict[str, Any]:
    """What every report of its kind says: what its epsilon leaves out, who is not protected, what has no noise."""
    others = set() if of_run else _NOT_OF_A_LEDGER
    return {
        "leaves_out": _of_kind(LEAVES_OUT, {"other_ledgers"} if of_run else _NOT_OF_A_LEDGER),
        # By user, a person's records are protected as a whole.
        "not_protected": _of_kind(NOT_PROTECTED, others | (set() if unit == "record" else {"several_records"})),
        "unprotected_figures": _of_kind(
            UNPROTECTED_FIGURES, _not_in(sites, audit) if of_run else others | {"attack_on_real_records"}
        ),
    }


def _code_problems(report: Report) -> Iterator[Problem]:
    """Codes that every report of its kind holds and this one lacks, and codes that none holds."""
    of_run = report.kind == "run"
    fixed = _fixed_codes(of_run=of_run, unit=report.unit, sites=report.sites, audit=report.audit)
    for key, codes in fixed.items():
        if getattr(report, key) != codes:
            yield Problem(key, ", ".join(getattr(report, key)), ", ".join(codes))
    scored = any(row.metrics_noise_multiplier > 0 for site in report.sites for row in site.mechanisms)
    restored = any(site.lifetime.restored for site in report.sites if site.lifetime and not of_run)
    covers = {"rounds_and_steps", "charged_retries", *(() if of_run else ("all_runs", "tuning_trials"))}
    covers |= {"lost_branches"} if restored else set()
    sent, most_sent = updates_of(report)
    released = {"refusals_and_receipts", *sent, *(("aggregates",) if of_run else ())}
    noised = {known.name for known in METRICS.values() if known.name}
    of_scores = noised & set(report.covers)
    told = of_scores == noised & set(report.released) and scored <= len(of_scores) <= (1 if of_run else len(noised))
    for key, least, most in (
        ("covers", covers, covers | noised),
        ("released", released, released | noised | most_sent | ({"final_adapter"} if of_run else set())),
    ):
        stated = getattr(report, key)
        if len(set(stated)) < len(stated) or not least <= set(stated) <= most or not told:
            yield Problem(key, ", ".join(stated), ", ".join(sorted(least | (noised if scored else set()))))


def _cell_problems(report: Report) -> Iterator[Problem]:
    """Facts in cells that the rest of the report denies; else cells that are missing, moved or more than they were."""
    names = {name for row in cells.ROWS for name in row.facts}
    stated = {name: value for cell in report.cells for name, value in cell.facts.items() if value and name in names}
    derived = {**cells.of_provenance(report), **cells.of_report(report)}
    denied = [
        Problem(f"cells.{cell.code}.{name}", value, derived[name])
        for cell in report.cells
        for name, value in cell.facts.items()
        if value and name in derived and value != derived[name]
    ]
    if not denied and report.cells != cells.rows({**stated, **derived}):
        denied = [Problem("cells", f"{len(report.cells)} cells", "each cell of every report, with all of its facts")]
    yield from denied


def _of_kind(codes: Sequence[str], without: set[str]) -> tuple[str, ...]:
    return tuple(code for code in codes if code not in without)


def _not_in(sites: Sequence[SiteReport], audit: Audit | None) -> set[str]:
    """Exact figures that a run's report has not: of an attack on records trained on, and a joined site's entries."""
    attacked = audit is not None and bool(audit.membership)
    counted = any(site.verification for site in sites)
    return {code for code, there in (("attack_on_real_records", attacked), ("counts_of_events", counted)) if not there}


def _randomness(facts: RunFacts | LedgerFacts, sites: Sequence[SiteReport]) -> str:
    """Where noise and samples came from, as far as somebody who knows has said so."""
    if isinstance(facts, LedgerFacts):
        return facts.randomness
    if not facts.private:
        return "none"
    if facts.seeded:
        return "seeded"
    # A site that signed its ledger's report runs fedtune, which draws from the operating system unless it is seeded.
    if facts.randomness is None and all(site.source == "signed_site_report" for site in sites):
        return "operating_system"
    return facts.randomness or NOT_RECORDED


def assumptions(facts: RunFacts | LedgerFacts, sites: Sequence[SiteReport]) -> tuple[Assumption, ...]:
    """What the guarantee rests on, the violated ones first."""
    if isinstance(facts, RunFacts):
        found = _assumptions_of_run(facts, sites)
    else:
        found = _assumptions_of_ledger(facts, sites[0])
    made = [Assumption(code=code, status=status, evidence=evidence) for code, status, evidence in found]
    return tuple(sorted(made, key=lambda assumption: _WORST_FIRST.index(assumption.status)))


def _assumptions_again(report: Report) -> tuple[Assumption, ...]:
    if report.kind == "run":
        return assumptions(RunFacts.of_report(report), report.sites)
    return assumptions(LedgerFacts.of_report(report, report.sites[0]), report.sites) if report.sites else ()


def _assumptions_of_run(facts: RunFacts, sites: Sequence[SiteReport]) -> Iterator[_Found]:
    """Those of a run, as its lead knows them: code, status, evidence."""
    yield from _of_mechanism(facts, sites)
    yield from _of_figures(sites, delta=facts.delta, unit=facts.unit)
    yield _receipts(facts, sites)
    if silent := [site.site for site in sites if site.spent and site.spent.upper_bound]:
        yield "every_site_answered", "violated", _named(silent)
    if not facts.finished:
        yield "end_independent_of_releases", "assumed", facts.progress
    if kept := facts.kept:
        evidence = f"{kept.judged_by}, round {kept.round}; {facts.progress}"
        yield "chosen_by_the_leads_own_records", "assumed", evidence
    yield "configuration_unchanged", "verified" if facts.unchanged else "violated", f"config.yaml: {facts.digest}"
    if said := [site for site in sites if site.source == "signed_site_report"]:
        disagree = [site.site for site in said if "site_report_disagrees" in site.verdict.reasons]
        status: _Status = "violated" if disagree else "verified"
        yield "site_reports_agree", status, _named(disagree or [site.site for site in said])
        # A lead may keep a newer one back; the site alone knows.
        yield "site_reports_are_newest", "assumed", _named(f"{site.site}: {site.reported}" for site in said)
    if facts.deployed:
        yield "sites_run_their_own_software", "assumed", "tests/deployment"


def _assumptions_of_ledger(facts: LedgerFacts, site: SiteReport) -> Iterator[_Found]:
    """Those of a ledger; one that does not fit together shows nothing, not even what its site asserts."""
    for code, status, evidence in _of_ledger(facts, site):
        fits = site.verification is not None or status == "violated"
        yield code, status if fits else "assumed", evidence


def _of_mechanism(facts: RunFacts, sites: Sequence[SiteReport]) -> Iterator[_Found]:
    """What a simulation's own process knows, and of real sites only those that signed a report."""
    said = [site.site for site in sites if site.source == "signed_site_report"]
    by_sites: tuple[_Status, str] = (
        "asserted" if len(said) == len(sites) else "assumed",
        _named(said) or "the sites' fedtune",
    )
    if not facts.private:
        yield "noise_in_every_step", "violated", "privacy.mechanism=none"
    elif facts.sampling:
        yield "noise_in_every_step", "ensured", f"{facts.program}: {_SAMPLED}; environment.json"
    else:
        yield "noise_in_every_step", *by_sites
    sampled = {row.sampling_run for site in sites for row in site.mechanisms}
    if facts.sampling == "poisson" and sampled <= {"poisson"}:
        yield "poisson_sampling", "ensured", f"{facts.program}: {_SAMPLED}; environment.json"
    elif sampled == {"poisson"}:
        yield "poisson_sampling", "asserted", _named(said)
    else:
        yield "poisson_sampling", "assumed", "the sites' fedtune"
    if facts.seeded:
        yield "unpredictable_randomness", "violated", "runtime.seeded_noise=true"
    elif not facts.private:
        pass  # there is no noise to say this of
    elif facts.randomness:
        yield "unpredictable_randomness", "ensured", f"{facts.program}: {_UNPREDICTABLE}; environment.json"
    else:
        yield "unpredictable_randomness", *by_sites
    yield _clipping(facts)


def _clipping(facts: RunFacts) -> _Found:
    """Whether the bound on one unit was exact, by the policies of simulated sites; real ones keep theirs."""
    if facts.inexact:
        return "clipping_but_for_rounding", "assumed", "allow.inexact_gradients=true; docs/guarantee.md"
    if not facts.private:
        return "clipping_exact", "violated", "privacy.mechanism=none"
    if facts.inexact is None or not facts.sampling:
        return "clipping_exact", "assumed", "allow.inexact_gradients; docs/guarantee.md"
    return "clipping_exact", "ensured", f"{facts.program}: {_EXACT}"


def _of_figures(sites: Sequence[SiteReport], *, delta: float, unit: str) -> Iterator[_Found]:
    """What the sites' figures themselves say."""
    largest = max((site.declared_size or 0 for site in sites), default=0)
    compared = f"delta={delta:g}; declared_size={largest}"
    yield "delta_below_one_over_size", "verified" if delta * largest < 1 else "violated", compared
    spent = [(site.source, site.spent) for site in sites if site.spent]
    if any(one.epsilon_pld and one.epsilon_rdp for _, one in spent):
        agree = all(profile.accountants_agree(one, width=profile.interval_of(source)) for source, one in spent)
        yield "accountants_agree", "verified" if agree else "violated", "PLD <= RDP"
    if shared := [row.shared for site in sites for row in site.mechanisms if row.shared]:
        honest = sorted({f"{one.threshold - one.colluders} of {one.num_sites}" for one in shared})
        yield "enough_sites_keep_their_noise", "assumed", ", ".join(honest)
    if unit == "record":
        yield "one_record_is_one_unit", "assumed", "unit=record"
    else:
        yield "every_record_names_its_person", "assumed", "unit=user; docs/user_level.md"
    said = {site.site: site.asserted.get("no_person_at_another_site") for site in sites}
    denied = [site for site, answer in said.items() if answer is False]
    silent = [site for site, answer in said.items() if answer is None]
    status: _Status = "violated" if denied else "assumed" if silent else "asserted"
    yield "units_at_one_site_only", status, _named(denied or silent or said)


def _receipts(facts: RunFacts, sites: Sequence[SiteReport]) -> _Found:
    """Of each site that was charged, whether the lead holds its signed word."""
    code, sources = "receipts_signed", {site.source for site in sites}
    if facts.doubtful:
        return code, "violated", _named(facts.doubtful)
    if "run_record" in sources:
        return code, "assumed", "run.json"
    if without := [one.site for one in sites if one.source == "not_released" and one.spent and one.spent.rounds]:
        return code, "assumed", _named(without)
    return code, "verified", _named(f"{site} {key}" for site, key in facts.keys)


def _of_ledger(facts: LedgerFacts, site: SiteReport) -> Iterator[_Found]:
    program, life = facts.versions, site.lifetime
    without = [row.run for row in site.mechanisms if row.noise_multiplier == 0]
    noise: tuple[_Status, str] = ("violated", _named(without)) if without else ("ensured", f"{program}: {_SAMPLED}")
    yield "noise_in_every_step", *noise
    yield "poisson_sampling", "ensured", f"{program}: {_SAMPLED}"
    if life and life.seeded:
        seeded = [run.run for run in life.runs if run.seeded_noise]
        yield "unpredictable_randomness", "violated", _named(seeded)
    elif not site.mechanisms or any(row.noise_multiplier > 0 for row in site.mechanisms):
        yield "unpredictable_randomness", "ensured", f"{program}: {_UNPREDICTABLE}"
    if without:
        yield "clipping_exact", "violated", _named(without)
    elif facts.inexact:
        yield "clipping_but_for_rounding", "assumed", "allow.inexact_gradients: true; docs/guarantee.md"
    else:
        yield "clipping_exact", "ensured", f"{program}: {_EXACT}"
    yield from _of_figures([site], delta=facts.delta, unit=facts.unit)
    yield from _of_file(facts, site.verification, in_doubt=bool(life and life.in_doubt))
    if life:
        yield from _of_history(facts, life)


def _of_file(facts: LedgerFacts, found: Verification | None, *, in_doubt: bool) -> Iterator[_Found]:
    if found is None:
        yield "ledger_intact", "violated", facts.problem
        return
    yield "ledger_intact", "verified", f"{found.num_events}: {found.head}"
    yield (
        "no_event_missing",
        "violated" if in_doubt else "verified" if found.rollback_excluded else "assumed",
        "anchor: none" if found.anchor_sequence is None else f"anchor: {found.anchor_sequence} / {found.num_events}",
    )
    yield "site_key_known", "verified" if found.key_expected else "assumed", found.site_key


def _of_history(facts: LedgerFacts, life: Lifetime) -> Iterator[_Found]:
    yield "order_fixed_beforehand", "verified", f"1: {life.order:g}"
    caps = _named(f"{cap.time[:10]}: {cap.max_epsilon}" for cap in life.caps)
    yield "cap_never_raised", "violated" if facts.cap_raised else "verified", caps
    if len(life.runs) > 1:
        yield "runs_fixed_beforehand", "assumed", "PLD, RDP"
    if early := [run for run in life.runs if 0 < run.rounds < run.most_rounds]:
        parts = _named(f"{run.run}: {run.rounds} / {run.most_rounds}" for run in early[:_MOST_NAMED])
        yield "ends_independent_of_releases", "assumed", parts + (", …" if len(early) > _MOST_NAMED else "")
    if facts.policy_noted is not None:
        yield "policy_noted", "verified" if facts.policy_noted else "violated", facts.policy_digest
    if life.restored:
        yield "lost_events_made_up_for", "verified", facts.restored


def _named(names: Iterable[str]) -> str:
    return ", ".join(names)


def contradictions(report: Report) -> Iterator[Problem]:
    """What one part of the report says and another denies: found without computing any epsilon."""
    yield from _identity(report)
    yield from reliance.contradictions(report)
    for site in report.sites:
        for where, said, found in _between_parts(report, site):
            yield Problem(f"sites.{site.site}.{where}", said, found)
    asked = (
        {name for cost in report.utility.rounds for name in (*cost.sites, *cost.failed_sites)} if report.utility else {}
    )
    for name in sorted(set(asked) - {site.site for site in report.sites}):
        yield Problem("sites", ", ".join(site.site for site in report.sites), f"{name}, which was asked, too")
    yield from _code_problems(report)
    yield from _cell_problems(report)
    private = any(row.noise_multiplier > 0 for site in report.sites for row in site.mechanisms)
    if report.kind == "run" and private and report.target_epsilon is None:
        yield Problem("target_epsilon", None, "a number: what the run was given")
    yield from _assumption_problems(report)
    simulated = "simulation" in report.banners
    of_real_sites = any(one.code == "sites_run_their_own_software" for one in report.assumptions)
    if report.kind == "run" and simulated == of_real_sites:
        yield Problem("cells.dpia_description.runtime", simulated, not simulated)


def _assumption_problems(report: Report) -> Iterator[Problem]:
    """Assumptions that the report's own facts ask for, do not know, or do not bear out as well as it says."""
    derived = {one.code: one.status for one in _assumptions_again(report)}
    stated = [one.code for one in report.assumptions]
    for code in sorted(derived.keys() - set(stated)):
        yield Problem(f"assumptions.{code}", None, "stated")
    for code in sorted(set(stated) - derived.keys() - set(CLIPPING)):
        yield Problem(f"assumptions.{code}", "stated", f"none of a {report.kind} by {report.unit}")
    if len(set(stated)) < len(stated) or set(CLIPPING) <= set(stated):
        yield Problem("assumptions", ", ".join(stated), "each once, and one about clipping")
    for one in report.assumptions:
        best = derived.get(one.code, one.status)
        if _WORST_FIRST.index(one.status) > _WORST_FIRST.index(best):
            yield Problem(f"assumptions.{one.code}.status", one.status, best)
    violated = {one.code for one in report.assumptions if one.status == "violated"}
    if report.verdict.state != "no_guarantee" and not violated.isdisjoint(FOUNDATIONS):
        yield Problem("verdict.state", report.verdict.state, "no_guarantee")


def _least_in_period(report: Report, site: SiteReport, life: Lifetime) -> float:
    """What was spent in the calendar period of a ledger's newest entry, at the least, as far as its steps tell."""
    dated = [(period_of(datetime.fromisoformat(step.time), life.period), step) for step in site.steps if step.time]
    if not dated or report.date is None or life.epsilon is None:
        return 0.0
    now = period_of(datetime.fromisoformat(report.date), life.period)
    first = next((place for place, (period, _) in enumerate(dated) if period == now), None)
    if first is None:
        return 0.0
    # The step of a whole run stands where the run ended: it may have begun in the period before.
    before = first if dated[first][1].round is None else first - 1
    if before < 0:
        return life.epsilon
    spent_before = dated[before][1].epsilon
    return 0.0 if spent_before is None else life.epsilon - spent_before + filter.surcharge(life.order, report.delta)


def _identity(report: Report) -> Iterator[Problem]:
    names = [site.site for site in report.sites]
    if not names or len(set(names)) < len(names):
        yield Problem("sites", ", ".join(names), "at least one site, and each once")
    if report.kind == "ledger" and [site.source for site in report.sites] != ["own_ledger"]:
        yield Problem("kind", report.kind, "run")
    if report.kind == "run" and any(site.source == "own_ledger" for site in report.sites):
        yield Problem("kind", report.kind, "ledger")
    if report.unit not in ("record", "user"):
        yield Problem("unit", report.unit, "record or user")
    if report.unit == "record" and any(row.records_per_user != 1 for site in report.sites for row in site.mechanisms):
        yield Problem("mechanisms.records_per_user", "several", "1, where the unit is a record")
    if report.neighbouring_relation != (relation := NEIGHBOURING_RELATION.name.lower()):
        yield Problem("neighbouring_relation", report.neighbouring_relation, relation)
    seeded = report.randomness == "seeded" if report.randomness != "none" else report.seeded_noise
    if report.seeded_noise != seeded:
        yield Problem("randomness", report.randomness, f"seeded_noise is {report.seeded_noise}".lower())


def _between_parts(report: Report, site: SiteReport) -> Iterator[Problem]:
    updates = sum(release.count for release in site.releases if release.kind == "update")
    if site.spent and site.spent.rounds < updates:
        yield Problem("spent.rounds", site.spent.rounds, f"at least {updates}, which left the site")
    life, verified = site.lifetime, site.verification
    if life and not life.seeded and (seeded := [run.run for run in life.runs if run.seeded_noise]):
        yield Problem("lifetime.seeded", life.seeded, ", ".join(seeded))
    if life and site.source == "own_ledger":
        if life.seeded != report.seeded_noise:
            yield Problem("lifetime.seeded", life.seeded, report.seeded_noise)
        least = _least_in_period(report, site, life)
        if life.period_epsilon is not None and life.period_epsilon < least - 1e-6 * max(1.0, least):
            yield Problem("lifetime.period_epsilon", life.period_epsilon, f"at least {least}")
    if verified and verified.rollback_excluded and verified.anchor_sequence != verified.num_events:
        yield Problem("verification.rollback_excluded", True, f"an anchor at entry {verified.anchor_sequence}")
