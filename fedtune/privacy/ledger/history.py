"""The state of a ledger, derived from its events: runs, charges and reservations.

`History.apply_event` processes the events in order. Spending is always derived from events, never stored, so that
everybody with the same ledger computes the same epsilon.
"""

from __future__ import annotations

import math
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
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
    RestoreNote,
    iter_charges,
    list_charge_rows,
)
from fedtune.privacy.ledger.register import LedgerHeader, Row
from fedtune.privacy.policy_file import build_never_accepted_mark, decode_policy_json, iter_permanent_marks
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import Policy
from fedtune.spec import FedtuneError, RunError

_LARGEST_CLOCK_ERROR = timedelta(days=1)  # a clock was wrong if the newest event is further in the future
_HOW_TO_CONFIRM = "If the clock is right, confirm it with `fedtune ledger confirm-date --policy site.toml`"
_FIRST = ("opened", "policy")  # the first two notes of every ledger


@dataclass(kw_only=True, slots=True)
class AcceptedRun:
    """The state of a run that the ledger has accepted.

    Attributes:
        proposal: the accepted proposal.
        expires: expiration time of the reservation; None: the run has ended.
        reserved: round -> digest of the charged request.
        attempts: round -> number of reservations.
        replies: request digest -> SHA-256 of the committed reply.
        charged: round -> time of its newest charge.
        state_charged: time of the charge for the newest committed round, which the algorithm's state depends on.
        adapter: digest of the final adapter from the lead; empty before its arrival.
    """

    proposal: Proposal
    expires: datetime | None
    reserved: dict[int, str] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)
    replies: dict[str, str] = field(default_factory=dict)
    charged: dict[int, datetime] = field(default_factory=dict)
    state_charged: datetime | None = None
    adapter: str = ""

    @property
    def plan(self) -> Plan:
        """The run's plan, which determines its privacy cost."""
        return self.proposal.plan

    @property
    def charged_rounds(self) -> int:
        """Number of charged rounds, retries included."""
        return self.attempts.total()

    def has_state_of_this_period(self, period: str) -> bool:
        """Whether the algorithm's state was charged in the same calendar period as the run's newest round."""
        if self.state_charged is None:
            return False
        newest = self.charged[max(self.charged)]
        return compute_period_number(self.state_charged, period) == compute_period_number(newest, period)

    def is_open(self, now: datetime) -> bool:
        """Whether further rounds of the run may be charged at time `now`."""
        return self.expires is not None and now < self.expires

    def count_remaining_charges(self, now: datetime) -> Counter[DpEvent]:
        """Count the mechanisms of all rounds that may still be charged. A closed run has no such rounds."""
        left = self.plan.max_rounds - self.charged_rounds
        once = dp_events.count_mechanisms([self.plan.event()]) if self.is_open(now) else Counter()
        return Counter({event: count * left for event, count in once.items()})


def build_refusal_key(
    day: date, run: str, lead: str, reason: Reason, request: str
) -> tuple[date, str, str, Reason, str]:
    """Build the key under which a refusal is recorded once; for waiting reasons, it is the same for all requests."""
    return day, run, lead, reason, "" if reason.is_waiting else request


def _list_user_columns(policy: Policy) -> Iterator[tuple[str, str, str]]:
    """Yield ("dataset", id, user column) and ("file", path, user column) for each data set of a population of users."""
    for dataset in policy.dataset if policy.population.unit == "user" else ():
        if column := dataset.columns.get("user"):
            yield "dataset", dataset.id, column
            if dataset.path:
                yield "file", posixpath.normpath(dataset.path), column


