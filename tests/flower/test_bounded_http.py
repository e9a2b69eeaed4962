"""Limits of HTTP clients against a malicious server: memory, duration and identity."""

import contextlib
import gzip
import resource
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse

import fedtune.ops.wire.bounded_http as bounded_http
from fedtune.ops.wire.bounded_http import ResponseLimitExceeded, bound_client
from fedtune.ops.wire.fleet import Fleet, NotFedtuneServer, Unreachable, ask_site_name
from fedtune.ops.wire.identity import Tls, explain_tls_refusal
from fedtune.ops.wire.lead_session import LeadSession
from fedtune.ops.wire.remote_grid import RemoteGrid
from fedtune.spec import RunError

from ..privacy.builders import lead_key
from .certificates import LOOPBACK, Authority, to_public_pem
from .hostile import Answer, Hostile, build_response, make_server_context, serve_answer

MIB = 1 << 20
Called = Callable[[str, Tls], None]


def _open_fleet(address: str, tls: Tls) -> None:
    fleet = Fleet(address, tls)
    try:
        fleet.activate()
    finally:
        fleet._stop.set()
        fleet._client.close()


CALLS = {"site": _open_fleet, "greeting": ask_site_name}
CALLS["lead"] = lambda address, tls: LeadSession(address, tls, lead_key)
both = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture(scope="module")
def own_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours") / "ca")


@pytest.fixture(scope="module")
def tls(own_authority: Authority) -> Tls:
    return own_authority.issue("north")


