"""The doctor's connection, against real servers on loopback that go wrong in every way it tells apart."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.doctor.check import Check
from fedtune.deploy.doctor.connection_checks import AUTHENTICATION, DNS, TCP, TLS, Connection, proxy_for
from fedtune.deploy.files import write_secret
from fedtune.deploy.kits.certificates import Authority, certificate_pem, make_key, private_pem
from fedtune.deploy.kits.kit import Kit, KitFile
from fedtune.privacy.keys import SigningKey
from tests.flower.hostile import Hostile

LONG_AGO = datetime.now(UTC) - timedelta(days=900)


def authority_of(federation: str) -> Authority:
    return Authority.make(federation, days=3650, now=LONG_AGO)


@pytest.fixture(scope="session")
def ours() -> Authority:
    return authority_of("cardiology")


@pytest.fixture(scope="session")
def theirs() -> Authority:
    return authority_of("Example Inspection Inc")


@dataclass
class Server:
    """What a server shows and says; `doctor` connects to it over loopback."""

    folder: Path
    authority: Authority
    clients: Authority
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1")
    begins: datetime = field(default_factory=lambda: datetime.now(UTC))
    days: int = 365
    newest_tls: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    clock_ahead_s: float = 0.0
    status: int = 200
    hello: Any = field(default_factory=lambda: {"site": "north", "time": time.time()})
    seen: list[str] = field(default_factory=list)

    def context(self) -> ssl.SSLContext:
        key = make_key()
        shown = self.authority.issue_server(key.public_key(), hosts=self.hosts, days=self.days, now=self.begins)
        chain, trusted = self.folder / "server_chain.pem", self.folder / "server_trusts.pem"
        chain.write_bytes(private_pem(key) + certificate_pem(shown))
        trusted.write_bytes(certificate_pem(self.clients.certificate))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        context.load_verify_locations(trusted)
        context.verify_mode, context.maximum_version = ssl.CERT_REQUIRED, self.newest_tls
        return context


class Loopback(http.server.ThreadingHTTPServer):
    """Serves a `Server` over TLS."""

    def __init__(self, server: Server) -> None:
        self.server, self.context = server, server.context()
        super().__init__(("127.0.0.1", 0), Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        plain, address = super().get_request()
        # The handshake is made by the thread that answers, so that a client that fails it stops nobody else.
        return self.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is what these tests are about


class Handler(http.server.BaseHTTPRequestHandler):
    server: Loopback

    def do_GET(self) -> None:
        told = self.server.server
        told.seen.append(self.path)
        status, content = (told.status, told.hello) if self.path == "/v1/fedtune/hello" else (404, {"reason": "no"})
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate((timestamp or time.time()) + self.server.server.clock_ahead_s, usegmt=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def kit(tmp_path: Path, ours: Authority) -> Callable[[str], Kit]:
    """The kit of site `north` for a server's address."""
    folder = tmp_path / "kit"
    folder.mkdir()
    key = make_key()
    now = datetime.now(UTC)
    issued = ours.issue_client(key.public_key(), kind="site", name="north", days=90, now=now)
    (folder / "site.pem").write_bytes(certificate_pem(issued))
    (folder / "ca.pem").write_bytes(certificate_pem(ours.certificate))
    write_secret(folder / "connection_key.pem", private_pem(key))
    lead = SigningKey.load_or_make(tmp_path / "lead.pem").public

    def make(server: str) -> Kit:
        written = KitFile(version=1, kind="site", federation="cardiology", server=server, lead=lead, site="north")
        (folder / "kit.toml").write_text(written.to_toml())
        return Kit.read(folder, kind="site")

    return make


