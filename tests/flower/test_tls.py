"""Who shakes hands with whom, and what a site says where somebody does not."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import httpx
import pytest

from fedtune.ops.wire.bounded_http import bounded
from fedtune.ops.wire.fleet import Unreachable, hello
from fedtune.ops.wire.identity import Tls, refusal

from .certificates import LOOPBACK, Authority
from .hostile import Answer, Hostile, server_context


def shake_hands(client: Tls, server: Tls, *, name: str = LOOPBACK, most: ssl.TLSVersion | None = None) -> str:
    """TLS between a client of ours and a server as uvicorn makes it; the protocol's version."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(server.certificate, server.key)
    theirs.load_verify_locations(server.ca)
    theirs.verify_mode = ssl.CERT_REQUIRED
    if most is not None:
        theirs.maximum_version = most
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        theirs.wrap_bio(to_server, to_client, server_side=True),
        client.client_context().wrap_bio(to_client, to_server, server_hostname=name),
    ]
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    for end in ends:
        end.do_handshake()
    return ends[1].version() or ""


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def others(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "others")


def test_members_of_one_federation_meet(ours: Authority) -> None:
    server = ours.issue("server", address=LOOPBACK)
    assert shake_hands(ours.issue("a"), server) == "TLSv1.3"


def test_another_authority_is_not_trusted(ours: Authority, others: Authority) -> None:
    server = ours.issue("server", address=LOOPBACK)
    with pytest.raises(ssl.SSLError):
        shake_hands(others.issue("a"), server)
    # A client of ours shows its certificate, and does not take theirs.
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(ours.issue("a"), others.issue("server", address=LOOPBACK))


def test_a_certificate_from_elsewhere_does_not_pass_for_ours(ours: Authority, others: Authority) -> None:
    theirs = others.issue("a")
    stranger = Tls(ca=ours.file, certificate=theirs.certificate, key=theirs.key)
    with pytest.raises(ssl.SSLError):
        shake_hands(stranger, ours.issue("server", address=LOOPBACK))


def test_a_server_under_another_name_is_not_trusted(ours: Authority) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)mismatch"):
        shake_hands(ours.issue("a"), ours.issue("server", address="127.0.0.2"))


def test_a_site_cannot_play_the_server(ours: Authority) -> None:
    # Its certificate is of the same authority, but for clients alone, whatever name it is reached under.
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(ours.issue("a"), ours.issue("b"))


def test_the_server_s_certificate_is_none_for_a_client(ours: Authority) -> None:
    server = ours.issue("server", address=LOOPBACK)
    with pytest.raises(ssl.SSLError):
        shake_hands(server, server)


@pytest.mark.parametrize("who", ["site", "server"])
def test_a_certificate_that_has_ended_is_none(ours: Authority, who: str) -> None:
    site = ours.issue("a", days=-1 if who == "site" else 5)
    server = ours.issue("server", address=LOOPBACK, days=-1 if who == "server" else 5)
    with pytest.raises(ssl.SSLError, match="expired"):
        shake_hands(site, server)


def test_old_protocols_are_refused(ours: Authority) -> None:
    with pytest.raises(ssl.SSLError):
        shake_hands(ours.issue("a"), ours.issue("server", address=LOOPBACK), most=ssl.TLSVersion.TLSv1_2)


def said_of(address: str, tls: Tls) -> str:
    """What a site's log says of the server at `address`."""
    with pytest.raises(Unreachable) as caught:
        hello(address, tls)
    return str(caught.value)


def cut(to: ssl.SSLSocket, path: str) -> None:
    raise ConnectionError


def cut_within(to: ssl.SSLSocket, path: str) -> None:
    to.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{")
    raise ConnectionError


@pytest.mark.parametrize("answer", [cut, cut_within])
def test_a_cut_is_not_taken_for_a_refusal(ours: Authority, answer: Answer) -> None:
    server = Hostile(server_context(ours.issue("server", address=LOOPBACK)), answer)
    assert said_of(server.address, ours.issue("a")) == "no connection to the server (the connection was cut)"
    server.close()


@pytest.mark.parametrize(
    ("who", "says"), [("stranger", "unknown ca"), ("ended", "certificate expired"), ("without", "certificate required")]
)
def test_a_refusal_is_named(ours: Authority, others: Authority, who: str, says: str) -> None:
    """Under TLS 1.3 it comes after the handshake."""
    site = ours.issue("a", days=-1 if who == "ended" else 5)
    if who == "stranger":
        theirs = others.issue("a")
        site = Tls(ca=ours.file, certificate=theirs.certificate, key=theirs.key)
    context = site.client_context()
    if who == "without":
        context = ssl.create_default_context(cafile=str(site.ca))
    server = Hostile(server_context(ours.issue("server", address=LOOPBACK)), cut)
    for _ in range(5):  # it does not depend on who is faster
        client = httpx.Client(verify=context)
        bounded(client)
        with client, pytest.raises(httpx.ConnectError) as caught:
            client.get(f"https://{server.address}/")
        assert refusal(caught.value) == f"it does not accept this site's certificate: {says}"
    server.close()


def test_an_old_server_is_not_taken_for_one_that_refuses_the_certificate(ours: Authority) -> None:
    files = ours.issue("server", address=LOOPBACK)
    server = Hostile(server_context(files, newest=ssl.TLSVersion.TLSv1_2), cut)
    said = said_of(server.address, ours.issue("a"))
    assert "certificate" not in said
    assert "protocol version" in said
    server.close()


def test_a_server_that_hangs_up_after_the_handshake_may_refuse(ours: Authority) -> None:
    """As fedtune's own does, whose library sends no alert."""
    context = server_context(ours.issue("server", address=LOOPBACK))
    context.num_tickets = 0

    class Silent(Hostile):
        """Hangs up where it would read a request."""

        def _serve(self, connection: socket.socket) -> None:
            with self.context.wrap_socket(connection, server_side=True):
                pass

    server = Silent(context, cut)
    assert "hung up right after the handshake" in said_of(server.address, ours.issue("a"))
    server.close()
