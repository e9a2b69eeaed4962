"""A site's record of what was run on its records: reserve before the first record is read, commit with the reply.

`Ledger` is the interface that a round uses.  `JournalLedger` keeps one run's entries in memory, with an append-only
journal file so that a killed run is charged for what it began.  It is what a simulation needs; it does not yet compose
several runs over one population.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from dp_accounting import DpEvent

from fedtune.privacy import events
from fedtune.privacy.durable import append_durably, write_durably
from fedtune.privacy.plan import Plan
from fedtune.privacy.release import Reason, Receipt, Refused
from fedtune.spec import RunError


class Kind(StrEnum):
    """What a ledger entry says."""

    PLAN = "plan"
    RESERVE = "reserve"
    COMMIT = "commit"
    REFUSAL = "refusal"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of a ledger.

    Attributes:
        sequence: 1, 2, 3, ... without gaps.
        attempt: 1 for the first reservation of a round, 2 for its first retry.
        detail: the plan, the event (see `fedtune.privacy.events`), the reply's SHA-256 or the reason of a refusal.
    """

    sequence: int
    kind: Kind
    time: float
    run: str
    round: int
    request: str
    attempt: int
    detail: dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Leave to train one round, already charged."""

    run: str
    round: int
    request: str
    attempt: int


class Ledger(Protocol):
    """What a round asks of a ledger, whatever keeps it."""

    def reserve(self, *, run: str, round: int, request: str, plan: Plan) -> Reservation | bytes:
        """Charge a round before it is trained, or return the stored reply to the same request.

        Guarantee: on return the charge is durable; no private record needs to have been read before.

        Raises:
            Refused: the request does not fit what was accepted before; only the refusal is recorded.
        """
        ...

    def commit(self, reservation: Reservation, reply: bytes) -> None:
        """Store the reply of a reserved round, durably, before it is sent."""
        ...

    def receipt(self, run: str) -> Receipt:
        """What `run` has been charged so far."""
        ...

    def events(self, run: str) -> list[DpEvent]:
        """Everything that `run` was charged for, as events."""
        ...


class JournalLedger:
    """The ledger of one simulated site.

    Args:
        site: the site's name, for receipts.
        path: journal file (JSON lines, made when missing), or None to keep nothing on disk.
    """

    def __init__(self, site: str, path: Path | None = None) -> None:
        self._site = site
        self._path = path
        self._replies: dict[str, bytes] = {}
        self._entries: list[Entry] = [] if path is None else _read_journal(path)

    @property
    def entries(self) -> Sequence[Entry]:
        """All entries, oldest first."""
        return tuple(self._entries)

    def reserve(self, *, run: str, round: int, request: str, plan: Plan) -> Reservation | bytes:
        try:
            stored = self._check(run, round, request, plan)
        except Refused as refused:
            self._append(Kind.REFUSAL, run, round, request, 0, {"reason": refused.reason.value})
            raise
        if stored is not None:
            return stored
        if not self._of(run, Kind.PLAN):
            self._append(Kind.PLAN, run, 0, "", 0, plan.to_json())
        attempt = 1 + sum(entry.round == round for entry in self._of(run, Kind.RESERVE))
        self._append(Kind.RESERVE, run, round, request, attempt, {"event": events.to_json(plan.event())})
        return Reservation(run=run, round=round, request=request, attempt=attempt)

    def commit(self, reservation: Reservation, reply: bytes) -> None:
        # The reply must be on disk before the entry that promises it.
        self._replies = {reservation.request: reply}
        if self._path is not None:
            write_durably(self._reply_path(), reply)
        detail: dict[str, object] = {"reply_sha256": hashlib.sha256(reply).hexdigest()}
        r = reservation
        self._append(Kind.COMMIT, r.run, r.round, r.request, r.attempt, detail)

    def receipt(self, run: str) -> Receipt:
        reserved = self._of(run, Kind.RESERVE)
        plans = self._of(run, Kind.PLAN)
        steps = _plan_of(plans[0]).local_steps if plans else 0
        return Receipt(
            site=self._site,
            run=run,
            charged_rounds=len(reserved),
            charged_steps=len(reserved) * steps,
            sequence=len(self._entries),
        )

    def events(self, run: str) -> list[DpEvent]:
        return [events.from_json(entry.detail["event"]) for entry in self._of(run, Kind.RESERVE)]

    def _check(self, run: str, round: int, request: str, plan: Plan) -> bytes | None:
        """Raise the reason to refuse, or return the stored reply, or None when the round may be trained."""
        for accepted in self._of(run, Kind.PLAN):
            if _plan_of(accepted) != plan:
                raise Refused(Reason.PLAN_CHANGED, asked=plan.digest(), allowed=_plan_of(accepted).digest())
        for entry in self._of(run, Kind.RESERVE):
            if entry.round == round and entry.request != request:
                raise Refused(Reason.ROUND_REQUESTED_DIFFERENTLY, asked=request, allowed=entry.request)
        for entry in self._of(run, Kind.COMMIT):
            if entry.request == request:
                return self._stored_reply(entry)
        charged = len(self._of(run, Kind.RESERVE))
        if charged >= plan.most_rounds:
            raise Refused(Reason.PLAN_EXHAUSTED, asked=charged + 1, allowed=plan.most_rounds)
        return None

    def _stored_reply(self, entry: Entry) -> bytes:
        reply = self._replies.get(entry.request)
        if reply is None and self._path is not None and self._reply_path().exists():
            reply = self._reply_path().read_bytes()
        if reply is None or hashlib.sha256(reply).hexdigest() != entry.detail["reply_sha256"]:
            raise Refused(Reason.REPLY_NO_LONGER_STORED, asked=entry.round)
        return reply

    def _of(self, run: str, kind: Kind) -> list[Entry]:
        return [entry for entry in self._entries if entry.run == run and entry.kind is kind]

    def _reply_path(self) -> Path:
        assert self._path is not None
        return self._path.with_suffix(".reply")

    def _append(self, kind: Kind, run: str, round: int, request: str, attempt: int, detail: dict[str, object]) -> None:
        entry = Entry(
            sequence=len(self._entries) + 1,
            kind=kind,
            time=time.time(),
            run=run,
            round=round,
            request=request,
            attempt=attempt,
            detail=detail,
        )
        if self._path is not None:
            append_durably(self._path, json.dumps(asdict(entry)).encode() + b"\n")
        self._entries.append(entry)


def _plan_of(entry: Entry) -> Plan:
    return Plan(**entry.detail)  # type: ignore[arg-type]


def _read_detail(entry: Entry) -> None:
    """Raise unless the entry's detail is what its kind needs."""
    match entry.kind:
        case Kind.PLAN:
            _plan_of(entry)
        case Kind.RESERVE:
            events.from_json(entry.detail["event"])
        case Kind.COMMIT:
            bytes.fromhex(str(entry.detail["reply_sha256"]))
        case Kind.REFUSAL:
            Reason(str(entry.detail["reason"]))


def _read_journal(path: Path) -> list[Entry]:
    """Entries of the journal at `path`, made when missing.

    A last line without its end is a write that a crash cut short: nothing was trained or sent on its strength, and it
    is removed.  Anything else that does not parse stops the run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data or not path.exists():
        write_durably(path, whole)
    entries = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            fields = json.loads(line)
            entry = Entry(**{**fields, "kind": Kind(fields["kind"])})
            _read_detail(entry)
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"ledger {path}: line {number} is damaged; refusing to train on an unknown budget"
            ) from error
        if entry.sequence != number:
            raise RunError(f"ledger {path}: line {number} carries number {entry.sequence}; entries are missing")
        entries.append(entry)
    return entries
