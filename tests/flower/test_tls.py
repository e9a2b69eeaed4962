"""Who shakes hands with whom, and what a site says where somebody does not."""

import socket
import ssl
from pathlib import Path

import httpx
import pytest

from fedtune.ops.wire.bounded_http import bounded
from fedtune.ops.wire.fleet import Unreachable, hello
from fedtune.ops.wire.identity import Tls, refusal

from .certificates import LOOPBACK, Authority
from .hostile import Answer, Hostile, server_context, whole


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def others(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "others")


@pytest.mark.parametrize("who", ["of ours", "of others", "elsewhere", "a site", "ended", "with old TLS"])
def test_only_a_federation_s_own_server_is_spoken_to(ours: Authority, others: Authority, who: str) -> None:
    """Who may speak to a real server: test_fleet.py."""
    tls = {
        "of others": lambda: others.issue("server", address=LOOPBACK),
        "elsewhere": lambda: ours.issue("server", address="127.0.0.2"),
        "a site": lambda: ours.issue("b"),  # of the same authority, but for clients alone
        "ended": lambda: ours.issue("server", address=LOOPBACK, days=-1),
    }.get(who, lambda: ours.issue("server", address=LOOPBACK))()
    newest = ssl.TLSVersion.TLSv1_2 if who == "with old TLS" else ssl.TLSVersion.TLSv1_3
    server = Hostile(server_context(tls, newest=newest), lambda to, path: to.sendall(whole(b'{"site": "a"}')))
    if who == "of ours":
        assert hello(server.address, ours.issue("a")) == "a"
    else:
        said = said_of(server.address, ours.issue("a"))
        assert ("protocol version" if who == "with old TLS" else "its certificate is not accepted here") in said
        assert server.asked == []
    server.close()


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
