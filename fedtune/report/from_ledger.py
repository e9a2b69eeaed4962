"""The report of a ledger: one site's own view over all runs and years, from events that were verified."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

from fedtune.privacy import accountant, filter
from fedtune.privacy.accountant import NEIGHBOURING_RELATION
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.spending import Spending, spending
from fedtune.privacy.proposal import UNVERIFIED
from fedtune.report import assumptions, cells, codes, facts, ledger_rounds, profile
from fedtune.report.ledger_lifetime import caps_of, lifetime_of, run_caps, spent_without_cap
from fedtune.report.ledger_record import LedgerRecord, read_ledger
from fedtune.report.mechanisms import bounded
from fedtune.report.model import Provenance, Report
from fedtune.report.site_model import (
    Approved,
    Mechanism,
    SiteReport,
    Spent,
    Verdict,
    Verification,
)
from fedtune.report.verdicts import has_meaning, with_foundations

LEAVES_OUT = tuple(code for code in codes.LEAVES_OUT if code not in ("other_runs", "tuning_trials", "lead_evaluation"))
NOT_PROTECTED = tuple(
    code for code in codes.NOT_PROTECTED if code not in ("lead_files", "model_against_malicious_sites")
)
UNPROTECTED_FIGURES = ("declared_sizes", "times", "counts_of_events")


def build(site_toml_or_ledger: Path, *, anchor: Path | None = None) -> Report:
    """The report of a ledger, as of its newest event.

    Guarantee: it holds nothing of the records but what was released; the records' fingerprints stay in the ledger.  A
    ledger that does not verify gives a report that says so and promises nothing.

    Args:
        site_toml_or_ledger: a `ledger.db`, or a `site.toml`, whose key and anchor are then used too.
        anchor: file that shows that no event is missing.

    Raises:
        ConfigError: there is no such file, or the files do not belong together.
        RunError: the ledger cannot be read at all.
    """
    record = read_ledger(site_toml_or_ledger, anchor=anchor)
    history, figures = record.history, spending(record.history, record.now)
    site = _site(record, figures)
    provenance, released = _provenance(record), tuple(_released(record))
    date = ledger_rounds.day_of(record.now.isoformat())
    randomness = _randomness(history)
    known = facts.of_ledger(record, site, provenance) | facts.of_report(
        released=released,
        randomness=randomness,
        not_protected=codes.of_unit(NOT_PROTECTED, history.opened.unit),
        date=date,
    )
    return Report(
        kind="ledger",
        name=f"{history.opened.site} {history.opened.population}",
        date=date,
        verdict=site.verdict,
        unit=history.opened.unit,
        neighbouring_relation=NEIGHBOURING_RELATION.name.lower(),
        delta=history.delta,
        epsilon=site.spent.epsilon if site.spent else None,
        target_epsilon=None,
        seeded_noise=history.seeded,
        randomness=randomness,
        released=released,
        sites=(site,),
        covers=tuple(_covers(history)),
        leaves_out=LEAVES_OUT,
        not_protected=codes.of_unit(NOT_PROTECTED, history.opened.unit),
        unprotected_figures=UNPROTECTED_FIGURES,
        assumptions=assumptions.of_ledger(record, site),
        cells=cells.rows(known),
        provenance=provenance,
    )


def _site(record: LedgerRecord, figures: Spending) -> SiteReport:
    history, policy = record.history, record.policy
    ran, charged = ledger_rounds.mechanisms(history), history.charged()
    size = sum(dataset.declared_size for dataset in policy.dataset)
    spent, lifetime = _spent(figures, ran), lifetime_of(record, figures, ran)
    agree = profile.accountants_agree(spent, width=accountant.COARSE)
    verdict = with_foundations(_verdict(record, figures), () if agree else ("accountants_disagree",))
    fixed = ledger_rounds.were_fixed(history, ran)
    return SiteReport(
        site=history.opened.site,
        source="own_ledger",
        verdict=verdict,
        declared_size=size,
        approved=_approved(record),
        spent=spent,
        left=lifetime.left,
        meaning=profile.meaning(charged, epsilon=spent.epsilon, delta=history.delta, declared_size=size, fixed=fixed)
        if has_meaning(verdict)
        else None,
        mechanisms=ran,
        curve=profile.curve(charged, profile.curve_deltas(history.delta)) if charged else (),
        steps=ledger_rounds.steps(record.events, history, epsilon=figures.epsilon),
        lifetime=lifetime,
        verification=_verification(record),
        releases=ledger_rounds.releases(record.events, history),
        asserted=dataclasses.asdict(policy.asserted),
    )


def _verdict(record: LedgerRecord, figures: Spending) -> Verdict:
    """What was spent against what is approved now; each run's plan against what was approved when it was accepted."""
    history, budget = record.history, record.in_force.budget
    spent_something = figures.mechanisms > 0
    nothing_promised = {
        "ledger_not_verified": record.verified is None,
        "ledger_in_doubt": history.in_doubt is not None,
        "seeded_noise": history.seeded,
        "no_noise": math.isinf(figures.epsilon),
        # A filter bounds anything only while a cap is fixed and never passed.
        "no_lifetime_cap": spent_without_cap(record) or (math.isinf(budget.max_epsilon) and spent_something),
    }
    passed = {
        "above_lifetime_cap": _above(history, budget.max_epsilon, history.divergence(history.charged())),
        "above_period_cap": budget.max_epsilon_per_period is not None
        and _above(history, budget.max_epsilon_per_period, _in_period(history, budget.period, record.now)),
        "above_run_cap": any(_plans_above_their_caps(record, figures)),
    }
    notes = {"nothing_spent": not spent_something, "cap_raised": assumptions.cap_was_raised(record)}
    if any(nothing_promised.values()):
        return Verdict(state="no_guarantee", reasons=_those_that_hold(nothing_promised))
    if any(passed.values()):
        return Verdict(state="exceeded", reasons=_those_that_hold(passed))
    return Verdict(state="within", reasons=_those_that_hold(notes))