@pytest.fixture
def served(tmp_path: Path, ours: Authority, stack: ExitStack) -> Callable[..., tuple[Server, str]]:
    """Serve with some things changed; its address as localhost:port."""

    def start(**changes: Any) -> tuple[Server, str]:
        server = Server(**{"folder": tmp_path, "authority": ours, "clients": ours, **changes})
        loopback = Loopback(server)
        thread = threading.Thread(target=loopback.serve_forever, args=(0.01,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(loopback.server_close)
        stack.callback(loopback.shutdown)
        return server, f"localhost:{loopback.server_port}"

    return start


def tried(kit: Kit, *, timeout_s: float = 5.0) -> dict[str, Check]:
    return {check.name: check for check in Connection(kit, timeout_s=timeout_s).checks()}


def marks(checks: dict[str, Check]) -> str:
    """The four lines' first letters: o(k), w(arning), f(ailed), s(kipped)."""
    assert list(checks) == [DNS, TCP, TLS, AUTHENTICATION]
    failures = [check for check in checks.values() if check.status == "failed"]
    assert all(check.fix.endswith(".") and check.exit_code == 1 for check in failures)
    return "".join(check.status[0] for check in checks.values())


def test_a_server_that_is_well(kit: Any, served: Any) -> None:
    _, address = served()
    connection = Connection(kit(address))
    checks = {check.name: check for check in connection.checks()}
    assert marks(checks) == "oooo"
    assert "TLSv1.3" in checks[TLS].found
    assert checks[AUTHENTICATION].found == "the server knows this key as north"
    assert connection.clock_ahead_s is not None
    ahead, unsure = connection.clock_ahead_s
    assert abs(ahead) <= unsure < 2


def test_an_address_in_place_of_a_name(kit: Any, served: Any) -> None:
    _, address = served()
    checks = tried(kit(address.replace("localhost", "127.0.0.1")))
    assert marks(checks) == "oooo"
    assert checks[DNS].found == "127.0.0.1 is an address"


def test_a_certificate_that_soon_ends_is_a_warning(kit: Any, served: Any) -> None:
    checks = tried(kit(served(days=20)[1]))
    assert marks(checks) == "oowo"
    assert "renew-server" in checks[TLS].fix


def test_a_name_that_does_not_resolve(kit: Any) -> None:
    checks = tried(kit("fl.nowhere.invalid:9092"))
    assert marks(checks) == "fsss"
    assert "fl.nowhere.invalid does not resolve" in checks[DNS].found
    assert checks[TLS].found == f"skipped, because {DNS} failed"


def test_a_port_where_nobody_listens(kit: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    checks = tried(kit(f"127.0.0.1:{port}"))
    assert marks(checks) == "ofss"
    assert "refuses connections" in checks[TCP].found


def test_a_server_of_another_authority(kit: Any, served: Any, theirs: Authority) -> None:
    checks = tried(kit(served(authority=theirs)[1]))
    assert marks(checks) == "oofs"
    assert "TLS inspection" in checks[TLS].found
    assert "Example Inspection Inc" in checks[TLS].found, "whose it is tells who opens the connections"
    assert "exempted" in checks[TLS].fix


def test_a_server_of_another_authority_by_the_same_name(kit: Any, served: Any) -> None:
    checks = tried(kit(served(authority=authority_of("cardiology"))[1]))
    assert marks(checks) == "oofs"
    assert "not issued by the federation's authority" in checks[TLS].found


def test_a_server_under_another_name(kit: Any, served: Any) -> None:
    checks = tried(kit(served(hosts=("fl.example.org",))[1]))
    assert marks(checks) == "oofs"
    assert checks[TLS].found == "the server's certificate is not for localhost but for fl.example.org"
    assert "also_known_as" in checks[TLS].fix


def test_a_server_under_another_address(kit: Any, served: Any) -> None:
    checks = tried(kit(served(hosts=("localhost",))[1].replace("localhost", "127.0.0.1")))
    assert marks(checks) == "oofs"
    assert "not for 127.0.0.1 but for localhost" in checks[TLS].found


def test_a_server_certificate_that_has_expired(kit: Any, served: Any) -> None:
    began = datetime.now(UTC) - timedelta(days=60)
    checks = tried(kit(served(begins=began, days=30)[1]))
    assert marks(checks) == "oofs"
    assert f"has expired on {began + timedelta(days=30):%Y-%m-%d}" in checks[TLS].found
    assert "renew-server" in checks[TLS].fix


def test_a_server_certificate_of_the_future(kit: Any, served: Any) -> None:
    checks = tried(kit(served(begins=datetime.now(UTC) + timedelta(days=3))[1]))
    assert marks(checks) == "oofs"
    assert "not valid yet" in checks[TLS].found
    assert "clock" in checks[TLS].fix


def test_a_server_that_speaks_an_old_protocol(kit: Any, served: Any) -> None:
    checks = tried(kit(served(newest_tls=ssl.TLSVersion.TLSv1_2)[1]))
    assert marks(checks) == "oofs"
    assert "certificate" not in checks[TLS].found
    assert "does not speak TLS as expected" in checks[TLS].found


def test_a_server_that_refuses_our_certificate(kit: Any, served: Any, theirs: Authority) -> None:
    # Under TLS 1.3 the client has done its part by then, and hears of it when it reads.
    server, address = served(clients=theirs)
    checks = tried(kit(address))
    assert marks(checks) == "oofs"
    assert checks[TLS].found == "the server refused this site's certificate (unknown ca)"
    assert "renew-site north" in checks[TLS].fix
    assert server.seen == []


def test_a_server_that_dribbles_is_left(kit: Any, ours: Authority, tmp_path: Path) -> None:
    def dribble(to: ssl.SSLSocket, path: str) -> None:
        while True:
            to.sendall(b"H")
            dribbling.pause(0.05)

    dribbling = Hostile(Server(folder=tmp_path, authority=ours, clients=ours).context(), dribble)
    began = time.monotonic()
    assert marks(tried(kit(dribbling.address), timeout_s=0.5)) == "oofs"
    assert time.monotonic() - began < 10
    dribbling.close()


def test_a_server_that_does_not_speak_tls(kit: Any, stack: ExitStack) -> None:
    checks = tried(kit(answering(stack, lambda asked: b"HTTP/1.1 400 Bad Request\r\n\r\n")))
    assert marks(checks) == "oofs"
    assert "does not speak TLS" in checks[TLS].found


def test_a_server_that_hangs_up(kit: Any, stack: ExitStack) -> None:
    checks = tried(kit(answering(stack, lambda asked: b"")))
    assert marks(checks) == "oofs"


def test_a_server_that_never_answers(kit: Any, stack: ExitStack) -> None:
    listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    checks = tried(kit(f"127.0.0.1:{listening.getsockname()[1]}"), timeout_s=0.3)
    assert marks(checks) == "oofs"
    assert "gave no answer in 0.3 s" in checks[TLS].found


@pytest.mark.parametrize(
    ("status", "hello", "found", "fix"),
    [
        (403, {"reason": "unknown"}, "unknown", "provision list` shows north"),
        (403, {"reason": "revoked"}, "revoked", "why this site was revoked"),
        (403, {"reason": "its clock is 12 s ahead"}, "clock is 12 s ahead", "time synchronisation"),
        (200, {"site": "south", "time": 0}, "knows this key as south, and the kit is for north", "mixed up"),
        (200, b"<html>Welcome to nginx</html>", "no server of fedtune's", "this version"),
        (200, {}, "no server of fedtune's", "this version"),
        (200, [1], "no server of fedtune's", "this version"),
    ],
)
def test_what_the_server_says_to_our_key(kit: Any, served: Any, status: int, hello: Any, found: str, fix: str) -> None:
    checks = tried(kit(served(status=status, hello=hello)[1]))
    assert marks(checks) == "ooof"
    assert found in checks[AUTHENTICATION].found
    assert fix in checks[AUTHENTICATION].fix


@pytest.mark.parametrize("ahead_s", [-90.0, 90.0])
def test_the_clocks_difference_is_measured(kit: Any, served: Any, ahead_s: float) -> None:
    connection = Connection(kit(served(clock_ahead_s=ahead_s)[1]))
    assert marks({check.name: check for check in connection.checks()}) == "oooo"
    assert connection.clock_ahead_s is not None
    assert connection.clock_ahead_s[0] == pytest.approx(-ahead_s, abs=2)


def answering(stack: ExitStack, answer: Callable[[bytes], bytes], *, tunnel: bool = False) -> str:
    """A plain TCP server that reads once, writes `answer` and hangs up, or as a proxy goes on to where it was asked."""
    listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            asked = connection.recv(1 << 16)
            connection.sendall(answer(asked))
            if tunnel:
                host, _, port = asked.split()[1].decode().rpartition(":")
                with socket.create_connection((host, int(port))) as onward:
                    back = threading.Thread(target=pumped, args=(onward, connection), daemon=True)
                    back.start()
                    pumped(connection, onward)
                    back.join()

    thread = threading.Thread(target=serve)
    thread.start()
    stack.callback(thread.join)
    stack.callback(listening.close)
    stack.callback(listening.shutdown, socket.SHUT_RDWR)
    return f"127.0.0.1:{listening.getsockname()[1]}"


def pumped(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            target.sendall(part)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def test_a_proxy_that_connects(kit: Any, served: Any, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def answer(request: bytes) -> bytes:
        asked.append(request)
        return b"HTTP/1.1 200 Connection established\r\n\r\n"

    proxy = answering(stack, answer, tunnel=True)
    monkeypatch.setenv("HTTPS_PROXY", f"http://someone:s%20cret@{proxy}")
    _, address = served()
    checks = tried(kit(address))
    assert marks(checks) == "oooo"
    assert f"through the proxy {proxy}" in checks[TCP].found
    assert asked[0].startswith(f"CONNECT {address} HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic c29tZW9uZTpzIGNyZXQ=\r\n" in asked[0]
    assert "cret" not in str(checks), "a proxy's password is nobody's business"


@pytest.mark.parametrize(
    ("answer", "found", "fix"),
    [
        (
            b"HTTP/1.1 403 Forbidden\r\n\r\n",
            "refused to connect to localhost:1 (403)",
            "CONNECT to localhost:1 allowed",
        ),
        (b"HTTP/1.1 407 Who are you\r\n\r\n", "wants a user and a password (407)", "http://USER:PASSWORD@"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer as an HTTP proxy", "HTTPS_PROXY"),
        (b"", "does not answer as an HTTP proxy", "HTTPS_PROXY"),
    ],
)
def test_a_proxy_that_does_not(
    kit: Any, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, answer: bytes, found: str, fix: str
) -> None:
    proxy = answering(stack, lambda asked: answer)
    monkeypatch.setenv("https_proxy", proxy)
    checks = tried(kit("localhost:1"))
    assert marks(checks) == "ofss"
    assert checks[TCP].found == f"the proxy {proxy} {found}"
    assert fix in checks[TCP].fix


def test_a_proxy_that_is_not_there(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.nowhere.invalid:3128")
    checks = tried(kit("localhost:1"))
    assert marks(checks) == "fsss"
    assert "proxy.nowhere.invalid does not resolve" in checks[DNS].found


def test_a_host_that_no_proxy_exempts(kit: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.nowhere.invalid:3128")
    monkeypatch.setenv("NO_PROXY", "localhost")
    checks = tried(kit(served()[1]))
    assert marks(checks) == "oooo"
    assert "proxy" not in checks[TCP].found


def test_a_proxy_of_another_kind_is_left_to_the_client(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "https://proxy.nowhere.invalid:3128")
    assert marks(tried(kit("localhost:1"))) == "sssf"


@pytest.mark.parametrize("url", ["", "http://", "http://proxy:none", "socks5://proxy:1"])
def test_urls_of_proxies_that_cannot_be_tried(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", url)
    found = proxy_for("fl.example.org")
    assert found is None or not found.can_be_tried
