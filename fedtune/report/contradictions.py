"""What a report says in two places, and differently: found without computing any epsilon.

A report that nobody signed can be changed in one place and not in the others: a status, a cell, a verdict without what
it rests on.  Where everything was changed alike, only a signature tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

from fedtune.privacy import filter
from fedtune.privacy.accountant import NEIGHBOURING_RELATION
from fedtune.privacy.policy import period_of
from fedtune.report import assumptions, facts
from fedtune.report.audit_record import refutes
from fedtune.report.model import Report
from fedtune.report.site_model import Lifetime, SiteReport, Verification

_FOUNDATIONS = (
    "configuration_unchanged",
    "receipts_signed",
    "accountants_agree",
    "ledger_intact",
    "site_reports_agree",
)


class Problem(NamedTuple):
    """A figure that differs: where it stands, what the report says, and what was found."""

    where: str
    said: object
    found: object


def contradictions(report: Report) -> Iterator[Problem]:
    """Everything that one part of the report says and another denies."""
    yield from _identity(report)
    for site in report.sites:
        for where, said, found in _of_site(report, site):
            yield Problem(f"sites.{site.site}.{where}", said, found)
    yield from _cells(report)
    yield from _left_out(report)
    yield from _statuses(report)
    violated = {one.code for one in report.assumptions if one.status == "violated"}
    if report.verdict.state != "no_guarantee" and not violated.isdisjoint(_FOUNDATIONS):
        yield Problem("verdict.state", report.verdict.state, "no_guarantee")


def denied(report: Report, site: SiteReport) -> bool:
    """Whether the site's own fields leave it no verdict but "no guarantee"."""
    if report.audit is not None and refutes(report.audit, report.sites, site.site):
        return True
    spent, life = site.spent, site.lifetime
    if life is not None and (life.seeded or life.in_doubt):
        return True
    if spent is None or spent.epsilon == 0:
        return False
    if spent.epsilon is None or report.seeded_noise:
        return True
    if life is None:
        return False
    without_cap = site.approved is None or site.approved.max_epsilon is None or _spent_without_cap(site, life)
    return life.epsilon is None or without_cap or site.verification is None


def least_in_period(report: Report, site: SiteReport, life: Lifetime) -> float:
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


def _of_site(report: Report, site: SiteReport) -> Iterator[Problem]:
    updates = sum(release.count for release in site.releases if release.kind == "update")
    if site.spent and site.spent.rounds < updates:
        yield Problem("spent.rounds", site.spent.rounds, f"at least {updates}, which left the site")
    life, verified = site.lifetime, site.verification
    if life and not life.seeded and (seeded := [run.run for run in life.runs if run.seeded_noise]):
        yield Problem("lifetime.seeded", life.seeded, ", ".join(seeded))
    if life and site.source == "own_ledger":
        if life.seeded != report.seeded_noise:
            yield Problem("lifetime.seeded", life.seeded, report.seeded_noise)
        least = least_in_period(report, site, life)
        if life.period_epsilon is not None and life.period_epsilon < least - 1e-6 * max(1.0, least):
            yield Problem("lifetime.period_epsilon", life.period_epsilon, f"at least {least}")
    if verified and verified.rollback_excluded and verified.anchor_sequence != verified.num_events:
        yield Problem("verification.rollback_excluded", True, f"an anchor at entry {verified.anchor_sequence}")


def _spent_without_cap(site: SiteReport, life: Lifetime) -> bool:
    """Whether a ledger charged something on a day on which no limit over all runs was in force."""
    if site.source != "own_ledger":
        return False
    days = [step.time[:10] for step in site.steps if step.time]
    ends = [*(cap.time[:10] for cap in life.caps[1:]), "9999"]
    return any(
        cap.max_epsilon is None and cap.time[:10] < day < end
        for cap, end in zip(life.caps, ends, strict=True)
        for day in days
    )


def _cells(report: Report) -> Iterator[Problem]:
    """Facts for an assessment that the rest of the report says, too."""
    known = facts.figures(report.sites, delta=report.delta)
    known |= {"unit": report.unit}
    known |= facts.of_report(
        released=report.released,
        randomness=report.randomness,
        not_protected=report.not_protected,
        date=report.date,
    )
    if report.kind == "ledger":
        known |= _of_verification(report.sites[0].verification if report.sites else None)
    for cell in report.cells:
        for name, said in cell.facts.items():
            if said and name in known and said != known[name]:
                yield Problem(f"cells.{cell.code}.{name}", said, known[name])


def _of_verification(verified: Verification | None) -> dict[str, str | None]:
    known: dict[str, str | None] = {"ledger_verified": "no" if verified is None else "yes"}
    if verified is None or verified.rollback_excluded or verified.anchor_sequence is None:
        return known | {"rollback_excluded": "yes" if verified and verified.rollback_excluded else "no"}
    return known | {"rollback_excluded": "up_to_the_anchor"}


def _left_out(report: Report) -> Iterator[Problem]:
    """A target or an assumption that a report of its kind states, or one that it does not."""
    private = any(row.noise_multiplier > 0 for site in report.sites for row in site.mechanisms)
    if report.kind == "run" and private and report.target_epsilon is None:
        yield Problem("target_epsilon", None, "a number: what the run was given")
    stated, needed = [one.code for one in report.assumptions], set(_needed(report))
    known = _MAY_HOLD[report.kind] | {_OF_UNIT.get(report.unit, "")}
    for code in sorted(needed.difference(stated)):
        yield Problem(f"assumptions.{code}", None, "stated")
    for code in sorted(set(stated) - needed - known):
        yield Problem(f"assumptions.{code}", "stated", f"none of a {report.kind} by {report.unit}")
    if len(set(stated)) < len(stated) or set(assumptions.CLIPPING) <= set(stated):
        yield Problem("assumptions", ", ".join(stated), "each once, and one about clipping")