class History:
    """The state of a ledger: runs, charges, reservations, policies and decisions.

    In a population with arrivals, the ledger's spending is the spending of the cohort with the highest spending.

    Attributes:
        policy: the newest policy.
        users: user column of every data set id and file in any policy so far; a different column would turn a budget
            per person into a budget per visit.
        delta: the delta at which every epsilon of the ledger is computed.
        order: Renyi order of the filter.
        runs: run name -> `AcceptedRun`.
        doubts: valid receipts for missing events, until a restore repeats the charges.
        restored: restore notes, one per restored backup.
        lost_runs: run -> number of rounds charged only on lost branches.
        hashes: hashes of all events, in order.
        path: (sequence, hash) of each lasting event.
        policies: lifetime caps, oldest first, as (time, max_epsilon, number of earlier charged rounds and restores);
            caps of a lost branch have the time of the restore.
        answers: number of refusals and offers, by day and by whether the recipient was a stranger.
        refused: the keys of all recorded refusals (`build_refusal_key`).
        approved: digest of each proposal that a person at the site approved -> time of the approval.
        denied: digests of the proposals that a person at the site denied.
        marks: permanent marks of the ledger: ("seeded", ""), ("frozen", ""), the marks of each policy
            (`iter_permanent_marks`), and the mark of each run that its lead ended after a refusal
            (`build_never_accepted_mark`).
        decided: digest of a proposal -> decisions of people at the site: `what` ("approved" or "denied"), `day`, `by`,
            `ticket` and `why`, each None if missing.
        last_time: time of the newest event; only a person's confirmation of the date sets it back.
        register: digest of the register of arrivals.
        lost_rows: for each restore that may have lost register rows: (newest event with complete rows, sequence number
            of the restore note).
    """

    def __init__(self) -> None:
        self._opened: LedgerHeader | None = None
        self.policy: Policy | None = None
        self.users: set[tuple[str, str, str]] = set()
        self.delta = self.order = math.nan
        self.runs: dict[str, AcceptedRun] = {}
        self.doubts: frozenset[Doubt] = frozenset()
        self.restored: list[RestoreNote] = []
        self.lost_runs: dict[str, int] = {}
        self.policies: list[tuple[str, float, int]] = []
        self.hashes: list[str] = []
        self.path: list[tuple[int, str]] = []
        self.last_time: datetime | None = None
        self.answers: Counter[tuple[date, bool]] = Counter()
        self.refused: set[tuple[date, str, str, Reason, str]] = set()
        self.approved: dict[str, datetime] = {}
        self.denied: set[str] = set()
        self.marks: set[tuple[str, str]] = set()
        self.decided = defaultdict[str, list[dict[str, str | None]]](list)
        self._rounds: list[tuple[int, str]] = []  # sequence, run
        # Sequence, time, mechanism, count, charged cohorts (None: everybody).
        self._charges: list[tuple[int, datetime, DpEvent, int, Cohorts | None]] = []
        self.register = START
        self.lost_rows: list[tuple[int, int]] = []

    @classmethod
    def empty(cls, policy: Policy) -> History:
        """Create the empty history of a new ledger under `policy`."""
        history = cls()
        history.policy, history.delta, history.order = policy, policy.budget.delta, policy.budget.order()
        return history

    def apply_event(self, event: Event) -> None:
        """Update the state with the next event.

        Raises:
            RunError: the event lacks a field that its kind requires, or contradicts the earlier events.
        """
        self.hashes.append(event.hash)  # even if the event is invalid: a partly applied event must not look unapplied
        self.path += [(event.sequence, event.hash)] if event.kind in LASTING else []
        try:
            self._dispatch_event(event)
        except (FedtuneError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise RunError(f"event {event.sequence} ({event.kind}) is invalid: {error}") from error

    def _dispatch_event(self, event: Event) -> None:
        moment = datetime.fromisoformat(event.time)
        confirmed = (event.kind, event.detail.get("what")) == (Kind.NOTE, "date_confirmed")
        if self.last_time is not None and moment < self.last_time and not confirmed:
            raise ValueError("the event's time is before the previous event's time")
        self.last_time = moment
        if event.sequence <= 2 and (event.kind, event.detail.get("what")) != (Kind.NOTE, _FIRST[event.sequence - 1]):
            raise ValueError(f"event {event.sequence} must be the note {_FIRST[event.sequence - 1]!r}")
        match event.kind:
            case Kind.PLAN:
                if event.run in self.runs:
                    raise ValueError("the run has already been accepted")
                proposal = decode(Proposal, event.detail["proposal"])
                if (proposal.plan.cohorts.period if proposal.plan.cohorts else "") != self.opening.arrivals:
                    raise ValueError("the cohorts of the plan do not match the ledger's calendar")
                expires = datetime.fromisoformat(event.detail["expires"])
                self.runs[event.run] = AcceptedRun(proposal=proposal, expires=expires)
                self.marks |= {("seeded", "")} if proposal.seeded_noise else set()
            case Kind.RESERVE:
                self._apply_reservation(event, moment)
            case Kind.COMMIT:
                run = self.runs[event.run]
                if run.reserved.get(event.round) != event.request or run.attempts[event.round] != event.attempt:
                    raise ValueError("the committed round was not reserved")
                run.replies[event.request] = str(event.detail["reply_sha256"])
                run.state_charged = run.charged[event.round]
            case Kind.REFUSAL | Kind.RELEASE:
                lead, reason = str(event.detail.get("lead", "")), Reason(event.detail.get("reason", Reason.SITE_ERROR))
                self.answers[moment.date(), reason.is_from_stranger] += 1
                self.refused.add(build_refusal_key(moment.date(), event.run, lead, reason, event.request))
            case Kind.NOTE:
                self._apply_note(event, moment)

    def _apply_reservation(self, event: Event, moment: datetime) -> None:
        run = self.runs[event.run]
        run.attempts[event.round] += 1
        run.charged[event.round] = moment
        self._rounds.append((event.sequence, event.run))
        if (
            run.attempts[event.round] != event.attempt
            or run.reserved.setdefault(event.round, event.request) != event.request
        ):
            raise ValueError("the reservation contradicts an earlier reservation")
        charged = dp_events.from_json(event.detail["event"])
        if charged != run.plan.event():
            raise ValueError("the charged event differs from a round of the run's plan")
        cohorts = run.plan.cohorts
        if event.cohort != (str(cohorts) if cohorts else ""):
            raise ValueError("the charged cohorts differ from the cohorts in the run's plan")
        if cohorts is not None:
            self.register = str(event.detail["register"])
        for part, count in dp_events.count_mechanisms([charged]).items():
            self._charges.append((event.sequence, moment, part, count, cohorts))

    def _apply_note(self, event: Event, moment: datetime) -> None:
        match event.detail["what"]:
            case "opened":
                if self._opened is not None:
                    raise ValueError("the ledger has already been opened")
                self._opened = LedgerHeader.from_detail(event.detail)
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
                pass  # the note has no content except its time
            case "restored":
                self._apply_restore(RestoreNote.from_detail(event.detail), event.sequence, moment)
            case "in_doubt":
                shown = [event.detail["sequence"], event.detail["head"], event.run, event.detail["rounds"]]
                self.doubts |= {decode_value("in_doubt", shown, Doubt)}
            case "frozen":
                self.marks.add(("frozen", ""))
            case other:
                raise ValueError(f"unknown note {other!r}")

    def _apply_decision(self, event: Event) -> Proposal:
        """Record a person's approval or denial, and return the decided proposal."""
        proposal = decode(Proposal, event.detail["proposal"])
        decision = {key: decode_value(key, event.detail[key], str) or None for key in ("what", "by", "ticket", "why")}
        self.decided[proposal.digest()].append({**decision, "day": event.time[:10]})
        return proposal

    def _apply_restore(self, restored: RestoreNote, sequence: int, moment: datetime) -> None:
        self.restored.append(restored)
        self._charges += [
            (sequence, moment, event, count, Cohorts.from_text(span, self.opening.arrivals) if span else None)
            for event, count, span in iter_charges(restored.gap, restored.arrivals)
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
        # The true progress of these runs is unknown, so no run continues.
        for run in self.runs.values():
            run.expires = None
        for name, rounds in restored.runs.items():
            self.lost_runs[name] = rounds + self.lost_runs.get(name, 0)

    @property
    def opening(self) -> LedgerHeader:
        """The content of the ledger's first event."""
        assert self._opened is not None, "an empty history has no first event"
        return self._opened

    @property
    def seeded(self) -> bool:
        """Whether any accepted run uses noise from a seed."""
        return ("seeded", "") in self.marks

    @property
    def is_frozen(self) -> bool:
        """Whether a person at the site has ended all training on this population permanently."""
        return ("frozen", "") in self.marks

    @property
    def furthest_doubt(self) -> Doubt | None:
        """The receipt in `doubts` with the highest sequence number, or None.

        A ledger with doubts permits no training.
        """
        return max(self.doubts, default=None)

    @property
    def cap(self) -> float:
        """Current lifetime cap on epsilon."""
        return self.policies[-1][1]

    @property
    def caps(self) -> tuple[float | None, ...]:
        """All lifetime caps on epsilon, newest last. None means no cap."""
        return tuple(None if math.isinf(cap) else float(cap) for cap, _ in groupby(cap for _, cap, _ in self.policies))

    @property
    def length(self) -> int:
        """Number of events in the ledger."""
        return len(self.hashes)

    @property
    def hash(self) -> str:
        """Hash of the newest event."""
        return self.hashes[-1] if self.hashes else START

    def list_changed_user_columns(self, policy: Policy) -> list[tuple[str, str, str]]:
        """List (key, recorded user column, user column in `policy`) for each user column that changed."""
        named = list(_list_user_columns(policy))  # two data sets of the policy may name different columns of one file
        return [
            (f"{kind} {name} columns.user", was, now)
            for kind, name, now in named
            for *other, was in sorted(self.users.union(named))
            if other == [kind, name] and was != now
        ]

    def charged_rounds(self, run: str) -> int:
        """Return the number of charged rounds of a run, including those on lost branches."""
        known = self.runs.get(run)
        return (known.charged_rounds if known else 0) + self.lost_runs.get(run, 0)

    def has_refused(self, run: str, lead: str) -> bool:
        """Whether the site has refused a proposal with this run name from this lead."""
        return any((name, who) == (run, lead) for _, name, who, *_ in self.refused)

    def count_rounds_up_to(self, sequence: int) -> Counter[str]:
        """Count each run's charged rounds up to event number `sequence`, excluding rounds on lost branches."""
        return Counter(run for number, run in self._rounds if number <= sequence)

    def charges(self, *, up_to: int | None = None) -> Counter[tuple[DpEvent, str]]:
        """Count the charges by (mechanism, charged cohorts), optionally only up to event number `up_to`."""
        total: Counter[tuple[DpEvent, str]] = Counter()
        for sequence, _, event, count, cohorts in self._charges:
            if up_to is None or sequence <= up_to:
                total[event, str(cohorts) if cohorts else ""] += count
        return total

    def cohorts(self, admitted: Cohorts | None = None) -> list[int]:
        """Group the cohorts with identical charges, and return each group's first cohort in ascending order.

        A ledger without arrivals has one group, which contains everybody.

        Args:
            admitted: include only cohorts in this range; None: all cohorts.
        """
        known = {cohorts for *_, cohorts in self._charges} | {run.plan.cohorts for run in self.runs.values()}
        begins = find_cohort_group_starts(known | {admitted}, oldest_apart=bool(self.lost_rows))
        return [cohort for cohort in begins if admitted is None or cohort in admitted]

    def find_cohort(self, row: Row | None, own: int) -> int:
        """Determine the cohort of a person from the register, or from the person's records if the register has no row.

        After a restore, a lost row may have belonged to anybody without a row in this register, or with a row from
        after the branches split; the lost branch charged these people under an unknown cohort. They count as members of
        the oldest cohort, which inherits all charges of all cohorts.

        Args:
            row: the person's row in the register, or None.
            own: cohort according to the person's records.
        """
        if row is None:
            return OLDEST if self.lost_rows else own
        return OLDEST if any(last < row.sequence <= at for last, at in self.lost_rows) else row.cohort

    def count_total_charges(self, cohort: int | None = None) -> Counter[DpEvent]:
        """Count all mechanisms charged to `cohort`, by default to the cohort with the highest spending."""
        return self._find_highest_spending(cohort, lambda number: self._sum_charges(number, lambda _: True))

    def count_charges_and_reservations(self, now: datetime, cohort: int | None = None) -> Counter[DpEvent]:
        """Count all mechanisms that are charged to `cohort` or still reserved for open runs."""
        return self._find_highest_spending(
            cohort, lambda number: self.count_total_charges(number) + self.count_remaining_charges(now, number)
        )

    def epsilon(self, spent: Counter[DpEvent] | None = None) -> float:
        """Compute the epsilon of `spent` (default: all charges) with the Renyi filter. The result may be infinite."""
        return filter.epsilon_filter(
            self.count_total_charges() if spent is None else spent, order=self.order, delta=self.delta
        )

    def count_charges_in_period(self, period: str, now: datetime, cohort: int | None = None) -> Counter[DpEvent]:
        """Count the charged mechanisms of the calendar period that contains `now`."""
        this = compute_period_number(now, period)
        return self._find_highest_spending(
            cohort,
            lambda number: self._sum_charges(number, lambda moment: compute_period_number(moment, period) == this),
        )

    def count_remaining_charges(self, now: datetime, cohort: int | None = None) -> Counter[DpEvent]:
        """Count the mechanisms that are reserved for open runs but not charged yet.

        `now`, the ledger's time, may be behind the clock: a clock that is ahead releases no reservation.
        """

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
        """Return `figure(cohort)`, by default for the cohort with the largest Renyi divergence."""
        if cohort is not None:
            return figure(cohort)
        spendings = [figure(number) for number in self.cohorts()]
        return spendings[0] if len(spendings) == 1 else max(spendings, key=self.divergence)

    @property
    def machine_clock(self) -> datetime:
        """The time of this machine's clock, which may be wrong."""
        return datetime.now(UTC)

    @property
    def clock(self) -> datetime:
        """The time of this machine's clock, or the time of the newest event if it is later."""
        return self.machine_clock if self.last_time is None else max(self.machine_clock, self.last_time)

    @property
    def caps_periods(self) -> bool:
        """Whether the policy has a cap for each calendar period."""
        return self.policy is not None and self.policy.budget.max_epsilon_per_period is not None

    def now(self, *, server: datetime | None = None) -> datetime:
        """Return the ledger's time: this machine's clock, unless it may be ahead.

        Without a cap per calendar period, the `server`'s time counts if it is earlier, so that no event moves the
        ledger ahead because of one wrong clock.

        Guarantee: the time is never before the newest event, so that setting the clock back opens no period. Under a
        cap per calendar period, a new period begins only if it directly follows the period of the newest event, and if
        both the clock and the `server`'s time, if available, are in it. So neither clock nor server can open a period
        alone, a server that skips ahead month after month opens no period while the clock is right, and both together
        open only the next period. For any other period, earlier ones included, a person has to confirm the date, which
        adds an event.
        """
        clock, last = self.clock, self.last_time
        if last is None or self.policy is None:
            return clock
        if not self.caps_periods:
            return clock if server is None else max(last, min(clock, server))
        reported = server or clock
        last_period, reported_period, clock_period = (
            compute_period_number(moment, self.policy.budget.period) for moment in (last, reported, clock)
        )
        if clock_period == last_period or clock_period == reported_period == last_period + 1:
            return clock
        return max(last, min(clock, reported)) if reported_period == last_period else last

    def explain_pending_period(self, *, server: datetime | None = None, time: datetime | None = None) -> str:
        """Explain why the budget period of the current date has not begun, or has passed, and how to open it.

        The text is empty if the ledger is in the period, and not more than a day ahead of this machine's clock.

        Args:
            server: the server's time, if known.
            time: the time for which the next charge counts; None: `now(server=server)`.
        """
        if self.policy is None or self.last_time is None:
            return ""
        clock, time, period = self.machine_clock, time or self.now(server=server), self.policy.budget.period
        if self.last_time - clock > _LARGEST_CLOCK_ERROR:
            return (
                f"this machine's clock says {clock:%Y-%m-%d %H:%M} UTC, and the ledger's newest event is from "
                f"{self.last_time:%Y-%m-%d}, when a clock was wrong: budget periods and daily limits follow the later "
                f"date. {_HOW_TO_CONFIRM}"
            )
        if not self.caps_periods or compute_period_number(clock, period) <= compute_period_number(time, period):
            return ""
        server_time = f", the server's time is {server:%Y-%m-%d %H:%M}" if server else ""
        is_next = compute_period_number(clock, period) == compute_period_number(time, period) + 1
        waits = f"A lead's next request opens the next {period}. " if is_next and server is None else ""
        return (
            f"this machine's clock says {clock:%Y-%m-%d %H:%M} UTC{server_time}, and the ledger's newest event is from "
            f"{self.last_time:%Y-%m-%d}: charges count for the {period} of {time:%Y-%m-%d}. {waits}{_HOW_TO_CONFIRM}"
        )

    def covers_receipt(
        self, shown: Doubt, matches: Callable[[str], bool], *, besides: RestoreNote | None = None
    ) -> bool:
        """Whether the ledger contains a receipt's event, or has charged for the loss of that event.

        Args:
            shown: the receipt.
            matches: whether an event's hash is the receipt's salted head.
            besides: a restore note to assume in addition.
        """
        here = self.hashes[shown.sequence - 1 : shown.sequence]
        lost = [*self.restored, *([besides] if besides else [])]
        there = [hash for restored in lost for number, hash in restored.path if number == shown.sequence]
        return any(map(matches, [*here, *there]))

    def covers_head(self, head: Head) -> bool:
        """Whether the ledger contains every event up to `head`, or has charged for all missing lasting events."""
        if head.sequence <= self.length and self.hashes[head.sequence - 1] == head.hash:
            return True
        return any(head.path[-1] in restored.path for restored in self.restored)

    def head(self, key: SigningKey) -> Head:
        """Create and sign the head of the newest event."""
        assert self.last_time is not None
        assert self.policy is not None
        charged = list_charge_rows(self.charges())
        arrivals = Arrivals(
            ranges=tuple(span for *_, span in charged),
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
        """Compute the total Renyi divergence of `spent` at the ledger's order, in nats."""
        return filter.compute_total_divergence(spent, self.order)
