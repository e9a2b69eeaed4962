"""A server that sends its callers elsewhere: nobody goes there, and nothing that was signed does."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fedtune.federation.aggregation import Closing
from fedtune.federation.spec import FederationSpec
from fedtune.flower.wire.fleet import Fleet, Foreign, Unreachable, hello
from fedtune.flower.wire.remote_grid import Heard, RemoteGrid
from fedtune.privacy.keys import SigningKey
from fedtune.spec import RunError

from .certificates import LOOPBACK, Authority, public_pem

STATUSES = (301, 302, 303, 307, 308)


class Served:
    """A server of one's own on loopback, over TLS where it has `tls`; each call that reaches it is noted."""

    def __init__(self, *, status: int = 200, location: str = "", tls: ssl.SSLContext | None = None) -> None:
        self.called = called = list[str]()

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                called.append(f"{self.command} {self.path}")
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self.send_response(status)
                if location:
                    self.send_header("location", location + self.path)
                self.send_header("content-length", "0")
                self.end_headers()

            do_GET = do_POST = _answer

            def log_message(self, *_: object) -> None:
                """Not on the terminal."""

        self._server = HTTPServer((LOOPBACK, 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.address = f"{LOOPBACK}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def elsewhere() -> Iterator[Served]:
    """A machine in somebody's network, without TLS."""
    served = Served()
    yield served
    served.close()


@pytest.fixture(params=STATUSES)
def sending_elsewhere(request: pytest.FixtureRequest, ours: Authority, elsewhere: Served) -> Iterator[Served]:
    """The federation's own server, whose administrator has put in a redirect."""
    files = ours.issue("server", address=LOOPBACK)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    served = Served(status=request.param, location=f"http://{elsewhere.address}", tls=context)
    yield served
    served.close()


def test_a_site_goes_nowhere_else(sending_elsewhere: Served, elsewhere: Served, ours: Authority) -> None:
    fleet = Fleet(sending_elsewhere.address, ours.issue("north"))
    with pytest.raises(Unreachable, match=r"sends elsewhere .*never followed"):
        fleet.activate()
    fleet.close()
    with pytest.raises(Foreign):
        hello(sending_elsewhere.address, ours.issue("south"))
    assert sending_elsewhere.called == ["POST /v1/fleet/activate-node", "GET /v1/fedtune/hello"]
    assert elsewhere.called == []


def test_a_lead_goes_nowhere_else(
    sending_elsewhere: Served, elsewhere: Served, ours: Authority, lead_key: SigningKey
) -> None:
    site, lead = ours.issue("north"), ours.issue("lead")
    grid = RemoteGrid(
        sending_elsewhere.address,
        lead,
        sites={"north": public_pem(site)},
        key=lead_key,
        hear=lambda number, question, answer: Heard(good=True),
        closing=lambda: Closing(FederationSpec(num_sites=1)),
    )
    with pytest.raises(RunError, match=r"sends elsewhere .*never followed"), grid:
        pass
    assert sending_elsewhere.called == ["POST /v1/control/start-run"]
    assert elsewhere.called == []
