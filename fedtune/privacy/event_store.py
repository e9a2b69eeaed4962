"""A ledger's events on disk and in memory: written durably, chained, signed, followed.  It decides nothing.

`fedtune.privacy.ledger` decides; `ledger_file` knows SQLite; `chain` knows hashes; `history` adds up.
"""

from __future__ import annotations

import hmac
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

from fedtune import __version__
from fedtune.privacy import chain, ledger_file
from fedtune.privacy.chain import Event, Head, Kind
from fedtune.privacy.durable import write_durably
from fedtune.privacy.history import History
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.notes import Restored
from fedtune.spec import ConfigError, RunError


class Place(TypedDict, total=False):
    """Where an event belongs; what is left out is empty."""

    run: str
    round: int
    request: str
    attempt: int
    dataset: str


_NOWHERE = Place(run="", round=0, request="", attempt=0, dataset="")


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
        self._key, self._anchor = key, anchor
        self._open_file: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"ledger {path} cannot be made ({error.strerror}); nothing is trained without it") from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Lock the file, follow what others wrote since, and write what the block appends; all of it or nothing.

        Guarantee: when the block has ended, what it appended is on disk, and so is the anchor.

        Raises:
            RunError: the file or the anchor is damaged, was changed or put back, or cannot be written.
        """
        before = self.history.length
        try:
            with ledger_file.writing(self.path) as file:
                self._catch_up(file)
                self._require_anchored()
                before, self._open_file = self.history.length, file
                yield
            if self._anchor is not None and (self.history.length > before or not self._anchor.exists()):
                self._write_anchor(self._anchor)
        except BaseException as error:
            if self.history.length != before:
                self.history = History()  # what was followed may not have been written
            if isinstance(error, OSError):
                raise RunError(
                    f"anchor {self._anchor} cannot be used ({error.strerror}); nothing is trained"
                ) from error
            raise
        finally:
            self._open_file = None

    @property
    def _file(self) -> sqlite3.Connection:
        assert self._open_file is not None, "outside a transaction"
        return self._open_file

    def append(self, kind: Kind, detail: dict[str, Any], **place: Unpack[Place]) -> None:
        """Write one event behind the newest one, and follow it."""
        unsigned: dict[str, Any] = {
            "sequence": self.history.length + 1,
            "kind": kind,
            "time": self.history.now().isoformat(),
            **_NOWHERE,
            **place,
            "cohort": "",
            "code": __version__,
            "detail": json.loads(chain.canonical(detail)),
        }
        hash = Event(**unsigned).hash_after(self.history.hash)
        event = Event(**unsigned, hash=hash, signature=self._key.sign(chain.EVENT, hash.encode()))
        ledger_file.insert(self._file, event)
        self.history.follow(event)

    def note(self, what: str, *, run: str = "", **detail: Any) -> None:
        """Append a note."""
        self.append(Kind.NOTE, {"what": what, **detail}, run=run)

    def store_reply(self, *, run: str, request: str, reply: bytes) -> None:
        """Keep `reply` as the newest of `run`."""
        ledger_file.store_reply(self._file, run=run, request=request, reply=reply)

    def reply_to(self, request: str) -> bytes | None:
        """The stored reply to a request, if it is still there."""
        return ledger_file.reply_to(self._file, request)

    def head(self) -> Head:
        """The newest head, for an anchor."""
        return self.history.head(self._key)

    def salted_head(self) -> str:
        """The newest event's hash under a salt of the site's own."""
        return self._salted(self.history.hash)

    def knows(self, sequence: int, salted_head: str, *, besides: Restored | None = None) -> bool:
        """Whether the event that had this salted head is here, or was made up for (`besides`: or would be)."""
        return self.history.knows(
            sequence, lambda hash: hmac.compare_digest(self._salted(hash), salted_head), besides=besides
        )

    def _require_anchored(self) -> None:
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
        try:
            anchor = Head.read(self._anchor)
        except ConfigError as error:
            raise RunError(f"{error}; nothing is trained") from error
        if not self.history.length:
            raise RunError(f"ledger {self.path} is missing: anchor {self._anchor} knows {anchor.sequence} events of it")
        self.require_same_ledger(anchor)
        if not self.history.holds(anchor):
            raise RunError(
                f"ledger {self.path} is older than its anchor {self._anchor} (event {self.history.length} of at least "
                f"{anchor.sequence}), or has branched off; see `fedtune ledger restore`"
            )

    def require_same_ledger(self, anchor: Head) -> None:
        """Raise unless the anchor is of this ledger."""
        if (anchor.ledger, anchor.site_key) != (self.history.opened.ledger, self._key.public):
            raise RunError(f"the anchor is of another ledger than {self.path}")

    def _catch_up(self, file: sqlite3.Connection) -> None:
        """Follow the events that are new, after checking that they continue the chain.

        The newest event's signature vouches for all before it, since its hash covers them.
        """
        known = self.history.length
        if known and ledger_file.hash_of(file, known) != self.history.hash:
            raise RunError(f"ledger {self.path} was changed or put back while it was open; nothing is trained")
        try:
            new = ledger_file.read_events(file, after=known)
            chain.check_chain(new, before=self.history.hash, first=known + 1)
            if new:
                chain.check_signature(new[-1], self._key.public)
            for event in new:
                self.history.follow(event)
        except RunError as error:
            raise RunError(f"ledger {self.path}: {error}; nothing is trained on a ledger in doubt") from error

    def _write_anchor(self, anchor: Path) -> None:
        """Bring the anchor up to the ledger: afterwards, so that a crash leaves it behind and never ahead."""
        with ledger_file.writing(self.path) as file:  # or two processes could write their heads in the wrong order
            self._catch_up(file)
            write_durably(anchor, self.head().to_bytes())

    def _salted(self, hash: str) -> str:
        return hmac.digest(self._key.secret("receipt head"), hash.encode(), "sha256").hex()
