"""Who may make which of the calls about the federation's members."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from fedtune.flower.wire.desk import LEAD, MOST_REQUEST_BYTES, RENEWALS, ROSTER, DeskLine, at_desk
from fedtune.flower.wire.fleet import Unreachable
from fedtune.flower.wire.identity import NotAllowed


class Noted:
    """A desk that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bytes]] = []

    def roster(self) -> bytes:
        return b"a roster"

    def take_roster(self, data: bytes) -> None:
        self.told.append(("roster", data))

    def ask(self, name: str, request: bytes) -> int:
        self.told.append((name, request))
        return 7

    def requests(self) -> list[bytes]:
        return [b"one", b"two"]


def said(text: bytes) -> str:
    return base64.b64encode(text).decode()


def test_member_and_lead_get_the_roster_and_ask_for_themselves() -> None:
    desk = Noted()
    for site in ("north", None):
        assert at_desk(desk, ("GET", ROSTER), site=site, body=b"") == {"roster": said(b"a roster")}
        assert at_desk(desk, ("POST", RENEWALS), site=site, body=b"mine") == {"number": 7}
    assert desk.told == [("north", b"mine"), (LEAD, b"mine")]


def test_the_lead_alone_gives_rosters_and_sees_who_asked() -> None:
    desk = Noted()
    assert at_desk(desk, ("POST", ROSTER), site=None, body=b"newer") == {}
    assert desk.told == [("roster", b"newer")]
    assert at_desk(desk, ("GET", RENEWALS), site=None, body=b"") == {"requests": [said(b"one"), said(b"two")]}
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
    "answer", [[], {}, None, 7, {"roster": 1, "number": "x", "requests": 5}, {"roster": "é", "number": 1e999}]
)
def test_whatever_a_server_answers_ends_nobody(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    monkeypatch.setattr(DeskLine, "_call", lambda *_: answer)
    line = DeskLine(server="127.0.0.1:9", tls=None)  # type: ignore[arg-type]
    for call in (line.roster, lambda: line.ask(b""), line.requests):
        with pytest.raises(Unreachable, match="the server's answer cannot be read"):
            call()
