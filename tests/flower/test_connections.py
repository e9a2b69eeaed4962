"""Limits on the server's connections: number, duration, and the validity of certificates."""

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fedtune.ops.wire import connections
from fedtune.ops.wire.fleet import HELLO, ask_site_name
from fedtune.ops.wire.identity import Tls

from .certificates import LOOPBACK, Authority
from .loopback import Loopback, run_server, wait_for
from .member import sign_headers

LIMITS = {"handshake_s": 1.5, "head_s": 1.0, "idle_s": 1.5, "life_s": 2.5, "of_certificate": 6}
ELSEWHERE = "127.0.0.9"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A server with 256 file descriptors and short timeouts."""
    with run_server(tmp_path_factory.mktemp("network"), limits=LIMITS, files=256) as network:
        yield network
        wait_for(lambda: read_status(network) == 200, seconds=10, what="an answer")  # it must still serve
        assert "Traceback" not in network.output


def wrap_tls(network: Loopback, tls: Tls, *, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
    plain = socket.create_connection((LOOPBACK, network.port), timeout=10)
    return (context or tls.create_client_context()).wrap_socket(plain, server_hostname=LOOPBACK)


def build_greeting(tls: Tls) -> bytes:
    lines = [f"GET {HELLO} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in sign_headers(tls).items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def read_status(network: Loopback, address: str = LOOPBACK) -> int:
    """Return the status of a member's call from a local address; 0 without an answer."""
    transport = httpx.HTTPTransport(verify=network.tls["a"].create_client_context(), local_address=address)
    with httpx.Client(transport=transport, timeout=10) as client, contextlib.suppress(httpx.HTTPError):
        return client.get(f"https://{network.address}{HELLO}", headers=sign_headers(network.tls["a"])).status_code
    return 0


def hangs_up_within(line: Any, seconds: float, *, send: bytes = b"") -> bool:
    """Return True if the peer closes the connection while a byte of `send` is sent every tenth of a second."""
    deadline, position = time.monotonic() + seconds, 0
    line.settimeout(0.1)
    while time.monotonic() < deadline:
        try:
            if send:
                line.send(send[position % len(send) : position % len(send) + 1])
                position += 1
            if not line.recv(1 << 16):
                return True
        except (TimeoutError, ssl.SSLWantReadError):
            continue
        except (OSError, ssl.SSLError):
            return True
    return False


def list_reasons(network: Loopback) -> set[str]:
    return {str(line.get("reason")) for line in network.audit()}


def test_idle_sockets_do_not_block_other_clients(network: Loopback) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(300):  # from five addresses, up to the limit of each
            plain = stack.enter_context(socket.socket())
            plain.bind((f"127.0.0.{2 + number % 5}", 0))
            plain.connect((LOOPBACK, network.port))
        assert read_status(network, ELSEWHERE) == 200
        network.set_revoked("b")
        wait_for(lambda: "b was revoked" in network.output, seconds=10, what="the roster")
    assert {"too many connections"} <= list_reasons(network)
    wait_for(lambda: "too slow" in list_reasons(network), seconds=10, what="handshakes that take too long")
    assert "Too many open files" not in network.output


def test_connections_per_address_are_limited_and_certificates_have_priority(network: Loopback) -> None:
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(socket.create_connection((LOOPBACK, network.port))) for _ in range(70)]
        assert read_status(network) == read_status(network, ELSEWHERE) == 200
        assert all(hangs_up_within(line, 0.5) for line in lines[:6])
    assert "too many from this address" in list_reasons(network)


def test_connection_bursts_release_all_their_slots(network: Loopback) -> None:
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(socket.create_connection((LOOPBACK, network.port)))
    wait_for(lambda: read_status(network) == 200, seconds=10, what="an answer")
    with contextlib.ExitStack() as stack:
        # A connection that stayed counted would displace the first of these 64, for which there is room.
        lines = [stack.enter_context(socket.create_connection((LOOPBACK, network.port))) for _ in range(60)]
        assert not select.select(lines, [], [], 0.4)[0]


