"""The sum of a ledger's events: runs, charges and reservations.  Spending is always derived from events, never stored.

`History.apply_event` processes one event after another.  It reads nothing but events, so that everybody with the same
ledger derives the same figures.
"""

from __future__ import annotations

import math
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from itertools import groupby

from fedtune.codec import decode, decode_value
from fedtune.privacy import events as dp_events
from fedtune.privacy import filter
from fedtune.privacy.cohorts import OLDEST, Cohorts, compute_period_number, find_cohort_group_starts
from fedtune.privacy.dp_library import DpEvent
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import (
    LASTING,
    START,
    Arrivals,
    Doubt,
    Event,
    Head,
    Kind,
    Restored,
    charge_rows,
    iter_charges,
)
from fedtune.privacy.ledger.register import Opened, Row
from fedtune.privacy.policy_file import build_never_accepted_mark, decode_policy_json, iter_permanent_marks
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import Policy
from fedtune.spec import FedtuneError, RunError

_FIRST = ("opened", "policy")  # the notes that every ledger begins with


@dataclass(kw_only=True, slots=True)
class AcceptedRun:
    """One accepted run.

    Attributes:
        proposal: the accepted proposal.
        expires: when the reservation for its plan expires; None: the run has ended.
        reserved: round -> digest of the request for which it was charged.
        attempts: round -> number of reservations.
        replies: request digest -> SHA-256 of the committed reply.
        adapter: digest of the final adapter, once the lead has sent it.
    """

    proposal: Proposal
    expires: datetime | None
    reserved: dict[int, str] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)
    replies: dict[str, str] = field(default_factory=dict)
    adapter: str = ""

    @property
    def plan(self) -> Plan:
        """The plan of the run, which determines the cost of its releases."""
        return self.proposal.plan

    @property
    def charged_rounds(self) -> int:
        """The number of charged rounds, retries included."""
        return self.attempts.total()

    def is_open(self, now: datetime) -> bool:
        """Whether the run may still be charged."""
        return self.expires is not None and now < self.expires

    def count_remaining_charges(self, now: datetime) -> Counter[DpEvent]:
        """Return the rest of the plan that the run may still spend; empty once the run is no longer open."""
        left = self.plan.most_rounds - self.charged_rounds
        once = dp_events.count_mechanisms([self.plan.event()]) if self.is_open(now) else Counter()
        return Counter({event: count * left for event, count in once.items()})


def _list_user_columns(policy: Policy) -> Iterator[tuple[str, str, str]]:
    """Yield ("dataset", id, user column) and ("file", path, user column) for each data set of a population of users."""
    for dataset in policy.dataset if policy.population.unit == "user" else ():
        if column := dataset.columns.get("user"):
            yield "dataset", dataset.id, column
            if dataset.path:
                yield "file", posixpath.normpath(dataset.path), column


