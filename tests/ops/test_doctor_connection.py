"""The doctor's connection checks against real servers on loopback, with every fault that the checks distinguish."""

import re
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedtune.ops.doctor.check import DoctorCheck
from fedtune.ops.doctor.connection_checks import AUTHENTICATION, DNS, TCP, TLS, Connection, check_control_api
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.wire import bounded_http
from fedtune.spec import KIT_SCHEMA
from tests.flower.certificates import LOOPBACK, Authority
from tests.flower.hostile import Hostile, make_server_context, serve_answer

from ..flower.loopback import find_free_port
from .conftest import Mailbox, check_snapshot, format_lines

pytestmark = pytest.mark.usefixtures("remove_proxies")


@pytest.fixture(scope="session")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> list[Authority]:
    """The authority of the federation, and another authority."""
    return [Authority(tmp_path_factory.mktemp("authority") / "ca") for _ in range(2)]


@dataclass
class World:
    """Site `north` with its kit, and the servers and proxies of a test."""

    folder: Path
    ours: Authority
    theirs: Authority
    stack: ExitStack
    patch: pytest.MonkeyPatch

    def kit(self, server: str) -> Kit:
        files = self.ours.issue("north", days=90)
        for name, path in (("site.pem", files.certificate), ("ca.pem", files.ca), ("connection_key.pem", files.key)):
            shutil.copy(path, self.folder / name)
        fields = {"version": KIT_SCHEMA, "kind": "site", "federation": "test", "lead": "ab" * 32, "site": "north"}
        return Kit(folder=self.folder, server=server, **fields)

    def serve_tls(self, of: Authority | None = None, clients: Any = None, **changes: Any) -> tuple[Mailbox, str]:
        """Start a server with changed TLS settings or certificate; return its address as localhost:port."""
        tls = {key: changes.pop(key) for key in ("newest",) if key in changes}
        files = (of or self.ours).issue("server", **({"address": "localhost", "days": 60} | changes))
        mailbox = Mailbox(make_server_context(replace(files, ca=(clients or self.ours).file), **tls))
        self.stack.callback(mailbox.close)
        return mailbox, mailbox.address.replace(LOOPBACK, "localhost")

    def serve_status(self, status: int, **hello: Any) -> dict[str, DoctorCheck]:
        """Start a server that answers the hello call with this status."""
        mailbox, address = self.serve_tls()
        mailbox.says = lambda: (status, hello)
        return self.run_checks(address)

    def serve_answer_once(self, answer: bytes) -> str:
        return self.stack.enter_context(serve_answer(answer))[0]

    def listen_silently(self) -> str:
        listening = self.stack.enter_context(socket.create_server((LOOPBACK, 0)))
        return f"{LOOPBACK}:{listening.getsockname()[1]}"

    def check_by_proxy(
        self, proxy: str, server: str = "localhost:1", *, name: str = "HTTPS_PROXY"
    ) -> dict[str, DoctorCheck]:
        self.patch.setenv(name, proxy)
        return self.run_checks(server)

    def run_checks(self, server: str, *, timeout_s: float = 5.0) -> dict[str, DoctorCheck]:
        checks = {check.name: check for check in Connection(self.kit(server), timeout_s=timeout_s).run_checks()}
        assert list(checks) == [DNS, TCP, TLS, AUTHENTICATION]
        failures = [check for check in checks.values() if check.status == "failed"]
        assert all(check.fix.endswith(".") and check.exit_code == 1 for check in failures)
        assert "cret" not in str(checks), "a proxy's password must not be shown"
        return checks


@pytest.fixture
def world(tmp_path: Path, authorities: list[Authority], monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, *authorities, stack, monkeypatch)


def list_marks(checks: dict[str, DoctorCheck]) -> str:
    """Return the first letters of the four lines: o(k), w(arning), f(ailed), s(kipped)."""
    return "".join(check.status[0] for check in checks.values())


