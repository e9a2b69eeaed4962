"""What a report's guarantee rests on, and how far each of these is known to hold.

"verified" names what checked it: a test of fedtune's, or a check made for this report.  "asserted" names who says so.
"assumed" is said by nobody, and "violated" is known not to hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from fedtune.report.derive import profile
from fedtune.report.derive.facts import LedgerFacts, RunFacts
from fedtune.report.model import Assumption, Lifetime, SiteReport, Verification

Status = Literal["violated", "assumed", "asserted", "verified"]
WORST_FIRST: tuple[Status, ...] = ("violated", "assumed", "asserted", "verified")

CODES = (
    "noise_in_every_step",
    "poisson_sampling",
    "unpredictable_randomness",
    "clipping_exact",
    "clipping_but_for_rounding",
    "delta_below_one_over_size",
    "accountants_agree",
    "one_record_is_one_unit",
    "every_record_names_its_person",
    "units_at_one_site_only",
    # Of a run.
    "receipts_signed",
    "every_site_answered",
    "end_independent_of_releases",
    "configuration_unchanged",
    "site_reports_agree",
    "site_reports_are_newest",
    "sites_run_their_own_software",
    # Of a ledger.
    "ledger_intact",
    "no_event_missing",
    "site_key_known",
    "order_fixed_beforehand",
    "cap_never_raised",
    "runs_fixed_beforehand",
    "ends_independent_of_releases",
    "policy_noted",
    "lost_events_made_up_for",
)

CLIPPING = ("clipping_exact", "clipping_but_for_rounding")
"""A report states one of these.  The second is for machines that a site accepts although they round a record by its
neighbours, and for all reports made before there was the first."""

FOUNDATIONS = (
    "configuration_unchanged",
    "receipts_signed",
    "accountants_agree",
    "ledger_intact",
    "site_reports_agree",
)
"""Where one of these is violated, nothing is promised."""

_Found = tuple[str, Status, str]
_EXACT = "allow.inexact_gradients=false; tests/training/test_preflight.py; docs/guarantee.md"
_MOST_NAMED = 5  # runs; report.json lists all of them


def ordered(found: Iterable[_Found]) -> tuple[Assumption, ...]:
    """As a report states them: violated ones first."""
    made = [Assumption(code=code, status=status, evidence=evidence) for code, status, evidence in found]
    return tuple(sorted(made, key=lambda assumption: WORST_FIRST.index(assumption.status)))


def of_run(facts: RunFacts, sites: Sequence[SiteReport]) -> Iterator[_Found]:
    """Those of a run, as its lead knows them: code, status, evidence."""
    yield from _of_mechanism(facts, sites)
    yield from _of_figures(sites, delta=facts.delta, unit=facts.unit)
    yield _receipts(facts, sites)
    if silent := [site.site for site in sites if site.spent and site.spent.upper_bound]:
        yield "every_site_answered", "violated", _named(silent)
    if not facts.finished:
        yield "end_independent_of_releases", "assumed", facts.progress
    yield "configuration_unchanged", "verified" if facts.unchanged else "violated", f"config.yaml: {facts.digest}"
    if said := [site for site in sites if site.source == "signed_site_report"]:
        disagree = [site.site for site in said if "site_report_disagrees" in site.verdict.reasons]
        status: Status = "violated" if disagree else "verified"
        yield "site_reports_agree", status, _named(disagree or [site.site for site in said])
        # A lead may keep a newer one back; the site alone knows.
        yield "site_reports_are_newest", "assumed", _named(f"{site.site}: {site.reported}" for site in said)
    if facts.deployed:
        yield "sites_run_their_own_software", "assumed", "tests/deployment"


def of_ledger(facts: LedgerFacts, site: SiteReport) -> Iterator[_Found]:
    """Those of a ledger; one that does not fit together shows nothing, not even what its site asserts."""
    for code, status, evidence in _of_ledger(facts, site):
        fits = site.verification is not None or status == "violated"
        yield code, status if fits else "assumed", evidence


def _of_mechanism(facts: RunFacts, sites: Sequence[SiteReport]) -> Iterator[_Found]:
    """What a simulation's own process knows, and of real sites only those that signed a report."""
    said = [site.site for site in sites if site.source == "signed_site_report"]
    by_sites: tuple[Status, str] = (
        "asserted" if len(said) == len(sites) else "assumed",
        _named(said) or "the sites' fedtune",
    )
    if not facts.private:
        yield "noise_in_every_step", "violated", "privacy.mechanism=none"
    elif facts.sampling:
        yield "noise_in_every_step", "verified", "environment.json; tests/training/test_dp_step.py"
    else:
        yield "noise_in_every_step", *by_sites
    sampled = {row.sampling_run for site in sites for row in site.mechanisms}
    if facts.sampling == "poisson" and sampled <= {"poisson"}:
        yield "poisson_sampling", "verified", "environment.json; tests/training/test_dp_step.py"
    elif sampled == {"poisson"}:
        yield "poisson_sampling", "asserted", _named(said)
    else:
        yield "poisson_sampling", "assumed", "the sites' fedtune"
    if facts.seeded:
        yield "unpredictable_randomness", "violated", "runtime.seeded_noise=true"
    elif facts.randomness:
        yield "unpredictable_randomness", "verified", "environment.json; tests/privacy/test_randomness.py"
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
    return "clipping_exact", "verified", _EXACT


def _of_figures(sites: Sequence[SiteReport], *, delta: float, unit: str) -> Iterator[_Found]:
    """What the sites' figures themselves say."""
    largest = max((site.declared_size or 0 for site in sites), default=0)
    compared = f"delta={delta:g}; declared_size={largest}"
    yield "delta_below_one_over_size", "verified" if delta * largest < 1 else "violated", compared
    spent = [(site.source, site.spent) for site in sites if site.spent]
    if any(one.epsilon_pld and one.epsilon_rdp for _, one in spent):
        agree = all(profile.accountants_agree(one, width=profile.interval_of(source)) for source, one in spent)
        yield "accountants_agree", "verified" if agree else "violated", "PLD <= RDP; tests/privacy/test_accountant.py"
    if unit == "record":
        yield "one_record_is_one_unit", "assumed", "unit=record"
    else:
        yield "every_record_names_its_person", "assumed", "unit=user; docs/user_level.md"
    said = {site.site: site.asserted.get("no_person_at_another_site") for site in sites}
    denied = [site for site, answer in said.items() if answer is False]
    silent = [site for site, answer in said.items() if answer is None]
    status: Status = "violated" if denied else "assumed" if silent else "asserted"
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
    by_site, life = f"{site.site}: {facts.versions}", site.lifetime
    without = [row.run for row in site.mechanisms if row.noise_multiplier == 0]
    noise: tuple[Status, str] = (
        ("violated", _named(without)) if without else ("verified", "tests/training/test_dp_step.py")
    )
    yield "noise_in_every_step", *noise
    yield "poisson_sampling", "asserted", by_site
    if life and life.seeded:
        seeded = [run.run for run in life.runs if run.seeded_noise]
        yield "unpredictable_randomness", "violated", _named(seeded)
    else:
        yield "unpredictable_randomness", "asserted", by_site
    if without:
        yield "clipping_exact", "violated", _named(without)
    elif facts.inexact == "false":
        yield "clipping_exact", "verified", _EXACT
    else:
        evidence = f"allow.inexact_gradients: {facts.inexact}; docs/guarantee.md"
        yield "clipping_but_for_rounding", "assumed", evidence
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
