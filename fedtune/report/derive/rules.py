"""The rules that derive a report from its source data and its sites: assumptions, codes, and the report as a whole.

The status of an assumption is "verified" if it was checked for the report; "ensured" if the program enforces it in
every run (the evidence names the version and the test); "asserted" if a site states it; "assumed" if no site does;
"violated" if it is known not to hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from fedtune.federation.secure.agreement import MAX_SITES_OF_SUM
from fedtune.formatting import format_key_start
from fedtune.privacy.accountant import NEIGHBORING_RELATION
from fedtune.privacy.events import Spent
from fedtune.privacy.own_release import CHARGED_ONLY
from fedtune.report.derive import profile, verdicts
from fedtune.report.derive.verdicts import CODES
from fedtune.report.facts import NOT_RECORDED, Facts, LedgerFacts, RunFacts
from fedtune.report.model import Assumption, Mechanism, Report, SiteReport, Status, Utility
from fedtune.show.budget_text import ArrivalRange
from fedtune.spec import REPORT_SCHEMA

_WORST_FIRST = get_args(Status)
_Found = tuple[str, Status, str]
_SAMPLED = "tests/training/test_dp_step.py"
_UNPREDICTABLE = "tests/privacy/test_randomness.py"
_EXACT = "tests/training/test_batch_invariance.py; allow.inexact_gradients=false; docs/guarantee.md"
# whether secure aggregation masks a site's updates -> their code
_UPDATES = {False: "updates", True: "masked_updates"}
_MAX_NAMED = 5  # runs named in the evidence; report.json lists all runs


def assemble_report(facts: Facts, sites: tuple[SiteReport, ...], *, utility: Utility | None = None) -> Report:
    """Build the report of a run or a ledger without its cells; `sites` already have their verdicts."""
    if isinstance(facts, RunFacts):
        scores = ["noised_scores"] if facts.plan.releases_metrics else []
        released = [_UPDATES[facts.plan.shared is not None], *scores, "aggregates", "refusals_and_receipts"]
        released += ["final_adapter"] if facts.finished else []
        covers, cohorts = list[str](), facts.plan.cohorts
        admits = ArrivalRange.from_cohort(cohorts.span[0], cohorts.span[1] + 1, cohorts.period) if cohorts else None
        randomness = facts.randomness or NOT_RECORDED
        # A site that signed a ledger report runs fedtune, which uses the operating system's generator unless seeded.
        if facts.randomness is None and all(site.statement for site in facts.sites):
            randomness = "operating_system"
        if facts.seeded_noise or not facts.plan.private:
            randomness = "seeded" if facts.plan.private else "none"
        # These figures require an attack on training records, or a site's verified ledger report.
        on_records = facts.attacks or (facts.audit and facts.audit.membership)
        without = {"other_ledgers"} | (set() if on_records else {"attack_on_real_records"})
        joined = any(one.statement and one.statement.verification for one in facts.sites)
        without |= set() if joined else {"counts_of_events"}
    else:
        scores = ["noised_scores"] if any(run.plan.releases_metrics for run in facts.runs) else []
        masked = {run.run: run.plan.shared is not None for run in facts.runs}
        sent = {masked[one.run] for one in facts.releases if one.kind == "update" and one.run in masked}
        released = [code for is_masked, code in _UPDATES.items() if is_masked in sent]
        released += ["own_releases"] if any(run.release for run in facts.runs) else []
        released += [*scores, "refusals_and_receipts"]
        covers, admits = ["all_runs", "tuning_trials"], None
        covers += [] if all(entry.run for entry in facts.charges) else ["lost_branches"]
        randomness = "operating_system" if all(run.plan.private for run in facts.runs) else "none"
        randomness = "seeded" if facts.seeded_noise else randomness
        without = {*CODES["of_a_ledger"]["without"]}
    without |= set() if facts.unit == "record" else {"several_records"}  # the unit "user" covers all of a person's
    listed = {kind: tuple(code for code in codes if code not in without) for kind, codes in CODES["listed"].items()}
    return Report(
        schema_version=REPORT_SCHEMA,
        facts=facts,
        verdict=verdicts.combine_verdicts(site.verdict for site in sites),
        neighboring_relation=NEIGHBORING_RELATION.name.lower(),
        epsilon=profile.find_largest_epsilon(site.spent.epsilon for site in sites),
        randomness=randomness,
        released=tuple(released),
        sites=sites,
        covers=("rounds_and_steps", "charged_retries", *scores, *covers),
        **listed,
        assumptions=list_assumptions(facts, sites),
        cells={},
        utility=utility,
        admits=admits,
        signature=None,
    )


def add_meaning(
    site: SiteReport, rows: Sequence[Mechanism], charged: Spent | None, *, declared_size: int | None, delta: float
) -> SiteReport:
    """Add the meaning of a site's epsilon to its report.

    A site without a guarantee gets no meaning, unless missing noise is the only reason.

    Args:
        site: the site's report without its meaning.
        rows: the site's mechanisms.
        charged: the charges of `rows`; None: they were not fixed beforehand, so that the mechanism's trade-off curve is
            not a valid bound.
        declared_size: the site's declared size; None: unknown.
        delta: the report's delta.
    """
    if site.verdict.state == "no_guarantee" and site.verdict.reasons != ("no_noise",):
        return site
    others = None
    if site.by_trust is not None:
        alone = profile.compute_charges_against_colluders(rows, colluders=MAX_SITES_OF_SUM)
        others = alone, site.by_trust.with_all_others
    meaning = profile.compute_meaning(
        charged, epsilon=site.spent.epsilon, delta=delta, declared_size=declared_size, others=others
    )
    return replace(site, meaning=meaning)


def list_assumptions(facts: Facts, sites: Sequence[SiteReport]) -> tuple[Assumption, ...]:
    """Return the assumptions on which the guarantee depends, violated ones first."""
    if isinstance(facts, RunFacts):
        found, shows = _list_run_assumptions(facts, sites), True
    else:
        # A ledger that does not verify is no evidence, not even for its site's assertions.
        found, shows = _list_ledger_assumptions(facts, sites[0]), facts.verification is not None
    made = [
        Assumption(code=code, status=status if shows or status == "violated" else "assumed", evidence=evidence)
        for code, status, evidence in found
    ]
    return tuple(sorted(made, key=lambda assumption: _WORST_FIRST.index(assumption.status)))


def _list_run_assumptions(facts: RunFacts, sites: Sequence[SiteReport]) -> Iterator[_Found]:
    """Yield the assumptions of a run from the lead's data: code, status, evidence."""
    said = {site.site: site.statement for site in facts.sites if site.statement}
    yield from _list_mechanism_assumptions(facts, sites, said=[*said])
    yield from _list_figure_assumptions(facts, sites, asserted={site: one.asserted for site, one in said.items()})
    # The lead needs a signed receipt from every charged site.
    if unsigned := [one.site for one in sites if one.source == "not_released" and one.spent.rounds]:
        yield "receipts_signed", "assumed", ", ".join(unsigned)
    else:
        keys = [f"{one.site} {format_key_start(one.receipt.site_key)}" for one in facts.sites if one.receipt]
        yield "receipts_signed", "verified", ", ".join(keys)
    if silent := [site.site for site in facts.sites if facts.is_upper_bound(site)]:
        yield "every_site_answered", "violated", ", ".join(silent)
    if facts.deployed and facts.files:
        digest, others = facts.find_signed_adapter()
        signed: Status = "violated" if others or not digest else "verified"
        yield "adapter_signed", signed, ", ".join(others) or format_key_start(digest)
    if kept := facts.selected_round:
        evidence = f"{kept.primary_metric}, round {kept.round}; {facts.progress}"
        yield "chosen_by_the_leads_own_records", "assumed", evidence
    if start := facts.provenance.start_adapter:
        code = "start_adapter_public" if start.public else "start_adapter_covered_elsewhere"
        yield code, "assumed", f"{start.run or NOT_RECORDED}: {start.digest}"
    unchanged: Status = "verified" if facts.unchanged else "violated"
    yield "configuration_unchanged", unchanged, f"config.yaml: {facts.config_file_sha256}"
    if said:
        disagree = [site.site for site in sites if "site_report_disagrees" in site.verdict.reasons]
        status: Status = "violated" if disagree else "verified"
        yield "site_reports_agree", status, ", ".join(disagree or said)
        # A lead may withhold a newer report; only the site knows.
        days = ", ".join(f"{site}: {one.date}" for site, one in said.items())
        yield "site_reports_are_newest", "assumed", days
    if facts.deployed:
        yield "sites_run_their_own_software", "assumed", "tests/deployment"