def test_addresses_of_one_ipv6_prefix_count_as_one_origin() -> None:
    addresses = ("192.0.2.7", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::1", "fe80::1%eth0", "::1")
    origins = ["192.0.2.7", "2001:db8:1:2::/64", "2001:db8:1:2::/64", "fe80::/64", "::/64"]
    assert list(map(connections._group_address, addresses)) == origins


def test_connections_per_certificate_are_limited(network: Loopback) -> None:
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(wrap_tls(network, network.tls["a"])) for _ in range(8)]
        assert sum(hangs_up_within(line, 0.2) for line in lines) >= 2
    assert "too many with this certificate" in list_reasons(network)


def test_slow_or_oversized_headers_end_the_connection(network: Loopback) -> None:
    with wrap_tls(network, network.tls["a"]) as line:
        assert hangs_up_within(line, 4, send=build_greeting(network.tls["a"]))
    with wrap_tls(network, network.tls["a"]) as line:
        line.sendall(build_greeting(network.tls["a"]))
        assert b"200 OK" in line.recv(1 << 16)
        assert hangs_up_within(line, 5, send=build_greeting(network.tls["a"])), "also for a second request"
    with wrap_tls(network, network.tls["a"]) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 40_000)
        assert b" 400 " in line.recv(1 << 16), "their size must be limited, too"


def test_silent_connection_is_closed(network: Loopback) -> None:
    with wrap_tls(network, network.tls["a"]) as line:
        assert hangs_up_within(line, 3)
    with socket.create_connection((LOOPBACK, network.port)) as plain:
        assert hangs_up_within(plain, 4, send=b"\x16")


def test_connection_has_a_maximum_lifetime_and_no_tls_session_ticket(network: Loopback) -> None:
    with wrap_tls(network, network.tls["a"]) as line:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start < 10:
                line.sendall(build_greeting(network.tls["a"]))
                if not line.recv(1 << 16):
                    break
                assert line.version() == "TLSv1.3"
                assert line.session is None or not line.session.has_ticket
                time.sleep(0.3)
        assert 2 < time.monotonic() - start < 7


def test_connection_ends_when_its_certificate_expires(network: Loopback) -> None:
    tls = network.add_member("short", days=6 / 86400)  # issued ten days ago, valid for another six seconds
    wait_for(lambda: "short is registered" in network.output, seconds=10)
    assert ask_site_name(network.address, tls) == "short"

    def is_closed() -> bool:
        try:
            with httpx.Client(verify=tls.create_client_context(), base_url=f"https://{network.address}") as client:
                while True:
                    assert client.get(HELLO, headers=sign_headers(tls)).status_code == 200
                    time.sleep(0.2)
        except httpx.HTTPError:
            return "certificate: certificate has expired" in list_reasons(network)

    wait_for(is_closed, seconds=20, what="the end of the certificate")


def test_old_tls_versions_and_foreign_certificates_are_refused_and_logged(network: Loopback, tmp_path: Any) -> None:
    old = network.tls["a"].create_client_context()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        wrap_tls(network, network.tls["a"], context=old)
    stranger = Authority(tmp_path / "other").issue("stranger")
    for certificate in (stranger, None):
        foreign = ssl.create_default_context(cafile=str(network.tls["a"].ca))
        if certificate:
            foreign.load_cert_chain(certificate.certificate, certificate.key)
        with wrap_tls(network, stranger, context=foreign) as line:
            assert hangs_up_within(line, 3)
    reasons = {"unsupported protocol", "peer did not return a certificate"}
    reasons.add("certificate: unable to get local issuer certificate")
    wait_for(lambda: reasons <= list_reasons(network), seconds=5, what=f"the reasons among {list_reasons(network)}")
    (line_,) = [line for line in network.audit() if line.get("reason") == "unsupported protocol"]
    assert line_["address"] == LOOPBACK