PROXY = "http://someone:s%20cret@"
SITUATIONS: dict[str, Callable[[World], dict[str, DoctorCheck]]] = {
    "an unresolvable name": lambda at: at.run_checks("fl.nowhere.invalid:9092"),
    "a closed port": lambda at: at.run_checks(f"127.0.0.1:{find_free_port()}"),
    "a certificate that expires soon": lambda at: at.run_checks(at.serve_tls(days=20)[1]),
    "a certificate from another authority": lambda at: at.run_checks(at.serve_tls(at.theirs)[1]),
    "a certificate for another host": lambda at: at.run_checks(at.serve_tls(address="fl.example.org")[1]),
    "an expired certificate": lambda at: at.run_checks(at.serve_tls(days=-1)[1]),
    "a certificate that is not yet valid": lambda at: at.run_checks(at.serve_tls(age_days=-3)[1]),
    "an older protocol": lambda at: at.run_checks(at.serve_tls(newest=ssl.TLSVersion.TLSv1_2)[1]),
    "no TLS": lambda at: at.run_checks(at.serve_answer_once(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
    "no answer": lambda at: at.run_checks(at.listen_silently(), timeout_s=0.3),
    "an unknown site": lambda at: at.serve_status(403, reason="unknown"),
    "a revoked site": lambda at: at.serve_status(403, reason="revoked"),
    "a wrong clock": lambda at: at.serve_status(403, reason="its clock is 12 s ahead"),
    "another site's key": lambda at: at.serve_status(200, site="south", time=0),
    "another kind of server": lambda at: at.serve_status(200),
    "a proxy that forbids the connection": lambda at: at.check_by_proxy(
        at.serve_answer_once(b"HTTP/1.1 403 Forbidden\r\n\r\n"), name="https_proxy"
    ),
    "a proxy that requires a password": lambda at: at.check_by_proxy(
        at.serve_answer_once(b"HTTP/1.1 407 Who are you\r\n\r\n")
    ),
    "a server that is not a proxy": lambda at: at.check_by_proxy(at.serve_answer_once(b"SSH-2.0-OpenSSH_9.6\r\n")),
    "an unreachable proxy": lambda at: at.check_by_proxy("http://proxy.nowhere.invalid:3128"),
    "a proxy without a port": lambda at: at.check_by_proxy(f"{PROXY}proxy:none"),
    "a proxy of an unsupported kind": lambda at: at.check_by_proxy("socks5://someone:s%20cret@proxy:1"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_doctor_explains_each_connection_problem(world: World, situation: str) -> None:
    lines = [line for check in SITUATIONS[situation](world).values() for line in format_lines(check)]
    text = re.sub(r"(localhost|127\.0\.0\.1):\d{2,}", r"\1:PORT", "\n".join(lines))
    text = re.sub(r"(does not resolve|TLS as expected) \(.+?\)", r"\1 (WHY)", text)  # the system's own wording
    check_snapshot(f"a connection: {situation}", re.sub(r"\d{4}-\d\d-\d\d", "DATE", text))


@pytest.mark.parametrize("ahead_s", [0.0, 90.0])
def test_doctor_measures_the_clock_of_a_healthy_server(world: World, ahead_s: float) -> None:
    mailbox, address = world.serve_tls()
    mailbox.clock_ahead_s = ahead_s
    connection = Connection(world.kit(address))
    checks = {check.name: check for check in connection.run_checks()}
    assert list_marks(checks) == "oooo"
    assert "TLSv1.3" in checks[TLS].found
    assert checks[AUTHENTICATION].found == "the server knows this key as north"
    ahead, unsure = connection.clock_ahead_s
    assert abs(ahead + ahead_s) <= unsure < 2


def test_doctor_names_a_rejected_site_certificate(world: World) -> None:
    # With TLS 1.3 the client has finished the handshake by then, and learns of the refusal when it reads.
    server, address = world.serve_tls(clients=world.theirs)
    checks = world.run_checks(address)
    assert list_marks(checks) == "oofs"
    assert "the server refused this site's certificate (unknown ca)" in checks[TLS].found
    assert "renew-site north" in checks[TLS].fix
    assert server.asked == []


def test_slowly_dribbling_server_times_out(world: World) -> None:
    world.patch.setattr(bounded_http, "_OTHER", (1000, 0.5))

    def send_slowly(connection: ssl.SSLSocket, path: str) -> None:
        while True:
            connection.sendall(b"H")
            dribbling.pause(0.05)

    dribbling = Hostile(make_server_context(world.ours.issue("server", address=LOOPBACK)), send_slowly)
    start = time.monotonic()
    assert list_marks(world.run_checks(dribbling.address, timeout_s=0.5)) == "oofs"
    assert time.monotonic() - start < 10
    dribbling.close()


def test_doctor_uses_the_proxy_and_respects_its_exemptions(world: World) -> None:
    proxy, calls = world.stack.enter_context(serve_answer(b"HTTP/1.1 200 Connection established\r\n\r\n", tunnel=True))
    _, address = world.serve_tls()
    checks = world.check_by_proxy(f"{PROXY}{proxy}", address)
    assert list_marks(checks) == "oooo"
    assert f"through the proxy {proxy}" in checks[TCP].found
    assert calls[0].startswith(f"CONNECT {address} HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic c29tZW9uZTpzIGNyZXQ=\r\n" in calls[0]
    world.patch.setenv("NO_PROXY", "localhost")
    checks = world.check_by_proxy("http://proxy.nowhere.invalid:3128", address)
    assert list_marks(checks) == "oooo"
    assert "proxy" not in checks[TCP].found


@pytest.mark.parametrize(("answered", "status"), [(404, "ok"), (401, "ok"), (200, "failed"), (400, "failed")])
def test_doctor_fails_if_control_calls_are_reachable_from_outside(
    answered: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def post(address: str, **_: Any) -> httpx.Response:
        calls.append(address)
        return httpx.Response(answered)

    monkeypatch.setattr(httpx, "post", post)
    check = check_control_api("fl.example.org:443", timeout_s=1.0)
    assert calls == ["https://fl.example.org:443/v1/control/list-nodes"]
    assert check.status == status
    assert ("ANYONE WHO CAN REACH IT CAN RUN CODE" in check.found) == (status == "failed")
    assert check.exit_code == 2


def test_doctor_reports_an_unreachable_superlink() -> None:
    check = check_control_api(f"{LOOPBACK}:{find_free_port()}", timeout_s=1.0)
    assert (check.status, check.exit_code) == ("failed", 1)
    assert "cannot be reached (ConnectError)" in check.found
