"""The report of a ledger, derived from its source data alone.

Its epsilons come from a Renyi privacy filter, so they hold even though each run was chosen after earlier releases.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime

from fedtune.formatting import convert_infinite_to_none
from fedtune.privacy import accountant, events, filter
from fedtune.privacy.cohorts import OLDEST, Calendar, Cohorts, compute_period_number, find_cohort_group_starts
from fedtune.privacy.dp_library import DpEvent
from fedtune.privacy.own_release import CHARGED_ONLY
from fedtune.privacy.run_plan import Plan
from fedtune.report.derive import profile, rules, verdicts
from fedtune.report.facts import NOT_RECORDED, ChargedRounds, CohortFigures, LedgerFacts, Lifetime, LifetimeRun
from fedtune.report.model import EpsilonStep, Mechanism, Report, SiteReport, SpentBudget
from fedtune.show.budget_text import ArrivalRange


def derive_ledger_report(facts: LedgerFacts) -> Report:
    """Derive the report of a ledger from its source data."""
    ran, charged = list_mechanisms(facts), find_largest_charges(facts)
    life, delta = compute_lifetime(facts), facts.delta
    spent = SpentBudget(
        epsilon=life.epsilon,
        epsilon_pld=life.epsilon_pld,
        epsilon_rdp=life.epsilon_rdp,
        planned_epsilon=None,
        rounds=sum(row.rounds for row in ran),
        steps=sum(row.rounds * row.local_steps for row in ran),
    )
    loosened, verified = bool(facts.limits_loosened), facts.verification is not None
    charges = count_charges(facts)
    found = verdicts.iter_ledger_reasons(
        life, facts.approved, charges=charges, verified=verified, limits_loosened=loosened
    )
    reasons, capped = list(found), ((run.plan, run.max_epsilon) for run in facts.runs if run.max_epsilon is not None)
    # The same comparison as when the run was accepted.
    if any(
        accountant.compute_epsilon_above_limit([plan.full_event], plan.delta, limit=cap) is not None
        for plan, cap in capped
    ):
        reasons.append("above_run_cap")
    verdict = verdicts.judge_site(reasons, spent, source="own_ledger")
    trust = profile.compute_epsilons_by_observer(
        ran, lambda spent: _compute_epsilon_by_filter(facts, Counter(events.count_mechanisms(spent)))
    )
    site = SiteReport(
        site=facts.site,
        source="own_ledger",
        verdict=verdict,
        spent=spent,
        meaning=None,
        mechanisms=ran,
        curve=profile.compute_epsilon_curve(charged, delta),
        steps=compute_steps(facts, life),
        lifetime=life,
        by_trust=trust,
    )
    fixed = charged if _was_fixed_beforehand(facts, ran) else None
    site = rules.add_meaning(site, ran, fixed, delta=delta, declared_size=facts.declared_size)
    return rules.assemble_report(facts, (site,))


def _was_fixed_beforehand(facts: LedgerFacts, ran: Sequence[Mechanism]) -> bool:
    """Whether all charges were fixed before the first release, which requires a single run that was charged for its
    whole plan.

    Otherwise a later run may have been chosen, or an earlier run ended, because of a release.
    """
    charged, most = [row for row in ran if row.rounds], {run.run: run.plan.max_rounds for run in facts.runs}
    return len(charged) == 1 and most.get(charged[0].run) == charged[0].rounds


def count_charges(facts: LedgerFacts) -> int:
    """Count the charged rounds and the restored backups of a ledger."""
    return sum(entry.rounds if entry.run else 1 for entry in facts.charges)


def map_plans_by_run(facts: LedgerFacts) -> Mapping[str, Plan]:
    """Map each run's name to its plan."""
    return {run.run: run.plan for run in facts.runs}


def find_largest_charges(facts: LedgerFacts) -> Counter[DpEvent]:
    """Return the charges of the cohort with the largest divergence."""
    return _pick_largest_divergence(
        facts, [count_charges_to_cohort(facts, cohort) for cohort in _find_cohort_groups(facts)]
    )


def _pick_largest_divergence(facts: LedgerFacts, found: Collection[Counter[DpEvent]]) -> Counter[DpEvent]:
    return max(found, key=lambda each: filter.compute_total_divergence(each, facts.order) if len(found) > 1 else 0.0)


def count_charges_to_cohort(facts: LedgerFacts, cohort: int | None, *, period: str | None = None) -> Counter[DpEvent]:
    """Count a cohort's charges, optionally only in the current `period`; None: of all cohorts together."""
    plans, total, owed = map_plans_by_run(facts), Counter[DpEvent](), _find_last_charge_with_lost_rows(facts)
    now = None if period is None else compute_period_number(datetime.fromisoformat(facts.date), period)
    for number, entry in enumerate(facts.charges):
        if period is None or compute_period_number(datetime.fromisoformat(entry.day), period) == now:
            for charged, admitted in _iter_entry_charges(entry, plans, facts.arrivals):
                if cohort is None or admitted is None or cohort in admitted or (cohort == OLDEST and number <= owed):
                    total.update(charged)
    return events.count_mechanisms(total)