@pytest.fixture
def serve(own_authority: Authority) -> Iterator[Callable[..., Hostile]]:
    servers: list[Hostile] = []

    def start(answer: Answer, **context: Any) -> Hostile:
        servers.append(Hostile(make_server_context(own_authority.issue("server", address=LOOPBACK), **context), answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def client(tls: Tls) -> Iterator[httpx.Client]:
    with httpx.Client(verify=tls.create_client_context(), timeout=30) as servers:
        bounded_http.bound_client(servers)
        yield servers


@pytest.fixture
def impatient_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Timeouts of seconds instead of minutes."""
    start = time.monotonic()
    monkeypatch.setattr(bounded_http, "_OTHER", (bounded_http._OTHER[0], 0.5))
    monkeypatch.setattr(bounded_http, "_OBJECT", (bounded_http._OBJECT[0], 0.5))
    yield
    assert time.monotonic() - start < 5


@contextlib.contextmanager
def limit_memory_growth() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@both
def test_compressed_response_is_not_read(serve: Any, tls: Tls, call: Called) -> None:
    # 256 KB that expand to 256 MB.
    bomb = gzip.compress(bytes(16 * MIB), mtime=0) * 16
    server = serve(lambda conn, path: conn.sendall(build_response(bomb, headers="content-encoding: gzip\r\n")))
    with limit_memory_growth(), pytest.raises((Unreachable, ResponseLimitExceeded), match="compressed"):
        call(server.address, tls)


@both
@pytest.mark.parametrize("length_said", [True, False], ids=["announced", "without a length"])
def test_response_is_read_up_to_a_size_limit(serve: Any, tls: Tls, call: Called, *, length_said: bool) -> None:
    def send_flood(connection: ssl.SSLSocket, path: str) -> None:
        head = f"content-length: {1 << 30}" if length_said else "transfer-encoding: chunked"
        connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode())
        for _ in range(256):
            connection.sendall(bytes(MIB) if length_said else b"100000\r\n" + bytes(MIB) + b"\r\n")

    server = serve(send_flood)
    with limit_memory_growth(), pytest.raises((Unreachable, ResponseLimitExceeded), match="bytes"):
        call(server.address, tls)


@both
@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b"."),
    ],
    ids=["before the head", "in the head", "in the body"],
)
@pytest.mark.usefixtures("impatient_client")
def test_slowly_dribbled_response_times_out(serve: Any, tls: Tls, call: Called, head: bytes, part: bytes) -> None:
    def send_slowly(connection: ssl.SSLSocket, path: str) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(part)
            server.pause(0.1)

    server = serve(send_slowly)
    with pytest.raises((Unreachable, httpx.TimeoutException)):
        call(server.address, tls)


@both
@pytest.mark.usefixtures("impatient_client")
def test_server_without_a_tls_handshake_times_out(tls: Tls, call: Called) -> None:
    with socket.create_server((LOOPBACK, 0)) as listening, pytest.raises((Unreachable, httpx.TimeoutException)):
        call(f"{LOOPBACK}:{listening.getsockname()[1]}", tls)


@pytest.mark.usefixtures("impatient_client")
def test_server_that_reads_slowly_times_out(serve: Any, client: httpx.Client) -> None:
    server = serve(lambda connection, path: None)
    with pytest.raises(httpx.TimeoutException):
        client.post(f"https://{server.address}/push-object", content=bytes(64 * MIB))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(serve: Any, tls: Tls, status: int) -> None:
    """A malicious administrator of the server redirects a call to a machine in the caller's network."""
    with socket.create_server((LOOPBACK, 0)) as target:
        target.setblocking(False)
        location = f"http://{LOOPBACK}:{target.getsockname()[1]}"
        answer = build_response(b"", headers=f"location: {location}/x\r\n", status=f"{status} Elsewhere")
        server = serve(lambda connection, path: connection.sendall(answer))
        with pytest.raises(Unreachable, match=r"redirects .*never followed"):
            _open_fleet(server.address, tls)
        with pytest.raises(NotFedtuneServer):
            ask_site_name(server.address, tls)
        keys = {"north": to_public_pem(tls)}
        grid = RemoteGrid(server.address, tls, sites=keys, key=lead_key, hear=Mock(), closing=Mock())
        with pytest.raises(RunError, match=r"redirects .*never followed"), grid:
            pass
        assert server.asked == ["/v1/fleet/activate-node", "/v1/fedtune/hello", "/v1/control/start-run"]
        with pytest.raises(BlockingIOError):
            target.accept()


def test_client_requests_uncompressed_responses(serve: Any, client: httpx.Client) -> None:
    server = serve(lambda connection, path: connection.sendall(build_response(b"{}")))
    assert client.get(f"https://{server.address}/").request.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("status", ["200 OK", "401 Unauthorized", "404 Not Found"])
@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"reason": "\xff"}', b"7" * 5000, b"[]", b"{}", b""],
    ids=["nesting", "no text", "a long number", "a list", "no field", "nothing"],
)
def test_malformed_greeting_raises_only_the_wrong_server_error(serve: Any, tls: Tls, status: str, body: bytes) -> None:
    """Otherwise the operator of the server could end every site's process."""
    server = serve(lambda connection, path: connection.sendall(build_response(body, status=status)))
    with pytest.raises(NotFedtuneServer):
        ask_site_name(server.address, tls)


def test_connection_is_renewed_after_its_maximum_age(
    serve: Any, tls: Tls, own_authority: Authority, monkeypatch: Any
) -> None:
    """Otherwise a site would keep polling a server with an expired or replaced certificate."""
    server = serve(lambda conn, path: conn.sendall(build_response(ActivateNodeResponse(node_id=7).SerializeToString())))
    fleet = Fleet(server.address, tls)
    for _ in range(3):
        fleet.activate()
    assert server.connections == 1
    server.context = make_server_context(own_authority.issue("server", address=LOOPBACK, days=-1))
    fleet.activate()
    assert server.connections == 1, "a recent connection must be reused"
    monkeypatch.setattr(bounded_http, "MAX_AGE_S", 0.0)
    with pytest.raises(Unreachable, match="its certificate is not accepted here: certificate has expired"):
        fleet.activate()
    fleet._stop.set()
    fleet._client.close()