def _those_that_hold(known: Mapping[str, bool]) -> tuple[str, ...]:
    return tuple(code for code, is_so in known.items() if is_so)


def _above(history: History, cap: float, divergence: float) -> bool:
    """As the ledger itself decides, by divergences, so that no last digit makes a difference."""
    return divergence > filter.most_divergence(cap, order=history.order, delta=history.delta) and divergence > 0


def _in_period(history: History, period: str, now: datetime) -> float:
    return history.divergence(history.charged_in_period(period, now))


def _plans_above_their_caps(record: LedgerRecord, figures: Spending) -> Iterator[bool]:
    caps = run_caps(record)
    for run in figures.runs:
        cap = caps[run.run]
        if cap is not None and run.planned_epsilon > cap:
            plan = record.history.runs[run.run].plan
            # Once more, as it was decided then: a close call on the fine grid.
            yield accountant.epsilon_above([plan.whole], plan.delta, limit=cap) is not None


def _approved(record: LedgerRecord) -> Approved:
    budget, noted = record.in_force.budget, record.policy.budget
    return Approved(
        max_epsilon=bounded(budget.max_epsilon),
        max_epsilon_per_run=budget.max_epsilon_per_run,
        max_epsilon_per_period=budget.max_epsilon_per_period,
        period=budget.period,
        since=caps_of(record.history)[-1].time if budget.max_epsilon == noted.max_epsilon else None,
    )


def _spent(figures: Spending, ran: Iterable[Mechanism]) -> Spent:
    rows = list(ran)
    return Spent(
        epsilon=bounded(figures.epsilon),
        epsilon_pld=bounded(figures.epsilon_pld),
        epsilon_rdp=bounded(figures.epsilon_rdp),
        planned_epsilon=None,
        upper_bound=False,
        rounds=sum(row.rounds for row in rows),
        steps=sum(row.rounds * row.local_steps for row in rows),
    )


def _verification(record: LedgerRecord) -> Verification | None:
    found = record.verified
    if found is None:
        return None
    return Verification(
        num_events=len(found.events),
        head=found.hash,
        site_key=found.site_key,
        key_expected=found.key_expected,
        rollback_excluded=record.anchored_to_the_end,
        anchor_sequence=found.anchor_sequence if found.rollback_excluded else None,
    )


def _released(record: LedgerRecord) -> Iterator[str]:
    kinds = {event.kind for event in record.events}
    plans = [run.plan for run in record.history.runs.values()]
    if Kind.COMMIT in kinds:
        yield "updates"
    if any(plan.releases_metrics for plan in plans):
        yield "noised_scores"
    yield "refusals_and_receipts"


def _covers(history: History) -> Iterator[str]:
    yield from ("rounds_and_steps", "charged_retries")
    if any(run.plan.releases_metrics for run in history.runs.values()):
        yield "noised_scores"
    yield from ("all_runs", "tuning_trials")
    if history.restored:
        yield "lost_branches"


def _randomness(history: History) -> str:
    """Of all runs: the worst source."""
    if history.seeded:
        return "seeded"
    plans = [run.plan for run in history.runs.values()]
    return "none" if plans and not all(plan.private for plan in plans) else "operating_system"


def _provenance(record: LedgerRecord) -> Provenance:
    """What the events name; the machine that they came about on is not among it."""
    proposals = [run.proposal for run in record.history.runs.values()]
    models = {proposal.base_model for proposal in proposals}
    return Provenance(
        fedtune_version=" / ".join(dict.fromkeys(event.code for event in record.events)),
        config_sha256=None,
        model=None,
        model_sha256=models.pop() if len(models) == 1 and models != {UNVERIFIED} else None,
        model_licence=None,
        dataset=", ".join(dataset.id for dataset in record.policy.dataset),
        task=", ".join(dict.fromkeys(proposal.task for proposal in proposals)) or None,
        libraries={},
        python=None,
        machine=None,
    )