def _list_mechanism_assumptions(
    facts: RunFacts, sites: Sequence[SiteReport], *, said: Sequence[str]
) -> Iterator[_Found]:
    """Yield the assumptions about the mechanism, from a simulation's records or from real sites' signed statements."""
    stated: Status = "asserted" if len(said) == len(sites) else "assumed"
    by_sites = stated, ", ".join(said) or "the sites' fedtune"
    program, private = f"fedtune {facts.provenance.fedtune_version}", facts.plan.private
    if not private:
        yield "noise_in_every_step", "violated", "privacy.mechanism=none"
    elif facts.sampling:
        yield "noise_in_every_step", "ensured", f"{program}: {_SAMPLED}; environment.json"
    else:
        yield "noise_in_every_step", *by_sites
    sampled = {row.sampling_run for site in sites for row in site.mechanisms}
    if facts.sampling == "poisson" and sampled <= {"poisson"}:
        yield "poisson_sampling", "ensured", f"{program}: {_SAMPLED}; environment.json"
    elif sampled == {"poisson"}:
        yield "poisson_sampling", "asserted", ", ".join(said)
    else:
        yield "poisson_sampling", "assumed", "the sites' fedtune"
    if facts.seeded_noise:
        yield "unpredictable_randomness", "violated", "runtime.seeded_noise=true"
    elif not private:
        pass  # no noise, so no source of randomness
    elif facts.randomness:
        yield "unpredictable_randomness", "ensured", f"{program}: {_UNPREDICTABLE}; environment.json"
    else:
        yield "unpredictable_randomness", *by_sites
    # Simulated sites' policies show whether clipping was exact; the lead does not know real sites' policies.
    if facts.inexact_gradients:
        yield "clipping_but_for_rounding", "assumed", "allow.inexact_gradients=true; docs/guarantee.md"
    elif not private:
        yield "clipping_exact", "violated", "privacy.mechanism=none"
    elif facts.inexact_gradients is None or not facts.sampling:
        yield "clipping_exact", "assumed", "allow.inexact_gradients; docs/guarantee.md"
    else:
        yield "clipping_exact", "ensured", f"{program}: {_EXACT}"


