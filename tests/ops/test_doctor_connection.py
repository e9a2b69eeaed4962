"""The doctor's connection, against real servers on loopback that go wrong in every way it tells apart."""

import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.doctor.check import Check
from fedtune.ops.doctor.connection_checks import AUTHENTICATION, DNS, TCP, TLS, Connection
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.wire import bounded_http
from fedtune.spec import KIT_SCHEMA
from tests.flower.certificates import LOOPBACK, Authority
from tests.flower.hostile import Hostile, answering, server_context

from .conftest import Mailbox

pytestmark = pytest.mark.usefixtures("no_proxy")


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours") / "ca")


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs") / "ca")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def kit(tmp_path: Path, ours: Authority) -> Callable[[str], Kit]:
    """The kit of site `north` for a server's address."""
    files = ours.issue("north", days=90)
    for name, path in (("site.pem", files.certificate), ("ca.pem", files.ca), ("connection_key.pem", files.key)):
        shutil.copy(path, tmp_path / name)
    about = {"version": KIT_SCHEMA, "kind": "site", "federation": "test", "lead": "ab" * 32, "site": "north"}
    return lambda server: Kit(folder=tmp_path, server=server, **about)


@pytest.fixture
def served(ours: Authority, stack: ExitStack) -> Callable[..., tuple[Mailbox, str]]:
    """Serve with some things of its certificate changed; its address as localhost:port."""

    def start(
        authority: Authority = ours,
        clients: Authority = ours,
        newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        **certificate: Any,
    ) -> tuple[Mailbox, str]:
        files = authority.issue("server", **({"address": "localhost", "days": 60} | certificate))
        mailbox = Mailbox(server_context(replace(files, ca=clients.file), newest=newest))
        stack.callback(mailbox.close)
        return mailbox, mailbox.address.replace(LOOPBACK, "localhost")

    return start


def tried(kit: Kit, *, timeout_s: float = 5.0) -> dict[str, Check]:
    return {check.name: check for check in Connection(kit, timeout_s=timeout_s).checks()}


def marks(checks: dict[str, Check]) -> str:
    """The four lines' first letters: o(k), w(arning), f(ailed), s(kipped)."""
    assert list(checks) == [DNS, TCP, TLS, AUTHENTICATION]
    failures = [check for check in checks.values() if check.status == "failed"]
    assert all(check.fix.endswith(".") and check.exit_code == 1 for check in failures)
    return "".join(check.status[0] for check in checks.values())


def require(checks: dict[str, Check], expected: str, line: str, found: str, fix: str = "") -> None:
    """These four letters; one of the lines says what was found, and what to do about it."""
    assert marks(checks) == expected
    assert found in checks[line].found
    assert fix in checks[line].fix


@pytest.mark.parametrize("ahead_s", [0.0, 90.0])
def test_a_server_that_is_well_and_its_clock(kit: Any, served: Any, ahead_s: float) -> None:
    mailbox, address = served()
    mailbox.clock_ahead_s = ahead_s
    connection = Connection(kit(address))
    checks = {check.name: check for check in connection.checks()}
    assert marks(checks) == "oooo"
    assert "TLSv1.3" in checks[TLS].found
    assert checks[AUTHENTICATION].found == "the server knows this key as north"
    ahead, unsure = connection.clock_ahead_s
    assert abs(ahead + ahead_s) <= unsure < 2


def test_a_name_that_does_not_resolve(kit: Any) -> None:
    checks = tried(kit("fl.nowhere.invalid:9092"))
    require(checks, "fsss", DNS, "fl.nowhere.invalid does not resolve")
    assert checks[TLS].found == f"skipped, because {DNS} failed"