def _find_last_charge_with_lost_rows(facts: LedgerFacts) -> int:
    """Return the index of the last charge that is marked with lost arrival rows; -1 if there is none.

    The oldest cohort is also charged for this entry and all earlier entries.
    """
    return max((number for number, entry in enumerate(facts.charges) if entry.lost_rows), default=-1)


def _find_cohort_groups(facts: LedgerFacts) -> list[int]:
    """Return the first cohort of each group of cohorts with equal charges."""
    said = {one for entry in facts.charges for one in entry.lost_cohorts or () if one}
    lost = [Cohorts.from_text(one, facts.arrivals) for one in said if facts.arrivals]
    oldest_apart = _find_last_charge_with_lost_rows(facts) >= 0
    return find_cohort_group_starts([*(run.plan.cohorts for run in facts.runs), *lost], oldest_apart=oldest_apart)


def _iter_entry_charges(
    entry: ChargedRounds, plans: Mapping[str, Plan], arrivals: Calendar | None
) -> Iterator[tuple[Counter[DpEvent], Cohorts | None]]:
    """Yield the charges of an entry, each with the cohorts that are charged (None: all people)."""
    lost = list(zip(entry.lost, entry.lost_cohorts or [""] * len(entry.lost), strict=True))
    for said in dict.fromkeys(said for _, said in lost):
        admitted = Cohorts.from_text(said, arrivals) if arrivals and said else None
        yield profile.parse_charges(charge for charge, of_charge in lost if of_charge == said), admitted
    if entry.run:
        plan = plans[entry.run]
        yield events.count_mechanisms([plan.event(rounds=entry.rounds)]), plan.cohorts


def _compute_epsilon_by_filter(facts: LedgerFacts, charged: Counter[DpEvent]) -> float | None:
    return convert_infinite_to_none(filter.epsilon_filter(charged, order=facts.order, delta=facts.delta))


def count_rounds_by_run(facts: LedgerFacts) -> Mapping[str, int]:
    """Return run -> number of rounds that the ledger's own entries charged, without lost branches."""
    rounds = Counter(dict.fromkeys(map_plans_by_run(facts), 0))
    for entry in facts.charges:
        rounds[entry.run] += entry.rounds  # 0 rounds for a lost branch, whose run is ""
    return rounds


def list_mechanisms(facts: LedgerFacts) -> tuple[Mechanism, ...]:
    """Return the mechanisms of each run, including rounds on lost branches, followed by mechanisms that belong to no
    known run.
    """
    own, charged = count_rounds_by_run(facts), count_charges_to_cohort(facts, None)
    # If an anchor's lost rounds exceed the charges, only the ledger's own rounds count; other charges have no run.
    for rounds in ({run.run: own[run.run] + run.lost_rounds for run in facts.runs}, own):
        unexplained = Counter(charged)
        for run in facts.runs:
            unexplained.subtract(profile.count_charged_events(run.plan, rounds[run.run]))
        if all(count >= 0 for count in unexplained.values()):
            break
    # fedtune uses Poisson sampling; the sampling of other software is not recorded.
    sampling = {one.run: NOT_RECORDED if one.release in CHARGED_ONLY else "poisson" for one in facts.runs}
    made = profile.describe_mechanism
    known = [made(one.plan, run=one.run, rounds=rounds[one.run], sampling=sampling[one.run]) for one in facts.runs]
    return (
        *known,
        *(profile.describe_lost_mechanism(event, count) for event, count in unexplained.items() if count > 0),
    )


