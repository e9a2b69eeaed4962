"""A running site: health, control by commands, and exclusive use of the ledger."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import fedtune.ops.services.site_service as site_service
import fedtune.ops.services.site_state as site_state
from fedtune.flower.client import SiteApp
from fedtune.ops.health import READY, Health
from fedtune.ops.services.site_service import _Loop, _stop_on_signal
from fedtune.ops.services.site_state import MAX_WAITING, SiteState, lock_ledger
from fedtune.ops.wire.fleet import Fleet
from fedtune.ops.wire.line_errors import Unreachable
from fedtune.privacy.proposal import Proposal
from fedtune.spec import ConfigError, RunError

from ..conftest import name_run, read_files, run_proposal


class Told(Health):
    """A health state that ends the loop once it is in `ends`."""

    def __init__(self, stop: threading.Event, *ends: str) -> None:
        super().__init__()
        self.states: list[str] = []
        self._stop, self._ends = stop, ends

    def update(self, **values: Any) -> None:
        super().update(**values)
        self.states.append(values.get("state"))
        if values.get("state") in self._ends:
            self._stop.set()


def make_loop(connection: Any, folder: Path, stop: Any, *, ends: datetime | None = None, **changes: Any) -> _Loop:
    """Create a site's loop with inactive defaults for `bell`, `app` and `health`."""
    ends = ends or datetime.now(UTC) + timedelta(days=1)
    quiet = {"bell": SimpleNamespace(rung=threading.Event(), works=False), "app": None, "health": Health()}
    bell, app, health = (quiet | changes).values()
    return _Loop(connection, bell, app, SiteState.in_kit(folder), health, stop, until=lambda: ends)


def run_loop(fleet: Any, folder: Path, *, final_state: str, ends: datetime | None = None) -> Told:
    """Run a site with this connection until it reaches a state."""
    health = Told(stop := threading.Event(), final_state)
    make_loop(fleet, folder, stop, health=health, ends=ends).run()
    return health


def test_unreachable_server_makes_the_site_disconnected(tmp_path: Path, caplog: Any) -> None:
    """The ways to be unreachable: tests/flower/test_bounded_http.py."""
    fleet = SimpleNamespace(activate=lambda: None, receive=Mock(side_effect=Unreachable("no connection to the server")))
    assert run_loop(fleet, tmp_path, final_state="disconnected").states == ["connected", "disconnected"]
    assert "no contact: no connection to the server" in caplog.text


