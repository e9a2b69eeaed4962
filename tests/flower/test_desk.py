"""Who may make which of the calls about the federation's members."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections import Counter
from typing import Any

import pytest

from fedtune.deploy.kits.members import Roster
from fedtune.flower.wire.audit_log import AuditLog
from fedtune.flower.wire.desk import LEAD, MOST_REQUEST_BYTES, RENEWALS, ROSTER, DeskLine, at_desk
from fedtune.flower.wire.fleet import Unreachable
from fedtune.flower.wire.gate import Gate, Registered
from fedtune.flower.wire.identity import NotAllowed
from fedtune.spec import ConfigError


class Noted:
    """A desk that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bytes]] = []

    def roster(self) -> bytes:
        return b"the newest roster"

    def known(self) -> bytes:
        return b"a roster"

    def take_roster(self, data: bytes) -> None:
        self.told.append(("roster", data))

    def ask(self, name: str, request: bytes) -> int:
        self.told.append((name, request))
        return 7

    def requests(self) -> list[bytes]:
        return [b"one", b"two"]


def said(*texts: bytes) -> bytes:
    return json.dumps({"requests": [base64.b64encode(one).decode() for one in texts]}).encode()


def test_member_and_lead_get_the_roster_and_ask_for_themselves() -> None:
    desk = Noted()
    for site, roster in (("north", b"a roster"), (None, b"the newest roster")):
        assert at_desk(desk, ("GET", ROSTER), site=site, body=b"") == roster
        assert at_desk(desk, ("POST", RENEWALS), site=site, body=b"mine") == b'{"number": 7}'
    assert desk.told == [("north", b"mine"), (LEAD, b"mine")]


def test_the_lead_alone_gives_rosters_and_sees_who_asked() -> None:
    desk = Noted()
    assert at_desk(desk, ("POST", ROSTER), site=None, body=b"newer") == b"{}"
    assert desk.told == [("roster", b"newer")]
    assert at_desk(desk, ("GET", RENEWALS), site=None, body=b"") == said(b"one", b"two")
    for call in (("POST", ROSTER), ("GET", RENEWALS)):
        with pytest.raises(NotAllowed, match="not this caller's to make"):
            at_desk(desk, call, site="north", body=b"newer")
    assert len(desk.told) == 1


def test_no_other_call_is_one() -> None:
    desk = Noted()
    for call in (("DELETE", ROSTER), ("PUT", RENEWALS), ("POST", "/v1/fedtune/hello"), ("", "")):
        with pytest.raises(NotAllowed):
            at_desk(desk, call, site=None, body=b"")
    with pytest.raises(NotAllowed):
        at_desk(desk, ("POST", RENEWALS), site=None, body=b"x" * (MOST_REQUEST_BYTES + 1))
    assert desk.told == []


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"7",
        b'{"number": "x", "requests": 5}',
        b'{"requests": ["\xc3\xa9"], "number": 1e999}',
    ],
)
def test_whatever_a_server_answers_ends_nobody(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setattr(DeskLine, "_call", lambda *_: answer)
    line = DeskLine(server="127.0.0.1:9", tls=None)  # type: ignore[arg-type]
    for call in (lambda: line.ask(b""), line.requests):
        with pytest.raises(Unreachable, match="the server's answer cannot be read"):
            call()
    with pytest.raises(ConfigError):
        Roster.of(line.roster())


class Slow(Noted):
    """A desk at which each call of "greedy" takes a while; it notes how many there are at once."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once, self.most = Counter[str](), Counter[str]()
        self.busy, self.go_on = threading.Event(), threading.Event()

    def ask(self, name: str, request: bytes) -> int:
        self.at_once[name] += 1
        self.most[name] = max(self.most[name], self.at_once[name])
        if name == "greedy":
            self.busy.set()
            assert self.go_on.wait(30)
        self.at_once[name] -= 1
        return super().ask(name, request)


def test_a_member_that_calls_all_the_time_takes_one_turn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    desk, audit = Slow(), AuditLog(None)
    door = Gate(None, lead="", roster=tuple, rules=None, audit=audit, desk=desk)  # type: ignore[arg-type]

    def member(headers: dict[str, str], peer: object) -> Registered:
        return Registered(site=headers["name"], node_key=b"", revoked=False)

    monkeypatch.setattr(door, "_member", member)

    async def call(name: str) -> None:
        scope = {"type": "http", "method": "POST", "path": RENEWALS, "headers": [(b"name", name.encode())]}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"mine"}

        async def send(message: Any) -> None:
            pass

        await door(scope, receive, send)

    async def both() -> None:
        greedy = [asyncio.create_task(call("greedy")) for _ in range(64)]  # more than there are threads for such calls
        await asyncio.to_thread(desk.busy.wait, 30)
        await asyncio.wait_for(call("modest"), 20)
        assert desk.told == [("modest", b"mine")], "before the first of the others is done"
        desk.go_on.set()
        await asyncio.gather(*greedy)

    asyncio.run(both())
    assert desk.most == {"greedy": 1, "modest": 1}
    assert len(desk.told) == 65
