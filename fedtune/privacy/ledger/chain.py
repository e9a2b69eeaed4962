"""The hash chain of a ledger: each event's hash covers its own fields and the hash of the previous event.

A changed, deleted, inserted or moved event changes every later hash. The newest hash, signed with the site's key, is
the *head*. A truncated chain is still consistent: only a head stored elsewhere, an *anchor*, shows that events are
missing at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from fedtune.codec import decode, parse_json, read_bounded_file
from fedtune.formatting import format_key_start
from fedtune.privacy import events as dp_events
from fedtune.privacy.dp_library import DpEvent
from fedtune.privacy.keys import SigningKey, is_public_key, is_signed
from fedtune.spec import LEDGER_SCHEMA, NOT_GIVEN, ConfigError, RunError

START = "0" * 64  # hash before the first event
EVENT, HEAD = "ledger event", "ledger head"  # purposes of signatures


class Kind(StrEnum):
    """Type of a ledger event."""

    PLAN = "plan"  # a run was accepted, and the cost of its plan reserved
    RESERVE = "reserve"  # a round was charged; training may begin
    COMMIT = "commit"  # the reply is stored; sending may begin
    RELEASE = "release"  # a release other than the reply of a round
    REFUSAL = "refusal"
    NOTE = "note"  # opened, policy, approved, denied, run_ended, in_doubt, restored, date_confirmed, frozen


LASTING = (Kind.RESERVE, Kind.NOTE)
"""Kinds of events that a ledger must not lose: charges and notes.

An anchor lists all of these events, a receipt the newest.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One event of a ledger, stored as a row of its database.

    Attributes:
        sequence: sequence number: 1, 2, 3, ... without gaps.
        time: UTC, ISO 8601; never before the previous event's time.
        run: name of the run; empty for events without a run.
        request: digest of the lead's request.
        attempt: 1 for the first reservation of a round, 2 for its first retry.
        cohort: arrival cohorts that a reservation charges, as formatted by `Cohorts.__str__`; empty: everybody.
        code: version of fedtune that wrote the event.
        detail: further fields, depending on the kind.
        signature: signature by the site's key on this event's hash.
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

    def compute_hash_after(self, before: str) -> str:
        """Compute the SHA-256 of this event, in hex, with `before` as the hash of the previous event."""
        fields = asdict(self)
        del fields["hash"], fields["signature"]
        return hashlib.sha256(
            b"fedtune ledger event\n" + before.encode() + b"\n" + to_canonical_json(fields)
        ).hexdigest()


