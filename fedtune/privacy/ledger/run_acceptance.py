"""The remaining budget of a ledger, and checks of new charges against every cap."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial

from fedtune.privacy import accountant, events, filter
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.dp_library import DpEvent
from fedtune.privacy.ledger.history import History
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_policy import Policy


def compute_spent_fraction(history: History, spent: Counter[DpEvent], *, cap: float) -> float | None:
    """Compute the fraction of a lifetime cap that `spent` uses, in Renyi divergence. None for an infinite cap."""
    if math.isinf(cap):
        return None
    room = filter.compute_max_divergence(cap, order=history.order, delta=history.delta)
    return history.divergence(spent) / room if room > 0 else 1.0


def require_acceptable(
    history: History, policy: Policy, proposal: Proposal, now: datetime, *, own: bool = False
) -> None:
    """Check that a new run breaks no policy rule, and that its whole plan fits into the remaining budget.

    Args:
        history: state of the ledger.
        policy: the site's policy.
        proposal: the new run.
        now: the ledger's time.
        own: check the site's own release instead, by `Policy.check_release`.

    Raises:
        Refused: names the rule, the requested value and the allowed value.
    """
    require_usable_ledger(history)
    if proposal.run in history.lost_runs:
        raise Refused(Reason.RUN_ENDED)
    (policy.check_release if own else policy.check)(proposal)
    require_run_room(history, policy, proposal.plan.full_event, now, admitted=proposal.plan.cohorts)


def require_usable_ledger(history: History) -> None:
    """Check that the ledger is not frozen, and that no receipt for a missing event is unresolved.

    Raises:
        Refused: the ledger permits no training.
    """
    if history.is_frozen:
        raise Refused(Reason.FROZEN)
    if history.furthest_doubt:
        raise Refused(Reason.LEDGER_BEHIND_RECEIPT)


def require_run_room(
    history: History, policy: Policy, plan: DpEvent, now: datetime, *, admitted: Cohorts | None = None
) -> None:
    """Check that a run of the event `plan` fits every cap, in addition to the reservations of open runs.

    Raises:
        Refused: names the cap, the resulting epsilon and the allowed epsilon.
    """
    asked, held = events.count_mechanisms([plan]), partial(history.count_remaining_charges, now)
    require_budget_room(history, policy, admitted, asked=asked, held=held, now=now)


def compute_remaining_divergence(
    history: History, policy: Policy, now: datetime, *, admitted: Cohorts | None = None
) -> float:
    """Compute the Renyi divergence that the caps leave for new runs at the time `now`, in nats at the ledger's order.

    The result is the minimum over the caps for lifetime and period, and over the cohorts in `admitted` (None: all
    cohorts).
    """
    if history.is_frozen or history.furthest_doubt:
        return 0.0
    held = partial(history.count_remaining_charges, now)
    rooms = _iter_rooms(history, policy, admitted, held=held, now=now)
    left = (room - history.divergence(used) for _, _, used, room in rooms if not math.isinf(room))
    return max(0.0, min(left, default=math.inf))


def count_remaining_runs(
    history: History, policy: Policy, plan: DpEvent, now: datetime, *, admitted: Cohorts | None = None
) -> int | None:
    """Compute how many runs of the event `plan` the caps allow at the time `now`. None means unlimited."""
    left = compute_remaining_divergence(history, policy, now, admitted=admitted)
    return filter.compute_max_repeats(plan, left, order=history.order)


def _iter_rooms(
    history: History,
    policy: Policy,
    admitted: Cohorts | None,
    *,
    held: Callable[[int], Counter[DpEvent]],
    now: datetime,
) -> Iterator[tuple[Reason, float, Counter[DpEvent], float]]:
    """Yield (reason, cap, used mechanisms, allowed divergence) for each cohort and each cap of the policy.

    The used mechanisms are those charged under the cap, and those that `held` reserves for the cohort.
    """
    budget = policy.budget
    for cohort in history.cohorts(admitted):
        period, besides = history.count_charges_in_period(budget.period, now, cohort), held(cohort)
        for reason, cap, charged in (
            (Reason.MAX_EPSILON, budget.max_epsilon, history.count_total_charges(cohort)),
            (Reason.MAX_EPSILON_PER_PERIOD, budget.max_epsilon_per_period, period),
        ):
            if cap is not None:
                room = filter.compute_max_divergence(cap, order=history.order, delta=history.delta)
                yield reason, cap, charged + besides, room


def require_budget_room(
    history: History,
    policy: Policy,
    admitted: Cohorts | None,
    *,
    asked: Counter[DpEvent],
    held: Callable[[int], Counter[DpEvent]],
    now: datetime,
) -> None:
    """Check that a new charge fits every cap, in addition to earlier charges and reservations.

    Guarantee: the stopping rule of the Renyi filter. At the one order that was fixed when the ledger was created, the
    divergence of everything charged to a cohort, plus `asked`, stays within the divergence that each cap allows.

    Args:
        history: state of the ledger.
        policy: the site's policy.
        admitted: the cohorts to charge, even cohorts without members; None: all cohorts.
        asked: mechanisms of the new charge, with counts.
        held: function from a cohort to its reserved mechanisms.
        now: the ledger's time.

    Raises:
        Refused: names the cap, the resulting epsilon and the allowed epsilon.
    """
    for reason, cap, used, room in _iter_rooms(history, policy, admitted, held=held, now=now):
        # Not `>`: a divergence that is NaN must be refused.
        if not history.divergence(used + asked) <= room:
            would, taken = history.epsilon(used + asked), history.epsilon(used)
            allowed = f"at most {cap:g}, of which {taken:.4f} is spent or reserved"
            raise Refused(reason, requested=f"{would:.4f}", allowed=allowed)


def find_max_rounds(proposal: Proposal, accepts: Callable[[Proposal], bool]) -> int:
    """Find the largest number of rounds, at most the proposal's, for which `accepts` returns True; 0 if none."""

    def is_refused(rounds: int) -> bool:
        return not accepts(dataclasses.replace(proposal, plan=dataclasses.replace(proposal.plan, num_rounds=rounds)))

    return bisect(range(1, proposal.plan.num_rounds + 1), False, key=is_refused)


def find_min_noise(proposal: Proposal, accepts: Callable[[Proposal], bool]) -> float | None:
    """Find the smallest noise multiplier, to four decimals, for which `accepts` returns True; None if none.

    The search starts at the noise multiplier of the proposal.
    """
    low = high = proposal.plan.noise_multiplier
    while not accepts(proposal.with_noise(high)):
        low, high = high, max(2 * high, 0.1)
        if high > accountant.MAX_NOISE:
            return None
    while high - low > 1e-4 * high:
        middle = math.ceil((low + high) / 2 * 1e4) / 1e4
        if middle >= high:
            break
        low, high = (low, middle) if accepts(proposal.with_noise(middle)) else (middle, high)
    return high
