"""What a running site says of itself while its server, or its own certificate, keeps it from working."""

import logging
import os
import signal
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.proto.fleet_pb2 import ActivateNodeResponse
from flwr.supercore.task_identity import TaskIdentity

import fedtune.ops.services.site_service as site_service
import fedtune.ops.wire.bounded_http as bounded_http
from fedtune.ops.health import Health
from fedtune.ops.services.site_service import _Loop, _until_stopped
from fedtune.ops.services.site_state import SiteState
from fedtune.ops.wire.fleet import Exchange, Fleet, SiteApp
from tests.flower.certificates import LOOPBACK, Authority
from tests.flower.hostile import Hostile, server_context, whole


def quiet(*, works: bool = False) -> Any:
    """A bell that has not rung."""
    return SimpleNamespace(rung=threading.Event(), works=works)


class Told(Health):
    """Ends the loop once the state is one of `ends`."""

    def __init__(self, stop: threading.Event, *ends: str) -> None:
        super().__init__()
        self.states: list[str] = []
        self._stop, self._ends = stop, ends

    def update(self, **values: Any) -> None:
        super().update(**values)
        self.states.append(values.get("state"))
        if values.get("state") in self._ends:
            self._stop.set()


def loop_of(
    connection: Any,
    folder: Path,
    stop: threading.Event,
    *,
    bell: Any = None,
    app: Any = None,
    health: Health | None = None,
    ends: datetime | None = None,
) -> _Loop:
    """A site's loop, whose parts do nothing where they are not given."""
    ends = ends or datetime.now(UTC) + timedelta(days=1)
    parts = (connection, bell or quiet(), app, SiteState.of(folder), health or Health(), stop)
    return _Loop(*parts, until=lambda: ends)


def looped(fleet: Any, folder: Path, *, until: str, ends: datetime | None = None) -> Told:
    """Let a site with this connection run until it is in a state."""
    health = Told(stop := threading.Event(), until)
    loop_of(fleet, folder, stop, health=health, ends=ends).run()
    return health


@pytest.fixture
def caught(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


def test_a_dribbling_server_makes_a_site_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bounded_http, "_OTHER", bounded_http._Bound(1000, 0.5))
    authority = Authority(tmp_path / "ca")

    def dribble(to: ssl.SSLSocket, path: str) -> None:
        if path.endswith("activate-node"):
            to.sendall(whole(ActivateNodeResponse(node_id=7).SerializeToString()))
            return
        while True:
            to.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            server.pause(0.1)

    server = Hostile(server_context(authority.issue("server", address=LOOPBACK)), dribble)
    fleet = Fleet(server.address, authority.issue("north"))
    assert looped(fleet, tmp_path, until="disconnected").states == ["connected", "disconnected"]
    assert "no contact: no connection to the server (ReadTimeout)" in caught.text
    fleet._stop.set()
    fleet._client.close()
    server.close()


def test_a_site_whose_certificate_has_ended_says_so(tmp_path: Path, caught: pytest.LogCaptureFixture) -> None:
    ended = datetime.now(UTC) - timedelta(minutes=1)
    assert looped(None, tmp_path, until="expired", ends=ended).states == ["expired"]
    assert f"this site's own certificate ended at {ended:%Y-%m-%d %H:%M} UTC: ask the lead for a new kit" in caught.text
    assert "trying again" not in caught.text


def test_a_certificate_that_ends_while_an_answer_waits_is_shown_as_such(
    tmp_path: Path, caught: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is away, and when it comes back it would not take the site: the answer waits for a new certificate."""
    health, ended = Told(stop := threading.Event(), "expired"), datetime.now(UTC) - timedelta(minutes=1)
    loop = loop_of(None, tmp_path, stop, health=health, ends=ended)
    monkeypatch.setattr(Exchange, "is_void", lambda *_: False)
    loop._send(Exchange(None))  # type: ignore[arg-type]
    assert health.states == ["expired"]
    assert "this site's own certificate ended at" in caught.text


def test_the_first_signal_asks_and_the_second_ends() -> None:
    with _until_stopped() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_round_that_has_begun_is_finished_and_sent(tmp_path: Path) -> None:
    """The signal comes while the site trains."""
    done: list[str] = []

    def answer(exchange: Any) -> None:
        stop.set()
        exchange._reply = object()
        done.append("answered")

    class Exchanged(Exchange):
        """A message without Flower's envelope."""

        kind, answered = "train", None  # type: ignore[assignment]

        def is_void(self, now: float) -> bool:
            return False

    stop = threading.Event()
    asked = SimpleNamespace(
        activate=lambda: done.append("came"), receive=object, reply=lambda reply: done.append("sent")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_service, "Exchange", Exchanged)
        patch.setattr(site_service, "_FETCHED_S", 0.0)
        loop_of(asked, tmp_path, stop, app=SimpleNamespace(answer=answer)).run()
    assert done == ["came", "answered", "sent"]


@pytest.mark.parametrize("kind", ["x", "", "a.b.c", "train.\n"])
def test_a_message_of_no_kind_ends_no_site(
    tmp_path: Path, kind: str, caught: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower can address no answer to it; who runs the server, or a lead, could otherwise end every site's process."""
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

    app = SiteApp(lambda settings: pytest.fail("nothing is asked"), name="north")
    loop_of(SimpleNamespace(activate=lambda: None, receive=receive), tmp_path, stop, app=app).run()
    assert not waiting, "it went on"
    assert "a message was dropped" in caught.text


def test_a_site_rests_until_the_bell_rings(tmp_path: Path) -> None:
    stop, bell, asked = threading.Event(), quiet(works=True), []

    def receive() -> None:
        asked.append(time.monotonic())
        if len(asked) == 1:
            threading.Timer(0.5, bell.rung.set).start()
        else:
            stop.set()

    app = SiteApp(lambda settings: pytest.fail("nothing is asked"), name="north")
    loop_of(SimpleNamespace(activate=lambda: None, receive=receive), tmp_path, stop, bell=bell, app=app).run()
    assert 0.4 < asked[1] - asked[0] < 10, "neither before it rang nor after half a minute"
