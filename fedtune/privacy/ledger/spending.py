"""Figures derived from a ledger's events on demand: what is spent, what is left, and whether a new run fits."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from dp_accounting import DpEvent

from fedtune.privacy import accountant, events, filter
from fedtune.privacy.distributed_noise import Epsilons
from fedtune.privacy.ledger.history import History, Run
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpending:
    """The charges of one run so far.

    Attributes:
        epsilon: by PLD; a proof unless the run ended early because of what it had released.
        epsilon_rdp: the same events by RDP at their best order.
        planned_epsilon: of the whole plan, by PLD; a proof whatever ended the run.
        state: "open", "ended" or "expired".
    """

    run: str
    lead: str
    dataset: str
    state: str
    rounds: int
    most_rounds: int
    steps: int
    noise_multiplier: float
    sampling_rate: float
    epsilon: float
    epsilon_rdp: float
    planned_epsilon: float
    num_sites_claimed: int
    by_trust: Epsilons | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """A population's lifetime figures; None for an infinite cap's share.

    Attributes:
        epsilon: spent, by the filter: the figure that caps and verdicts use.
        epsilon_with_set_aside: the same with everything that open runs may still spend.
        share: spent fraction of the cap's divergence, 1 if it is not above 0; `share_with_set_aside` adds open runs.
        epsilon_pld: the same events by PLD, which would be a proof only if all runs had been fixed beforehand.
        epsilon_rdp: the same at the order that fits best in hindsight; under the same condition.
        period_epsilon: spent in the current calendar period, by the filter.
    """

    delta: float
    order: float
    max_epsilon: float
    epsilon: float
    epsilon_with_set_aside: float
    share: float | None
    share_with_set_aside: float | None
    epsilon_pld: float
    epsilon_rdp: float
    period: str
    max_epsilon_per_period: float | None
    period_epsilon: float
    mechanisms: int
    seeded: bool
    frozen: bool
    runs: tuple[RunSpending, ...]


def share_of_cap(history: History, spent: Counter[DpEvent], *, cap: float) -> float | None:
    """The spent fraction of a lifetime cap's divergence; None for an infinite cap."""
    if math.isinf(cap):
        return None
    room = filter.most_divergence(cap, order=history.order, delta=history.delta)
    return history.divergence(spent) / room if room > 0 else 1.0


def spending(history: History, now: datetime) -> Spending:
    """The figures of a ledger at `now`."""
    delta, order, cap = history.delta, history.order, history.cap
    charged, held = history.charged(), history.set_aside(now)
    assert history.policy is not None
    budget = history.policy.budget
    return Spending(
        delta=delta,
        order=order,
        max_epsilon=cap,
        epsilon=filter.epsilon_filter(charged, order=order, delta=delta),
        epsilon_with_set_aside=filter.epsilon_filter(charged + held, order=order, delta=delta),
        share=share_of_cap(history, charged, cap=cap),
        share_with_set_aside=share_of_cap(history, charged + held, cap=cap),
        epsilon_pld=accountant.epsilon_pld(charged, delta, interval=accountant.COARSE),
        epsilon_rdp=accountant.epsilon_rdp(charged, delta),
        period=budget.period,
        max_epsilon_per_period=budget.max_epsilon_per_period,
        period_epsilon=filter.epsilon_filter(history.charged_in_period(budget.period, now), order=order, delta=delta),
        mechanisms=charged.total(),
        seeded=history.seeded,
        frozen=history.frozen,
        runs=tuple(_run(name, run, now) for name, run in history.runs.items()),
    )


def _run(name: str, run: Run, now: datetime) -> RunSpending:
    plan, rounds = run.plan, run.charged_rounds
    return RunSpending(
        run=name,
        lead=run.proposal.lead,
        dataset=run.proposal.dataset,
        state="open" if run.is_open(now) else "ended" if run.expires is None else "expired",
        rounds=rounds,
        most_rounds=plan.most_rounds,
        steps=rounds * plan.local_steps,
        noise_multiplier=plan.counted_noise,
        sampling_rate=plan.sampling_rate,
        epsilon=_epsilon(plan, rounds),
        epsilon_rdp=_epsilon_rdp(plan, rounds),
        planned_epsilon=_epsilon(plan, plan.most_rounds),
        by_trust=_by_trust(plan, rounds) if rounds else None,
        num_sites_claimed=run.proposal.num_sites,
    )


@lru_cache(maxsize=4096)
def _epsilon(plan: Plan, rounds: int) -> float:
    """PLD epsilon of some rounds of a plan; cached, because a ledger may hold many runs of one plan."""
    return accountant.epsilon_pld([plan.event(rounds=rounds)], plan.delta, interval=accountant.COARSE)


