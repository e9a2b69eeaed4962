"""The ledger file: durable, consistent in every copy, locked by one writer at a time, and never partially written."""

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.ops.backup import copy_database
from fedtune.privacy import durable, events
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import Head, Kind
from fedtune.privacy.ledger.store import EventStore
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError, RunError
from fedtune.spec import describe_full_disk as what_is_full

from .builders import list_kinds, make_policy, make_proposal, read_refusal_reason, reserve, tamper, train


class PowerCut(Exception):
    """Raised by a test at the point of a crash."""


def test_rollback_journal_and_full_synchronization_are_enabled(path: Path) -> None:
    store.create_ledger_file(path)
    with store.open_for_writing(path) as file:
        assert file.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert file.execute("PRAGMA synchronous").fetchone() == (3,), "synchronous must be EXTRA"
        assert file.in_transaction
        file.execute("INSERT INTO replies VALUES ('r', 'q', x'00', x'')")
        assert sorted(p.name for p in path.parent.iterdir()) == ["ledger.db", "ledger.db-journal"]


def test_journal_that_names_another_file_deletes_nothing(open_ledger: Any, path: Path, tmp_path: Path) -> None:
    train(open_ledger(), make_proposal(), 1)
    (other := tmp_path / "other").touch()
    name, mark = bytes(other), bytes.fromhex("d9d505f920a163d7")
    header = (mark + struct.pack(">5I", 0, 0, path.stat().st_size // 4096, 512, 4096)).ljust(512, b"\0")
    named = struct.pack(">I", (1 << 30) // 4096 + 1) + name + struct.pack(">2I", len(name), sum(name)) + mark
    (path.parent / "ledger.db-journal").write_bytes(header + named)  # SQLite deletes the named file after the rollback
    for read in (lambda: verify(path), open_ledger, lambda: copy_database(path, tmp_path / "copy")):
        with pytest.raises((RunError, ConfigError), match="its journal names another file"):
            read()
    assert other.exists()


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (lambda path: path.unlink(), "is missing; training is not possible without it"),
        (lambda path: path.write_bytes(b""), "does not have the tables of a ledger"),
        (lambda path: (path.unlink(), store.create_ledger_file(path)), "has no events"),
    ],
    ids=["missing", "empty", "without events"],
)
def test_lost_ledger_is_not_replaced_by_a_new_one(
    open_ledger: Any, path: Path, lose: Callable[[Path], object], message: str
) -> None:
    train(open_ledger(), make_proposal(), 1)
    lose(path)
    lost = path.read_bytes() if path.exists() else None
    with pytest.raises(RunError, match=message):
        open_ledger(create=False)
    assert (path.read_bytes() if path.exists() else None) == lost


def test_emptied_ledger_file_is_no_new_ledger(open_ledger: Any, path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with pytest.raises(RunError, match="does not have the tables of a ledger"):
        open_ledger()
    assert path.read_bytes() == b""


def test_link_to_a_policy_has_the_ledger_and_the_key_of_the_policy(tmp_path: Path) -> None:
    policy = tmp_path / "real" / "site.toml"
    write_policy(make_policy(), policy)
    link = tmp_path / "site.toml"
    link.symlink_to(policy)
    files = SiteFiles.from_site_toml(link)
    assert files.ledger == policy.parent / "ledger.db"
    assert files.site_key.parent == policy.parent


def test_ledger_leaves_no_extra_files_and_is_readable_only_by_owner(open_ledger: Any, path: Path) -> None:
    anchor = path.parent / "anchor.json"
    train(open_ledger(anchor=anchor), make_proposal(), 1)
    verify(path)
    with contextlib.closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",), "opening must reset WAL mode"
    train(open_ledger(anchor=anchor), make_proposal(), 2)
    with contextlib.closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert sorted(p.name for p in path.parent.iterdir()) == ["anchor.json", "ledger.db"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_events_table_rejects_updates_deletes_and_wrong_types(open_ledger: Any, path: Path) -> None:
    open_ledger()
    with contextlib.closing(sqlite3.connect(path)) as file:
        for statement in ("UPDATE events SET run = 'x'", "DELETE FROM events WHERE sequence = 1"):
            with pytest.raises(sqlite3.IntegrityError, match="the ledger is append-only"):
                file.execute(statement)
        with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT value in INTEGER column"):
            file.execute(
                "INSERT INTO events SELECT 3, kind, time, run, 'one', request, attempt, dataset, cohort,"
                " code, detail, hash, signature FROM events WHERE sequence = 1"
            )


@pytest.mark.parametrize("struck", ["insert_event", "open_for_writing"])
def test_crash_within_a_transaction_rolls_it_back(open_ledger: Any, path: Path, monkeypatch: Any, struck: str) -> None:
    ledger = open_ledger()
    train(ledger, make_proposal(), 1, reply=b"reply 1")
    reservation = reserve(ledger, make_proposal(), 2)
    before = list_kinds(path)

    insert, open_for_writing = store.insert_event, store.open_for_writing

    def insert_and_crash(*args: Any) -> None:
        insert(*args)
        raise PowerCut

    @contextlib.contextmanager
    def write_and_crash(path: Path) -> Iterator[sqlite3.Connection]:
        with open_for_writing(path) as file:
            yield file
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(store, struck, insert_and_crash if struck == "insert_event" else write_and_crash)
        with pytest.raises(PowerCut):
            ledger.commit(reservation, b"reply 2")
        with pytest.raises(PowerCut):
            ledger.reserve(make_proposal(run="2"), round=1, request="q")
    assert list_kinds(path) == before
    for opened in (ledger, open_ledger()):
        opened.end_run("unknown")
        assert opened.sign_receipt("r").charged_rounds == 2, "the interrupted round must stay charged"
        assert opened.sign_receipt("2").charged_rounds == 0
    assert ledger.reserve(make_proposal(), round=1, request="digest r 1") == b"reply 1"
    second = reserve(ledger, make_proposal(), 2)
    assert second.attempt == 2, "an uncommitted reply must not be sent, nor its noise reused"
    ledger.commit(second, b"reply 2, second attempt")
    assert open_ledger().reserve(make_proposal(), round=2, request="digest r 2") == b"reply 2, second attempt"
    verify(path)


KILLED = """
import os, signal, sys
from pathlib import Path
from fedtune.privacy.ledger import store
with store.open_for_writing(Path(sys.argv[1])) as file:
    file.execute("PRAGMA cache_spill = 1")
    file.execute("INSERT INTO replies VALUES ('r', 'q', zeroblob(20000000), x'')")  # more than is kept in memory
    print("written", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("first", ["verify", "ledger"])
def test_ledger_is_unchanged_after_its_writer_is_killed(open_ledger: Any, path: Path, first: str) -> None:
    reserve(ledger := open_ledger(), make_proposal(), 1)
    before = path.read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout == b"written\n"
    assert path.read_bytes() != before, "the writer must have changed the file"
    assert Path(f"{path}-journal").exists()
    if first == "verify":
        assert [kind for kind, _ in list_kinds(path)][2:] == [Kind.PLAN, Kind.RESERVE]
    reserve(ledger, make_proposal(), 2)
    assert not Path(f"{path}-journal").exists()
    assert [kind for kind, _ in list_kinds(path)] == ["note", "note", "plan", "reserve", "reserve"]


# Unwritable files, and files that are not a ledger.


def test_full_disk_leaves_no_charge_in_memory(open_ledger: Any, path: Path, monkeypatch: Any) -> None:
    ledger, open_for_writing = open_ledger(), store.open_for_writing
    reservation = reserve(ledger, make_proposal(), 1)

    @contextlib.contextmanager
    def fill_disk(path: Path) -> Iterator[sqlite3.Connection]:
        with open_for_writing(path) as file:
            (pages,) = file.execute("PRAGMA page_count").fetchone()
            file.execute(f"PRAGMA max_page_count = {pages}")
            yield file

    with monkeypatch.context() as patch:
        patch.setattr(store, "open_for_writing", fill_disk)
        with pytest.raises(
            RunError, match=r"cannot be read or written \(database or disk is full\); training is not possible"
        ):
            ledger.commit(reservation, bytes(100_000))
        with pytest.raises(RunError, match="disk is full"):
            ledger.reserve(make_proposal(run="x" * 200), round=1, request="y" * 100_000)
    on_disk = verify(path).history
    assert set(on_disk.runs) == {"r"}
    assert on_disk.runs["r"].replies == {}
    for opened in (ledger, open_ledger()):
        opened.end_run("unknown")
        assert (
            opened.history.count_total_charges()
            == on_disk.count_total_charges()
            == events.count_mechanisms([make_proposal().plan.event()])
        )
    ledger.commit(reservation, bytes(100_000))  # the disk has space again
    assert open_ledger().reserve(make_proposal(), round=1, request="digest r 1") == bytes(100_000)


@pytest.mark.parametrize("blocked", ["folder is a file", "file is a folder", "folder cannot be made"])
def test_ledger_that_cannot_be_created_raises_a_run_error(open_ledger: Any, path: Path, blocked: str) -> None:
    if blocked == "folder is a file":
        path.parent.write_bytes(b"")
    elif blocked == "file is a folder":
        path.mkdir(parents=True)
    else:
        path = Path("/proc/nobody/ledger.db")
    with pytest.raises(
        RunError,
        match=rf"ledger {re.escape(str(path))} cannot be (created|opened|read or written) \(.*\); training is not",
    ):
        open_ledger(path=path)


def test_transaction_locks_the_ledger_before_reading(open_ledger: Any, path: Path) -> None:
    # Otherwise two processes could both find budget left, and one would fail when it writes.
    open_ledger()
    with (
        store.open_for_writing(path),
        contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other_connection,
    ):
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            other_connection.execute("BEGIN IMMEDIATE")
        other_connection.execute("BEGIN")
    with store.open_for_writing(path):
        pass


def test_ledger_locked_for_too_long_raises_a_run_error(open_ledger: Any, path: Path, monkeypatch: Any) -> None:
    ledger = open_ledger()
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.01)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other_connection:
        other_connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match=r"cannot be read or written \(database is locked\)"):
            ledger.reserve(make_proposal(), round=1, request="q")
    reserve(ledger, make_proposal(), 1)


@pytest.mark.parametrize(
    "content",
    [b"no database at all, but longer than the hundred bytes of a header. " * 4, b"SQLite format 3\0" + bytes(84)],
)
def test_non_ledger_file_raises_a_run_error_and_stays_unchanged(open_ledger: Any, path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(
        RunError, match=r"training is not possible without a ledger|does not have the tables of a ledger"
    ):
        open_ledger()
    assert path.read_bytes() == content
    with pytest.raises(RunError, match=r"cannot be read|does not have the tables of a ledger"):
        verify(path)


def test_truncated_ledger_file_raises_a_run_error(open_ledger: Any, path: Path) -> None:
    train(ledger := open_ledger(), make_proposal(), 1, reply=bytes(50_000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for check in (open_ledger, lambda: verify(path), lambda: ledger.reserve(make_proposal(), round=2, request="q")):
        with pytest.raises(RunError):
            check()


@pytest.mark.parametrize(
    "statement",
    [
        *("CREATE TABLE epsilon (spent REAL)", "CREATE INDEX by_run ON events (run)", "CREATE VIEW spent AS SELECT 0"),
        *("DROP TRIGGER events_are_never_changed", "DROP TRIGGER events_are_never_deleted", "DROP TABLE replies"),
        "ALTER TABLE events ADD COLUMN more TEXT",
        *("CREATE TRIGGER more AFTER INSERT ON events BEGIN DELETE FROM replies; END", "PRAGMA application_id = 5"),
    ],
)
def test_unexpected_database_schema_raises_a_run_error(open_ledger: Any, path: Path, statement: str) -> None:
    ledger = open_ledger()
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.execute(statement)
        file.commit()
    for check in (open_ledger, lambda: verify(path), lambda: ledger.reserve(make_proposal(), round=1, request="q")):
        with pytest.raises(
            RunError, match="does not have the tables of a ledger: the file was changed, or is another database"
        ):
            check()


def test_damaged_ledger_is_not_left_locked(open_ledger: Any, path: Path) -> None:
    open_ledger()
    tamper(path, "UPDATE events SET detail = ''")
    with pytest.raises(RunError) as of_opening:
        open_ledger()
    with pytest.raises(RunError) as of_verifying:
        verify(path)
    with contextlib.closing(sqlite3.connect(path, timeout=0)) as file:
        file.execute("BEGIN EXCLUSIVE")
    del of_opening, of_verifying  # their tracebacks hold frames, and with them open database connections


def test_last_round_is_granted_to_a_single_racing_process(open_ledger: Any, path: Path) -> None:
    """Two races: for the last of the budget, between different runs; then for the last round of one run."""
    processes, anchor = multiprocessing.get_context("fork"), path.with_name("anchor.json")
    gate, results = processes.Barrier(8), processes.SimpleQueue()
    shared = make_proposal(run="shared", plan={"num_rounds": 2})
    train(open_ledger(anchor=anchor), shared, 1)  # two of ten rounds are reserved, so one plan of five fits

    def race(number: int) -> None:
        ledger = open_ledger(anchor=anchor)
        for proposal, round in ((make_proposal(run=f"own {number}"), 1), (shared, 2)):
            gate.wait(60)
            try:
                reserve(ledger, proposal, round)
                results.put((proposal.run.split()[0], "granted"))
            except Refused as refused:
                results.put((proposal.run.split()[0], refused.reason.value))

    racing = [processes.Process(target=race, args=(number,)) for number in range(1, 9)]
    for attempt_one in racing:
        attempt_one.start()
    for attempt_one in racing:
        attempt_one.join(60)
    assert [attempt_one.exitcode for attempt_one in racing] == [0] * 8
    refused = {("own", "max_epsilon"): 7, ("shared", "plan_exhausted"): 7}
    assert Counter(results.get() for _ in range(16)) == refused | {("own", "granted"): 1, ("shared", "granted"): 1}
    verified = verify(path, anchor=Head.read(anchor))
    assert verified.anchor_sequence == len(verified.events)
    assert [event.kind for event in verified.events].count(Kind.RESERVE) == 3
    assert verified.history.count_total_charges() == events.count_mechanisms([shared.plan.event()] * 3)


def test_concurrent_charge_between_transactions_cannot_exceed_the_plan(open_ledger: Any, monkeypatch: Any) -> None:
    attempt_one, other_connection, two_rounds = open_ledger(), open_ledger(), make_proposal(plan={"num_rounds": 2})
    refusals, original = list[Reason](), EventStore.transaction

    @contextlib.contextmanager
    def charge_from_other(store: EventStore) -> Iterator[None]:
        with original(store):
            yield
        if store is attempt_one._store and len(refusals) == 0:
            refusals.append(read_refusal_reason(other_connection.reserve, two_rounds, round=3, request="of the other"))

    reserve(attempt_one, two_rounds, 1)
    monkeypatch.setattr(EventStore, "transaction", charge_from_other)
    reserve(attempt_one, two_rounds, 2)
    assert refusals == [Reason.PLAN_EXHAUSTED]
    assert open_ledger().history.charged_rounds("r") == 2


# Writing a file atomically.


def test_full_disk_error_names_the_file_and_leaves_no_partial_write(tmp_path: Path, monkeypatch: Any) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(durable.os, "fsync", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space") as caught:
        durable.write_durably(tmp_path / "file", b"x")
    assert list(tmp_path.iterdir()) == []
    refused = ConfigError("--output", "file", "must be a file that can be written")
    refused.__context__ = caught.value
    assert what_is_full(refused) == f"the disk is full: no room for {tmp_path / 'file'}"
    assert what_is_full(ValueError("I/O error: No space left on device (os error 28)")) == "the disk is full"
    ledger = RunError(
        "ledger l.db cannot be read or written (database or disk is full); training is not possible without a ledger"
    )
    assert what_is_full(ledger) == str(ledger)
    assert what_is_full(OSError(errno.EACCES, os.strerror(errno.EACCES), "file")) is None


def test_durable_write_syncs_the_file_before_renaming_and_the_folder_after(tmp_path: Path, monkeypatch: Any) -> None:
    order: list[str] = []
    replace = os.replace

    def fsync(handle: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "bytes")

    def record_rename(source: Path, target: Path) -> None:
        order.append("name")
        replace(source, target)

    monkeypatch.setattr(durable.os, "fsync", fsync)
    monkeypatch.setattr(durable.os, "replace", record_rename)
    durable.write_durably(tmp_path / "file", b"x")
    assert order == ["bytes", "name", "folder"]


def test_concurrent_writers_of_one_file_do_not_mix_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def replace_other_first(source: Path, target: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "replace", replace)
            patch.setattr(durable.os, "getpid", lambda: 1)
            durable.write_durably(target, b"of the other process")
        replace(source, target)

    monkeypatch.setattr(durable.os, "replace", replace_other_first)
    durable.write_durably(tmp_path / "file", b"of this one")
    assert (tmp_path / "file").read_bytes() == b"of this one"


def test_refused_request_leaves_ledger_and_anchor_unchanged(open_ledger: Any, path: Path) -> None:
    anchor = path.with_name("anchor.json")
    ledger = open_ledger(anchor=anchor)
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in (path, anchor)]
    assert read_refusal_reason(ledger.reserve, make_proposal(rank=9), round=1, request="q") is Reason.MAX_RANK
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in (path, anchor)] == before