_MECHANISM = {
    "noise_in_every_step",
    "poisson_sampling",
    "unpredictable_randomness",
    *assumptions.CLIPPING,
    "accountants_agree",
}
_MAY_HOLD = {
    "run": _MECHANISM
    | {
        "every_site_answered",
        "end_independent_of_releases",
        "site_reports_agree",
        "site_reports_are_newest",
        "sites_run_their_own_software",
    },
    "ledger": _MECHANISM
    | {
        "no_event_missing",
        "site_key_known",
        "runs_fixed_beforehand",
        "ends_independent_of_releases",
        "policy_noted",
        "lost_events_made_up_for",
    },
}
_OF_UNIT = {"record": "one_record_is_one_unit", "user": "every_record_names_its_person"}


def _needed(report: Report) -> Iterator[str]:
    """The assumptions that a report's own figures say it has to state."""
    sites = report.sites
    yield from _MECHANISM - {"accountants_agree", *assumptions.CLIPPING}
    # One of the two; reports of earlier versions know the second alone.
    stated = {one.code for one in report.assumptions}
    yield from stated.intersection(assumptions.CLIPPING) or {"clipping_exact"}
    yield from (code for code, _, _ in assumptions.of_figures(report.delta, sites, unit=report.unit))
    if report.kind == "run":
        yield from ("receipts_signed", "configuration_unchanged")
        told = any(site.source == "signed_site_report" for site in sites)
        yield from ("site_reports_agree", "site_reports_are_newest") if told else ()
        if any(site.spent and site.spent.upper_bound for site in sites):
            yield "every_site_answered"
        return
    yield from ("ledger_intact", "order_fixed_beforehand", "cap_never_raised")
    if any(site.verification for site in sites):
        yield from ("no_event_missing", "site_key_known")
    runs = [run for site in sites if site.lifetime for run in site.lifetime.runs]
    if len(runs) > 1:
        yield "runs_fixed_beforehand"
    if any(0 < run.rounds < run.most_rounds for run in runs):
        yield "ends_independent_of_releases"
    if any(site.lifetime and site.lifetime.restored for site in sites):
        yield "lost_events_made_up_for"


def _statuses(report: Report) -> Iterator[Problem]:
    """Assumptions that are said to hold better than the rest of the report allows."""
    best = _best(report)
    unverified = any(site.source == "own_ledger" and site.verification is None for site in report.sites)
    for one in report.assumptions:
        most = best.get(one.code, "assumed" if unverified else "verified")
        order = assumptions.WORST_FIRST
        if order.index(one.status) > order.index(most):
            yield Problem(f"assumptions.{one.code}.status", one.status, most)


def _best(report: Report) -> Mapping[str, assumptions.Status]:
    """The best status that each assumption can have."""
    sites, order = report.sites, assumptions.WORST_FIRST
    mechanisms = [mechanism for site in sites for mechanism in site.mechanisms]
    lives = [site.lifetime for site in sites if site.lifetime and site.source == "own_ledger"]
    ledgers = [site.verification for site in sites if site.source == "own_ledger"]
    unheard = [site for site in sites if site.spent and site.spent.rounds and site.source in _WITHOUT_RECEIPT]
    limits: list[tuple[str, assumptions.Status, bool]] = [
        *((code, "assumed", True) for code in assumptions.NEVER_CHECKED),
        *((code, status, True) for code, status, _ in assumptions.of_figures(report.delta, sites, unit=report.unit)),
        ("noise_in_every_step", "violated", any(one.noise_multiplier == 0 for one in mechanisms)),
        ("clipping_exact", "violated", any(one.noise_multiplier == 0 for one in mechanisms)),
        (
            "clipping_exact",
            "assumed",
            report.kind == "run" and any(one.sampling_run != "poisson" for one in mechanisms),
        ),
        ("unpredictable_randomness", "violated", report.seeded_noise),
        ("poisson_sampling", "asserted", report.kind == "ledger"),
        (
            "poisson_sampling",
            "assumed",
            report.kind == "run" and any(one.sampling_run != "poisson" for one in mechanisms),
        ),
        ("ledger_intact", "violated", None in ledgers),
        ("no_event_missing", "assumed", not all(one and one.rollback_excluded for one in ledgers)),
        ("no_event_missing", "violated", any(life.in_doubt for life in lives)),
        ("site_key_known", "assumed", not all(one and one.key_expected for one in ledgers)),
        ("cap_never_raised", "violated", any(_was_raised(site) for site in sites)),
        ("every_site_answered", "violated", any(site.spent and site.spent.upper_bound for site in sites)),
        ("receipts_signed", "assumed", bool(unheard)),
    ]
    best: dict[str, assumptions.Status] = {}
    for code, status, is_so in limits:
        if is_so and order.index(status) < order.index(best.get(code, "verified")):
            best[code] = status
    return best


_WITHOUT_RECEIPT = ("run_record", "not_released")


def _was_raised(site: SiteReport) -> bool:
    """Whether a ledger's limit was raised on a day after its first charge."""
    days = [step.time[:10] for step in site.steps if step.time]
    if site.lifetime is None or site.source != "own_ledger" or not days:
        return False
    caps = [(cap.time[:10], cap.max_epsilon) for cap in site.lifetime.caps]
    return any(
        day > min(days) and before is not None and (after is None or after > before)
        for (_, before), (day, after) in pairwise(caps)
    )
