"""A site whose ledger is not in order trains nothing and says only that; the others do not wait for it."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.federation.rounds import run_rounds
from fedtune.privacy.ledger import store
from fedtune.runs.results import site_charge


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedtune")


def require_site_2_left_out(
    made: Any, state: Any, caplog: pytest.LogCaptureFixture, text: str, *, readable: bool = False
) -> None:
    """The next round comes without site-2: no training, and the reason in its own log alone."""
    trained = list(made.trained)
    after = run_rounds(made.transport, made.lead, state)
    assert after.rounds[-1].failed_sites == {"site-2": "site_error"}
    assert after.rounds[-1].sites == ("site-1", "site-3")
    assert made.trained[len(trained) :] == ["site-1", "site-3"]
    assert text in caplog.text
    assert text not in repr(after)
    charge = site_charge(after, "site-2", made.plan)
    # Where not even a receipt comes nobody can say whether the round was charged, so the lead counts it.
    assert (charge.rounds, charge.upper_bound) == ((1, False) if readable else (len(after.rounds), True))


def flip_a_byte_of_an_event(path: Path) -> None:
    data = path.read_bytes()
    place = data.index(b'"noise_multiplier":4.0')
    path.write_bytes(data[:place] + b'"noise_multiplier":9.0' + data[place + 22 :])


def forget_the_last_event(path: Path) -> None:
    file = sqlite3.connect(path, isolation_level=None)
    file.execute("DROP TRIGGER events_are_never_deleted")
    file.execute("DELETE FROM events WHERE sequence = (SELECT max(sequence) FROM events)")
    file.execute(next(statement for statement in store.SCHEMA if "never_deleted" in statement))
    file.close()


def add_a_table(path: Path) -> None:
    file = sqlite3.connect(path, isolation_level=None)
    file.execute("CREATE TABLE notes (text TEXT)")
    file.close()


def make_a_folder_of_it(path: Path) -> None:
    path.unlink()
    path.mkdir()


_BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no database": (lambda path: path.write_bytes(b"no database" * 500), "file is not a database"),
    "a folder": (make_a_folder_of_it, "unable to open database file"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:6000]), "database disk image is malformed"),
    "changed": (flip_a_byte_of_an_event, "was changed: its hash does not fit"),
    "with a table more": (add_a_table, "does not have a ledger's tables"),
}


@pytest.mark.parametrize("fault", list(_BROKEN))
def test_a_broken_ledger(federation: Any, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    breaks, text = _BROKEN[fault]
    made = federation(num_rounds=2)
    state = made.run_until(1)
    breaks(made.ledger_path("site-2"))
    require_site_2_left_out(made, state, caplog, text)


def test_a_ledger_that_can_only_be_read(
    federation: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a disk that was mounted read-only.  File modes would not stop a test that root runs.
    made = federation(num_rounds=2)
    state = made.run_until(1)
    connect = sqlite3.connect

    def read_only(path: Any, **settings: Any) -> sqlite3.Connection:
        if path == made.ledger_path("site-2"):
            return connect(f"{path.as_uri()}?mode=ro", uri=True, **settings)
        return connect(path, **settings)

    monkeypatch.setattr(store.sqlite3, "connect", read_only)
    require_site_2_left_out(made, state, caplog, "attempt to write a readonly database", readable=True)
    monkeypatch.undo()
    assert [event.kind for event in made.events("site-2")][2:] == ["plan", "reserve", "commit"]


def test_a_ledger_that_somebody_keeps_locked(
    federation: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.05)
    made = federation(num_rounds=2)
    state = made.run_until(1)
    other = sqlite3.connect(made.ledger_path("site-2"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    require_site_2_left_out(made, state, caplog, "database is locked")
    other.close()


@pytest.mark.parametrize(
    ("happens", "text"),
    [
        (lambda path, backup: shutil.copy(backup, path), "is older than its anchor"),
        (lambda path, backup: forget_the_last_event(path), "is older than its anchor"),
        (lambda path, backup: path.unlink(), "is missing: anchor"),
    ],
    ids=["put back", "with an event forgotten", "lost"],
)
def test_a_ledger_that_lacks_what_its_anchor_knows(
    federation: Any, caplog: pytest.LogCaptureFixture, happens: Callable[[Path, Path], object], text: str
) -> None:
    made = federation(num_rounds=3, policies={"site-2": {"anchor": "elsewhere/anchor.json"}})
    path = made.ledger_path("site-2")
    state = made.run_until(1)
    backup = path.with_suffix(".backup")
    shutil.copy(path, backup)
    state = made.run_until(2, state)
    happens(path, backup)
    require_site_2_left_out(made, state, caplog, text)


def test_a_ledger_that_was_put_back_without_an_anchor_is_found_out_by_the_leads_receipt(federation: Any) -> None:
    made = federation(num_rounds=3)
    path = made.ledger_path("site-2")
    state = made.run_until(1)
    backup = path.with_suffix(".backup")
    shutil.copy(path, backup)
    state = made.run_until(2, state)
    shutil.copy(backup, path)
    after = run_rounds(made.transport, made.lead, state)
    assert after.rounds[-1].failed_sites == {"site-2": "ledger_behind_receipt"}
    assert made.trained[-2:] == ["site-1", "site-3"]
    assert after.receipts["site-2"] == state.receipts["site-2"], "what the site says now is not believed"
    charge = site_charge(after, "site-2", made.plan)
    assert (charge.rounds, charge.upper_bound) == (3, True)