class History:
    """The sum of a ledger's events: runs, charges, reservations, policies and decisions.

    In a population with arrivals, spending is that of the cohort with the highest spending.

    Attributes:
        policy: the newest policy.
        users: the column that identifies the owner of a record, for every data set id and file that a policy ever
            named; another column would turn a budget per person into a budget per visit.
        delta: the delta of every epsilon in the ledger.
        order: the Renyi order of the filter.
        runs: run name -> `AcceptedRun`.
        doubts: genuine receipts that prove missing events, each until a restore makes up for it.
        restored: the restore notes, one for each time that a backup was put back.
        lost_runs: run -> rounds charged on lost branches only.
        hashes: of all events, in order.
        path: (sequence, hash) of each lasting event.
        policies: lifetime caps, oldest first, as (time, max_epsilon, number of rounds charged and backups put back
            before); caps of a lost branch have the time of the restore.
        answers: number of refusals and offers, by day and by whether a stranger received them.
        refused: (day, run, lead, reason) of each refusal.
        approved: digest of each proposal that a person at the site approved -> time of the approval.
        denied: digests of the proposals that a person at the site denied.
        marks: permanent marks of the ledger: ("seeded", ""), ("frozen", ""), the result of `iter_permanent_marks`
            for each policy, and `never(run, lead)` for a run that was refused and then ended by that lead.
        decided: digest of a proposal -> the decisions of people on it: `what` ("approved" or "denied"), the `day`, and
            `by`, `ticket` and `why`, each None if not given.
        last_time: time of the newest event.
        register: digest of the register of arrivals.
        lost_rows: for each restore that may have lost rows of the register: the newest event whose rows are complete,
            and the sequence of the restore note.
    """

    def __init__(self) -> None:
        self._opened: Opened | None = None
        self.policy: Policy | None = None
        self.users: set[tuple[str, str, str]] = set()
        self.delta = self.order = math.nan
        self.runs: dict[str, AcceptedRun] = {}
        self.doubts: frozenset[Doubt] = frozenset()
        self.restored: list[Restored] = []
        self.lost_runs: dict[str, int] = {}
        self.policies: list[tuple[str, float, int]] = []
        self.hashes: list[str] = []
        self.path: list[tuple[int, str]] = []
        self.last_time: datetime | None = None
        self.answers: Counter[tuple[date, bool]] = Counter()
        self.refused: set[tuple[date, str, str, str]] = set()
        self.approved: dict[str, datetime] = {}
        self.denied: set[str] = set()
        self.marks: set[tuple[str, str]] = set()
        self.decided = defaultdict[str, list[dict[str, str | None]]](list)
        self._rounds: list[tuple[int, str]] = []  # sequence, run
        # Sequence, time, mechanism, count, and whom it was charged to; None: everybody.
        self._charges: list[tuple[int, datetime, DpEvent, int, Cohorts | None]] = []
        self.register = START
        self.lost_rows: list[tuple[int, int]] = []

    @classmethod
    def empty(cls, policy: Policy) -> History:
        """Return the empty history of a ledger that is yet to be created under `policy`."""
        history = cls()
        history.policy, history.delta, history.order = policy, policy.budget.delta, policy.budget.order()
        return history

    def apply_event(self, event: Event) -> None:
        """Process the next event.

        Raises:
            RunError: the event lacks a field that its kind requires, or cannot follow the earlier events.
        """
        self.hashes.append(event.hash)  # also if it fails: what was followed by half must not pass for what came before
        self.path += [(event.sequence, event.hash)] if event.kind in LASTING else []
        try:
            self._dispatch_event(event)
        except (FedtuneError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise RunError(f"event {event.sequence} ({event.kind}) is invalid: {error}") from error

    def _dispatch_event(self, event: Event) -> None:
        moment = datetime.fromisoformat(event.time)
        if self.last_time is not None and moment < self.last_time:
            raise ValueError("it is dated before the previous event")
        self.last_time = moment
        if event.sequence <= 2 and (event.kind, event.detail.get("what")) != (Kind.NOTE, _FIRST[event.sequence - 1]):
            raise ValueError(f"event {event.sequence} must be the note {_FIRST[event.sequence - 1]!r}")
        match event.kind:
            case Kind.PLAN:
                if event.run in self.runs:
                    raise ValueError("the run has already been accepted")
                proposal = decode(Proposal, event.detail["proposal"])
                if (proposal.plan.cohorts.period if proposal.plan.cohorts else "") != self.opening.arrivals:
                    raise ValueError("its cohorts do not match the ledger's calendar")
                expires = datetime.fromisoformat(event.detail["expires"])
                self.runs[event.run] = AcceptedRun(proposal=proposal, expires=expires)
                self.marks |= {("seeded", "")} if proposal.seeded_noise else set()
            case Kind.RESERVE:
                self._apply_reservation(event, moment)
            case Kind.COMMIT:
                run = self.runs[event.run]
                if run.reserved.get(event.round) != event.request or run.attempts[event.round] != event.attempt:
                    raise ValueError("it commits a round that was not reserved")
                run.replies[event.request] = str(event.detail["reply_sha256"])
            case Kind.REFUSAL | Kind.RELEASE:
                stranger = Reason(event.detail.get("reason", Reason.SITE_ERROR)).is_from_stranger
                self.answers[moment.date(), stranger] += 1
                lead, reason = str(event.detail.get("lead", "")), str(event.detail.get("reason"))
                self.refused.add((moment.date(), event.run, lead, reason))
            case Kind.NOTE:
                self._apply_note(event, moment)

    def _apply_reservation(self, event: Event, moment: datetime) -> None:
        run = self.runs[event.run]
        run.attempts[event.round] += 1
        self._rounds.append((event.sequence, event.run))
        if (
            run.attempts[event.round] != event.attempt
            or run.reserved.setdefault(event.round, event.request) != event.request
        ):
            raise ValueError("it does not follow from the reservations before it")
        charged = dp_events.from_json(event.detail["event"])
        if charged != run.plan.event():
            raise ValueError("it does not charge a round of the run's plan")
        cohorts = run.plan.cohorts
        if event.cohort != (str(cohorts) if cohorts else ""):
            raise ValueError("it does not charge the cohorts of the run's plan")
        if cohorts is not None:
            self.register = str(event.detail["register"])
        for part, count in dp_events.count_mechanisms([charged]).items():
            self._charges.append((event.sequence, moment, part, count, cohorts))

    def _apply_note(self, event: Event, moment: datetime) -> None:
        match event.detail["what"]:
            case "opened":
                if self._opened is not None:
                    raise ValueError("the ledger was opened before")
                self._opened = Opened.from_detail(event.detail)
                self.delta, self.order = self._opened.delta, self._opened.order
            case "policy":
                before, self.policy = self.policy, decode_policy_json(event.detail["policy"])
                loosens = before.budget if before and self._charges else None
                self.marks.update(iter_permanent_marks(self.policy, before=loosens, time=event.time))
                self.users.update(_list_user_columns(self.policy))
                self.policies.append(
                    (event.time, self.policy.budget.max_epsilon, len(self._rounds) + len(self.restored))
                )
            case "approved":
                self.approved[self._apply_decision(event).digest()] = moment
            case "denied":
                denied = self._apply_decision(event)
                self.denied.add(denied.digest())
                if (run := self.runs.get(event.run)) is not None and run.proposal == denied:
                    run.expires = None
            case "run_ended":
                lead = str(event.detail.get("lead", ""))
                if event.run not in self.runs and self.has_refused(event.run, lead):
                    self.marks.add(build_never_accepted_mark(event.run, lead))
                else:
                    ended = self.runs[event.run]
                    ended.expires, ended.adapter = None, str(event.detail["adapter_sha256"])
            case "date_confirmed":
                pass  # its time is what it says
            case "restored":
                self._apply_restore(Restored.from_detail(event.detail), event.sequence, moment)
            case "in_doubt":
                shown = [event.detail["sequence"], event.detail["head"], event.run, event.detail["rounds"]]
                self.doubts |= {decode_value("in_doubt", shown, Doubt)}
            case "frozen":
                self.marks.add(("frozen", ""))
            case other:
                raise ValueError(f"unknown note {other!r}")

    def _apply_decision(self, event: Event) -> Proposal:
        """Process a person's decision, and return the proposal that it is about."""
        proposal = decode(Proposal, event.detail["proposal"])
        said = {key: decode_value(key, event.detail[key], str) or None for key in ("what", "by", "ticket", "why")}
        self.decided[proposal.digest()].append({**said, "day": event.time[:10]})
        return proposal

    def _apply_restore(self, restored: Restored, sequence: int, moment: datetime) -> None:
        self.restored.append(restored)
        self._charges += [
            (sequence, moment, event, count, Cohorts.from_text(said, self.opening.arrivals) if said else None)
            for event, count, said in iter_charges(restored.gap, restored.arrivals)
        ]
        if restored.arrivals is not None and restored.arrivals.lost_after is not None:
            self.lost_rows.append((restored.arrivals.lost_after, sequence))
        self.doubts = restored.doubts
        self.denied |= restored.denied
        self.marks |= restored.marks
        self.users |= restored.users
        for cap in (*(math.inf if cap is None else cap for cap in restored.caps), self.cap):
            if cap != self.cap:
                self.policies.append((moment.isoformat(), cap, len(self._rounds) + len(self.restored)))
        # How far each run had really got is not known here, so none of them goes on, known or not.
        for run in self.runs.values():
            run.expires = None
        for name, rounds in restored.runs.items():
            self.lost_runs[name] = rounds + self.lost_runs.get(name, 0)

    @property
    def opening(self) -> Opened:
        """The ledger's first event."""
        assert self._opened is not None, "an empty history has not been opened"
        return self._opened

    @property
    def seeded(self) -> bool:
        """Whether any accepted run took its noise from a seed."""
        return ("seeded", "") in self.marks

    @property
    def is_frozen(self) -> bool:
        """Whether all training on this population has ended for good."""
        return ("frozen", "") in self.marks

    @property
    def furthest_doubt(self) -> Doubt | None:
        """The doubt with the highest sequence, or None.  A ledger in doubt permits no training."""
        return max(self.doubts, default=None)

    @property
    def cap(self) -> float:
        """The current lifetime cap on epsilon."""
        return self.policies[-1][1]

    @property
    def caps(self) -> tuple[float | None, ...]:
        """All lifetime caps so far, newest last; None means no cap."""
        return tuple(None if math.isinf(cap) else float(cap) for cap, _ in groupby(cap for _, cap, _ in self.policies))

    @property
    def length(self) -> int:
        """The number of events."""
        return len(self.hashes)

    @property
    def hash(self) -> str:
        """The hash of the newest event."""
        return self.hashes[-1] if self.hashes else START

    def iter_changed_user_columns(self, policy: Policy) -> list[tuple[str, str, str]]:
        """Return (key, earlier user column, user column in `policy`) wherever the two columns differ."""
        named = list(_list_user_columns(policy))  # two of its own data sets may differ over one file
        return [
            (f"{kind} {name} columns.user", was, now)
            for kind, name, now in named
            for *other, was in sorted(self.users.union(named))
            if other == [kind, name] and was != now
        ]

    def charged_rounds(self, run: str) -> int:
        """Return the number of rounds charged to a run, lost branches included."""
        known = self.runs.get(run)
        return (known.charged_rounds if known else 0) + self.lost_runs.get(run, 0)

    def has_refused(self, run: str, lead: str) -> bool:
        """Whether the site refused a proposal with this run name from this lead."""
        return any((name, who) == (run, lead) for _, name, who, _ in self.refused)

    def count_rounds_up_to(self, sequence: int) -> Counter[str]:
        """Count the rounds charged to each run by events up to `sequence`, without those on lost branches."""
        return Counter(run for number, run in self._rounds if number <= sequence)

    def charges(self, *, up_to: int | None = None) -> Counter[tuple[DpEvent, str]]:
        """Count the charged mechanisms by (mechanism, charged cohorts), optionally only those of events up to
        `up_to`.
        """
        total: Counter[tuple[DpEvent, str]] = Counter()
        for sequence, _, event, count, cohorts in self._charges:
            if up_to is None or sequence <= up_to:
                total[event, str(cohorts) if cohorts else ""] += count
        return total

    def cohorts(self, admitted: Cohorts | None = None) -> list[int]:
        """Return the first cohort of each group of cohorts with equal figures, ascending; optionally only those in
        `admitted`.

        A ledger without arrivals has one group, which holds everybody.
        """
        known = {cohorts for *_, cohorts in self._charges} | {run.plan.cohorts for run in self.runs.values()}
        begins = find_cohort_group_starts(known | {admitted}, oldest_apart=bool(self.lost_rows))
        return [cohort for cohort in begins if admitted is None or cohort in admitted]

    def find_cohort(self, row: Row | None, own: int) -> int:
        """Return a person's cohort: the one in the register's `row`, or `own` if the person has no row.

        `own` is the cohort by the person's own records.  After a restore, a lost row may have belonged to anybody who
        is missing from this register, or who was written to it after the branches split; the lost branch charged these
        people under an unknown cohort.  They count as the oldest cohort, which then owes everything that was charged to
        any cohort.
        """
        if row is None:
            return OLDEST if self.lost_rows else own
        return OLDEST if any(last < row.sequence <= at for last, at in self.lost_rows) else row.cohort

    def count_total_charges(self, cohort: int | None = None) -> Counter[DpEvent]:
        """Count all mechanisms charged so far: to `cohort`, or to the cohort with the highest spending."""
        return self._find_highest_spending(cohort, lambda number: self._sum_charges(number, lambda _: True))

    def count_charges_and_reservations(self, now: datetime, cohort: int | None = None) -> Counter[DpEvent]:
        """Count all mechanisms charged so far or set aside for open runs."""
        return self._find_highest_spending(
            cohort, lambda number: self.count_total_charges(number) + self.count_remaining_charges(now, number)
        )

    def epsilon(self, spent: Counter[DpEvent] | None = None) -> float:
        """Return the epsilon of `spent`, by default of all charges, by the Renyi filter as in the caps; may be
        infinite.
        """
        return filter.epsilon_filter(
            self.count_total_charges() if spent is None else spent, order=self.order, delta=self.delta
        )

    def count_charges_in_period(self, period: str, now: datetime, cohort: int | None = None) -> Counter[DpEvent]:
        """Count the mechanisms charged in the calendar period that contains `now`."""
        this = compute_period_number(now, period)
        return self._find_highest_spending(
            cohort,
            lambda number: self._sum_charges(number, lambda moment: compute_period_number(moment, period) == this),
        )

    def count_remaining_charges(self, now: datetime, cohort: int | None = None) -> Counter[DpEvent]:
        """Count the mechanisms that open runs may still spend."""

        def count_for_cohort(number: int) -> Counter[DpEvent]:
            total: Counter[DpEvent] = Counter()
            for run in self.runs.values():
                if run.plan.cohorts is None or number in run.plan.cohorts:
                    total.update(run.count_remaining_charges(now))
            return dp_events.count_mechanisms(total)

        return self._find_highest_spending(cohort, count_for_cohort)

    def _sum_charges(self, cohort: int, chosen: Callable[[datetime], bool]) -> Counter[DpEvent]:
        owes_all_up_to = max((at for _, at in self.lost_rows if cohort == OLDEST), default=0)
        total: Counter[DpEvent] = Counter()
        for sequence, moment, event, count, cohorts in self._charges:
            if (cohorts is None or cohort in cohorts or sequence <= owes_all_up_to) and chosen(moment):
                total[event] += count
        return dp_events.count_mechanisms(total)

    def _find_highest_spending(self, cohort: int | None, figure: Callable[[int], Counter[DpEvent]]) -> Counter[DpEvent]:
        """Return `figure` of a cohort; without one, the figure with the largest divergence over all cohorts."""
        if cohort is not None:
            return figure(cohort)
        found = [figure(each) for each in self.cohorts()]
        return found[0] if len(found) == 1 else max(found, key=self.divergence)

    @property
    def clock(self) -> datetime:
        """The time of this machine's clock, but never before the newest event."""
        now = datetime.now(UTC)
        return now if self.last_time is None else max(now, self.last_time)

    def now(self, *, server: datetime | None = None) -> datetime:
        """Return the ledger's time: this machine's clock, unless that would open a budget period too early.

        Guarantee: the time is never before the newest event, so that setting the clock back opens no period.  Under a
        cap per calendar period, a new period begins only if it directly follows the period of the newest event, and if
        both the clock and the `server`'s time, if given, are in it.  So neither of the two can open a period alone, a
        server that reports month after month opens none of them while the clock is right, and both together open only
        the next period.  For a later period a person has to confirm the date, which is an event of its own.
        """
        clock, last = self.clock, self.last_time
        if last is None or self.policy is None or self.policy.budget.max_epsilon_per_period is None:
            return clock
        told = server or clock
        begun, said, wanted = (
            compute_period_number(moment, self.policy.budget.period) for moment in (last, told, clock)
        )
        if wanted == begun or wanted == said == begun + 1:
            return clock
        return max(last, min(clock, told)) if said == begun else last

    def explain_pending_period(self, *, server: datetime | None = None) -> str:
        """Return why the clock's budget period has not begun and how to open it; empty if the period has begun."""
        if self.policy is None or self.last_time is None:
            return ""
        clock, time, period = self.clock, self.now(server=server), self.policy.budget.period
        if compute_period_number(clock, period) <= compute_period_number(time, period):
            return ""
        told = f", the server's time is {server:%Y-%m-%d %H:%M}" if server else ""
        return (
            f"this machine's clock says {clock:%Y-%m-%d %H:%M} UTC{told}, and the ledger's newest event is from "
            f"{self.last_time:%Y-%m-%d}: charges count for the {period} of {time:%Y-%m-%d}. If the clock is right, "
            "confirm it with `fedtune ledger confirm-date --policy site.toml`"
        )

    def covers_receipt(self, shown: Doubt, matches: Callable[[str], bool], *, besides: Restored | None = None) -> bool:
        """Whether the ledger contains the receipt's event, whose hash `matches`, or has made up for its loss.

        `besides` is a restore note to assume in addition.
        """
        here = self.hashes[shown.sequence - 1 : shown.sequence]
        lost = [*self.restored, *([besides] if besides else [])]
        there = [hash for restored in lost for number, hash in restored.path if number == shown.sequence]
        return any(map(matches, [*here, *there]))

    def covers_head(self, head: Head) -> bool:
        """Whether no event up to `head` is missing, or every lasting event that is missing has been made up for."""
        if head.sequence <= self.length and self.hashes[head.sequence - 1] == head.hash:
            return True
        return any(head.path[-1] in restored.path for restored in self.restored)

    def head(self, key: SigningKey) -> Head:
        """Create and sign the newest head."""
        assert self.last_time is not None
        assert self.policy is not None
        charged = charge_rows(self.charges())
        arrivals = Arrivals(
            ranges=tuple(said for *_, said in charged),
            lost_after=min((last for last, _ in self.lost_rows), default=None),
        )
        return Head.create_signed(
            key,
            ledger=self.opening.ledger,
            sequence=self.length,
            hash=self.hash,
            time=self.last_time.isoformat(),
            charged=tuple((event, count) for event, count, _ in charged),
            runs=tuple((name, self.charged_rounds(name)) for name in sorted({*self.runs, *self.lost_runs})),
            path=tuple(self.path),
            made_up=tuple(sorted({pair for restored in self.restored for pair in restored.path})),
            doubts=tuple(sorted(self.doubts)),
            denied=tuple(sorted(self.denied)),
            marks=tuple(sorted(self.marks)),
            policy=self.policy.digest(),
            caps=self.caps,
            users=tuple(sorted(self.users)),
            arrivals=arrivals if self.opening.arrivals else None,
        )

    def divergence(self, spent: dp_events.Spent) -> float:
        """Return the Renyi divergence of `spent` at the ledger's order."""
        return filter.compute_total_divergence(spent, self.order)
