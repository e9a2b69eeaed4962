"""The SQLite file of a ledger: its tables, and how events get in and out.  Nothing here decides anything."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.privacy.chain import Event, Kind, canonical
from fedtune.spec import RunError

LOCK_TIMEOUT_S = 60.0
_APPLICATION_ID = 0x66656474  # "fedt"
_COLUMNS = (
    "sequence", "kind", "time", "run", "round", "request", "attempt", "dataset", "cohort", "code", "detail", "hash",
    "signature",
)  # fmt: skip

# The triggers keep a mistake from rewriting history; the hash chain shows it when somebody does it on purpose.
SCHEMA = (
    """CREATE TABLE events (
  sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, time TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
  request TEXT NOT NULL, attempt INTEGER NOT NULL, dataset TEXT NOT NULL, cohort TEXT NOT NULL, code TEXT NOT NULL,
  detail TEXT NOT NULL, hash TEXT NOT NULL, signature TEXT NOT NULL
) STRICT""",
    "CREATE TABLE replies (run TEXT PRIMARY KEY, request TEXT NOT NULL, reply BLOB NOT NULL) STRICT",
    """CREATE TRIGGER events_are_never_changed BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER events_are_never_deleted BEFORE DELETE ON events
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
)


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction that locks the ledger at `path`, made when missing, against every other writer.

    It is on disk when the block ends, and undone when the block raises.

    Raises:
        RunError: the file cannot be opened, locked or written, or is no ledger.
    """
    try:
        if not path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        file = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None)
    except (sqlite3.Error, OSError) as error:
        raise RunError(f"ledger {path} cannot be opened ({error}); nothing is trained without it") from error
    try:
        # The rollback journal, and not a write-ahead log: a copied file is whole.  EXTRA also syncs the folder after
        # the journal is gone, without which a power cut could bring an undone state back.
        file.execute("PRAGMA journal_mode = DELETE")
        file.execute("PRAGMA synchronous = EXTRA")
        file.execute("BEGIN IMMEDIATE")
        _make_or_check_tables(file, path)
        yield file
        file.execute("COMMIT")
    except sqlite3.Error as error:
        raise RunError(f"ledger {path} cannot be read or written ({error}); nothing is trained without it") from error
    finally:
        file.close()  # a transaction that did not commit is rolled back


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to an existing ledger that changes nothing, but for undoing a transaction that a crash cut short.

    Raises:
        RunError: the file is missing, damaged or not a ledger.
    """
    if not path.is_file():
        raise RunError(f"ledger {path} does not exist")
    # Only a writer may roll a journal back, and until that is done nobody can read.
    mode = "rw" if path.resolve().with_name(f"{path.resolve().name}-journal").exists() else "ro"
    try:
        file = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=LOCK_TIMEOUT_S, isolation_level=None
        )
        try:
            file.execute("PRAGMA query_only = ON")
            file.execute("BEGIN")
            _check_tables(file, path)
            yield file
        finally:
            file.close()
    except sqlite3.Error as error:
        raise RunError(f"ledger {path} cannot be read ({error})") from error


def insert(file: sqlite3.Connection, event: Event) -> None:
    """Append one row."""
    values = [getattr(event, name) for name in _COLUMNS]
    values[_COLUMNS.index("detail")] = canonical(event.detail).decode()
    values[_COLUMNS.index("kind")] = event.kind.value
    marks = ", ".join("?" * len(_COLUMNS))
    file.execute(f"INSERT INTO events ({', '.join(_COLUMNS)}) VALUES ({marks})", values)


def read_events(file: sqlite3.Connection, *, after: int = 0) -> list[Event]:
    """Events with a sequence above `after`, in order.

    Raises:
        RunError: a row is not an event.
    """
    query = f"SELECT {', '.join(_COLUMNS)} FROM events WHERE sequence > ? ORDER BY sequence"
    rows = file.execute(query, (after,)).fetchall()  # a cursor left half-way would hold the lock after an error
    return [_event(dict(zip(_COLUMNS, row, strict=True))) for row in rows]


def hash_of(file: sqlite3.Connection, sequence: int) -> str | None:
    """The stored hash of one event; None where there is none."""
    row = file.execute("SELECT hash FROM events WHERE sequence = ?", (sequence,)).fetchone()
    return None if row is None else str(row[0])


def store_reply(file: sqlite3.Connection, *, run: str, request: str, reply: bytes) -> None:
    """Keep `reply` as the newest of `run`."""
    file.execute("INSERT OR REPLACE INTO replies (run, request, reply) VALUES (?, ?, ?)", (run, request, reply))


def stored_replies(file: sqlite3.Connection) -> list[tuple[str, str, bytes]]:
    """Run, request digest and reply of each stored reply."""
    return file.execute("SELECT run, request, reply FROM replies").fetchall()


def reply_to(file: sqlite3.Connection, request: str) -> bytes | None:
    """The stored reply to a request, if it is still there."""
    row = file.execute("SELECT reply FROM replies WHERE request = ?", (request,)).fetchone()
    return None if row is None else bytes(row[0])


def _event(row: dict[str, object]) -> Event:
    try:
        detail = json.loads(str(row["detail"]))
        # One event has one spelling, or a change of spelling would go unseen.
        if not isinstance(detail, dict) or canonical(detail).decode() != row["detail"]:
            raise ValueError("detail")
        return Event(**{**row, "kind": Kind(row["kind"]), "detail": detail})  # type: ignore[arg-type]
    except (ValueError, RecursionError) as error:
        raise RunError(f"event {row['sequence']} was changed: it is not written as fedtune writes events") from error


def _make_or_check_tables(file: sqlite3.Connection, path: Path) -> None:
    if file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        file.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        for statement in SCHEMA:
            file.execute(statement)
    _check_tables(file, path)


def _check_tables(file: sqlite3.Connection, path: Path) -> None:
    """Refuse a file with other tables, triggers or views than fedtune's."""
    found = {sql for (sql,) in file.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    (application,) = file.execute("PRAGMA application_id").fetchone()
    if found != set(SCHEMA) or application != _APPLICATION_ID:
        raise RunError(f"ledger {path} does not have a ledger's tables: it was changed, or is another file")
