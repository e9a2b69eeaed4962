"""What a ledger's events add up to: runs, charges, what is set aside.  Spending is always derived, never stored.

`History.follow` takes one event after another.  It reads nothing but events, so that two people with the same ledger
derive the same figures.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from dp_accounting import DpEvent

from fedtune.privacy import events as dp_events
from fedtune.privacy import filter
from fedtune.privacy.chain import Event, Kind
from fedtune.privacy.plan import Plan
from fedtune.privacy.policy import period_of
from fedtune.privacy.proposal import Proposal
from fedtune.spec import FedtuneError, RunError


@dataclass(kw_only=True, slots=True)
class Run:
    """One accepted run.

    Attributes:
        proposal: what was accepted.
        expires: until when its plan is set aside; None: it has ended.
        reserved: round -> digest of the request that it was charged for.
        attempts: round -> reservations made for it.
        replies: request digest -> SHA-256 of the committed reply.
    """

    proposal: Proposal
    expires: datetime | None
    reserved: dict[int, str] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)
    replies: dict[str, str] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """What the run's releases cost."""
        return self.proposal.plan

    @property
    def charged_rounds(self) -> int:
        """Rounds charged, retries included."""
        return self.attempts.total()

    def is_open(self, now: datetime) -> bool:
        """Whether the run may still be charged."""
        return self.expires is not None and now < self.expires

    def set_aside(self, now: datetime) -> Counter[DpEvent]:
        """What the run may still spend: the rest of its plan while it is open, else nothing."""
        left = self.plan.most_rounds - self.charged_rounds
        return Counter({self.plan.event(): left}) if self.is_open(now) else Counter()


class History:
    """The sum of a ledger's events.

    Attributes:
        opened: the first event's detail: ledger id, site, population, unit, delta, order, reference plan, key.
        policy: detail of the newest policy event.
        runs: run -> what became of it.
        gaps: what was charged for events that a restored backup lacked.
        seeded: whether any accepted run took its noise from a seed.
        frozen: whether the population takes part in nothing any more.
        restored: sequences of anchors whose gap was charged.
        policies: caps in force, oldest first, as (time, max_epsilon).
        answers: refusals and offers of each day.
        length: number of events.
        last_time: of the newest event.
    """

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}
        self.policy: dict[str, Any] = {}
        self.runs: dict[str, Run] = {}
        self.gaps: Counter[DpEvent] = Counter()
        self.seeded = False
        self.frozen = False
        self.restored: list[int] = []
        self.policies: list[tuple[str, float]] = []
        self.length = 0
        self.last_time: datetime | None = None
        self.answers: Counter[str] = Counter()
        self._charges: Counter[tuple[datetime, DpEvent]] = Counter()

    def follow(self, event: Event) -> None:
        """Take the next event into account.

        Raises:
            RunError: the event does not say what its kind needs, or cannot follow those before it.
        """
        try:
            self._follow(event)
        except (FedtuneError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"event {event.sequence} ({event.kind}) cannot be understood: {error}") from error
        self.length = event.sequence

    def _follow(self, event: Event) -> None:
        moment = datetime.fromisoformat(event.time)
        if self.last_time is not None and moment < self.last_time:
            raise ValueError("its time lies before the event in front of it")
        self.last_time = moment
        if not self.opened and (event.kind, event.detail.get("what")) != (Kind.NOTE, "opened"):
            raise ValueError("the first event must open the ledger")
        match event.kind:
            case Kind.PLAN:
                if event.run in self.runs:
                    raise ValueError("the run was accepted before")
                proposal = Proposal.from_json(event.detail["proposal"])
                self.runs[event.run] = Run(proposal=proposal, expires=datetime.fromisoformat(event.detail["expires"]))
                self.seeded |= proposal.seeded_noise
            case Kind.RESERVE:
                self._reserve(event, moment)
            case Kind.COMMIT:
                run = self.runs[event.run]
                if run.reserved.get(event.round) != event.request or run.attempts[event.round] != event.attempt:
                    raise ValueError("it commits what was not reserved")
                run.replies[event.request] = str(event.detail["reply_sha256"])
            case Kind.REFUSAL | Kind.RELEASE:
                self.answers[event.time[:10]] += 1
            case Kind.NOTE:
                self._note(event, moment)

    def _reserve(self, event: Event, moment: datetime) -> None:
        run = self.runs[event.run]
        run.attempts[event.round] += 1
        if (
            run.attempts[event.round] != event.attempt
            or run.reserved.setdefault(event.round, event.request) != event.request
        ):
            raise ValueError("it does not follow the reservations before it")
        charged = dp_events.from_json(event.detail["event"])
        if charged != run.plan.event():
            raise ValueError("it charges something else than a round of the run's plan")
        self._charges[moment, charged] += 1

    def _note(self, event: Event, moment: datetime) -> None:
        match event.detail["what"]:
            case "opened":
                if self.opened:
                    raise ValueError("the ledger was opened before")
                self.opened = event.detail
            case "policy":
                self.policy = event.detail["policy"]
                cap = self.policy["budget"]["max_epsilon"]
                self.policies.append((event.time, math.inf if cap is None else float(cap)))
            case "run_ended":
                self.runs[event.run].expires = None
            case "restored":
                self.restored.append(int(event.detail["anchor_sequence"]))
                for data, count in event.detail["gap"]:
                    missing = dp_events.from_json(data)
                    self.gaps[missing] += count
                    self._charges[moment, missing] += count
            case "frozen":
                self.frozen = True
            case other:
                raise ValueError(f"unknown note {other!r}")

    @property
    def delta(self) -> float:
        """At which every figure of the ledger is stated."""
        return float(self.opened["delta"])

    @property
    def order(self) -> float:
        """Of the filter, fixed when the ledger was made."""
        return float(self.opened["order"])

    @property
    def cap(self) -> float:
        """The newest lifetime cap."""
        return self.policies[-1][1]

    def charged(self, *, period: str | None = None, now: datetime | None = None) -> Counter[DpEvent]:
        """Single mechanisms charged so far, counted; with `period`, only in the calendar period of `now`."""
        chosen: Counter[DpEvent] = Counter()
        for (moment, event), count in self._charges.items():
            if period is None or (now is not None and period_of(moment, period) == period_of(now, period)):
                chosen[event] += count
        return dp_events.grouped(chosen)

    def set_aside(self, now: datetime, *, leave_out: str = "") -> Counter[DpEvent]:
        """What all open runs may still spend, but for the run `leave_out`."""
        total: Counter[DpEvent] = Counter()
        for name, run in self.runs.items():
            if name != leave_out:
                total.update(run.set_aside(now))
        return dp_events.grouped(total)

    def divergence(self, spent: dp_events.Spent) -> float:
        """Of `spent`, at the ledger's order."""
        return filter.total_divergence(spent, self.order)


def expiry(now: datetime, days: float) -> str:
    """When a run that is accepted at `now` expires."""
    return (now + timedelta(days=days)).isoformat()