def _list_figure_assumptions(
    facts: Facts, sites: Sequence[SiteReport], *, asserted: Mapping[str, Mapping[str, bool]]
) -> Iterator[_Found]:
    """Yield the assumptions that follow from the sites' figures and from the assertions (`asserted`) of some sites."""
    largest = max((size or 0 for size in facts.declared_sizes.values()), default=0)
    compared = f"delta={facts.delta:g}; declared_size={largest}"
    yield "delta_below_one_over_size", "verified" if facts.delta * largest < 1 else "violated", compared
    if any(one.spent.epsilon_pld and one.spent.epsilon_rdp for one in sites):
        agree = all(
            profile.accountants_agree(one.spent, width=profile.choose_pld_interval(one.source)) for one in sites
        )
        yield "accountants_agree", "verified" if agree else "violated", "PLD <= RDP"
    if shared := [row.shared for site in sites for row in site.mechanisms if row.shared]:
        honest = sorted({f"{one.threshold - one.colluders} of {one.num_sites}" for one in shared})
        yield "enough_sites_keep_their_noise", "assumed", ", ".join(honest)
    if facts.unit == "record":
        yield "one_record_is_one_unit", "assumed", "unit=record"
    else:
        yield "every_record_names_its_person", "assumed", "unit=user; docs/user_level.md"
    said = {site: asserted.get(site, {}).get("no_person_at_another_site") for site in facts.declared_sizes}
    denied = [site for site, answer in said.items() if answer is False]
    silent = [site for site, answer in said.items() if answer is None]
    status: Status = "violated" if denied else "assumed" if silent else "asserted"
    yield "units_at_one_site_only", status, ", ".join(denied or silent or said)


