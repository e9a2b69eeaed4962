"""Sites that wait in a call until the lead asks them something."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from flwr.app import Message, RecordDict

import fedtune.ops.wire.waiting as waiting
from fedtune.ops.wire.identity import Tls
from fedtune.ops.wire.waiting import WAIT, Bell, Questions

from .loopback import Loopback, wait_for
from .member import by_site


def counting(*steps: Callable[[Questions], Any]) -> Any:
    """What the last of these coroutines or calls gives, on one loop."""

    async def run() -> Any:
        questions, found = Questions(), None
        for step in steps:
            found = step(questions)
            if asyncio.iscoroutine(found):
                found = await asyncio.wait_for(found, 5)
        return found

    return asyncio.run(run())


def test_what_was_not_heard_yet_is_told_at_once() -> None:
    assert counting(lambda q: q.count(1, heard=-1)) == 0
    assert counting(lambda q: q.asked([1, 1, 2]), lambda q: q.count(1, heard=0)) == 2
    assert counting(lambda q: q.asked([1]), lambda q: q.count(1, heard=5)) == 1, "the server started again meanwhile"


def test_a_call_is_held_until_this_node_is_asked() -> None:
    async def run() -> list[str]:
        questions, order = Questions(), []

        async def wait(node: int) -> None:
            order.append(f"{node} heard {await questions.count(node, heard=0)}")

        calls = [asyncio.create_task(wait(node)) for node in (1, 1, 2)]
        await asyncio.sleep(0)
        questions.asked([2])
        await asyncio.sleep(0.05)
        order.append("only then")
        questions.asked([1])
        await asyncio.wait_for(asyncio.gather(*calls), 5)
        return order

    assert asyncio.run(run()) == ["2 heard 1", "only then", "1 heard 1", "1 heard 1"]


def test_nobody_is_held_for_ever_or_by_a_server_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ends() -> int:
        questions = Questions()
        call = asyncio.create_task(questions.count(1, heard=0))
        await asyncio.sleep(0)
        questions.close()
        return await asyncio.wait_for(call, 5) + await asyncio.wait_for(questions.count(1, heard=0), 5)

    assert asyncio.run(ends()) == 0
    monkeypatch.setattr(waiting, "_HELD_S", 0.05)
    assert counting(lambda q: q.count(1, heard=0)) == 0


@pytest.fixture
def ring(network: Loopback) -> Iterator[Callable[[Tls], Bell]]:
    """A bell with these certificates; closed at the end."""
    made: list[Bell] = []

    def make(tls: Tls, address: str = network.address) -> Bell:
        made.append(Bell(address, tls, threading.Event()))
        return made[-1]

    yield make
    for bell in made:
        bell.close()


@pytest.fixture
def ask(network: Loopback) -> Iterator[Callable[[int], Future[Any]]]:
    """The lead asks a node something, in the background; nobody need answer."""
    with ThreadPoolExecutor(1) as pool, network.grid(["a", "b"], round_timeout_s=3.0) as grid:

        def put(node: int) -> Future[Any]:
            message = Message(RecordDict(), node, "query")
            return pool.submit(lambda: list(grid.receive([message], timeout=3)))

        yield put


def test_a_site_hears_of_its_own_questions_alone(network: Loopback, ring: Any, ask: Any) -> None:
    network.site("a")
    network.site("b")
    a, b = (ring(network.tls[name]) for name in "ab")
    for bell in (a, b):
        wait_for(lambda bell=bell: bell.works and bell.rung.is_set(), what="the first answer")
        bell.rung.clear()
    began = time.monotonic()
    asked = ask(2)
    assert b.rung.wait(10)
    assert time.monotonic() - began < 5, "it was not the call's end"
    asked.result()
    assert not a.rung.is_set()


def test_only_members_may_wait_and_only_for_a_number(network: Loopback) -> None:
    def status(name: str, query: str, tls: Tls | None = None) -> int:
        tls = tls or network.tls[name]
        with httpx.Client(verify=tls.client_context()) as client:
            return client.get(f"https://{network.address}{WAIT}{query}", headers=by_site(network.tls[name])).status_code

    assert status("a", "?heard=-1") == 200
    for query in ("", "?heard", "?heard=", "?heard=x", "?heard=1&heard=2", "?other=1", "?heard=1.5", "?%ff=1"):
        assert status("a", query) == 400, query
    assert status("a", "?heard=" + "9" * 4000) == 200, "not parsed for seconds"
    assert status("a", "?heard=-1", tls=network.tls["b"]) == 401
    assert status("b", "?heard=-1") == 200
    network.set_revoked("b")
    wait_for(lambda: status("b", "?heard=-1") == 403)


def test_a_bell_at_no_server_does_not_work_and_is_quiet(
    network: Loopback, ring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_AGAIN_S", 0.1)
    bell = ring(network.tls["a"], "127.0.0.1:9")
    time.sleep(0.5)
    assert not bell.works
    assert not bell.rung.is_set()


def test_a_server_that_ends_holds_nobody(network: Loopback, ring: Any) -> None:
    bell = ring(network.tls["a"])
    wait_for(lambda: bell.works and bell.rung.is_set(), what="the first answer")
    time.sleep(0.5)  # so that the next call is held
    began = time.monotonic()
    network.stop_sites()
    network.stop()
    assert time.monotonic() - began < 8
    network.start()
