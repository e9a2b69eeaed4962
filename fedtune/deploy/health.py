"""How a process is doing, for the site's own monitoring: two addresses to read, on this machine only.

`GET /health` answers 200 as long as the process runs; `GET /ready` answers 200 when a round that came now would be
answered (state "connected" or "training"), else 503.  Both give the same five values and nothing of any record.
Still, how long a site is in state "training" tells roughly how many records it has, as the time of a reply would
(docs/site_policy.md, `reply_after_s`): so an address that other machines reach has to be asked for.

    python -m fedtune.deploy.health 127.0.0.1:8089 [/health | /ready]

asks, prints the answer and ends with 0 for 200, else with 1: a probe for containers without any other client in them.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Literal, TypedDict, get_args

from fedtune import __version__
from fedtune.spec import ConfigError, check_one_of

State = Literal["starting", "connected", "disconnected", "expired", "failing", "training", "paused", "stopping"]
READY: frozenset[State] = frozenset({"connected", "training"})

_KEY = "--health"
_BOUND = "must be host:port on this machine, such as 127.0.0.1:8089"
_REQUEST_S = 2.0  # for all of a request, so that whoever dribbles bytes holds a place no longer
_REQUEST_BYTES = 4096
_PLACES = 4

_log = logging.getLogger(__name__)


class Snapshot(TypedDict):
    """What the endpoint says; times are UTC, in ISO 8601.

    Attributes:
        since: when the state was entered.
        last_contact: when the server last answered a site, or when a server began to listen; None before that.
        rounds_answered: by a site, since its process started.
    """

    state: State
    since: str
    last_contact: str | None
    rounds_answered: int
    version: str


class Health:
    """How a process is doing; any thread may update it and any may read it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: State = "starting"
        self._since = datetime.now(UTC)
        self._last_contact: datetime | None = None
        self._rounds_answered = 0

    def update(
        self,
        *,
        state: State | None = None,
        last_contact: datetime | None = None,
        rounds_answered: int | None = None,
    ) -> None:
        """Set what is given, together; what is None stays.

        Args:
            state: "starting", then mostly "connected" (a server: it listens) or "disconnected".
            last_contact: with a time zone.
            rounds_answered: since the process started.
        """
        check_one_of("state", state, (None, *get_args(State)))
        with self._lock:
            if state is not None and state != self._state:
                self._state, self._since = state, datetime.now(UTC)
            if last_contact is not None:
                self._last_contact = last_contact.astimezone(UTC)
            if rounds_answered is not None:
                self._rounds_answered = rounds_answered

    def snapshot(self) -> Snapshot:
        """All values, of one moment."""
        with self._lock:
            last = self._last_contact
            return Snapshot(
                state=self._state,
                since=self._since.isoformat(timespec="seconds"),
                last_contact=None if last is None else last.isoformat(timespec="seconds"),
                rounds_answered=self._rounds_answered,
                version=__version__,
            )


@contextmanager
def serve_health(address: str, health: Health, *, anywhere: bool = False) -> Iterator[str]:
    """Answer at `address` while the block runs; yields the address, with its port where 0 was asked for.

    Args:
        address: host:port; an IP address (an IPv6 one in brackets) or localhost.
        health: what to tell.
        anywhere: also take an address that other machines reach.

    Raises:
        ConfigError: the address is none, is not loopback without `anywhere`, or cannot be had.
    """
    host, port = _parse(address, anywhere=anywhere)
    try:
        server = _Server(host, port, health)
    except OSError as error:
        raise ConfigError(_KEY, address, f"cannot be listened on ({error.strerror})") from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, name="health", daemon=True)
    thread.start()
    try:
        bound = server.server_address[1]
        yield f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(address: str, path: str = "/health") -> tuple[int, str]:
    """Status and body of one request, directly: no proxy is used.

    Raises:
        OSError: nobody answers.
        http.client.HTTPException: somebody else does.
    """
    host, port = _parse(address, anywhere=True)
    connection = http.client.HTTPConnection(host, port, timeout=_REQUEST_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(_REQUEST_BYTES).decode("utf-8", "replace")
    finally:
        connection.close()


def _parse(address: str, *, anywhere: bool) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = "127.0.0.1" if host == "localhost" else host[1:-1] if bracketed else host
    try:
        known = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(_KEY, address, _BOUND) from None
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16) or bracketed != (known.version == 6):
        raise ConfigError(_KEY, address, _BOUND)
    if not (known.is_loopback or anywhere):
        raise ConfigError(
            _KEY, address, "would be read by other machines, too; if you want that, add --health-anywhere"
        )
    return host, int(port)


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A few requests at a time, each with a thread of its own; who comes on top takes the place of the oldest.

    A probe takes milliseconds: whoever holds a place for longer must not keep it out.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, host: str, port: int, health: Health) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.health = health
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}  # the oldest first
        super().__init__((host, port), _Request)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= _PLACES:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with suppress(OSError):  # it has hung up itself
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:  # a socket that is closed is nobody's: its number may be another's by now
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a request for health failed", exc_info=True)  # not to stderr, as the library would


class _Request(socketserver.BaseRequestHandler):
    """One request, one answer, end of the connection."""

    request: socket.socket
    server: _Server

    def handle(self) -> None:
        line = self._first_line()
        if line is not None:
            self.request.settimeout(_REQUEST_S)
            self.request.sendall(_answer(line, self.server.health.snapshot()))

    def _first_line(self) -> bytes | None:
        """The first line of a request that came whole and in time."""
        ends, head = time.monotonic() + _REQUEST_S, b""
        while b"\r\n\r\n" not in head:
            left = ends - time.monotonic()
            if left <= 0 or len(head) > _REQUEST_BYTES:
                return None
            self.request.settimeout(left)
            try:
                received = self.request.recv(_REQUEST_BYTES)
            except OSError:
                return None
            if not received:
                return None
            head += received
        return head.partition(b"\r\n")[0]


def _answer(line: bytes, snapshot: Snapshot) -> bytes:
    method, _, rest = line.partition(b" ")
    path, _, protocol = rest.partition(b" ")
    body: object = snapshot
    if not protocol.startswith(b"HTTP/1."):
        status, body = "400 Bad Request", {}
    elif path not in (b"/health", b"/ready"):
        status, body = "404 Not Found", {}
    elif method != b"GET":
        status, body = "405 Method Not Allowed", {}
    elif path == b"/ready" and snapshot["state"] not in READY:
        status = "503 Service Unavailable"
    else:
        status = "200 OK"
    content = json.dumps(body).encode() + b"\n"
    lines = (
        f"HTTP/1.1 {status}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Cache-Control: no-store",
        "Connection: close",
        *(["Allow: GET"] if status.startswith("405") else []),
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def main(arguments: list[str]) -> int:
    """Ask once; 0 for 200, 1 for anything else, 2 for arguments that are wrong."""
    try:
        address, path = (*arguments, "/health")[:2] if 1 <= len(arguments) <= 2 else ("", "")
        status, body = ask(address, path)
    except ConfigError as error:
        sys.stderr.write(f"fedtune: {error}\n")
        return error.exit_code
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"fedtune: nobody answers at {address} ({type(error).__name__})\n")
        return 1
    sys.stdout.write(body)
    return 0 if status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
