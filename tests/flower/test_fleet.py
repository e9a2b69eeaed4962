"""A site's connection to a real server: admission, revocation and errors."""

import asyncio
import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.date import now

import fedtune.ops.wire.fleet as fleet_module
import fedtune.ops.wire.waiting as waiting
from fedtune.ops.wire import identity
from fedtune.ops.wire.fleet import Fleet, Unauthorized, Unreachable, ask_site_name
from fedtune.ops.wire.identity import Tls
from fedtune.ops.wire.waiting import WAIT, Bell, Questions

from .certificates import LOOPBACK, Authority
from .faults import Faulty
from .loopback import Loopback, find_free_port, wait_for
from .member import sign_headers


def has_heartbeats() -> bool:
    return any(thread.name == "heartbeats" for thread in threading.enumerate())


@pytest.fixture
def join_network(network: Loopback) -> Iterator[Callable[[Tls], Fleet]]:
    with contextlib.ExitStack() as stack:

        def join(tls: Tls) -> Fleet:
            fleet = Fleet(network.address, tls)
            stack.callback(lambda: fleet._stop.is_set() or fleet.close())
            return fleet

        yield join


def list_status(network: Loopback, name: str) -> list[str]:
    return [status for (status,) in network.rows(f"SELECT status FROM node WHERE name = '{name}'")]


def succeeds(work: Callable[[], Any], *, error: type[Exception] | tuple[type[Exception], ...] = Unauthorized) -> bool:
    try:
        work()
    except error:
        return False
    return True


def test_unregistered_member_with_a_valid_certificate_is_refused(network: Loopback, join_network: Any) -> None:
    # For example the lead, or a site whose kit is not yet copied to the server.
    for name in ("lead", "newcomer"):
        tls = network.authority.issue(name)
        with pytest.raises(Unauthorized, match="the server refused this site: unknown"):
            ask_site_name(network.address, tls)
        with pytest.raises(Unauthorized, match="unknown"):
            join_network(tls).activate()
    assert network.rows("SELECT count(*) FROM node") == [(len(network.members),)], "no member may register itself"


@pytest.mark.parametrize(("seconds", "says"), [(-600, "60[0-9] s behind"), (60, "(60|5[0-9]) s ahead")])
def test_wrong_site_clock_is_named_in_the_error(
    network: Loopback, monkeypatch: pytest.MonkeyPatch, seconds: int, says: str
) -> None:
    monkeypatch.setattr(fleet_module, "now", lambda: now() + datetime.timedelta(seconds=seconds))
    with pytest.raises(Unauthorized, match=f"its clock is {says}"):
        ask_site_name(network.address, network.tls["a"])