def to_canonical_json(data: object) -> bytes:
    """Serialize `data` as canonical JSON: sorted keys, no spaces, ASCII, no infinity or NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class Doubt(NamedTuple):
    """A valid receipt for an event that is missing from the ledger.

    Attributes:
        sequence: sequence number of the newest lasting event in the receipt.
        head: salted hash of that event.
        run: name of the receipt's run.
        rounds: number of charged rounds of the run in the receipt.
    """

    sequence: int
    head: str
    run: str
    rounds: int


def check_ledger_schema(path: Path, found: object) -> None:
    """Reject a ledger or anchor in the format of an incompatible version of fedtune.

    Guarantee: the message tells people to continue with the version that wrote the file, and never suggests a new
    ledger with a fresh budget.

    Raises:
        ConfigError: the schema differs. Not a RunError, which indicates a damaged ledger that a backup may replace.
    """
    if type(found) is not int or found != LEDGER_SCHEMA:
        go_on = "use the version of fedtune that wrote the ledger; its charges stay in force"
        value = found if type(found) is int else NOT_GIVEN
        raise ConfigError(f"{path}: schema", value, f"must be {LEDGER_SCHEMA}", remedy=go_on)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """The arrival-cohort fields of a head or a restore note.

    Attributes:
        ranges: cohort range of each charge in the head or note, in the order of the charges.
        lost_after: sequence number of the newest event whose register rows are complete; a person with a later row, or
            without a row, counts as a member of the oldest cohort. None: no rows are missing.
    """

    ranges: tuple[str, ...]
    lost_after: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The signed state of a ledger after its newest event: the content of an anchor file.

    A restored ledger adopts the content of a newer head, so a head must contain all state that has to survive a
    restore.

    Attributes:
        ledger: random identifier of the ledger, in hex.
        sequence: sequence number of the newest event.
        hash: hash of the newest event.
        time: time of the newest event.
        charged: all charged mechanisms, with counts. A restored ledger charges the mechanisms that it lacks.
        runs: every run, with its number of charged rounds.
        path: (sequence, hash) of each lasting event, used to find the event where a restored ledger branched off.
        made_up: (sequence, hash) of the events on lost branches whose charges this ledger has repeated.
        doubts: receipts for missing events whose charges this ledger has not repeated.
        denied: digest of each proposal that a person at the site denied.
        marks: permanent marks of the ledger, as in `History`.
        policy: digest of the policy.
        caps: all lifetime caps, newest last; None: no cap.
        users: user column of each data set and each file, from the policies.
        arrivals: None, and omitted from the JSON, if the population has no arrivals.
        site_key: public key of the site.
        signature: signature on all other fields.
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
    def create_signed(cls, key: SigningKey, **fields: Any) -> Head:
        """Create a head and sign it with `key`."""
        unsigned = cls(**fields, site_key=key.public, signature="")
        return cls(**fields, site_key=key.public, signature=key.sign(HEAD, unsigned.encode_signed_bytes()))

    def encode_signed_bytes(self) -> bytes:
        """Encode all fields except the signature, for signing and verification."""
        fields = self._collect_fields()
        del fields["signature"]
        return to_canonical_json(fields)

    def _collect_fields(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__}  # `asdict` would copy thousands of hashes
        fields |= {"schema": LEDGER_SCHEMA, "arrivals": self.arrivals and asdict(self.arrivals)}
        return _drop_none(fields, "arrivals")

    def to_bytes(self) -> bytes:
        """Encode the head as the content of an anchor file."""
        return json.dumps(self._collect_fields(), sort_keys=True).encode() + b"\n"

    @classmethod
    def read(cls, path: Path) -> Head:
        """Read the head from an anchor file, and verify its signature.

        Raises:
            ConfigError: the file is missing or contains no head, or the signature does not match its key.
        """
        damaged = ConfigError("anchor", str(path), "must be a readable anchor file written by fedtune")
        try:
            fields = parse_json(read_bounded_file(path, key="anchor"), key="anchor", bound="must be JSON")
        except ConfigError as error:
            raise damaged from error
        check_ledger_schema(path, fields.pop("schema", None))
        try:
            head = decode(cls, fields)
            right = is_public_key(head.site_key) and is_signed(
                head.site_key, HEAD, head.encode_signed_bytes(), head.signature
            )
        except ValueError as error:  # a ConfigError, or a NaN or infinity
            raise damaged from error
        if not right:
            raise ConfigError("anchor", str(path), "must be signed with the site key that it names")
        return head


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreNote:
    """A restore note, written when a restored backup lacks events that an anchor covers.

    Attributes:
        shared: sequence number of the newest common event of both branches; the note charges the anchor's later events
            again.
        end: sequence number of the anchor's newest event.
        path: (sequence, hash) of the lasting events on the lost branch, and of the lost events that this branch had
            already repeated.
        gap: charges on the lost branch after `shared`: mechanisms as `privacy.events` serializes them, with counts.
        runs: run -> number of rounds charged on the lost branch after `shared`; none of these runs continues.
        denied: digests of proposals that a person denied on the lost branch.
        marks: permanent marks of the lost branch.
        caps: lifetime caps of the lost branch only; None: no cap.
        users: user column of each data set and file, from the policies of the lost branch.
        doubts: receipts for missing events that neither branch contains.
        arrivals: cohorts charged in `gap`; None, and omitted from the JSON, if the population has no arrivals.
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
        """Return the detail field of the note as a JSON object."""
        fields = {key: sorted(value) if isinstance(value, frozenset) else value for key, value in asdict(self).items()}
        return _drop_none(fields, "arrivals")

    @classmethod
    def from_detail(cls, detail: dict[str, Any]) -> RestoreNote:
        """Parse the detail field of a restore note.

        Raises:
            ValueError: `detail` is not a valid restore note.
        """
        restored = decode(cls, {key: value for key, value in detail.items() if key != "what"})
        # Counts are positive, so that no entry can lower an earlier charge.
        if min(restored.shared, restored.end, *restored.runs.values()) < 0 or any(n < 1 for _, n in restored.gap):
            raise ValueError("a count in a restore note is negative")
        return restored


def iter_charges(
    charged: Sequence[tuple[dict[str, Any], int]], arrivals: Arrivals | None
) -> Iterator[tuple[DpEvent, int, str]]:
    """Iterate over serialized charges as (mechanism, count, charged cohorts).

    Empty cohorts mean that everybody was charged.
    """
    ranges = arrivals.ranges if arrivals else [""] * len(charged)
    return ((dp_events.from_json(event), n, span) for (event, n), span in zip(charged, ranges, strict=True))


def list_charge_rows(charges: Mapping[tuple[DpEvent, str], int]) -> list[tuple[dict[str, Any], int, str]]:
    """List the charges in a fixed order as rows (mechanism as JSON, count, charged cohorts)."""
    rows = [(dp_events.to_json(event), count, span) for (event, span), count in charges.items()]
    return sorted(rows, key=lambda row: (json.dumps(row[0], sort_keys=True), row[2]))


def _drop_none(fields: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key or value is not None}


def check_chain(events: Iterable[Event], *, before: str = START, first: int = 1) -> str:
    """Verify the hash chain of consecutive events, and return its last hash.

    Args:
        events: events in sequence order.
        before: hash of the event before the first one.
        first: sequence number of the first event.

    Raises:
        RunError: an event is missing or was changed; the message contains the number of the first such event.
    """
    for number, event in enumerate(events, first):
        if event.sequence != number:
            raise RunError(f"event {number} is missing (the next one is number {event.sequence})")
        expected = event.compute_hash_after(before)
        if event.hash != expected:
            raise RunError(f"event {number} was changed: its hash does not match its values and the previous event")
        before = expected
    return before


def check_signature(event: Event, site_key: str) -> None:
    """Verify that `site_key` signed the hash of `event`, which covers the event and all earlier events.

    Raises:
        RunError: the signature is not valid.
    """
    if not is_signed(site_key, EVENT, event.hash.encode(), event.signature):
        raise RunError(f"event {event.sequence} is not signed by the site's key {format_key_start(site_key)}")
