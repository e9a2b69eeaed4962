"""A ledger's figures over all its runs: by the filter, which holds although each run was chosen after earlier ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from fedtune.privacy import accountant, filter
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.spending import RunSpending, Spending, divergence_left, runs_left
from fedtune.privacy.policy_file import policy_of
from fedtune.report.ledger_record import LedgerRecord
from fedtune.report.mechanisms import bounded
from fedtune.report.site_model import Cap, Lifetime, LifetimeRun, Mechanism


def lifetime_of(record: LedgerRecord, figures: Spending, ran: Iterable[Mechanism]) -> Lifetime:
    """The figures at the time of the newest event.

    Args:
        record: of the ledger.
        figures: what it has spent.
        ran: what each run did.
    """
    history, policy, now = record.history, record.in_force, record.now
    in_period = history.charged_in_period(policy.budget.period, now)
    rounds, adapters = {row.run: row.rounds for row in ran}, _final_adapters(record)
    return Lifetime(
        order=figures.order,
        epsilon=bounded(figures.epsilon),
        with_set_aside=bounded(figures.epsilon_with_set_aside),
        epsilon_pld=bounded(figures.epsilon_pld),
        epsilon_rdp=bounded(figures.epsilon_rdp),
        left=bounded(divergence_left(history, policy, now)),
        period=policy.budget.period,
        period_epsilon=bounded(filter.epsilon_filter(in_period, order=history.order, delta=history.delta)),
        reference_runs_left=runs_left(history, policy, policy.budget.reference_event(), now),
        caps=caps_of(history),
        runs=tuple(_run(history, run, rounds[run.run], adapters.get(run.run)) for run in figures.runs),
        frozen=history.frozen,
        in_doubt=history.in_doubt is not None,
        restored=len(history.restored),
        seeded=history.seeded,
    )


def _run(history: History, run: RunSpending, rounds: int, adapter: str | None) -> LifetimeRun:
    """One run; rounds that it was charged on a lost branch are in its figures."""
    known = history.runs[run.run]
    plan, epsilon = known.plan, run.epsilon
    if rounds != run.rounds:
        epsilon = accountant.epsilon_pld([plan.event(rounds=rounds)], plan.delta, interval=accountant.COARSE)
    return LifetimeRun(
        run=run.run,
        lead=run.lead,
        dataset=run.dataset,
        state=run.state,
        rounds=rounds,
        most_rounds=run.most_rounds,
        steps=rounds * plan.local_steps,
        epsilon=bounded(epsilon),
        planned_epsilon=bounded(run.planned_epsilon),
        seeded_noise=known.proposal.seeded_noise,
        base_model=known.proposal.base_model,
        adapter_sha256=adapter,
    )


def _final_adapters(record: LedgerRecord) -> Mapping[str, str]:
    """Run -> digest of the adapter that its lead gave to the site at its end."""
    return {
        event.run: str(event.detail["adapter_sha256"])
        for event in record.events
        if event.kind is Kind.NOTE and event.detail["what"] == "run_ended" and event.detail.get("adapter_sha256")
    }


def caps_of(history: History) -> tuple[Cap, ...]:
    """The lifetime caps, each from when it began to hold."""
    caps: list[Cap] = []
    for time, cap in history.policies:
        if not caps or caps[-1].max_epsilon != bounded(cap):
            caps.append(Cap(time=time, max_epsilon=bounded(cap)))
    return tuple(caps)


def spent_without_cap(record: LedgerRecord) -> bool:
    """Whether something was charged while no lifetime cap was in force: no later cap makes that a promise."""
    cap = math.inf
    for event in record.events:
        what = event.detail.get("what")
        if event.kind is Kind.NOTE and what == "policy":
            cap = policy_of(event.detail["policy"]).budget.max_epsilon
        elif math.isinf(cap) and (event.kind is Kind.RESERVE or (event.kind is Kind.NOTE and what == "restored")):
            return True
    return False


def run_caps(record: LedgerRecord) -> Mapping[str, float | None]:
    """Run -> the cap on one run that was in force when it was accepted."""
    caps: dict[str, float | None] = {}
    in_force: float | None = None
    for event in record.events:
        if event.kind is Kind.PLAN:
            caps[event.run] = in_force
        elif event.kind is Kind.NOTE and event.detail["what"] == "policy":
            in_force = policy_of(event.detail["policy"]).budget.max_epsilon_per_run
    return caps
