"""What a ledger's events add up to: runs, charges, what is set aside.  Spending is always derived, never stored.

`History.follow` takes one event after another.  It reads nothing but events, so that two people with the same ledger
derive the same figures.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dp_accounting import DpEvent

from fedtune.privacy import events as dp_events
from fedtune.privacy import filter
from fedtune.privacy.chain import Event, Head, Kind, canonical
from fedtune.privacy.keys import SigningKey, is_public_key
from fedtune.privacy.plan import Plan
from fedtune.privacy.policy import Policy, period_of
from fedtune.privacy.policy_file import policy_of
from fedtune.privacy.proposal import Proposal
from fedtune.spec import FedtuneError, RunError

_FIRST = ("opened", "policy")
"""The notes that every ledger begins with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What a ledger's first event says; none of it ever changes.

    Attributes:
        ledger: random id, in hex.
        order: of the filter.
        reference: the run that the order was chosen for, as an event's JSON.
    """

    ledger: str
    site: str
    population: str
    unit: str
    delta: float
    order: float
    reference: dict[str, Any]
    site_key: str
    no_person_at_another_site: bool

    @classmethod
    def of(cls, detail: dict[str, Any]) -> Opened:
        """Read the first event's detail; raises ValueError, TypeError or KeyError for anything else."""
        opened = cls(**{name: value for name, value in detail.items() if name != "what"})
        texts = all(isinstance(getattr(opened, name), str) for name in ("ledger", "site", "population", "unit"))
        numbers = type(opened.delta) is float and type(opened.order) is float
        if not (texts and numbers and 0 < opened.delta < 1 and opened.order > 1 and is_public_key(opened.site_key)):
            raise ValueError("it does not open a ledger")
        dp_events.from_json(opened.reference)
        return opened


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
        once = dp_events.grouped([self.plan.event()]) if self.is_open(now) else Counter()
        return Counter({event: count * left for event, count in once.items()})


class History:
    """The sum of a ledger's events.

    Attributes:
        policy: the newest one.
        delta: at which every figure of the ledger is stated.
        order: of the filter.
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
        self._opened: Opened | None = None
        self.policy: Policy | None = None
        self.delta = self.order = math.nan
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
        self.length = event.sequence  # also if it fails: what was followed by half must not pass for what came before
        try:
            self._follow(event)
        except (FedtuneError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise RunError(f"event {event.sequence} ({event.kind}) cannot be understood: {error}") from error

    def _follow(self, event: Event) -> None:
        moment = datetime.fromisoformat(event.time)
        if self.last_time is not None and moment < self.last_time:
            raise ValueError("its time lies before the event in front of it")
        self.last_time = moment
        if event.sequence <= 2 and (event.kind, event.detail.get("what")) != (Kind.NOTE, _FIRST[event.sequence - 1]):
            raise ValueError(f"event {event.sequence} must be the note {_FIRST[event.sequence - 1]!r}")
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
        for part, count in dp_events.grouped([charged]).items():
            self._charges[moment, part] += count

    def _note(self, event: Event, moment: datetime) -> None:
        match event.detail["what"]:
            case "opened":
                if self._opened is not None:
                    raise ValueError("the ledger was opened before")
                self._opened = Opened.of(event.detail)
                self.delta, self.order = self._opened.delta, self._opened.order
            case "policy":
                self.policy = policy_of(event.detail["policy"])
                self.policies.append((event.time, self.policy.budget.max_epsilon))
            case "run_ended":
                self.runs[event.run].expires = None
            case "restored":
                self.restored.append(int(event.detail["anchor_sequence"]))
                for data, count in event.detail["gap"]:
                    missing = dp_events.from_json(data)
                    self.gaps[missing] += count
                    self._charges[moment, missing] += count
                self.seeded |= bool(event.detail["seeded"])
                self.frozen |= bool(event.detail["frozen"])
                # How far each run had really got is not known any more, so none of them goes on.
                for run in self.runs.values():
                    run.expires = None
            case "frozen":
                self.frozen = True
            case other:
                raise ValueError(f"unknown note {other!r}")

    @property
    def opened(self) -> Opened:
        """What never changes."""
        assert self._opened is not None, "an empty history has not been opened"
        return self._opened

    @property
    def cap(self) -> float:
        """The newest lifetime cap."""
        return self.policies[-1][1]

    def charged(
        self, *, period: str | None = None, now: datetime | None = None, until: datetime | None = None
    ) -> Counter[DpEvent]:
        """Single mechanisms charged so far, counted.

        Args:
            period: count only what was charged in the calendar period of `now`.
            now: see `period`.
            until: count only what was charged up to then.
        """
        chosen: Counter[DpEvent] = Counter()
        for (moment, event), count in self._charges.items():
            in_period = period is None or (now is not None and period_of(moment, period) == period_of(now, period))
            if in_period and (until is None or moment <= until):
                chosen[event] += count
        return dp_events.grouped(chosen)

    def set_aside(self, now: datetime, *, leave_out: str = "") -> Counter[DpEvent]:
        """What all open runs may still spend, but for the run `leave_out`."""
        total: Counter[DpEvent] = Counter()
        for name, run in self.runs.items():
            if name != leave_out:
                total.update(run.set_aside(now))
        return dp_events.grouped(total)

    def makes_up_for(self, *, sequence: int, restores: int) -> bool:
        """Whether event `sequence`, known from outside when there had been `restores` restores, may be missing.

        It may if a backup was put back later and charged what it lacked up to there.
        """
        return sequence <= max(self.restored[restores:], default=0)

    def head(self, hash: str, key: SigningKey) -> Head:
        """The head of a ledger whose newest event has this `hash`, signed."""
        assert self.last_time is not None
        return Head.signed(
            key,
            ledger=self.opened.ledger,
            sequence=self.length,
            hash=hash,
            time=self.last_time.isoformat(),
            charged=tuple(counted(self.charged())),
            seeded=self.seeded,
            frozen=self.frozen,
            restores=len(self.restored),
        )

    def divergence(self, spent: dp_events.Spent) -> float:
        """Of `spent`, at the ledger's order."""
        return filter.total_divergence(spent, self.order)


def counted(spent: dp_events.Spent) -> list[tuple[dp_events.Json, int]]:
    """Counted mechanisms as JSON, in a fixed order."""
    pairs = [(dp_events.to_json(event), count) for event, count in dp_events.grouped(spent).items()]
    return sorted(pairs, key=lambda pair: canonical(pair[0]))