def test_site_with_an_expired_certificate_reports_it(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    expired = datetime.now(UTC) - timedelta(minutes=1)
    assert run_loop(None, tmp_path, final_state="expired", ends=expired).states == ["expired"]
    assert f"this site's certificate expired at {expired:%Y-%m-%d %H:%M} UTC: ask the lead for a new kit" in caplog.text
    assert "trying again" not in caplog.text
    caplog.clear()
    # The server is away, and would refuse the site when it returns: the reply waits for a new certificate.
    health = Told(stop := threading.Event(), "expired")
    loop = make_loop(None, tmp_path, stop, health=health, ends=expired)
    monkeypatch.setattr(Fleet, "is_past_deadline", lambda *_, **__: False)
    loop._send(Mock(), Mock())
    assert health.states == ["expired"]
    assert "this site's certificate expired at" in caplog.text


def test_first_signal_requests_a_stop_and_restores_default_handlers() -> None:
    with _stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_started_round_is_finished_and_sent_after_a_stop_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal arrives while the site trains."""
    process, stop = list[str](), threading.Event()

    def answer(message: Any) -> Mock:
        stop.set()
        process.append("answered")
        return Mock()

    monkeypatch.setattr(SiteApp, "read_answer", lambda reply: None)
    monkeypatch.setattr(Fleet, "is_past_deadline", lambda *_, **__: False)
    monkeypatch.setattr(site_service, "_FETCHED_S", 0.0)
    calls = {"activate": lambda: process.append("came"), "receive": Mock, "reply": lambda reply: process.append("sent")}
    make_loop(SimpleNamespace(**calls), tmp_path, stop, app=SimpleNamespace(answer=answer)).run()
    assert process == ["came", "answered", "sent"]


@pytest.mark.parametrize("kind", ["x", "", "a.b.c", "train.\n"])
def test_message_of_unknown_type_does_not_stop_a_site(tmp_path: Path, kind: str, caplog: Any, monkeypatch: Any) -> None:
    """Flower cannot address an answer to such a message, which could otherwise end every site's process."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 0)
    message = Message(RecordDict(), 1, "train")
    message.metadata.__dict__["_message_type"] = kind
    waiting: list[Message | None] = [message, None]
    stop = threading.Event()

    def receive() -> Message | None:
        if len(waiting) == 1:
            stop.set()
        return waiting.pop(0)

    app = SiteApp(lambda settings: pytest.fail("no question is expected"), name="north")
    make_loop(SimpleNamespace(activate=lambda: None, receive=receive), tmp_path, stop, app=app).run()
    assert not waiting, "the site must continue"
    assert "a message of an unknown type was dropped" in caplog.text


def test_site_loop_wakes_up_on_server_notification(tmp_path: Path) -> None:
    stop, bell, times = threading.Event(), SimpleNamespace(rung=threading.Event(), works=True), []

    def receive() -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            threading.Timer(0.5, bell.rung.set).start()
        else:
            stop.set()

    app = SiteApp(lambda settings: pytest.fail("no question is expected"), name="north")
    make_loop(SimpleNamespace(activate=lambda: None, receive=receive), tmp_path, stop, bell=bell, app=app).run()
    assert 0.4 < times[1] - times[0] < 10, "it must ask on the signal, not on the timer"


# Runs that wait for approval, as shown by the site's commands.

SETTINGS = '{"seed": 3}'


def propose_run(run: str = "r", **changes: Any) -> Proposal:
    """Build a lead's proposal for a run with these settings."""
    return run_proposal(run=name_run(run, SETTINGS), **changes)


@pytest.fixture
def state(tmp_path: Path) -> SiteState:
    (tmp_path / "kit").mkdir()
    return SiteState.in_kit(tmp_path / "kit")


def test_pending_run_keeps_the_time_of_its_first_request(state: Any, monkeypatch: Any) -> None:
    for day, run, is_new in ((2, "second", True), (1, "first", True), (3, "second", False)):
        now = datetime(2030, 1, day, tzinfo=UTC)
        monkeypatch.setattr(site_state, "datetime", SimpleNamespace(now=lambda zone, now=now: now))
        assert state.queue_for_approval(propose_run(run), SETTINGS) is is_new
    waiting = [(one.proposal.run, one.since[:10]) for one in state.list_pending_runs()]
    assert waiting == [(name_run("first", SETTINGS), "2030-01-01"), (name_run("second", SETTINGS), "2030-01-02")]


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "x" * 267, "con: *?"])
def test_pending_run_with_any_name_is_stored_inside_its_folder(tmp_path: Path, state: SiteState, name: str) -> None:
    before, proposal = read_files(tmp_path), propose_run(name, target_modules=("query",), spare_rounds=0)
    state.queue_for_approval(proposal, SETTINGS)
    (stored,) = read_files(tmp_path).keys() - before.keys()
    assert Path(stored).parent == Path("kit/state/pending")
    state.remove_pending(propose_run("another"))
    (pending,) = SiteState.in_kit(state.folder.parent).list_pending_runs()
    assert (pending.proposal, pending.settings) == (proposal, SETTINGS)
    for _ in range(2):
        state.remove_pending(proposal)
        assert read_files(tmp_path) == before


@pytest.mark.parametrize(
    "damage",
    [
        *("", "{", "[]", '{"since": "x"}', '{"proposal": null, "since": "x"}'),
        *({"settings": "no JSON"}, {"settings": "\ud800"}, {"settings": None}),
        {"settings": '{"seed": 4}'},  # readable, but the run's name is the hash of other settings
    ],
)
def test_damaged_pending_file_hides_no_other_run_and_is_rewritten(state: SiteState, damage: Any, caplog: Any) -> None:
    state.queue_for_approval(propose_run(), SETTINGS)
    (path,) = (state.folder / "pending").iterdir()
    path.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(path.read_text()) | damage))
    state.queue_for_approval(propose_run("other"), SETTINGS)
    assert [pending.proposal for pending in state.list_pending_runs()] == [propose_run("other")]
    assert f"{path} is damaged; remove it" in caplog.text
    assert state.queue_for_approval(propose_run(), SETTINGS) is True, "the lead repeats its request every few seconds"
    assert {pending.proposal for pending in state.list_pending_runs()} == {propose_run(), propose_run("other")}