@pytest.mark.parametrize(("kept", "owner"), [(True, "so the server's is wrong"), (False, "one of them is wrong")])
def test_wrong_server_clock_is_named_in_the_error(
    network: Loopback, kept: bool, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other clocks are ten minutes ahead, which is equivalent to a slow server clock."""
    monkeypatch.setattr(fleet_module, "now", lambda: now() + datetime.timedelta(seconds=600))
    monkeypatch.setattr(identity, "time", Mock(time=lambda: time.time() + 600))
    monkeypatch.setattr(identity, "is_clock_synchronized", lambda: kept)
    with pytest.raises(Unreachable, match=rf"the server's clock is (59|60)\d s behind this machine's: .*{owner}"):
        ask_site_name(network.address, network.tls["a"])


def test_site_is_added_and_revoked_while_the_server_runs(network: Loopback, join_network: Any) -> None:
    bystander = join_network(network.tls["a"])
    bystander.activate()
    tls = network.add_member("guest")
    fleet = join_network(tls)
    wait_for(lambda: succeeds(fleet.activate, error=(Unauthorized, Unreachable)), what="the roster")
    assert ask_site_name(network.address, tls) == "guest"
    assert fleet.receive() is None

    network.set_revoked("guest")
    message = ""

    def is_refused() -> bool:
        nonlocal message
        try:
            fleet.receive()
        except Unauthorized as error:
            message = str(error)
        # Flower itself refuses a call that was in progress when the roster changed, without a reason.
        return bool(message) and not message.endswith("(401)")

    wait_for(is_refused, what="the roster")
    assert message.endswith(": revoked")
    for request in (lambda: ask_site_name(network.address, tls), fleet.activate):
        with pytest.raises(Unauthorized, match="the server refused this site: revoked"):
            request()
    assert bystander.receive() is None, "other sites must stay connected"
    assert list_status(network, "guest") == ["unregistered"]


def test_second_process_of_a_site_waits_for_the_first(network: Loopback, join_network: Any) -> None:
    first, second = join_network(network.tls["a"]), join_network(network.tls["a"])
    first.activate()
    with pytest.raises(Unreachable, match="an earlier connection of this site is still open"):
        second.activate()
    assert has_heartbeats()
    first.close()
    assert not has_heartbeats()
    assert list_status(network, "a") == ["offline"]
    second.activate()
    assert list_status(network, "a") == ["online"]


def test_garbled_proxy_response_raises_unreachable(network: Loopback, join_network: Any) -> None:
    fleet = join_network(network.tls["a"])
    faulty = Faulty(fleet._client)
    faulty.break_at("activate-node", "garbled")
    with pytest.raises(Unreachable, match="cannot be read"):
        fleet.activate()
    fleet.activate()
    faulty.break_at("pull-messages", "garbled")
    with pytest.raises(Unreachable, match="cannot be read"):
        fleet.receive()
    assert fleet.receive() is None, "the site must continue"


def test_missing_server_is_reported_by_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, address = Authority(tmp_path / "ca"), f"{LOOPBACK}:{find_free_port()}"
    tls = authority.issue("a")
    fleet = Fleet(address, tls)
    for request in (fleet.activate, lambda: ask_site_name(address, tls)):
        with pytest.raises(Unreachable, match="no connection to the server"):
            request()
    fleet.close()
    monkeypatch.setattr(waiting, "_AGAIN_S", 0.1)
    with contextlib.closing(Bell(address, tls, threading.Event())) as bell:
        time.sleep(0.5)
        assert (bell.works, bell.rung.is_set()) == (False, False), "the bell must stay silent"


def run_with_timeout(request: Coroutine[Any, Any, Any]) -> Any:
    async def run() -> Any:
        return await asyncio.wait_for(request, 5)

    return asyncio.run(run())


def test_missed_questions_are_reported_immediately() -> None:
    async def run() -> list[int]:
        questions = Questions()
        first = await questions.wait_for_count(1, heard=-1)
        questions.count_questions([1, 1, 2])
        return [first, await questions.wait_for_count(1, heard=0), await questions.wait_for_count(1, heard=5)]

    assert run_with_timeout(run()) == [0, 2, 2], "also if the server was restarted meanwhile"


def test_call_is_held_until_its_node_is_asked() -> None:
    async def run() -> list[str]:
        questions, order = Questions(), []

        async def wait(node: int) -> None:
            order.append(f"{node} heard {await questions.wait_for_count(node, heard=0)}")

        calls = [asyncio.create_task(wait(node)) for node in (1, 1, 2)]
        await asyncio.sleep(0)
        questions.count_questions([2])
        await asyncio.sleep(0.05)
        order.append("only then")
        questions.count_questions([1])
        await asyncio.gather(*calls)
        return order

    assert run_with_timeout(run()) == ["2 heard 1", "only then", "1 heard 1", "1 heard 1"]


def test_held_call_ends_by_timeout_or_server_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait_and_end() -> int:
        questions = Questions()
        request = asyncio.create_task(questions.wait_for_count(1, heard=0))
        await asyncio.sleep(0)
        questions.close()
        return await request + await questions.wait_for_count(1, heard=0)

    assert run_with_timeout(wait_and_end()) == 0
    monkeypatch.setattr(waiting, "_HELD_S", 0.05)
    assert run_with_timeout(Questions().wait_for_count(1, heard=0)) == 0


@pytest.fixture
def make_bell(network: Loopback) -> Iterator[Callable[[Tls], Bell]]:
    with contextlib.ExitStack() as stack:
        yield lambda tls: stack.enter_context(contextlib.closing(Bell(network.address, tls, threading.Event())))


def test_site_is_notified_only_of_its_own_questions(network: Loopback, make_bell: Any) -> None:
    network.site("a")
    network.site("b")
    a, b = (make_bell(network.tls[name]) for name in "ab")
    for bell in (a, b):
        wait_for(lambda bell=bell: bell.works and bell.rung.is_set(), what="the first answer")
        bell.rung.clear()
    with ThreadPoolExecutor(1) as pool, network.grid(["a", "b"], round_timeout_s=3.0) as grid:
        start = time.monotonic()
        # The lead asks in the background; no answer is needed.
        future = pool.submit(lambda: list(grid.receive([Message(RecordDict(), 2, "query")], timeout=3)))
        assert b.rung.wait(10)
        assert time.monotonic() - start < 5, "the call must not wait for its timeout"
        future.result()
    assert not a.rung.is_set()


def test_waiting_requires_membership_and_a_valid_counter(network: Loopback) -> None:
    def read_status(name: str, query: str, tls: Tls | None = None) -> int:
        tls = tls or network.tls[name]
        with httpx.Client(verify=tls.create_client_context()) as client:
            return client.get(
                f"https://{network.address}{WAIT}{query}", headers=sign_headers(network.tls[name])
            ).status_code

    assert read_status("a", "?heard=-1") == 200
    for query in ("", "?heard", "?heard=", "?heard=x", "?heard=1&heard=2", "?other=1", "?heard=1.5", "?%ff=1"):
        assert read_status("a", query) == 400, query
    assert read_status("a", "?heard=" + "9" * 4000) == 200, "a long counter must be rejected quickly"
    assert read_status("a", "?heard=-1", tls=network.tls["b"]) == 401
    assert read_status("b", "?heard=-1") == 200
    network.set_revoked("b")
    wait_for(lambda: read_status("b", "?heard=-1") == 403)


def test_server_shutdown_releases_held_calls(network: Loopback, make_bell: Any) -> None:
    bell = make_bell(network.tls["a"])
    wait_for(lambda: bell.works and bell.rung.is_set(), what="the first answer")
    time.sleep(0.5)  # so that the next call is being held
    start = time.monotonic()
    network.stop_sites()
    network.stop()
    assert time.monotonic() - start < 8
    network.start()
