"""A site's connection to a real server: who gets in, who is put out, and what a site is told about it."""

import datetime
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.date import now

import fedtune.ops.wire.fleet as fleet_module
from fedtune.ops.wire.fleet import Fleet, Unauthorised, Unreachable, hello
from fedtune.ops.wire.identity import Tls

from .certificates import LOOPBACK, Authority
from .faults import Faulty
from .loopback import Loopback, free_port, wait_for


@pytest.fixture
def joined(network: Loopback) -> Iterator[Callable[[Tls], Fleet]]:
    """A connection with these certificates, in this process; closed at the end."""
    made: list[Fleet] = []

    def join(tls: Tls, *, address: str = network.address) -> Fleet:
        made.append(Fleet(address, tls))
        return made[-1]

    yield join
    for fleet in made:
        if not fleet._stop.is_set():
            fleet.close()


def status_of(network: Loopback, name: str) -> list[str]:
    return [status for (status,) in network.rows(f"SELECT status FROM node WHERE name = '{name}'")]


def works(work: Callable[[], Any], *, error: type[Exception] | tuple[type[Exception], ...] = Unauthorised) -> bool:
    try:
        work()
    except error:
        return False
    return True


def test_a_certificate_of_the_federation_is_not_enough(network: Loopback, joined: Any) -> None:
    # The lead's, for example, or that of a site whose kit was made and not yet copied to the server.
    for name in ("lead", "newcomer"):
        tls = network.authority.issue(name)
        with pytest.raises(Unauthorised, match="the server refused this site: unknown"):
            hello(network.address, tls)
        with pytest.raises(Unauthorised, match="unknown"):
            joined(tls).activate()
    assert network.rows("SELECT count(*) FROM node") == [(len(network.members),)], "nobody registers himself"


@pytest.mark.parametrize(("seconds", "says"), [(-600, "60[0-9] s behind"), (60, "(60|5[0-9]) s ahead")])
def test_a_wrong_clock_is_named(network: Loopback, monkeypatch: pytest.MonkeyPatch, seconds: int, says: str) -> None:
    monkeypatch.setattr(fleet_module, "now", lambda: now() + datetime.timedelta(seconds=seconds))
    with pytest.raises(Unauthorised, match=f"its clock is {says}"):
        hello(network.address, network.tls["a"])


def test_a_site_is_added_and_revoked_while_the_server_runs(network: Loopback, joined: Any) -> None:
    bystander = joined(network.tls["a"])
    bystander.activate()
    tls = network.enlist("guest")
    fleet = joined(tls)
    wait_for(lambda: works(fleet.activate, error=(Unauthorised, Unreachable)), what="the roster")
    assert hello(network.address, tls) == "guest"
    assert fleet.receive() is None

    network.set_revoked("guest")
    wait_for(lambda: not works(fleet.receive), what="the roster")
    for call in (lambda: hello(network.address, tls), fleet.activate):
        with pytest.raises(Unauthorised, match="the server refused this site: revoked"):
            call()
    assert bystander.receive() is None, "the others notice nothing"
    assert status_of(network, "guest") == ["unregistered"]


def test_a_second_process_is_told_to_wait_for_the_first(network: Loopback, joined: Any) -> None:
    first, second = joined(network.tls["a"]), joined(network.tls["a"])
    first.activate()
    with pytest.raises(Unreachable, match="an earlier connection of this site is not over yet"):
        second.activate()
    first.close()
    assert status_of(network, "a") == ["offline"]
    second.activate()
    assert status_of(network, "a") == ["online"]


def test_a_proxy_that_answers_in_the_servers_place_is_an_error_and_no_crash(network: Loopback, joined: Any) -> None:
    fleet = joined(network.tls["a"])
    faulty = Faulty(fleet._client)
    faulty.break_at("activate-node", "garbled")
    with pytest.raises(Unreachable, match="cannot be read"):
        fleet.activate()
    fleet.activate()
    faulty.break_at("pull-messages", "garbled")
    with pytest.raises(Unreachable, match="cannot be read"):
        fleet.receive()
    assert fleet.receive() is None, "and it goes on"


def test_without_a_server_a_site_says_so(tmp_path: Path) -> None:
    authority, address = Authority(tmp_path / "ca"), f"{LOOPBACK}:{free_port()}"
    tls = authority.issue("a")
    fleet = Fleet(address, tls)
    for call in (fleet.activate, lambda: hello(address, tls)):
        with pytest.raises(Unreachable, match="no connection to the server"):
            call()
    fleet.close()


def test_closing_ends_the_heartbeats(network: Loopback) -> None:
    fleet = Fleet(network.address, network.tls["b"])
    fleet.activate()
    assert [thread for thread in threading.enumerate() if thread.name == "heartbeats"]
    fleet.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeats"]
    assert status_of(network, "b") == ["offline"]
