"""A ledger's events on disk and in memory: written durably, chained, signed, followed.  It decides nothing.

`fedtune.privacy.ledger` decides; `ledger_file` knows SQLite; `chain` knows hashes; `history` adds up.
"""

from __future__ import annotations

import hmac
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.privacy import chain, ledger_file
from fedtune.privacy.chain import Event, Head, Kind
from fedtune.privacy.durable import write_durably
from fedtune.privacy.history import History
from fedtune.privacy.keys import SigningKey
from fedtune.spec import RunError


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Leave to train one round, already charged; in an event, where it belongs."""

    run: str
    round: int = 0
    request: str = ""
    attempt: int = 0


class EventStore:
    """The events of one ledger file.

    Args:
        path: the SQLite file, made when missing.
        key: the site's key, which signs each event.
        anchor: file outside the ledger that always holds the newest signed head; None: none is kept.

    Attributes:
        history: what the events add up to, as of the last transaction.
    """

    def __init__(self, path: Path, key: SigningKey, anchor: Path | None) -> None:
        self.path, self.history = path, History()
        self._key, self._anchor, self._hash = key, anchor, chain.START
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"ledger {path} cannot be made ({error.strerror}); nothing is trained without it") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Lock the file, follow what others wrote since, and write what the block appends; all of it or nothing.

        Guarantee: when the block has ended, what it appended is on disk, and so is the anchor.

        Raises:
            RunError: the file or the anchor is damaged, was changed or put back, or cannot be written.
        """
        before = self.history.length
        try:
            with ledger_file.writing(self.path) as file:
                self._catch_up(file)
                before = self.history.length
                yield file
            if self._anchor is not None and (self.history.length > before or not self._anchor.exists()):
                self._write_anchor(self._anchor)
        except BaseException as error:
            if self.history.length != before:
                self.history, self._hash = History(), chain.START  # what was followed may not have been written
            if isinstance(error, OSError):
                raise RunError(
                    f"anchor {self._anchor} cannot be used ({error.strerror}); nothing is trained"
                ) from error
            raise

    def append(
        self,
        file: sqlite3.Connection,
        kind: Kind,
        detail: dict[str, Any],
        *,
        of: Reservation | None = None,
        dataset: str = "",
    ) -> None:
        """Write one event behind the newest one, and follow it."""
        place = of or Reservation(run="")
        unsigned: dict[str, Any] = {
            "sequence": self.history.length + 1,
            "kind": kind,
            "time": self.now().isoformat(),
            "run": place.run,
            "round": place.round,
            "request": place.request,
            "attempt": place.attempt,
            "dataset": dataset,
            "cohort": "",
            "code": __version__,
            "detail": json.loads(chain.canonical(detail)),
        }
        hash = Event(**unsigned).hash_after(self._hash)
        event = Event(**unsigned, hash=hash, signature=self._key.sign(chain.EVENT, hash.encode()))
        ledger_file.insert(file, event)
        self.history.follow(event)
        self._hash = hash

    def now(self) -> datetime:
        """The time, but never before the newest event: a clock that is set back opens no new period."""
        now, last = datetime.now(UTC), self.history.last_time
        return now if last is None else max(now, last)

    def head(self) -> Head:
        """The newest head, for an anchor."""
        return self.history.head(self._hash, self._key)

    def salted_head(self) -> str:
        """The newest event's hash under a salt of the site's own."""
        return self._salted(self._hash)

    def contains(self, sequence: int, salted_head: str) -> bool:
        """Whether event `sequence` is the one that had this salted head."""
        with ledger_file.reading(self.path) as file:
            hash = ledger_file.hash_of(file, sequence)
        return hash is not None and hmac.compare_digest(self._salted(hash), salted_head)

    def require_anchored(self, file: sqlite3.Connection) -> None:
        """Raise unless the ledger holds the head that the anchor outside it says it reached."""
        if self._anchor is None:
            return
        if not self._anchor.exists():
            # Without a charge the ledger is as good as new: a crash came before its first anchor was written.
            if self.history.charged():
                raise RunError(
                    f"anchor {self._anchor} is missing, and ledger {self.path} is not new; nothing is trained"
                )
            return
        anchor = Head.read(self._anchor)
        if not self.history.length:
            raise RunError(f"ledger {self.path} is missing: anchor {self._anchor} knows {anchor.sequence} events of it")
        self.require_same_ledger(anchor)
        if self.lacks(file, anchor):
            raise RunError(
                f"ledger {self.path} is older than its anchor {self._anchor} (event {self.history.length} of at least "
                f"{anchor.sequence}), or is another branch; see `fedtune ledger restore`"
            )

    def lacks(self, file: sqlite3.Connection, anchor: Head) -> bool:
        """Whether events up to `anchor` are missing and were not made up for."""
        made_up_for = self.history.makes_up_for(sequence=anchor.sequence, restores=anchor.restores)
        return not made_up_for and ledger_file.hash_of(file, anchor.sequence) != anchor.hash

    def require_same_ledger(self, anchor: Head) -> None:
        """Raise unless the anchor is of this ledger."""
        if (anchor.ledger, anchor.site_key) != (self.history.opened.ledger, self._key.public):
            raise RunError(f"the anchor is of another ledger than {self.path}")

    def _catch_up(self, file: sqlite3.Connection) -> None:
        """Follow the events that are new, after checking that they continue the chain.

        The newest event's signature vouches for all before it, since its hash covers them.
        """
        known = self.history.length
        if known and ledger_file.hash_of(file, known) != self._hash:
            raise RunError(f"ledger {self.path} was changed or put back while it was open; nothing is trained")
        try:
            new = ledger_file.read_events(file, after=known)
            last = chain.check_chain(new, before=self._hash, first=known + 1)
            if new:
                chain.check_signature(new[-1], self._key.public)
            for event in new:
                self.history.follow(event)
        except RunError as error:
            raise RunError(f"ledger {self.path}: {error}; nothing is trained on a ledger in doubt") from error
        self._hash = last

    def _write_anchor(self, anchor: Path) -> None:
        """Bring the anchor up to the ledger: afterwards, so that a crash leaves it behind and never ahead."""
        with ledger_file.writing(self.path) as file:  # or two processes could write their heads in the wrong order
            self._catch_up(file)
            write_durably(anchor, self.head().to_bytes())

    def _salted(self, hash: str) -> str:
        return hmac.digest(self._key.secret("receipt head"), hash.encode(), "sha256").hex()
