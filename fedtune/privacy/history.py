"""What a ledger's events add up to: runs, charges, what is set aside.  Spending is always derived, never stored.

`History.follow` takes one event after another.  It reads nothing but events, so that two people with the same ledger
derive the same figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime

from dp_accounting import DpEvent

from fedtune.privacy import events as dp_events
from fedtune.privacy import filter
from fedtune.privacy.chain import START, Event, Head, Kind, path_of
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.notes import Doubt, Opened, Restored
from fedtune.privacy.policy import Policy, period_of
from fedtune.privacy.policy_file import policy_of
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.privacy.run import Run
from fedtune.spec import FedtuneError, RunError

_FIRST = ("opened", "policy")  # the notes that every ledger begins with


class History:
    """The sum of a ledger's events.

    Attributes:
        policy: the newest one.
        delta: at which every figure of the ledger is stated.
        order: of the filter.
        runs: run -> what became of it.
        seeded: whether any accepted run took its noise from a seed.
        frozen: whether all training on the population has ended for ever.
        in_doubt: a genuine receipt that shows that events are missing, until they are made up for.
        restored: what was made up for, each time a backup was put back.
        lost_runs: run -> rounds that it was charged on lost branches alone.
        hashes: of all events, in order.
        policies: caps in force, oldest first, as (time, max_epsilon).
        answers: refusals and offers of each day, and whether a stranger got them.
        refused: (day, run, reason) of each refusal.
        approved: digest of each proposal that a person at the site approved -> when.
        last_time: of the newest event.
    """

    def __init__(self) -> None:
        self._opened: Opened | None = None
        self.policy: Policy | None = None
        self.delta = self.order = math.nan
        self.runs: dict[str, Run] = {}
        self.seeded = False
        self.frozen = False
        self.in_doubt: Doubt | None = None
        self.restored: list[Restored] = []
        self.lost_runs: dict[str, int] = {}
        self.policies: list[tuple[str, float]] = []
        self.hashes: list[str] = []
        self.last_time: datetime | None = None
        self.answers: Counter[tuple[date, bool]] = Counter()
        self.refused: set[tuple[date, str, str]] = set()
        self.approved: dict[str, datetime] = {}
        self._rounds: list[tuple[int, str]] = []  # sequence, run
        self._charges: list[tuple[int, datetime, DpEvent, int]] = []  # sequence, time, mechanism, count

    @classmethod
    def before(cls, policy: Policy) -> History:
        """The empty history of a ledger that is yet to be made under `policy`."""
        history = cls()
        history.policy, history.delta, history.order = policy, policy.budget.delta, policy.budget.order()
        return history

    def follow(self, event: Event) -> None:
        """Take the next event into account.

        Raises:
            RunError: the event does not say what its kind needs, or cannot follow those before it.
        """
        self.hashes.append(event.hash)  # also if it fails: what was followed by half must not pass for what came before
        try:
            self._follow(event)
        except (FedtuneError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise RunError(f"event {event.sequence} ({event.kind}) cannot be understood: {error}") from error

    def _follow(self, event: Event) -> None:
        moment = datetime.fromisoformat(event.time)
        if self.last_time is not None and moment < self.last_time:
            raise ValueError("its time is earlier than that of the event before it")
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
                    raise ValueError("it commits a round that was not reserved")
                run.replies[event.request] = str(event.detail["reply_sha256"])
            case Kind.REFUSAL | Kind.RELEASE:
                stranger = Reason(event.detail.get("reason", Reason.SITE_ERROR)).is_of_a_stranger
                self.answers[moment.date(), stranger] += 1
                self.refused.add((moment.date(), event.run, str(event.detail.get("reason"))))
            case Kind.NOTE:
                self._note(event, moment)

    def _reserve(self, event: Event, moment: datetime) -> None:
        run = self.runs[event.run]
        run.attempts[event.round] += 1
        self._rounds.append((event.sequence, event.run))
        if (
            run.attempts[event.round] != event.attempt
            or run.reserved.setdefault(event.round, event.request) != event.request
        ):
            raise ValueError("it does not follow the reservations before it")
        charged = dp_events.from_json(event.detail["event"])
        if charged != run.plan.event():
            raise ValueError("it does not charge a round of the run's plan")
        for part, count in dp_events.grouped([charged]).items():
            self._charges.append((event.sequence, moment, part, count))

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
            case "approved":
                self.approved[Proposal.from_json(event.detail["proposal"]).digest()] = moment
            case "run_ended":
                ended = self.runs[event.run]
                ended.expires, ended.adapter = None, str(event.detail.get("adapter_sha256", ""))
            case "restored":
                self._restore(Restored.of(event.detail), event.sequence, moment)
            case "in_doubt":
                self.in_doubt = Doubt(sequence=int(event.detail["sequence"]), head=str(event.detail["head"]))
            case "frozen":
                self.frozen = True
            case other:
                raise ValueError(f"unknown note {other!r}")

    def _restore(self, restored: Restored, sequence: int, moment: datetime) -> None:
        self.restored.append(restored)
        self._charges += [(sequence, moment, event, count) for event, count in restored.gap.items()]
        self.seeded |= restored.seeded
        self.frozen |= restored.frozen
        if restored.clears_doubt:
            self.in_doubt = None
        # How far each run had really got is not known here, so none of them goes on, known or not.
        for run in self.runs.values():
            run.expires = None
        for name, rounds in restored.runs.items():
            self.lost_runs[name] = rounds + self.lost_runs.get(name, 0)

    @property
    def opened(self) -> Opened:
        """What never changes."""
        assert self._opened is not None, "an empty history has not been opened"
        return self._opened

    @property
    def cap(self) -> float:
        """The newest lifetime cap."""
        return self.policies[-1][1]

    @property
    def length(self) -> int:
        """Number of events."""
        return len(self.hashes)

    @property
    def hash(self) -> str:
        """Of the newest event."""
        return self.hashes[-1] if self.hashes else START

    def charged_rounds(self, run: str) -> int:
        """Rounds that a run was charged for, on a lost branch too."""
        known = self.runs.get(run)
        return (known.charged_rounds if known else 0) + self.lost_runs.get(run, 0)

    def rounds_up_to(self, sequence: int) -> Counter[str]:
        """Run -> rounds charged by events up to `sequence`, here."""
        return Counter(run for number, run in self._rounds if number <= sequence)

    def charged(self, *, up_to: int | None = None) -> Counter[DpEvent]:
        """Single mechanisms charged so far, counted; with `up_to`, by events up to that sequence."""
        return self._sum(lambda sequence, _: up_to is None or sequence <= up_to)

    def charged_in_period(self, period: str, now: datetime) -> Counter[DpEvent]:
        """The same in the calendar period that `now` lies in."""
        return self._sum(lambda _, moment: period_of(moment, period) == period_of(now, period))

    def _sum(self, chosen: Callable[[int, datetime], bool]) -> Counter[DpEvent]:
        total: Counter[DpEvent] = Counter()
        for sequence, moment, event, count in self._charges:
            if chosen(sequence, moment):
                total[event] += count
        return dp_events.grouped(total)

    def set_aside(self, now: datetime) -> Counter[DpEvent]:
        """What all open runs may still spend."""
        total: Counter[DpEvent] = Counter()
        for run in self.runs.values():
            total.update(run.set_aside(now))
        return dp_events.grouped(total)

    def now(self) -> datetime:
        """The time, but never before the newest event: a clock that is set back opens no new period."""
        now = datetime.now(UTC)
        return now if self.last_time is None else max(now, self.last_time)

    def knows(self, sequence: int, matches: Callable[[str], bool], *, besides: Restored | None = None) -> bool:
        """Whether the event `sequence` whose hash `matches` is here, or on a lost branch that was made up for."""
        here = self.hashes[sequence - 1 : sequence] if sequence else [START]
        lost = [*self.restored, *([besides] if besides else [])]
        return any(map(matches, here)) or any(restored.knows(sequence, matches) for restored in lost)

    def holds(self, head: Head) -> bool:
        """Whether no event up to `head` is missing, or what was is made up for.

        Unlike a receipt, a head that a lost branch's sparse path does not name is not trusted: it can be charged.
        """
        if head.sequence <= self.length and self.hashes[head.sequence - 1] == head.hash:
            return True
        return any((head.sequence, head.hash) in restored.path for restored in self.restored)

    def head(self, key: SigningKey) -> Head:
        """The newest head, signed."""
        assert self.last_time is not None
        return Head.signed(
            key,
            ledger=self.opened.ledger,
            sequence=self.length,
            hash=self.hash,
            time=self.last_time.isoformat(),
            charged=tuple(dp_events.counted(self.charged())),
            runs=tuple((name, self.charged_rounds(name)) for name in sorted({*self.runs, *self.lost_runs})),
            path=path_of(self.hashes),
            made_up=tuple(sorted({pair for restored in self.restored for pair in restored.path})),
            seeded=self.seeded,
            frozen=self.frozen,
        )

    def divergence(self, spent: dp_events.Spent) -> float:
        """Of `spent`, at the ledger's order."""
        return filter.total_divergence(spent, self.order)
