"""Verification of a ledger file with the site's public key and, to detect a rollback, with an anchor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.privacy.ledger import chain, register, store
from fedtune.privacy.ledger.chain import START, Event, Head, Kind
from fedtune.privacy.ledger.history import History
from fedtune.spec import RunError


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedLedger:
    """A verified ledger, with the scope of its verification.

    Attributes:
        key_expected: whether the caller supplied the site's key, directly or in an anchor, instead of trusting the key
            in the ledger.
        anchor_sequence: sequence number up to which the anchor proves completeness; None without an anchor.
    """

    events: tuple[Event, ...]
    history: History
    key_expected: bool
    anchor_sequence: int | None

    @property
    def site_key(self) -> str:
        """Public key that signed all events."""
        return self.history.opening.site_key


def verify(path: Path, *, anchor: Head | None = None, site_key: str | None = None) -> VerifiedLedger:
    """Verify every event, signature and stored reply of a ledger.

    Guarantee: on success nobody without the site's key has changed, deleted, inserted or reordered an event, and with
    an anchor no event up to it is missing. Without an anchor, events may be missing at the end.

    Raises:
        RunError: the ledger is inconsistent; names the first mismatch.
    """
    with store.open_for_reading(path) as file:
        (answer,) = file.execute("PRAGMA integrity_check(1)").fetchone()
        if answer != "ok":
            raise RunError(f"the file is damaged: {answer}")
        (stray,) = file.execute("SELECT count(*) FROM events WHERE sequence < 1").fetchone()
        if stray:
            raise RunError(f"{stray} rows have a sequence number below 1")
        events = store.read_events(file)
        replies = store.read_replies(file)
        (arrivals,) = file.execute("SELECT count(*) FROM sqlite_master WHERE name = 'arrivals'").fetchone()
        rows = register.read_rows(file) if arrivals else []
    if not events:
        raise RunError(f"ledger {path} is empty")
    chain.check_chain(events)
    history = History()
    for event in events:
        history.apply_event(event)
    own_key = history.opening.site_key
    if site_key is not None and site_key != own_key:
        raise RunError(f"ledger {path} names site key {own_key}, not {site_key}")
    for event in events:
        chain.check_signature(event, own_key)
    if bool(arrivals) != bool(history.opening.arrivals):
        raise RunError("the ledger's tables do not match its first event")
    _check_register(rows, events)
    # The ledger stores exactly the newest committed reply of each run.
    expected = {(name, *list(run.replies.items())[-1]) for name, run in history.runs.items() if run.replies}
    stored = [(run, request, hashlib.sha256(reply).hexdigest()) for run, request, reply in replies]
    if sorted(stored) != sorted(expected):
        raise RunError("the stored replies are not the newest committed replies")
    if anchor is not None:
        if (anchor.ledger, anchor.site_key) != (history.opening.ledger, own_key):
            raise RunError("the anchor belongs to another ledger")
        if not history.covers_head(anchor) and anchor.sequence > len(events):
            raise RunError(
                f"the ledger was rolled back to an older copy: it ends at event {len(events)}, "
                f"but the anchor covers event {anchor.sequence}; fedtune ledger restore charges the missing events"
            )
        if not history.covers_head(anchor):
            raise RunError(f"event {anchor.sequence} does not match the anchor: the ledger has diverged")
    return VerifiedLedger(
        events=tuple(events),
        history=history,
        key_expected=site_key is not None or anchor is not None,
        anchor_sequence=anchor.sequence if anchor else None,
    )


def _check_register(rows: Sequence[register.Row], events: Sequence[Event]) -> None:
    """Verify that each register row belongs to an event that charged a round, and that no row is missing."""
    digest, after = START, register.map_digests_by_event(rows)
    for event in events:
        if event.kind is Kind.RESERVE and event.cohort:
            digest = after.pop(event.sequence, digest)
            if event.detail["register"] != digest:
                raise RunError(f"the register of arrivals was changed: it does not match event {event.sequence}")
    if after:
        raise RunError("the register of arrivals was changed: it has rows without an event")
