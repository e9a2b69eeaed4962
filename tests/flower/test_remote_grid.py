"""The lead's grid against a real server and real sites in separate processes, which may die.

Retries and provisional answers: test_asking_grid.py.
"""

import itertools
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree

from fedtune.flower import asking_grid
from fedtune.flower.flower_records import ARRAYS
from fedtune.ops.wire import bounded_http, identity
from fedtune.ops.wire.lead_session import LeadSession
from fedtune.ops.wire.remote_grid import RemoteGrid
from fedtune.spec import RunError

from ..privacy.builders import stranger_key
from .faults import Faulty
from .loopback import LOOPBACK, Loopback, find_free_port, wait_for

VALUES = {"b.lora_A": np.arange(6, dtype=np.float32).reshape(2, 3), "head": np.full(4, -0.5, np.float32)}


@pytest.fixture(autouse=True)
def impatient_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short polling and retry intervals."""
    monkeypatch.setattr(asking_grid, "RECONNECT_S", 0.2)
    monkeypatch.setattr(asking_grid, "_LOST_S", 0.5)
    monkeypatch.setattr(bounded_http, "_ALERT_S", 0.05)


def make_questions(*numbers: int, values: dict[str, np.ndarray] = VALUES) -> list[Message]:
    content = RecordDict({ARRAYS: ArrayRecord({name: Array(value) for name, value in values.items()})})
    return [Message(content, number, "train") for number in numbers]


def list_answering_sites(answers: Sequence[Message]) -> dict[int, str]:
    """Map each node to the site that answered; two answers of one node are an error."""
    assert len({answer.metadata.src_node_id for answer in answers}) == len(answers)
    return {answer.metadata.src_node_id: str(read_about(answer)["site"]) for answer in answers}


def read_about(answer: Message) -> Any:
    return answer.content.config_records["about"]


@pytest.fixture
def ask_in_thread() -> Iterator[Any]:
    with ThreadPoolExecutor(1) as pool:

        def ask(grid: RemoteGrid, *numbers: int, timeout: float = 60) -> Future[list[Message]]:
            return pool.submit(list, grid.receive(make_questions(*numbers), timeout=timeout))

        yield ask


def test_arrays_round_trip_and_nodes_are_numbered_by_the_roster(network: Loopback) -> None:
    network.site("a")
    network.site("b", works_s=0.5)
    with network.grid(["b", "a"]) as grid:
        assert list(grid.get_node_ids()) == [1, 2]
        answers = list(grid.receive(make_questions(1, 2), timeout=30))
        assert list_answering_sites(answers) == {1: "b", 2: "a"}
        assert list_answering_sites(list(grid.receive(make_questions(2), timeout=30))) == {2: "a"}, (
            "only the site that was asked may answer"
        )
        assert grid.list_online_nodes() == [1, 2]
    for answer in answers:
        arrays = answer.content.array_records[ARRAYS]
        assert list(arrays) == list(VALUES)
        for name, value in VALUES.items():
            np.testing.assert_array_equal(arrays[name].numpy(), value)
            assert arrays[name].numpy().dtype == np.float32
    # A site's training time would reveal the number of its records.
    assert network.rows("SELECT DISTINCT clientapp_runtime FROM run") == [(0.0,)]


@pytest.mark.nightly
def test_run_continues_with_a_renewed_lead_certificate(network: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "MAX_AGE_S", 0.0)  # each call opens a connection
    network.site("a")
    own, renewed = network.lead_tls, network.authority.issue("lead renewed")
    kept, checks = (
        (own.certificate.read_bytes(), own.key.read_bytes()),
        itertools.chain([True], itertools.repeat(False)),
    )
    with network.grid(["a"]) as grid:
        assert list_answering_sites(list(grid.receive(make_questions(1), timeout=30))) == {1: "a"}
        session = grid._session
        own.certificate.write_bytes(renewed.certificate.read_bytes())
        own.key.write_bytes(renewed.key.read_bytes())
        monkeypatch.setattr(grid, "_has_new_certificate", lambda: next(checks))
        try:
            assert list_answering_sites(list(grid.receive(make_questions(1), timeout=30))) == {1: "a"}
        finally:
            own.certificate.write_bytes(kept[0])
            own.key.write_bytes(kept[1])
        assert grid._session is session, "the run must continue"

    def was_renewed() -> bool:
        return any(one.get("certificate") == "lead renewed" for one in network.audit() if one["event"] == "connected")

    wait_for(was_renewed, what="the new certificate")


def test_answers_are_fetched_one_at_a_time(network: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    fetch_message = LeadSession._fetch_message

    def spy(self: LeadSession, tree: ObjectTree, **bounds: Any) -> Message | None:
        fetched.append(tree.object_id)
        return fetch_message(self, tree, **bounds)

    monkeypatch.setattr(LeadSession, "_fetch_message", spy)
    sites = [network.site("a"), network.site("b")]
    with network.grid(["a", "b"]) as grid:
        num_fetched = 0
        for _ in grid.receive(make_questions(1, 2), timeout=30):
            num_fetched += 1
            assert len(fetched) == num_fetched
            for site in sites:
                site.wait_for("replied")  # the second answer waits at the server, too
            time.sleep(0.3)
    assert num_fetched == 2


def test_lead_and_sites_connect_only_to_the_server(network: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    contacted: set[Any] = set()
    connect, look_up = socket.socket.connect, socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: (contacted.add(to), connect(self, to))[1])
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, *rest, **more: contacted.add((host, port)) or look_up(host, port, *rest, **more),
    )
    site = network.site("a")
    with network.grid(["a"]) as grid:
        assert len(list(grid.receive(make_questions(1), timeout=30))) == 1
    assert contacted == {(LOOPBACK, network.port)}, "the lead"
    site.stop()
    assert {tuple(event["address"]) for event in site.lines("outbound")} == {(LOOPBACK, network.port)}, "the site"
    assert not (network.folder / "outbound.log").exists(), "the server must open no connection"


@pytest.mark.nightly
def test_duplicate_answer_is_ignored(network: Loopback) -> None:
    site = network.site("a", replies=2)
    with network.grid(["a"]) as grid:
        answers = [list(grid.receive(make_questions(1), timeout=30)) for _ in range(3)]
    numbers = [read_about(answer)["number"] for (answer,) in answers]
    # If the server is slow, the lead asks again, so a number may be skipped, but none may occur twice.
    assert numbers == sorted(set(numbers)), "an answer was used for a later question"
    assert site.code is None


_LEADS_CALLS = ("get-nodes", "push-messages", "push-object", "pull-messages", "pull-object", "confirm-message-received")


@pytest.mark.nightly
def test_interrupted_lead_calls_lose_no_answers(network: Loopback) -> None:
    # "after": the server has processed the call, but its answer is lost. It delivers each message and each reply once.
    sites = [network.site("a"), network.site("b", works_s=0.3)]
    with network.grid(["a", "b"]) as grid:
        list(grid.receive(make_questions(1, 2), timeout=30))
        faulty = Faulty(grid._session._client)  # type: ignore[union-attr]
        for call, when in itertools.product(_LEADS_CALLS, ("before", "after")):
            faulty.break_at(call, when)
            time.sleep(1.0 if call == "get-nodes" else 0.0)  # called once a second
            answers = list(grid.receive(make_questions(1, 2), timeout=30))
            assert list_answering_sites(answers) == {1: "a", 2: "b"}, (call, when)
            assert not faulty.waits, f"{call} is no longer called: Flower's protocol changed"
    assert all(site.code is None for site in sites)


_SITES_CALLS = ("pull-messages", "pull-object", "confirm-message-received", "push-messages", "push-object")


@pytest.mark.nightly
def test_interrupted_site_calls_lose_no_answers(network: Loopback) -> None:
    faults = list(itertools.product(_SITES_CALLS, ("before", "after")))
    site = network.site("a", faults=faults)
    with network.grid(["a"]) as grid:
        for number, fault in enumerate(faults, 1):
            assert list_answering_sites(list(grid.receive(make_questions(1), timeout=45))) == {1: "a"}, fault
            wait_for(lambda number=number: len(site.lines("trouble")) >= number, what=f"the fault {fault}")
    assert [tuple(event["fault"]) for event in site.lines("fault")] == faults
    assert site.code is None


@pytest.mark.nightly
def test_questions_are_resent_after_the_server_lost_its_database(network: Loopback, ask_in_thread: Any) -> None:
    site = network.site("a", works_s=1.0)
    online_until = "SELECT online_until FROM node WHERE name = 'a'"
    with network.grid(["a"]) as grid:
        future = ask_in_thread(grid, 1)
        site.wait_for("received")
        network.process.kill()
        for path in network.folder.glob("state.db*"):
            path.unlink()
        network.start()
        assert list_answering_sites(future.result(timeout=60)) == {1: "a"}
        # The node has a new id, which its heartbeats must use.
        ((first,),) = network.rows(online_until)
        wait_for(lambda: network.rows(online_until)[0][0] > first, seconds=20, what="a heartbeat")


def test_run_without_a_server_raises_a_run_error(network: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "port", find_free_port())
    with pytest.raises(RunError, match=r"127\.0\.0\.1:\d+ cannot be reached \(ConnectError"), network.grid(["a"]):
        pass


@pytest.mark.nightly
def test_lead_waits_for_a_server_that_is_not_up_yet(network: Loopback, caplog: Any) -> None:
    network.stop_sites()
    network.stop()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: _ask_once(network))
        wait_for(lambda: "cannot be reached (ConnectError); trying again" in caplog.text, what="the lead to wait")
        network.start()
        network.site("a")
        assert future.result(timeout=60) == {1: "a"}
    assert caplog.text.count("trying again") == 1, "the retry must be reported once"


def _ask_once(network: Loopback) -> dict[int, str]:
    with network.grid(["a"], patience_s=60) as grid:
        return list_answering_sites(list(grid.receive(make_questions(1), timeout=60)))


def test_clock_skew_is_reported_without_ending_the_run(
    network: Loopback, ask_in_thread: Any, monkeypatch: Any, caplog: Any
) -> None:
    """The lead's clock is an hour ahead of the server's for some time, during and at the start of an exchange."""
    apart = 0.0
    monkeypatch.setattr(identity, "time", Mock(time=lambda: time.time() + apart))
    with network.grid(["a"]) as grid:
        future = ask_in_thread(grid, 1)
        apart = 3600.0
        wait_for(lambda: "the server's clock is" in caplog.text, what="the clock to be named")
        apart = 0.0
        network.site("a")
        assert list_answering_sites(future.result()) == {1: "a"}
    apart = 3600.0
    with pytest.raises(RunError, match=r"the server's clock is 3[56]\d\d s behind this machine's"), network.grid(["a"]):
        pass


def test_foreign_lead_signature_starts_no_run(network: Loopback) -> None:
    before = network.rows("SELECT count(*) FROM run")
    network.lead_key, own_key = stranger_key, network.lead_key
    try:
        with pytest.raises(RunError, match="does not accept this lead's signature"), network.grid(["a"]):
            pass
    finally:
        network.lead_key = own_key
    assert network.rows("SELECT count(*) FROM run") == before
