"""Nothing of a site's own words is in any byte that leaves it: not of an exception, a path, a record or a database."""

from __future__ import annotations

import base64
import errno
import logging
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fedtune.federation.rounds import run_rounds
from fedtune.privacy.ledger import store
from fedtune.spec import ConfigError, DataError, RunError

CANARY = "patient-4711-has-hepatitis"
_WORDS = (CANARY, "patient", "hepatitis", "Traceback", "Error", "ledger.db", "site_key.pem", "sqlite")


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedtune")


def require_silence(sent: list[bytes], words: tuple[str, ...] = _WORDS) -> None:
    """No word, nor the canary in another encoding that a library might have put it into."""
    assert sent
    everything = b"\0".join(sent)
    for word in words:
        assert word.encode() not in everything
    canary = CANARY.encode()
    for spelled in (canary.hex().encode(), CANARY.encode("utf-16-le"), base64.b64encode(canary)[:-4]):
        assert spelled not in everything


def three_of(made: Any, *, failed: str, reason: str) -> Any:
    """Run a round: one site fails for a reason of the list, the other two are averaged."""
    state = run_rounds(made.transport, made.lead, made.start)
    assert state.rounds[0].failed_sites == {failed: reason}
    assert len(state.rounds[0].sites) == 2
    return state