def test_proxied_calls_have_the_same_limits(serve: Any, tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(lambda conn, path: conn.sendall(build_response(b"{}", headers="content-encoding: gzip\r\n")))
    with serve_answer(b"HTTP/1.1 200 OK\r\n\r\n", tunnel=True) as (proxy, requests):
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        for send in CALLS.values():
            with pytest.raises((Unreachable, ResponseLimitExceeded), match="compressed"):
                send(server.address, tls)
    assert {request.split(b"\r\n")[0].decode() for request in requests} == {f"CONNECT {server.address} HTTP/1.1"}


@pytest.fixture
def other_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "others")


@pytest.mark.parametrize("peer", ["of ours", "of others", "elsewhere", "a site", "ended", "with old TLS"])
def test_client_accepts_only_the_server_of_its_federation(
    own_authority: Authority, other_authority: Authority, peer: str
) -> None:
    """Authentication at a real server: test_fleet.py."""
    tls = {
        "of others": lambda: other_authority.issue("server", address=LOOPBACK),
        "elsewhere": lambda: own_authority.issue("server", address="127.0.0.2"),
        "a site": lambda: own_authority.issue("b"),  # issued by the same authority, but for clients only
        "ended": lambda: own_authority.issue("server", address=LOOPBACK, days=-1),
    }.get(peer, lambda: own_authority.issue("server", address=LOOPBACK))()
    max_version = ssl.TLSVersion.TLSv1_2 if peer == "with old TLS" else ssl.TLSVersion.TLSv1_3
    server = Hostile(
        make_server_context(tls, newest=max_version), lambda conn, path: conn.sendall(build_response(b'{"site": "a"}'))
    )
    if peer == "of ours":
        assert ask_site_name(server.address, own_authority.issue("a")) == "a"
    else:
        error = read_hello_error(server.address, own_authority.issue("a"))
        assert ("protocol version" if peer == "with old TLS" else "its certificate is not accepted here") in error
        assert server.asked == []
    server.close()


def read_hello_error(address: str, tls: Tls) -> str:
    with pytest.raises(Unreachable) as caught:
        ask_site_name(address, tls)
    return str(caught.value)


def cut(connection: ssl.SSLSocket, path: str) -> None:
    raise ConnectionError


def cut_within(connection: ssl.SSLSocket, path: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{")
    raise ConnectionError


@pytest.mark.parametrize("answer", [cut, cut_within])
def test_interrupted_connection_is_not_reported_as_a_refusal(serve: Any, tls: Tls, answer: Answer) -> None:
    assert read_hello_error(serve(answer).address, tls) == "no connection to the server (the connection was cut)"


@pytest.mark.parametrize(
    ("who", "says"), [("stranger", "unknown ca"), ("ended", "certificate expired"), ("without", "certificate required")]
)
def test_certificate_refusal_is_named_in_the_error(
    serve: Any, own_authority: Authority, other_authority: Authority, who: str, says: str
) -> None:
    """With TLS 1.3, the refusal arrives after the handshake."""
    site = own_authority.issue("a", days=-1 if who == "ended" else 5)
    if who == "stranger":
        cert = other_authority.issue("a")
        site = Tls(ca=own_authority.file, certificate=cert.certificate, key=cert.key)
    context = site.create_client_context()
    if who == "without":
        context = ssl.create_default_context(cafile=str(site.ca))
    server = serve(cut)
    for _ in range(5):  # repeated, because it is a race
        client = httpx.Client(verify=context)
        bound_client(client)
        with client, pytest.raises(httpx.ConnectError) as caught:
            client.get(f"https://{server.address}/")
        assert explain_tls_refusal(caught.value) == f"it does not accept this site's certificate: {says}"


def test_hang_up_after_the_handshake_is_reported_as_a_possible_refusal(own_authority: Authority) -> None:
    """fedtune's own server closes the connection without an alert."""
    context = make_server_context(own_authority.issue("server", address=LOOPBACK))
    context.num_tickets = 0

    class Silent(Hostile):
        def _serve(self, connection: socket.socket) -> None:
            with self.context.wrap_socket(connection, server_side=True):
                pass

    server = Silent(context, cut)
    assert "closed the connection right after the handshake" in read_hello_error(
        server.address, own_authority.issue("a")
    )
    server.close()