def compute_lifetime(facts: LedgerFacts) -> Lifetime:
    """Compute a ledger's budget figures over all runs, as of the report's date."""
    own, rounds = count_rounds_by_run(facts), {row.run: row.rounds for row in list_mechanisms(facts)}
    begins, approved = _find_cohort_groups(facts), facts.approved
    spent = [count_charges_to_cohort(facts, cohort) for cohort in begins]
    in_period = [count_charges_to_cohort(facts, cohort, period=approved.period) for cohort in begins]
    # Includes the reserved rounds of open runs that admit the cohort.
    held = [
        (run.plan.cohorts, run.plan.event(rounds=run.plan.max_rounds - own[run.run]))
        for run in facts.runs
        if run.state == "open"
    ]
    reserved = [
        events.count_mechanisms([event for admitted, event in held if admitted is None or cohort in admitted])
        for cohort in begins
    ]
    taken = [one + more for one, more in zip(spent, reserved, strict=True)]
    charged, most = _pick_largest_divergence(facts, spent), _pick_largest_divergence(facts, taken)
    of_lifetime = [_compute_remaining_divergence(facts, approved.max_epsilon, one) for one in taken]
    of_period = [
        _compute_remaining_divergence(facts, approved.max_epsilon_per_period, one + more)
        for one, more in zip(in_period, reserved, strict=True)
    ]
    left = [*map(min, of_lifetime, of_period)]
    return Lifetime(
        order=facts.order,
        epsilon=_compute_epsilon_by_filter(facts, charged),
        with_reserved=_compute_epsilon_by_filter(facts, most),
        epsilon_pld=profile.epsilon_pld(charged, facts.delta),
        epsilon_rdp=profile.epsilon_rdp(charged, facts.delta),
        remaining_epsilon=convert_infinite_to_none(min(left)),
        period=approved.period,
        period_epsilon=_compute_epsilon_by_filter(facts, _pick_largest_divergence(facts, in_period)),
        reference_remaining_runs=_count_reference_runs(facts, min(left)),
        reference_runs_in_lifetime=_count_reference_runs(facts, min(of_lifetime)),
        caps=facts.caps,
        runs=tuple(
            LifetimeRun(
                run=run.run,
                lead=run.lead,
                dataset=run.dataset,
                state=run.state,
                rounds=rounds[run.run],  # with those that it was charged on a lost branch
                max_rounds=run.plan.max_rounds,
                steps=rounds[run.run] * run.plan.local_steps,
                epsilon=profile.epsilon_pld([run.plan.event(rounds=rounds[run.run])], facts.delta),
                planned_epsilon=profile.epsilon_pld([run.plan.full_event], facts.delta),
                seeded_noise=run.seeded_noise,
            )
            for run in facts.runs
        ),
        frozen=facts.frozen,
        in_doubt=facts.in_doubt,
        restored=sum(not entry.run for entry in facts.charges),
        seeded=facts.seeded_noise,
        cohorts=facts.arrivals
        and tuple(
            CohortFigures(
                people=ArrivalRange.from_cohort(cohort, after, facts.arrivals),
                epsilon=_compute_epsilon_by_filter(facts, one),
                with_reserved=_compute_epsilon_by_filter(facts, with_held),
                remaining_epsilon=convert_infinite_to_none(of_cohort),
            )
            for cohort, after, one, with_held, of_cohort in zip(
                begins, [*begins[1:], None], spent, taken, left, strict=True
            )
        ),
    )


def _compute_remaining_divergence(facts: LedgerFacts, cap: float | None, used: Counter[DpEvent]) -> float:
    """Return the Renyi divergence that a cap leaves at the ledger's order; infinite if there is no cap."""
    if facts.frozen or facts.in_doubt:
        return 0.0
    if cap is None:
        return math.inf
    room = filter.compute_max_divergence(cap, order=facts.order, delta=facts.delta)
    return max(0.0, room - filter.compute_total_divergence(used, facts.order))


def _count_reference_runs(facts: LedgerFacts, left: float) -> int | None:
    """Return how many runs like the policy's reference fit into the divergence `left`; None: no limit."""
    each = filter.compute_total_divergence([facts.reference.event], facts.order)
    return None if math.isinf(left) or each == 0 else math.floor(left / each)


def compute_steps(facts: LedgerFacts, life: Lifetime) -> tuple[EpsilonStep, ...]:
    """Return the filter's epsilon after each separately listed round, and after each run without separately listed
    rounds.

    The last value is as in `life`. Sums are added in another order than in the ledger, so the last digits may differ.
    """
    charges, order, delta = facts.charges, facts.order, facts.delta
    totals = dict.fromkeys(_find_cohort_groups(facts), 0.0)
    plans, owed = map_plans_by_run(facts), _find_last_charge_with_lost_rows(facts)
    last = {entry.run: number for number, entry in enumerate(charges)}
    of_cohorts = [one.epsilon for one in life.cohorts or ()]
    each = {run: filter.compute_total_divergence([plan.event()], order) for run, plan in plans.items()}
    made: list[EpsilonStep] = []

    def figure(total: float, at_last: float | None) -> float | None:
        if number == len(charges) - 1 or not total:
            return at_last if total else 0.0
        so_far = max(0.0, total + filter.compute_epsilon_conversion_term(order, delta))
        return profile.find_smallest_epsilon(at_last, so_far)

    for number, entry in enumerate(charges):
        for charged, admitted in _iter_entry_charges(entry, plans, facts.arrivals):
            cost = each[entry.run] * entry.rounds if entry.run else filter.compute_total_divergence(charged, order)
            for cohort in totals:
                if admitted is None or cohort in admitted or (cohort == OLDEST and number <= owed):
                    totals[cohort] += cost
        if entry.run and entry.round is None and last[entry.run] != number:
            continue
        cohorts = tuple(map(figure, totals.values(), of_cohorts)) or None
        so_far = figure(max(totals.values()), life.epsilon)
        made.append(EpsilonStep(run=entry.run, round=entry.round, time=entry.day, epsilon=so_far, cohorts=cohorts))
    return tuple(made)
