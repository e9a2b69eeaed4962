"""Durable storage of chained and signed events in SQLite. Policy and budget are checked elsewhere (`site_ledger`).

The functions access SQLite only; `EventStore` keeps the file, the hash chain and the history consistent.
"""

from __future__ import annotations

import hmac
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fedtune.codec import parse_json
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.durable import lock_folder, write_durably
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import register
from fedtune.privacy.ledger.chain import (
    EVENT,
    START,
    Doubt,
    Event,
    Head,
    Kind,
    RestoreNote,
    check_chain,
    check_ledger_schema,
    check_signature,
    to_canonical_json,
)
from fedtune.privacy.ledger.history import History
from fedtune.spec import LEDGER_SCHEMA, ConfigError, RunError
from fedtune.system import fsync_folder
from fedtune.version import __version__

LOCK_TIMEOUT_S = 60.0
_APPLICATION_ID = 0x66656474  # "fedt"
_END_OF_NAME = bytes.fromhex("d9d505f920a163d7")  # end of a journal that names a super-journal
_COLUMNS = (
    "sequence", "kind", "time", "run", "round", "request", "attempt", "dataset", "cohort", "code", "detail", "hash",
    "signature",
)  # fmt: skip

# The triggers prevent accidental changes of events; the hash chain reveals deliberate ones.
SCHEMA = (
    """CREATE TABLE events (
  sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, time TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
  request TEXT NOT NULL, attempt INTEGER NOT NULL, dataset TEXT NOT NULL, cohort TEXT NOT NULL, code TEXT NOT NULL,
  detail TEXT NOT NULL, hash TEXT NOT NULL, signature TEXT NOT NULL
) STRICT""",
    """CREATE TABLE replies (
  run TEXT PRIMARY KEY, request TEXT NOT NULL, reply BLOB NOT NULL, state BLOB NOT NULL
) STRICT""",
    """CREATE TRIGGER events_are_never_changed BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER events_are_never_deleted BEFORE DELETE ON events
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
)


def create_ledger_file(path: Path) -> None:
    """Create a ledger without events at `path`, completely or not at all; an existing file is left unchanged.

    Raises:
        RunError: the file cannot be created.
    """
    if os.path.lexists(path):
        return
    building = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        write_durably(building, _build_empty_ledger(), mode=0o600)
        try:
            with suppress(FileExistsError):  # another process has created a ledger, which a link never replaces
                os.link(building, path)
        finally:
            building.unlink()
        fsync_folder(path.parent)
    except OSError as error:
        raise RunError(
            f"ledger {path} cannot be created ({error}); training is not possible without a ledger"
        ) from error


def _build_empty_ledger() -> bytes:
    with closing(sqlite3.connect(":memory:")) as file:
        file.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        file.execute(f"PRAGMA user_version = {LEDGER_SCHEMA}")
        for statement in SCHEMA:
            file.execute(statement)
        return file.serialize()


def connect(path: Path, *, writing: bool = False) -> sqlite3.Connection:
    """Open an existing SQLite database, read-only unless it is for `writing`, or has a journal to roll back.

    Guarantee: opening a database from an untrusted source, or another account's as root, deletes no other file. A
    journal may name a super-journal, which SQLite deletes after the rollback, whatever file that is. Only transactions
    over several databases have one, so such a journal is none of fedtune's.

    Raises:
        sqlite3.Error: the file cannot be opened, or its journal names another file.
    """
    file = path.resolve()
    journal = file.with_name(f"{file.name}-journal")
    if journal.is_file():
        with suppress(OSError), journal.open("rb") as stream:
            stream.seek(-len(_END_OF_NAME), os.SEEK_END)
            if stream.read() == _END_OF_NAME:
                raise sqlite3.DatabaseError("its journal names another file")
    # Only a writer can roll back a hot journal, which blocks all readers.
    mode = "rw" if writing or journal.exists() else "ro"
    return sqlite3.connect(f"{file.as_uri()}?mode={mode}", uri=True, timeout=LOCK_TIMEOUT_S, isolation_level=None)


@contextmanager
def open_for_writing(path: Path) -> Iterator[sqlite3.Connection]:
    """Open an exclusive transaction on the existing ledger at `path`.

    The transaction is durable when the block ends, and is rolled back if the block raises.

    Guarantee: a missing or empty file is never replaced by a new ledger, which would lack the epsilon that was spent.

    Raises:
        ConfigError: the ledger has the format of another version.
        RunError: the file cannot be opened, locked or written, or is not a ledger.
    """
    if not path.exists():
        raise RunError(f"ledger {path} is missing; training is not possible without it: restore it from a backup")
    try:
        with closing(connect(path, writing=True)) as file:
            # A rollback journal instead of a write-ahead log, so that a copied file is complete. EXTRA also syncs the
            # folder after the journal is deleted; otherwise a power cut could undo a committed transaction.
            file.execute("PRAGMA journal_mode = DELETE")
            file.execute("PRAGMA synchronous = EXTRA")
            file.execute("BEGIN IMMEDIATE")
            _check_tables(file, path)
            yield file  # a transaction that does not commit is rolled back when the file is closed
            file.execute("COMMIT")
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite may quote invalid UTF-8 in its message
        raise RunError(
            f"ledger {path} cannot be read or written ({error}); training is not possible without a ledger"
        ) from error


@contextmanager
def open_for_reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open an existing ledger read-only, after rolling back a transaction that a crash interrupted.

    Raises:
        ConfigError: the ledger has the format of another version.
        RunError: the file is missing, damaged or not a ledger.
    """
    if not path.is_file():
        raise RunError(f"ledger {path} does not exist")
    try:
        with closing(connect(path)) as file:
            file.execute("PRAGMA query_only = ON")
            file.execute("BEGIN")
            _check_tables(file, path)
            yield file
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise RunError(f"ledger {path} cannot be read ({error})") from error


def insert_event(file: sqlite3.Connection, event: Event) -> None:
    """Insert an event as a row of the database."""
    values = [getattr(event, name) for name in _COLUMNS]
    values[_COLUMNS.index("detail")] = to_canonical_json(event.detail).decode()
    values[_COLUMNS.index("kind")] = event.kind.value
    marks = ", ".join("?" * len(_COLUMNS))
    file.execute(f"INSERT INTO events ({', '.join(_COLUMNS)}) VALUES ({marks})", values)


def read_events(file: sqlite3.Connection, *, after: int = 0) -> list[Event]:
    """Read the events after sequence number `after`, in order.

    Raises:
        RunError: a row is not a valid event.
    """
    query = f"SELECT {', '.join(_COLUMNS)} FROM events WHERE sequence > ? ORDER BY sequence"
    rows = file.execute(query, (after,)).fetchall()  # an open cursor would keep the lock after an error
    return [_parse_event(dict(zip(_COLUMNS, row, strict=True))) for row in rows]


def read_replies(file: sqlite3.Connection) -> list[tuple[str, str, bytes]]:
    """Read all stored replies as (run, request digest, reply)."""
    return file.execute("SELECT run, request, reply FROM replies").fetchall()


def _parse_event(row: dict[str, object]) -> Event:
    try:
        detail = parse_json(str(row["detail"]), key="detail", bound="must be JSON")
        # The encoding is unique; otherwise a re-encoded row would go unnoticed.
        if to_canonical_json(detail).decode() != row["detail"]:
            raise ValueError("detail")
        return Event(**{**row, "kind": Kind(row["kind"]), "detail": detail})  # type: ignore[arg-type]
    except ValueError as error:
        raise RunError(f"event {row['sequence']} was changed: its format is invalid") from error


def _check_tables(file: sqlite3.Connection, path: Path) -> None:
    """Reject a file with foreign tables, triggers or views, or with the schema of another version."""
    (schema,) = file.execute("PRAGMA user_version").fetchone()
    (application,) = file.execute("PRAGMA application_id").fetchone()
    if application == _APPLICATION_ID:
        check_ledger_schema(path, schema)
    tables = {sql for (sql,) in file.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if tables not in (set(SCHEMA), {*SCHEMA, *register.SCHEMA}) or application != _APPLICATION_ID:
        raise RunError(
            f"ledger {path} does not have the tables of a ledger: the file was changed, or is another database"
        )


@contextmanager
def _name_anchor_in_errors(anchor: Path | None) -> Iterator[None]:
    """Convert operating-system errors into a RunError that names the anchor."""
    try:
        yield
    except OSError as error:
        raise RunError(f"anchor {anchor} cannot be used ({error.strerror}); training is not possible") from error


def resolve_link(path: Path) -> Path:
    """Return the file that a path links to; a path that is no link stays as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def lock_anchor(anchor: Path | None) -> AbstractContextManager[None]:
    """Lock the folder of an anchor, created if it is missing, so that nobody else replaces the anchor; None: no lock.

    Raises:
        ConfigError: the folder, or its file system, does not support locks.
        OSError: the folder cannot be created.
    """
    if anchor is None:
        return nullcontext()
    anchor.parent.mkdir(parents=True, exist_ok=True)
    return lock_folder(anchor.parent)


class EventStore:
    """Transactional access to the events of one ledger file.

    Args:
        path: the existing SQLite file.
        key: the site's key, which signs each event.
        anchor: file for the newest signed head, outside the ledger; None: no anchor.

    Attributes:
        history: state of the ledger after the last transaction.
        server_time: the server's time at the newest request; None before the first request.
    """

    def __init__(self, path: Path, key: SigningKey, anchor: Path | None) -> None:
        self.path, self.history = path, History()
        self.server_time: datetime | None = None
        self._key, self._anchor = key, anchor and resolve_link(anchor)
        self._open_file: sqlite3.Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Lock the file, apply events that other processes wrote, and write the block's events atomically.

        Guarantee: when the block has ended, its events and the anchor are on disk.

        Raises:
            ConfigError: the ledger has the format of another version.
            RunError: the file or the anchor is damaged, was changed or rolled back, or cannot be written.
        """
        before, anchor, due = self.history.length, self._anchor, None
        try:
            with ExitStack() as held:
                with open_for_writing(self.path) as file:
                    self._catch_up(file)
                    with _name_anchor_in_errors(anchor):
                        self._require_anchor_head()
                    before, self._open_file = self.history.length, file
                    yield
                    if anchor is not None and (self.history.length > before or not anchor.exists()):
                        due = anchor
                        with _name_anchor_in_errors(anchor):
                            # A copy of this ledger may have written the anchor meanwhile. Check the anchor again before
                            # the commit, and lock it until it has this ledger's head.
                            held.enter_context(lock_anchor(anchor))
                            self._require_anchor_head()
                if due is not None:  # after the commit: a crash can only leave an outdated anchor
                    with _name_anchor_in_errors(due):
                        write_durably(due, self.head().to_bytes())
        except BaseException:
            if self.history.length != before:
                self.history = History()  # applied events may not have been written
            raise
        finally:
            self._open_file = None

    @property
    def _file(self) -> sqlite3.Connection:
        assert self._open_file is not None, "outside a transaction"
        return self._open_file

    def now(self) -> datetime:
        """Return the time for the next event. Without the server's time, no new budget period begins."""
        fallback = self.history.last_time if self.history.caps_periods else None
        return self.history.now(server=self.server_time or fallback)

    def append_event(
        self, kind: Kind, detail: dict[str, Any], *, at: datetime | None = None, **about: str | int
    ) -> None:
        """Append an event to the chain, and apply it to the history.

        The keyword arguments `about` set further fields of `Event`; its time is `at`, by default `now`.
        """
        unsigned: dict[str, Any] = {
            "sequence": self.history.length + 1,
            "kind": kind,
            "time": (at or self.now()).isoformat(),
            "code": __version__,
            "detail": json.loads(to_canonical_json(detail)),
            **about,
        }
        hash = Event(**unsigned).compute_hash_after(self.history.hash)
        event = Event(**unsigned, hash=hash, signature=self._key.sign(EVENT, hash.encode()))
        insert_event(self._file, event)
        self.history.apply_event(event)

    def append_note(self, what: str, *, run: str = "", at: datetime | None = None, **detail: Any) -> None:
        """Append a note, an event of kind "note" with the type `what`."""
        self.append_event(Kind.NOTE, {"what": what, **detail}, at=at, run=run)

    def store_reply(self, *, run: str, request: str, reply: bytes, state: bytes = b"") -> None:
        """Store the newest reply of a run with the algorithm's state, replacing the previous reply and state."""
        row = (run, request, reply, state)
        self._file.execute("INSERT OR REPLACE INTO replies (run, request, reply, state) VALUES (?, ?, ?, ?)", row)

    def create_register(self) -> None:
        """Create the register of arrivals in a new ledger."""
        for statement in register.SCHEMA:
            self._file.execute(statement)

    def admit_users(self, own: Mapping[str, int], cohorts: Cohorts) -> tuple[frozenset[str], str]:
        """Admit users to the next charged round, and record their cohorts in the register.

        Args:
            own: user -> cohort according to the user's records.
            cohorts: cohorts that the run admits.

        Returns:
            The users that the round may sample, and the register's digest after their admission.

        Guarantee: a user is admitted only if the cohort from `History.find_cohort` is in `cohorts`. The register then
        has this cohort, which never changes in later rounds, even if `own` does.

        Raises:
            RunError: the register does not match the digest in the hash chain.
        """
        rows, key = register.read_rows(self._file), self._key.derive_secret("arrivals")
        if [START, *register.map_digests_by_event(rows).values()][-1] != self.history.register:
            raise RunError(f"the register of arrivals in ledger {self.path} was changed; training is not possible")
        known, admitted, new = {row.unit: row for row in rows}, set[str](), list[register.Row]()
        for user, cohort in own.items():
            unit = register.pseudonymize(key, user)
            row = known.get(unit)
            counted = self.history.find_cohort(row, cohort)
            if counted in cohorts:
                admitted.add(user)
                if row is None:
                    new.append(register.Row(self.history.length + 1, unit, counted))
        self._file.executemany("INSERT INTO arrivals (sequence, unit, cohort) VALUES (?, ?, ?)", new)
        return frozenset(admitted), register.compute_register_digest(self.history.register, new)

    def read_stored_reply(self, request: str) -> bytes | None:
        """Read the stored reply to a request. None if a newer reply of the run has replaced it."""
        row = self._file.execute("SELECT reply FROM replies WHERE request = ?", (request,)).fetchone()
        return None if row is None else bytes(row[0])

    def read_stored_state(self, run: str) -> bytes:
        """Read the algorithm's state that was stored with a run's newest reply. The state is empty without a reply."""
        row = self._file.execute("SELECT state FROM replies WHERE run = ?", (run,)).fetchone()
        return b"" if row is None else bytes(row[0])

    def head(self) -> Head:
        """Create and sign the head of the newest event, for an anchor."""
        return self.history.head(self._key)

    def compute_salted_head(self) -> str:
        """Compute the hash of the newest lasting event, salted with a secret of the site."""
        return self._add_salt_to_hash(self.history.path[-1][1])

    def covers_receipt(self, shown: Doubt, *, besides: RestoreNote | None = None) -> bool:
        """Whether the ledger contains a receipt's event, or has charged for the loss of that event.

        Args:
            shown: the receipt.
            besides: a restore note to assume in addition.
        """
        return self.history.covers_receipt(
            shown, lambda hash: hmac.compare_digest(self._add_salt_to_hash(hash), shown.head), besides=besides
        )

    def _require_anchor_head(self) -> None:
        """Check that the ledger contains the newest event of its anchor.

        Raises:
            RunError: the ledger is older than its anchor or has branched off, or one of the two files is missing or
                damaged.
            ConfigError: the anchor has the format of another version.
        """
        if self._anchor is None:
            return
        if not self._anchor.exists():
            # A ledger without charges counts as new: a crash may have preceded its first anchor.
            if self.history.count_total_charges():
                raise RunError(
                    f"anchor {self._anchor} is missing, and ledger {self.path} is not new; training is not possible"
                )
            return
        try:
            anchor = Head.read(self._anchor)
        except ConfigError as error:
            if error.key != "anchor":  # the format of another version: a backup would not help
                raise
            raise RunError(f"{error}; training is not possible") from error
        if not self.history.length:
            raise RunError(
                f"ledger {self.path} is missing, but anchor {self._anchor} covers {anchor.sequence} of its events"
            )
        self.require_same_ledger(anchor)
        if not self.history.covers_head(anchor):
            raise RunError(
                f"ledger {self.path} is older than its anchor {self._anchor} (event {self.history.length} of at least "
                f"{anchor.sequence}), or has diverged from it; see `fedtune ledger restore`"
            )

    def require_same_ledger(self, anchor: Head) -> None:
        """Check that an anchor belongs to this ledger.

        Raises:
            RunError: the anchor belongs to another ledger.
        """
        if (anchor.ledger, anchor.site_key) != (self.history.opening.ledger, self._key.public):
            raise RunError(f"the anchor belongs to another ledger, not to {self.path}")

    def _catch_up(self, file: sqlite3.Connection) -> None:
        """Verify that new events of the file continue the chain, and apply them to the history.

        Only the signature of the newest event is verified: its hash covers all earlier events.
        """
        known = self.history.length
        stored = file.execute("SELECT hash FROM events WHERE sequence = ?", (known,)).fetchone()
        if known and stored != (self.history.hash,):
            raise RunError(f"ledger {self.path} was changed or rolled back while it was open; training is not possible")
        try:
            new = read_events(file, after=known)
            check_chain(new, before=self.history.hash, first=known + 1)
            if new:
                check_signature(new[-1], self._key.public)
            for event in new:
                self.history.apply_event(event)
        except RunError as error:
            raise RunError(f"ledger {self.path}: {error}; training is not possible with a damaged ledger") from error

    def _add_salt_to_hash(self, hash: str) -> str:
        return hmac.digest(self._key.derive_secret("receipt head"), hash.encode(), "sha256").hex()