@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"cannot tokenise {CANARY}"),
        DataError(f"/records/{CANARY}.csv:12, text", f"{CANARY} came in on Tuesday", f"must be {CANARY}"),
        ConfigError(CANARY, CANARY, CANARY),
        RunError(f"the disk of {CANARY} is full"),
        OSError(errno.ENOSPC, f"no space for {CANARY}", f"/records/{CANARY}"),
        sqlite3.OperationalError(f"no such column: {CANARY}"),
        UnicodeDecodeError("utf-8", CANARY.encode() + b"\xff", 26, 27, CANARY),
        type(CANARY.replace("-", "_"), (Exception,), {})(),
        KeyError(CANARY),
        AssertionError(CANARY),
        MemoryError(CANARY),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_training_raises_stays(
    federation: Any, everything_sent: list[bytes], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    made = federation()
    made.fails["site-2"] = error
    state = three_of(made, failed="site-2", reason="site_error")
    require_silence(everything_sent)
    assert "site-2 failed in round 1" in caplog.text
    assert CANARY in caplog.text.replace("_", "-")
    receipt = state.receipts["site-2"]
    assert CANARY not in repr(receipt)
    assert receipt.charged_rounds == 1, "the round was charged before it failed"


def test_a_chain_of_exceptions_stays(federation: Any, everything_sent: list[bytes]) -> None:
    made = federation()
    try:
        try:
            raise ValueError(CANARY)
        except ValueError as cause:
            raise RuntimeError("in row 3") from cause
    except RuntimeError as error:
        made.fails["site-2"] = error
    three_of(made, failed="site-2", reason="site_error")
    require_silence(everything_sent, (*_WORDS, "row 3"))


def test_the_names_of_a_sites_files_stay(
    federation: Any, everything_sent: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    names = {
        "ledger": f"{CANARY}/{CANARY}.db",
        "site_key": f"{CANARY}.pem",
        "anchor": f"{CANARY}.json",
        "population": {"name": CANARY},
        "releases": {"metrics": "none"},
    }
    made = federation(policies={"site-2": names})
    state = run_rounds(made.transport, made.lead, made.start)
    assert state.rounds[0].failed_sites == {}
    require_silence(everything_sent)
    # Now with a ledger that cannot be read: the error names its path.
    made.ledger_path("site-2").write_bytes(b"no database" * 500)
    again = federation(policies={"site-2": names}, asks={"run": "s"})
    three_of(again, failed="site-2", reason="site_error")
    require_silence(everything_sent)
    assert f"{CANARY}.db cannot be read or written" in caplog.text


def _in_the_way(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(CANARY)


@pytest.mark.parametrize("what", ["ledger", "anchor", "key"])
def test_what_the_operating_system_says_stays(
    federation: Any, everything_sent: list[bytes], caplog: pytest.LogCaptureFixture, what: str
) -> None:
    # A file where a folder should be.
    names = {
        "ledger": {"ledger": f"{CANARY}/ledger.db"},
        "anchor": {"anchor": f"{CANARY}/anchor.json"},
        "key": {"site_key": f"{CANARY}/site_key.pem"},
    }
    made = federation(policies={"site-2": names[what]})
    _in_the_way(made.folder / "site-2" / CANARY)
    state = three_of(made, failed="site-2", reason="site_error")
    require_silence(everything_sent)
    assert CANARY in caplog.text
    assert "site-2" not in state.receipts
    assert made.trained == ["site-1", "site-3"]


def test_an_error_of_the_disk_stays(
    federation: Any, everything_sent: list[bytes], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = store.insert

    def full(file: sqlite3.Connection, event: Any) -> None:
        if event.kind == "reserve" and "site-2" in file.execute("PRAGMA database_list").fetchone()[2]:
            raise OSError(errno.EIO, f"input/output error below {CANARY}", f"/dev/{CANARY}")
        insert(file, event)

    monkeypatch.setattr(store, "insert", full)
    made = federation()
    three_of(made, failed="site-2", reason="site_error")
    require_silence(everything_sent)
    assert CANARY in caplog.text
    assert made.trained == ["site-1", "site-3"], "what cannot be charged is not trained"
    assert [event.kind for event in made.events("site-2")][2:] == []


def test_a_notice_of_the_end_that_fails_says_nothing(
    federation: Any, everything_sent: list[bytes], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = federation()
    deliver = made.grid.__class__.deliver

    def lose_the_ledger(self: Any, message: Any) -> Any:
        if message.metadata.message_type == "query.end":
            made.ledger_path("site-2").write_bytes(CANARY.encode() * 500)
        return deliver(self, message)

    monkeypatch.setattr(made.grid.__class__, "deliver", lose_the_ledger)
    state = run_rounds(made.transport, made.lead, made.start)
    assert state.round == 1
    require_silence(everything_sent)
    assert "site-2 could not end a run" in caplog.text


def test_the_environment_stays(federation: Any, everything_sent: list[bytes], tmp_path: Path) -> None:
    made = federation()
    made.fails["site-2"] = RuntimeError(repr(dict(os.environ)))
    three_of(made, failed="site-2", reason="site_error")
    require_silence(everything_sent, (str(tmp_path), str(Path.cwd()), "PYTEST_CURRENT_TEST"))


def test_a_refusal_repeats_what_was_asked_and_the_policys_numbers_only(
    federation: Any, everything_sent: list[bytes]
) -> None:
    tables: dict[str, Any] = {"limits": {"max_rounds": 2}, "population": {"name": CANARY}}
    made = federation(policies={"site-2": tables})
    state = three_of(made, failed="site-2", reason="max_rounds")
    require_silence(everything_sent)
    assert b"at most 2" in b"".join(everything_sent)
    assert state.receipts["site-2"].charged_rounds == 0


def test_the_search_finds_what_it_looks_for(federation: Any, everything_sent: list[bytes]) -> None:
    # Else all of the above would pass over nothing.
    made = federation(asks={"run": CANARY})
    run_rounds(made.transport, made.lead, made.start)
    with pytest.raises(AssertionError, match="hepatitis"):
        require_silence(everything_sent)


def test_everything_is_listened_to(federation: Any, everything_sent: list[bytes], adapter: Any) -> None:
    made = federation(num_rounds=2)
    run_rounds(made.transport, made.lead, made.start)
    introductions, offers, replies, ends = 3, 3, 2 * 3, 3
    assert len(everything_sent) == introductions + offers + replies + ends
    assert sum(b"site_key" in sent for sent in everything_sent) == offers + replies + ends, "a receipt is in each"