def test_a_port_where_nobody_listens(kit: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    require(tried(kit(f"127.0.0.1:{port}")), "ofss", TCP, "refuses connections")


@pytest.mark.parametrize(
    ("changes", "expected", "found", "fix"),
    [
        ({"days": 20}, "oowo", "the federation's own server, whose certificate ends on", "renew-server"),
        ({"authority": "theirs"}, "oofs", "authority: a wrong server, or TLS inspection", "exempted"),
        ({"address": "fl.example.org"}, "oofs", "is not for localhost", "also_known_as"),
        ({"days": -1}, "oofs", "has expired", "renew-server"),
        ({"age_days": -3}, "oofs", "not valid yet", "clock"),
        ({"newest": ssl.TLSVersion.TLSv1_2}, "oofs", "does not speak TLS as expected", "at this port"),
    ],
)
def test_a_server_whose_certificate_or_protocol_is_wrong(
    kit: Any, served: Any, theirs: Authority, changes: dict[str, Any], expected: str, found: str, fix: str
) -> None:
    if "authority" in changes:
        changes = {"authority": theirs}
    require(tried(kit(served(**changes)[1])), expected, TLS, found, fix)


def test_a_server_that_refuses_our_certificate(kit: Any, served: Any, theirs: Authority) -> None:
    # Under TLS 1.3 the client has done its part by then, and hears of it when it reads.
    server, address = served(clients=theirs)
    checks = tried(kit(address))
    require(checks, "oofs", TLS, "the server refused this site's certificate (unknown ca)", "renew-site north")
    assert server.asked == []


def test_a_server_that_dribbles_is_left(kit: Any, ours: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "_OTHER", bounded_http._Bound(1000, 0.5))

    def dribble(to: ssl.SSLSocket, path: str) -> None:
        while True:
            to.sendall(b"H")
            dribbling.pause(0.05)

    dribbling = Hostile(server_context(ours.issue("server", address=LOOPBACK)), dribble)
    began = time.monotonic()
    assert marks(tried(kit(dribbling.address), timeout_s=0.5)) == "oofs"
    assert time.monotonic() - began < 10
    dribbling.close()


def test_a_server_that_does_not_speak_tls(kit: Any, stack: ExitStack) -> None:
    address, _ = stack.enter_context(answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    require(tried(kit(address)), "oofs", TLS, "does not speak TLS")


def test_a_server_that_never_answers(kit: Any, stack: ExitStack) -> None:
    listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    checks = tried(kit(f"127.0.0.1:{listening.getsockname()[1]}"), timeout_s=0.3)
    require(checks, "oofs", TLS, "gave no answer in 0.3 s")


@pytest.mark.parametrize(
    ("status", "hello", "found", "fix"),
    [
        (403, {"reason": "unknown"}, "unknown", "provision list` shows north"),
        (403, {"reason": "revoked"}, "revoked", "why this site was revoked"),
        (403, {"reason": "its clock is 12 s ahead"}, "clock is 12 s ahead", "time synchronisation"),
        (200, {"site": "south", "time": 0}, "knows this key as south, and the kit is for north", "mixed up"),
        (200, {}, "no server of fedtune's", "this version"),
    ],
)
def test_what_the_server_says_to_our_key(kit: Any, served: Any, status: int, hello: Any, found: str, fix: str) -> None:
    mailbox, address = served()
    mailbox.says = lambda: (status, hello)
    require(tried(kit(address)), "ooof", AUTHENTICATION, found, fix)


def test_a_proxy_that_connects(kit: Any, served: Any, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, asked = stack.enter_context(answering(b"HTTP/1.1 200 Connection established\r\n\r\n", tunnel=True))
    monkeypatch.setenv("HTTPS_PROXY", f"http://someone:s%20cret@{proxy}")
    _, address = served()
    checks = tried(kit(address))
    require(checks, "oooo", TCP, f"through the proxy {proxy}")
    assert asked[0].startswith(f"CONNECT {address} HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic c29tZW9uZTpzIGNyZXQ=\r\n" in asked[0]
    assert "cret" not in str(checks), "a proxy's password is nobody's business"


REFUSED = "refused to connect to localhost:1"


@pytest.mark.parametrize(
    ("answer", "found", "fix"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", f"{REFUSED} (403 Forbidden)", "CONNECT to localhost:1 allowed"),
        (b"HTTP/1.1 407 Who are you\r\n\r\n", f"{REFUSED} (407 Who are you)", "http://USER:PASSWORD@"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer as an HTTP proxy", "HTTPS_PROXY"),
    ],
)
def test_a_proxy_that_does_not(
    kit: Any, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, answer: bytes, found: str, fix: str
) -> None:
    proxy, _ = stack.enter_context(answering(answer))
    monkeypatch.setenv("https_proxy", proxy)
    require(tried(kit("localhost:1")), "ofss", TCP, f"the proxy {proxy} {found}", fix)


def test_a_proxy_that_is_away_and_a_host_it_exempts(kit: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.nowhere.invalid:3128")
    require(tried(kit("localhost:1")), "fsss", DNS, "the proxy proxy.nowhere.invalid:3128 does not resolve")
    monkeypatch.setenv("NO_PROXY", "localhost")
    checks = tried(kit(served()[1]))
    assert marks(checks) == "oooo"
    assert "proxy" not in checks[TCP].found


@pytest.mark.parametrize("url", ["http://someone:s%20cret@proxy:none", "socks5://someone:s%20cret@proxy:1"])
def test_a_proxy_that_the_client_cannot_use(kit: Any, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", url)
    checks = tried(kit("localhost:1"))
    assert marks(checks) == "ofss"
    assert "cret" not in str(checks)
