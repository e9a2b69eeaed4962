"""The report of a run, derived from its source data alone."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedtune.federation.drift import detect_score_drop
from fedtune.federation.replies import LEFT_OUT, NO_REPLY, UNSIGNED_REPLY
from fedtune.privacy.dp_library import GaussianDpEvent
from fedtune.report.derive import profile, rules, verdicts
from fedtune.report.facts import NOT_RECORDED, Release, RunFacts, SiteFacts, SiteStatement, Source
from fedtune.report.model import EpsilonStep, Report, SiteReport, SpentBudget, Utility

_MAX_FIGURES = 64  # round counts at which epsilon is computed; other counts use the next larger one


def derive_run_report(facts: RunFacts) -> Report:
    """Derive the report of a run from its source data."""
    made = [_derive_site_report(facts, site) for site in facts.sites]
    sites = verdicts.apply_audit(made, facts.audit, marked=facts.canaries_planted)
    return rules.assemble_report(facts, sites, utility=_derive_utility(facts, sites))


def compute_min_charged_rounds(facts: RunFacts, site: SiteFacts) -> int:
    """Return the smallest possible number of charged rounds at a site, from its receipt and from its updates."""
    signed = site.receipt.charged_rounds if site.receipt else 0
    return max(signed, sum(result.has_update_from(site.site) for result in facts.rounds))


def statement_agrees(facts: RunFacts, site: SiteFacts, said: SiteStatement) -> bool:
    """Whether a site's statement matches the run: the requested plan, and at least the rounds of its receipt and
    updates.
    """
    known = [run for run in said.lifetime.runs if run.run == facts.run]
    return said.same_plan and all(
        run.rounds >= compute_min_charged_rounds(facts, site)
        and run.seeded_noise == facts.seeded_noise
        and run.max_rounds == facts.plan.max_rounds
        for run in known
    )


def _derive_site_report(facts: RunFacts, site: SiteFacts) -> SiteReport:
    plan, statement, rounds = facts.plan, site.statement, facts.count_charged_rounds(site)
    source: Source = "not_released" if site.receipt is None else "charged_by_receipts"
    source = "signed_site_report" if statement else source
    grid, whole = profile.choose_pld_interval(source), plan.max_rounds if rounds else 0
    charged, promised = profile.count_charged_events(plan, rounds), profile.count_charged_events(plan, whole)
    known = statement is not None and any(run.run == facts.run for run in statement.lifetime.runs)
    ran = facts.sampling if statement is None else "poisson" if known else None
    row = profile.describe_mechanism(plan, run=facts.run, rounds=rounds, sampling=ran or NOT_RECORDED)
    rows, of_plan = ((row,), (replace(row, rounds=whole),)) if rounds else ((), ())
    by_pld = profile.epsilon_pld(charged, plan.delta, interval=grid)
    spent = SpentBudget(
        epsilon=profile.epsilon_pld(promised, plan.delta, interval=grid),
        epsilon_pld=by_pld,
        epsilon_rdp=profile.epsilon_rdp(charged, plan.delta),
        planned_epsilon=profile.epsilon_pld([plan.full_event], plan.delta, interval=grid),
        rounds=rounds,
        steps=rounds * plan.local_steps,
    )
    trust = profile.compute_epsilons_by_observer(
        of_plan, lambda spent: profile.epsilon_pld(spent, plan.delta, interval=grid)
    )
    verdict = verdicts.judge_site(verdicts.iter_run_reasons(site, facts, spent, sampling=ran), spent, source=source)
    if statement is not None:
        life, limits, verified = statement.lifetime, statement.approved, statement.verification is not None
        reasons = [*verdicts.iter_ledger_reasons(life, limits, charges=statement.charges, verified=verified)]
        reasons += [] if statement_agrees(facts, site, statement) else ["site_report_disagrees"]
        verdict = verdicts.combine_verdicts([verdict, statement.verdict, verdicts.derive_verdict(reasons)])
    made = SiteReport(
        site=site.site,
        source=source,
        verdict=verdict,
        spent=spent,
        meaning=None,
        mechanisms=rows,
        curve=profile.compute_epsilon_curve(promised, plan.delta),
        steps=tuple(_derive_steps(facts, site, by_pld)),
        releases=() if statement else tuple(_group_releases(facts, site)),
        by_trust=trust,
    )
    return rules.add_meaning(made, of_plan, promised, delta=plan.delta, declared_size=site.declared_size)


def _derive_utility(facts: RunFacts, sites: Sequence[SiteReport]) -> Utility:
    line, epsilons = facts.held_out or (), defaultdict[int | None, list[float | None]](list)
    for step in (step for site in sites for step in site.steps):
        epsilons[step.round].append(step.epsilon)
    releases = max(map(facts.count_charged_rounds, facts.sites), default=0)
    price = Counter({GaussianDpEvent(facts.plan.metrics_noise_multiplier): releases}) if line else Counter()
    return Utility(
        epsilons=tuple(profile.find_largest_epsilon(epsilons[result.round]) for result in facts.rounds),
        selected_round=facts.selected_round,
        held_out_epsilon=profile.epsilon_pld(price, facts.plan.delta) if line else None,
        score_drop=detect_score_drop(line) if line and line[-1].run == facts.name else None,
    )


def _derive_steps(facts: RunFacts, site: SiteFacts, final: float | None) -> Iterator[EpsilonStep]:
    """Yield an upper bound on epsilon after each round: all charges, minus one round for each later update of the site.

    `final` is the site's epsilon at the end of the run. Earlier values use the coarse grid and never exceed it. If the
    site has not signed a final receipt, only the rounds so far count, including rounds without an update.
    """
    plan, later = facts.plan, sum(result.has_update_from(site.site) for result in facts.rounds)
    charged, silent = facts.count_charged_rounds(site), len(facts.rounds) - later
    most = charged if site.final else min(charged, compute_min_charged_rounds(facts, site) + silent)
    every, epsilons = math.ceil(most / _MAX_FIGURES) or 1, {charged: final}
    for result in facts.rounds:
        later -= result.has_update_from(site.site)
        shown = min(most, math.ceil(max(0, most - later) / every) * every)
        if shown not in epsilons:
            found = profile.epsilon_pld(profile.count_charged_events(plan, shown), plan.delta)
            epsilons[shown] = profile.find_smallest_epsilon(final, found)
        yield EpsilonStep(run=facts.run, round=result.round, time=result.ended or None, epsilon=epsilons[shown])


def _group_releases(facts: RunFacts, site: SiteFacts) -> Iterator[Release]:
    """Yield all releases and refusals of a site, grouped by kind and reason."""
    groups = defaultdict[tuple[str, str | None], list[str]](list)
    for result in facts.rounds:
        reason, kind = result.failed_sites.get(site.site), "refusal"
        if result.has_update_from(site.site):
            kind = "update"
        elif reason in (None, LEFT_OUT):
            continue  # the site was not asked for an update
        elif reason in (NO_REPLY, UNSIGNED_REPLY):
            kind = "no_answer"
        groups[kind, reason].append(result.ended)
    came = sum(len(ended) for (kind, _), ended in groups.items() if kind == "update")
    for (kind, reason), ended in groups.items():
        times = [time for time in ended if time]
        first, last = min(times, default=None), max(times, default=None)
        yield Release(kind=kind, run=facts.run, reason=reason, count=len(ended), first=first, last=last)
    if (more := (site.receipt.charged_rounds if site.receipt else 0) - came) > 0:  # charged at unknown times
        yield Release(kind="reservation_without_update", run=facts.run, reason=None, count=more, first=None, last=None)
