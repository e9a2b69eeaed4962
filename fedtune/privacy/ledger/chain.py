"""The hash chain of a ledger: each event's hash covers its own values and, through the one before, all earlier events.

Changing, deleting, inserting or moving an event changes every later hash.  The newest hash, signed by the site's
key, is the *head*.  A chain that ends early still fits together: only a head that was kept somewhere else, an *anchor*,
shows that events are missing at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from dp_accounting import DpEvent

from fedtune.codec import decode, parse_json
from fedtune.privacy import events as dp_events
from fedtune.privacy.keys import SigningKey, is_public_key, is_signed
from fedtune.spec import LEDGER_SCHEMA, NOT_GIVEN, ConfigError, RunError
from fedtune.words import spoken_start

START = "0" * 64  # what stands in the place of the hash before the first event
EVENT, HEAD = "ledger event", "ledger head"  # purposes of signatures


class Kind(StrEnum):
    """The kind of an event."""

    PLAN = "plan"  # a run was accepted, and its plan's cost is set aside
    RESERVE = "reserve"  # a round was charged; training may begin
    COMMIT = "commit"  # its reply is stored; sending may begin
    RELEASE = "release"  # something was handed out beside a round's reply
    REFUSAL = "refusal"
    NOTE = "note"  # opened, policy, approved, denied, run_ended, in_doubt, restored, date_confirmed, frozen


LASTING = (Kind.RESERVE, Kind.NOTE)
"""What a ledger may not lose: charges and notes.  Anchors name each of these events, and a receipt shows the newest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One row of a ledger.

    Attributes:
        sequence: 1, 2, 3, ... without gaps.
        time: UTC, ISO 8601; never before the event in front of it.
        run: empty where an event belongs to none.
        request: digest of the lead's request.
        attempt: 1 for the first reservation of a round, 2 for its first retry.
        cohort: whom a reservation charges, as `Cohorts` writes it: people who arrived then.  Empty: everybody.
        code: version of fedtune that wrote the event.
        detail: what else there is to say, by kind.
        signature: of the head that this event is, by the site's key.
    """

    sequence: int
    kind: Kind
    time: str
    run: str = ""
    round: int = 0
    request: str = ""
    attempt: int = 0
    dataset: str = ""
    cohort: str = ""
    code: str
    detail: dict[str, Any]
    hash: str = ""
    signature: str = ""

    def hash_after(self, before: str) -> str:
        """SHA-256, in hex, of this event behind the event whose hash is `before`."""
        fields = asdict(self)
        del fields["hash"], fields["signature"]
        return hashlib.sha256(b"fedtune ledger event\n" + before.encode() + b"\n" + canonical(fields)).hexdigest()


def canonical(data: object) -> bytes:
    """The one way to write `data` as JSON: sorted keys, no spaces, ASCII, no infinity."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class Doubt(NamedTuple):
    """A genuine receipt that a ledger lacks.

    Attributes:
        sequence: of the newest lasting event that the receipt knows.
        head: that event's salted hash.
        run: whose receipt it is.
        rounds: that the run had been charged by then.
    """

    sequence: int
    head: str
    run: str
    rounds: int