def test_pending_run_requires_settings_matching_its_name(state: SiteState) -> None:
    with pytest.raises(ConfigError, match="must match the digest in the run's name"):
        state.queue_for_approval(propose_run(), '{"seed": 4}')
    assert state.list_pending_runs() == []


def test_number_of_pending_runs_is_limited(state: SiteState) -> None:
    for number in range(MAX_WAITING):
        state.queue_for_approval(propose_run(f"run-{number}"), SETTINGS)
    with pytest.raises(RunError, match="100 runs already await approval"):
        state.queue_for_approval(propose_run("one more"), SETTINGS)
    assert state.queue_for_approval(propose_run("run-0"), SETTINGS) is False, "a listed run may be requested again"
    state.remove_pending(propose_run("run-7"))
    assert state.queue_for_approval(propose_run("one more"), SETTINGS) is True


# The process that serves a ledger.

_HOLD = """
import sys, time
from pathlib import Path
from fedtune.ops.services.site_state import lock_ledger
with lock_ledger(Path(sys.argv[1])):
    print("serving", flush=True)
    time.sleep(600)
"""


def test_ledger_is_served_by_one_process_at_a_time(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    words = [sys.executable, "-c", _HOLD, str(ledger)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "serving\n"
            with pytest.raises(ConfigError) as caught, lock_ledger(ledger):
                pytest.fail("two processes serve one ledger")
        finally:
            holder.kill()
    message = f"ledger = {str(ledger)!r}: is already in use by process {holder.pid}; stop that process first"
    assert str(caught.value) == message
    with lock_ledger(ledger):
        assert (tmp_path / "ledger.db.serving").read_text() == f"{os.getpid()}\n"


def test_serving_lock_is_released_but_its_file_remains(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    (tmp_path / "ledger.db.serving").write_text("123456789012345\n")  # a longer number must be overwritten completely
    with pytest.raises(RuntimeError, match="failed"), lock_ledger(ledger):
        raise RuntimeError("failed")
    file = tmp_path / "ledger.db.serving"
    assert file.read_text() == f"{os.getpid()}\n"
    inode = file.stat().st_ino
    with (
        lock_ledger(ledger),
        pytest.raises(ConfigError, match=f"already in use by process {os.getpid()};"),
        lock_ledger(ledger),
    ):
        pytest.fail("one process serves the ledger twice")
    # If it were removed, two processes could hold two files of the same name.
    assert file.stat().st_ino == inode
    assert not ledger.exists()


_FULL = """
import os, sys
from pathlib import Path
from fedtune.ops.files import find_write_problem
folder = Path(sys.argv[1])
os.system(f"mount -t tmpfs -o size=2m none {folder}") and sys.exit(77)
ledger = folder / "ledger.db"
print(find_write_problem(ledger))
(folder / "other").write_bytes(bytes(3 << 19))
print(find_write_problem(ledger))
os.system(f"mount -o remount,ro {folder}")
print(find_write_problem(ledger))
"""


def test_full_or_read_only_disk_is_named_in_the_error(tmp_path: Path) -> None:
    """Uses a real file system of two megabytes, which is filled and then made read-only."""
    words = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", _FULL, str(tmp_path)]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    if process.returncode == 77 or "unshare failed" in process.stderr:
        pytest.skip("no file system can be mounted here")
    is_working, full, closed = process.stdout.splitlines()
    assert is_working == ""
    expected = f"disk {tmp_path}): no round can be charged"
    assert full == f"{tmp_path}/ledger.db cannot be written (No space left on device, {expected}"
    assert closed.endswith(expected)


def test_site_with_an_unwritable_ledger_is_not_ready(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_service, "_LEDGER_S", 0.0)
    problems = iter(["", "ledger.db is full", "ledger.db is full", ""])
    loop = make_loop(None, tmp_path, threading.Event())
    loop.find_problem = lambda: next(problems)
    states = [loop._standing.check_current_state() for _ in range(4)]
    assert states == ["connected", "failing", "failing", "connected"]
    assert "failing" not in READY
    assert [record.getMessage() for record in caplog.records] == [
        "ledger.db is full",
        "the ledger can be written again",
    ]