def _list_ledger_assumptions(facts: LedgerFacts, site: SiteReport) -> Iterator[_Found]:
    program, life = f"fedtune {', '.join(facts.provenance.fedtune_version.split(' / '))}", site.lifetime
    assert life is not None, "a ledger's report has its figures"
    without = [row.run for row in site.mechanisms if row.noise_multiplier == 0]
    of_others = ", ".join(run.run for run in facts.runs if run.release in CHARGED_ONLY)

    def classify_assumption(test: str) -> tuple[Status, str]:
        return ("assumed", of_others) if of_others else ("ensured", f"{program}: {test}")

    yield "noise_in_every_step", *(("violated", ", ".join(without)) if without else classify_assumption(_SAMPLED))
    yield "poisson_sampling", *classify_assumption(_SAMPLED)
    if life.seeded:
        seeded = [run.run for run in life.runs if run.seeded_noise]
        yield "unpredictable_randomness", "violated", ", ".join(seeded)
    elif not site.mechanisms or any(row.noise_multiplier > 0 for row in site.mechanisms):
        yield "unpredictable_randomness", *classify_assumption(_UNPREDICTABLE)
    if without:
        yield "clipping_exact", "violated", ", ".join(without)
    elif facts.inexact_gradients:
        yield "clipping_but_for_rounding", "assumed", "allow.inexact_gradients: true; docs/guarantee.md"
    else:
        yield "clipping_exact", *classify_assumption(_EXACT)
    yield from _list_figure_assumptions(facts, [site], asserted={facts.site: facts.asserted})
    if (found := facts.verification) is None:
        yield "ledger_intact", "violated", facts.problem
    else:
        yield "ledger_intact", "verified", f"{found.num_events}: {found.head}"
        missing: Status = "verified" if found.rollback_excluded else "assumed"
        anchor = "none" if found.anchor_sequence is None else f"{found.anchor_sequence} / {found.num_events}"
        yield "no_event_missing", "violated" if facts.in_doubt else missing, f"anchor: {anchor}"
        yield "site_key_known", "verified" if found.key_expected else "assumed", found.site_key
    yield "order_fixed_beforehand", "verified", f"1: {life.order:g}"
    caps = ", ".join(f"{cap.time[:10]}: {cap.max_epsilon}" for cap in life.caps)
    yield "cap_never_raised", "violated" if life.cap_raised else "verified", caps
    if len(life.runs) > 1:
        yield "runs_fixed_beforehand", "assumed", "PLD, RDP"
    if early := [run for run in life.runs if 0 < run.rounds < run.max_rounds]:
        parts = ", ".join(f"{run.run}: {run.rounds} / {run.max_rounds}" for run in early[:_MAX_NAMED])
        yield "ends_independent_of_releases", "assumed", parts + (", …" if len(early) > _MAX_NAMED else "")
    if facts.policy_noted is not None:
        yield "policy_noted", "verified" if facts.policy_noted else "violated", facts.policy_digest
    if life.restored:
        entries = ", ".join(str(entry.entry) for entry in facts.charges if not entry.run)
        yield "lost_events_recharged", "verified", entries