def check_ledger_schema(path: Path, found: object) -> None:
    """Refuse the ledger or anchor `path` of another format than this version's.

    Guarantee: the sentence names the version that goes on with it, and so invites no fresh budget.

    Raises:
        ConfigError: no RunError, which stands for a damaged ledger, in whose place a backup may be put.
    """
    if type(found) is not int or found != LEDGER_SCHEMA:
        go_on = "go on with the version of fedtune that wrote it; all that it has charged stays charged"
        value = found if type(found) is int else NOT_GIVEN
        raise ConfigError(f"{path}: schema", value, f"must be {LEDGER_SCHEMA}", remedy=go_on)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """The further words of a ledger of a population with arrivals, in a head and in the note of a restore.

    Attributes:
        ranges: for each charge that is named beside it, in its order, the cohorts that it was charged to.
        lost_after: the newest event whose rows of the register count for sure, where rows may be missing: whoever has a
            later one, or none, counts as the oldest cohort.  None: no row is missing.
    """

    ranges: tuple[str, ...]
    lost_after: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The end of a ledger at some moment, signed by the site.

    A ledger that is put back takes over all that a newer head says: whatever must outlast a restore is said here.

    Attributes:
        ledger: random id of the ledger, in hex.
        sequence: of the newest event.
        hash: of that event.
        time: of that event.
        charged: every event charged so far, equal ones counted: what a ledger that was put back has to make up for.
        runs: every run so far, with the rounds that it was charged.
        path: (sequence, hash) of each lasting event so far: what a ledger that was put back is compared with, to find
            where it left this chain.
        made_up: (sequence, hash) of events of lost branches that this one was made up for.
        doubts: receipts that showed that events are missing, and that nothing has made up for.
        denied: digest of each proposal that a person at the site denied.
        marks: what marks the ledger for good, as `History` has it.
        policy: digest of the policy.
        caps: lifetime caps so far, the newest last; None: no cap.
        users: which column says who a user is, by data set and by file, as policies named them.
        arrivals: None, and not written, where the population has none.
        site_key: public key of the site.
        signature: on all of the above.
    """

    ledger: str
    sequence: int
    hash: str
    time: str
    charged: tuple[tuple[dict[str, Any], int], ...]
    site_key: str
    signature: str
    runs: tuple[tuple[str, int], ...]
    path: tuple[tuple[int, str], ...]
    made_up: tuple[tuple[int, str], ...]
    doubts: tuple[Doubt, ...]
    denied: tuple[str, ...]
    marks: tuple[tuple[str, str], ...]
    policy: str
    caps: tuple[float | None, ...]
    users: tuple[tuple[str, str, str], ...]
    arrivals: Arrivals | None = None

    @classmethod
    def signed(cls, key: SigningKey, **fields: Any) -> Head:
        """A head with the signature of `key`."""
        unsigned = cls(**fields, site_key=key.public, signature="")
        return cls(**fields, site_key=key.public, signature=key.sign(HEAD, unsigned.message()))

    def message(self) -> bytes:
        """The bytes that are signed."""
        said = self._fields()
        del said["signature"]
        return canonical(said)

    def _fields(self) -> dict[str, Any]:
        said = {name: getattr(self, name) for name in self.__slots__}  # `asdict` would copy each of thousands of hashes
        said |= {"schema": LEDGER_SCHEMA, "arrivals": self.arrivals and asdict(self.arrivals)}
        return _without_none(said, "arrivals")

    def to_bytes(self) -> bytes:
        """The content of an anchor file."""
        return json.dumps(self._fields(), sort_keys=True).encode() + b"\n"

    @classmethod
    def read(cls, path: Path) -> Head:
        """The head in an anchor file.

        Raises:
            ConfigError: the file is missing or not a head, or the key that it names did not sign it.
        """
        damaged = ConfigError("anchor", str(path), "must be a readable anchor file that fedtune wrote")
        try:
            fields = parse_json(path.read_bytes(), key="anchor", bound="must be JSON")
        except (OSError, ConfigError) as error:
            raise damaged from error
        check_ledger_schema(path, fields.pop("schema", None))
        try:
            head = decode(cls, fields)
            right = is_public_key(head.site_key) and is_signed(head.site_key, HEAD, head.message(), head.signature)
        except ValueError as error:  # a ConfigError, or a number that JSON does not have
            raise damaged from error
        if not right:
            raise ConfigError("anchor", str(path), "must carry the signature of the site key that it names")
        return head


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """The note that a backup was put back, with all that an anchor knew of the events that it lacks.

    Attributes:
        shared: newest event known to be on both branches; what the anchor knows beyond it was charged again.
        end: the anchor's event.
        path: (sequence, hash) of lasting events of the lost branch, and of those that it had been made up for itself.
        gap: what was charged there beyond `shared`: mechanisms as `privacy.events` writes them, and how often they ran.
        runs: run -> rounds that it was charged there beyond `shared`; none of them goes on.
        denied: digests of proposals that a person denied there.
        marks: that the other branch had.
        caps: lifetime caps that were in force on the lost branch alone; None: no cap.
        users: which column says who a user is, by that branch's policies.
        doubts: receipts of either branch that are still not made up for.
        arrivals: the cohorts of the gap; None, and not written, where the population has none.
    """

    shared: int
    end: int
    path: frozenset[tuple[int, str]]
    gap: tuple[tuple[dict[str, Any], int], ...]
    runs: dict[str, int]
    denied: frozenset[str]
    marks: frozenset[tuple[str, str]]
    caps: tuple[float | None, ...]
    users: frozenset[tuple[str, str, str]]
    doubts: frozenset[Doubt]
    arrivals: Arrivals | None = None

    def to_json(self) -> dict[str, Any]:
        """The note's detail."""
        fields = {key: sorted(each) if isinstance(each, frozenset) else each for key, each in asdict(self).items()}
        return _without_none(fields, "arrivals")

    @classmethod
    def of(cls, detail: dict[str, Any]) -> Restored:
        """Read the note's detail; raises ValueError for anything else."""
        restored = decode(cls, {key: value for key, value in detail.items() if key != "what"})
        # Charges are never taken back, so that no entry can lower what an earlier one added.
        if min(restored.shared, restored.end, *restored.runs.values()) < 0 or any(n < 1 for _, n in restored.gap):
            raise ValueError("a count of a restored ledger")
        return restored


def charges_of(
    charged: Sequence[tuple[dict[str, Any], int]], arrivals: Arrivals | None
) -> Iterator[tuple[DpEvent, int, str]]:
    """Counted mechanisms with the cohorts that each was charged to; "": everybody."""
    ranges = arrivals.ranges if arrivals else [""] * len(charged)
    return ((dp_events.from_json(event), n, said) for (event, n), said in zip(charged, ranges, strict=True))


def table(charges: Mapping[tuple[DpEvent, str], int]) -> list[tuple[dict[str, Any], int, str]]:
    """Mechanisms as JSON with how often they ran and the cohorts that they were charged to, in a fixed order."""
    rows = [(dp_events.to_json(event), count, said) for (event, said), count in charges.items()]
    return sorted(rows, key=lambda row: (json.dumps(row[0], sort_keys=True), row[2]))


def _without_none(fields: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key or value is not None}


def check_chain(events: Iterable[Event], *, before: str = START, first: int = 1) -> str:
    """Follow the chain and return its last hash.

    Args:
        events: in the order of their sequence.
        before: hash of the event in front of the first one.
        first: sequence of the first one.

    Raises:
        RunError: names the first event that does not fit.
    """
    for number, event in enumerate(events, first):
        if event.sequence != number:
            raise RunError(f"event {number} is missing (the next one is number {event.sequence})")
        expected = event.hash_after(before)
        if event.hash != expected:
            raise RunError(f"event {number} was changed: its hash does not fit its values and the event before it")
        before = expected
    return before


def check_signature(event: Event, site_key: str) -> None:
    """Raise RunError unless `event` is signed by `site_key`; its hash covers everything before it."""
    if not is_signed(site_key, EVENT, event.hash.encode(), event.signature):
        raise RunError(f"event {event.sequence} is not signed by the site's key {spoken_start(site_key)}")