@lru_cache(maxsize=4096)
def _by_trust(plan: Plan, rounds: int) -> Epsilons | None:
    return plan.by_trust(rounds)


@lru_cache(maxsize=4096)
def _epsilon_rdp(plan: Plan, rounds: int) -> float:
    return accountant.epsilon_rdp([plan.event(rounds=rounds)], plan.delta)


def require_acceptable(history: History, policy: Policy, proposal: Proposal, now: datetime) -> None:
    """Check that a new run breaks no rule, and that its whole plan fits beside what open runs have set aside.

    Raises:
        Refused: names the rule, what was asked and what is allowed.
    """
    require_usable(history)
    if proposal.run in history.lost_runs:
        raise Refused(Reason.RUN_ENDED)
    policy.check(proposal)
    require_plan_room(history, policy, proposal.plan, now)


def require_usable(history: History) -> None:
    """Raise Refused if the ledger is frozen or in doubt: then nobody may train."""
    if history.frozen:
        raise Refused(Reason.FROZEN)
    if history.in_doubt:
        raise Refused(Reason.LEDGER_BEHIND_RECEIPT)


def require_plan_room(history: History, policy: Policy, plan: Plan, now: datetime) -> None:
    """Raise Refused unless the whole of `plan` fits every cap beside what open runs have set aside."""
    require_room(history, policy, asked=events.grouped([plan.whole]), held=history.set_aside(now), now=now)


def divergence_left(history: History, policy: Policy, now: datetime) -> float:
    """The lifetime cap's room for new runs, as a divergence of the ledger's order: 0 or more, maybe infinite."""
    if history.frozen or history.in_doubt:
        return 0.0
    if math.isinf(policy.budget.max_epsilon):
        return math.inf
    room = filter.most_divergence(policy.budget.max_epsilon, order=history.order, delta=history.delta)
    return max(0.0, room - history.divergence(history.charged() + history.set_aside(now)))


def runs_left(history: History, policy: Policy, plan: DpEvent, now: datetime) -> int | None:
    """How many runs that cost `plan` the lifetime cap still has room for; None: any number."""
    left, each = divergence_left(history, policy, now), filter.total_divergence([plan], history.order)
    return None if math.isinf(left) or each == 0 else math.floor(left / each)


def require_room(
    history: History, policy: Policy, *, asked: Counter[DpEvent], held: Counter[DpEvent], now: datetime
) -> None:
    """Check that `asked` fits every cap, beside what was charged and what is `held` for others.

    Guarantee: the filter's stopping rule.  At the one order that was fixed when the ledger was made, the divergence of
    everything charged and of `asked` stays within the divergence that each cap leaves room for.

    Raises:
        Refused: names the cap, what the figure would become, and what it may be.
    """
    budget = policy.budget
    period = history.charged_in_period(budget.period, now)
    for reason, cap, charged in (
        (Reason.MAX_EPSILON, budget.max_epsilon, history.charged()),
        (Reason.MAX_EPSILON_PER_PERIOD, budget.max_epsilon_per_period, period),
    ):
        if cap is None:
            continue
        room = filter.most_divergence(cap, order=history.order, delta=history.delta)
        # Not `>`: a divergence that is NaN must be refused.
        if not history.divergence(charged + held + asked) <= room:
            would = filter.epsilon_filter(charged + held + asked, order=history.order, delta=history.delta)
            now_at = filter.epsilon_filter(charged + held, order=history.order, delta=history.delta)
            raise Refused(reason, asked=f"{would:.4f}", allowed=f"at most {cap:g}, of which {now_at:.4f} is taken")


def most_rounds(proposal: Proposal, accepts: Callable[[Proposal], bool]) -> int:
    """The largest `num_rounds`, up to the proposal's own, that is accepted; 0 for none."""

    def with_rounds(count: int) -> Proposal:
        return dataclasses.replace(proposal, plan=dataclasses.replace(proposal.plan, num_rounds=count))

    fits, too_many = 0, proposal.plan.num_rounds + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if accepts(with_rounds(middle)) else (fits, middle)
    return fits


def least_noise(proposal: Proposal, accepts: Callable[[Proposal], bool]) -> float | None:
    """The least noise multiplier, to four digits and at least the proposal's own, that is accepted; None for none."""

    def with_noise(noise: float) -> Proposal:
        return dataclasses.replace(proposal, plan=proposal.plan.with_noise(noise))

    low = high = proposal.plan.noise_multiplier
    while not accepts(with_noise(high)):
        low, high = high, max(2 * high, 0.1)
        if high > accountant.MOST_NOISE:
            return None
    while high - low > 1e-4 * high:
        middle = math.ceil((low + high) / 2 * 1e4) / 1e4
        if middle >= high:
            break
        low, high = (low, middle) if accepts(with_noise(middle)) else (middle, high)
    return high
