"""The health endpoint, over real sockets on loopback."""

import contextlib
import json
import socket
import stat
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from fedtune.ops import health as module
from fedtune.ops.health import Health, State, send_probe, serve_health
from fedtune.spec import ConfigError
from fedtune.version import build

from .deployment_files import run

KEYS = {"state", "since", "last_contact", "rounds_answered", "version"}


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def address(health: Health) -> Iterator[str]:
    with serve_health("127.0.0.1:0", health) as bound:
        yield bound


def connect_to(address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=10)


def test_health_report_has_fixed_keys(address: str, health: Health) -> None:
    status, body = send_probe(address)
    assert status == 200
    report = json.loads(body)
    assert set(report) == KEYS
    assert (report["state"], report["last_contact"], report["rounds_answered"]) == ("starting", None, 0)
    assert report["version"] == build()
    with pytest.raises(TypeError):
        health.update(records=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="state"):
        health.update(state="CANARY")  # type: ignore[arg-type]


def test_readiness_reflects_whether_a_round_would_be_answered(address: str, health: Health) -> None:
    for state in get_args(State):
        health.update(state=state)
        status, body = send_probe(address, "/ready")
        assert (status, json.loads(body)["state"]) == (200 if state in ("connected", "training") else 503, state)
        assert send_probe(address, "/health")[0] == 200


def test_health_since_is_the_time_of_the_last_state_change(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
    monkeypatch.setattr(module, "datetime", SimpleNamespace(now=lambda zone: now))
    health.update(state="connected", last_contact=datetime(2026, 11, 20, 13, 0, tzinfo=timezone(timedelta(hours=1))))
    now += timedelta(hours=1)
    health.update(state="connected", rounds_answered=2)
    snapshot = health.snapshot()
    assert snapshot["since"] == "2026-11-20T12:00:00+00:00"
    assert snapshot["last_contact"] == "2026-11-20T12:00:00+00:00"
    assert snapshot["rounds_answered"] == 2


def test_only_health_and_ready_paths_are_served(address: str) -> None:
    for sent, status in (
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"GET /health/../etc HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"405"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nConnection: keep-alive\r\n\r\n" * 2, b"200"),  # one answer to both
    ):
        answer = b""
        with connect_to(address) as connection:
            connection.sendall(sent)
            while part := connection.recv(4096):  # until it is closed
                answer += part
        assert answer.split()[1] == status
        assert b"connection: close" in answer
        assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == (KEYS if status == b"200" else set())


def test_endless_request_is_cut_off(address: str) -> None:
    start = time.monotonic()
    with connect_to(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        try:
            for _ in range(100):
                connection.sendall(b"x" * 100)
            received = connection.recv(100)
        except ConnectionError:  # data was still in transit when the server closed
            received = b""
    assert received == b"" or received.split()[1] == b"400"
    assert time.monotonic() - start < 1.5  # limited by size, before the time limit
    assert send_probe(address)[0] == 200


def test_slow_clients_do_not_block_health_probes(address: str) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect_to(address)) for _ in range(40)]
        for connection in slow:
            connection.sendall(b"G")
        assert [send_probe(address)[0] for _ in range(20)] == [200] * 20
        assert send_probe(address, "/health")[0] == 200
        start = time.monotonic()
        for connection in slow:
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
        assert time.monotonic() - start < 8, "each must be cut off after two seconds"


def test_health_server_stops_with_its_context(health: Health) -> None:
    with serve_health("127.0.0.1:0", health) as bound:
        assert send_probe(bound)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        send_probe(bound)
    with serve_health(bound, health) as rebound:  # and its port must be free
        assert rebound == bound


def test_non_loopback_address_requires_an_explicit_option(address: str, health: Health) -> None:
    for message, addresses in {
        "--health-anywhere": ("0.0.0.0:0", "[::]:0", "10.1.2.3:8089"),
        "cannot be bound": (address,),
        r"^--health = .*must be host:port": (
            *("8089", "127.0.0.1", "127.0.0.1:70000", "127.0.0.1:\uff18\uff10", "[127.0.0.1]:1", "fl.example.org:8089"),
        ),
    }.items():
        for one in addresses:
            with pytest.raises(ConfigError, match=message), serve_health(one, health):
                pass


def test_non_loopback_and_ipv6_addresses_can_be_served(health: Health) -> None:
    with serve_health("0.0.0.0:0", health, anywhere=True) as bound:
        assert send_probe(bound.replace("0.0.0.0", "127.0.0.1"))[0] == 200
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serve_health("[::1]:0", health) as bound:
        assert bound.startswith("[::1]:")
        assert send_probe(bound)[0] == 200


def test_container_probe_reflects_health_and_readiness(address: str, health: Health) -> None:
    proxies = {"HTTP_PROXY": "http://127.0.0.1:1", "http_proxy": "http://127.0.0.1:1"}
    probe = partial(run, sys.executable, "-m", "fedtune.ops.health", env=proxies)
    assert probe(address).returncode == 0
    assert probe(address, "/ready").returncode == 1
    health.update(state="connected")
    response = probe(address, "/ready")
    assert (response.returncode, json.loads(response.stdout)["state"], response.stderr) == (0, "connected", "")
    assert probe("127.0.0.1:1").returncode == 1
    assert probe().returncode == 2


def test_health_is_served_on_a_unix_socket(tmp_path: Path, health: Health) -> None:
    address = f"unix:{tmp_path / 'health.sock'}"
    for _ in range(2):  # a killed process leaves its socket behind
        with serve_health(address, health) as served:
            assert served == address
            assert stat.S_IMODE((tmp_path / "health.sock").stat().st_mode) == 0o660
            health.update(state="training")
            assert send_probe(address, "/ready")[0] == 200
            assert module.main([address]) == 0
    (tmp_path / "notes").write_text("x")
    for socket_path, bound in (
        ("notes", "is not a socket"),
        ("missing/x.sock", "No such file"),
        ("x" * 200, "too long"),
    ):
        with pytest.raises(ConfigError, match=bound), serve_health(f"unix:{tmp_path / socket_path}", health):
            pass
    assert module.main([address]) == 1
