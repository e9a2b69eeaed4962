"""Health endpoint of a process for local monitoring; it listens only on loopback by default.

`GET /health` answers 200 while the process runs.  `GET /ready` answers 200 if the process would answer a round now
(state "connected" or "training"), else 503.  Both return the same five values, none of which depends on the content of
records.  However, the time in state "training" reveals a site's approximate number of records, as the time of a reply
does (docs/site_policy.md, `reply_after_s`).  An address that other machines can reach therefore requires an explicit
option.

A process without a network listens on a Unix socket: `unix:/run/fedtune/health.sock`.

    python -m fedtune.ops.health 127.0.0.1:8089 [/health | /ready]

sends one request, prints the answer, and exits with 0 for status 200 and with 1 otherwise.  Containers without another
HTTP client can use it as a probe.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import json
import re
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Literal, TypedDict, get_args

from fedtune.flower.unix_socket import bind_socket
from fedtune.spec import ConfigError, check_one_of
from fedtune.system import UNIX_SOCKETS
from fedtune.version import build

State = Literal["starting", "connected", "disconnected", "expired", "failing", "training", "paused", "stopping"]
READY: frozenset[State] = frozenset({"connected", "training"})

_KEY, _UNIX = "--health", "unix:"
_BOUND = "must be host:port on this machine, such as 127.0.0.1:8089, or unix:PATH"
_REQUEST_S = 2.0  # maximum duration of a connection
_REQUEST_BYTES = 4096
_PLACES, _BACKLOG = 4, 16
_FAR = "is reachable from other machines; add --health-anywhere to allow this"

Respond = Callable[[str], Awaitable[tuple[int, str, bytes]]]  # path of a GET -> status, content type and body


class Snapshot(TypedDict):
    """JSON content of the endpoint's answer; times are in UTC and ISO 8601."""

    state: State
    since: str  # when the state was entered
    last_contact: str | None  # a site: time of the server's last answer; a server: start of listening; None: none yet
    rounds_answered: int  # rounds that a site answered since its process started
    version: str  # version and build, as in `fedtune --version`


class Health:
    """Thread-safe health state of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told = Snapshot(
            state="starting",
            since=_format_moment(datetime.now(UTC)),
            last_contact=None,
            rounds_answered=0,
            version=build(),
        )

    def update(
        self, *, state: State | None = None, last_contact: datetime | None = None, rounds_answered: int | None = None
    ) -> None:
        """Set the given values atomically; None leaves a value unchanged.

        Args:
            state: the new state, such as "starting", "connected" (for a server: it is listening) or "disconnected".
            last_contact: time of the last contact, with a time zone.
            rounds_answered: number of rounds answered since the process started.
        """
        check_one_of("state", state, (None, *get_args(State)))
        with self._lock:
            if state is not None and state != self._told["state"]:
                self._told["state"], self._told["since"] = state, _format_moment(datetime.now(UTC))
            if last_contact is not None:
                self._told["last_contact"] = _format_moment(last_contact.astimezone(UTC))
            if rounds_answered is not None:
                self._told["rounds_answered"] = rounds_answered

    def snapshot(self) -> Snapshot:
        """Return a consistent copy of all values."""
        with self._lock:
            return self._told.copy()


def _format_moment(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def serve_health(address: str | None, health: Health, *, anywhere: bool = False) -> AbstractContextManager[str]:
    """Serve the health endpoint at `address` during the block; yield the address, with the actual port if 0 was given.

    Args:
        address: host:port, where host is an IP address (IPv6 in brackets) or localhost; or unix:PATH; None: no
        endpoint.
        health: the state to report.
        anywhere: whether to accept an address that other machines can reach.

    Raises:
        ConfigError: the address is invalid, is not loopback without `anywhere`, or cannot be bound.
    """
    if address is None:
        return nullcontext("")

    async def respond(path: str) -> tuple[int, str, bytes]:
        if path not in ("/health", "/ready"):
            return 404, "application/json", b"{}\n"
        snapshot = health.snapshot()
        status = 503 if path == "/ready" and snapshot["state"] not in READY else 200
        return status, "application/json", json.dumps(snapshot).encode() + b"\n"

    return serve_locally(address, respond, key=_KEY, most_s=_REQUEST_S, far=None if anywhere else _FAR)


@contextmanager
def serve_locally(address: str, respond: Respond, *, key: str, most_s: float, far: str | None) -> Iterator[str]:
    """Serve GET requests at `address` during the block; yield the address, with the actual port if 0 was given.

    Args:
        address: host:port, where host is an IP address (IPv6 in brackets) or localhost; or unix:PATH, a socket for the
            same user and group.
        respond: returns the answer for a path.
        key: the option that contains the address.
        most_s: maximum duration of a connection in seconds, so that a slow caller cannot occupy a slot.
        far: the error text for an address that other machines can reach; None: accept such an address.

    Raises:
        ConfigError: the address is invalid, is refused, or cannot be bound.
    """
    try:
        listening, bound_address = _listen(address, key=key, far=far)
    except OSError as error:
        raise ConfigError(key, address, f"cannot be bound ({error.strerror or error})") from None
    stop, callers = asyncio.Event(), list[asyncio.StreamWriter]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(writer)
        if len(callers) > _PLACES:  # probes take milliseconds, so drop the oldest caller
            callers.pop(0).transport.abort()
        try:
            async with asyncio.timeout(most_s):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.transport.set_write_buffer_limits(high=0)
                writer.write(await _answer(head, respond))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the caller disconnected, sent no request or sent too much data
        finally:
            writer.transport.abort()
            if writer in callers:
                callers.remove(writer)

    async def serve() -> None:
        server = await asyncio.start_server(answer, sock=listening, limit=_REQUEST_BYTES)
        await stop.wait()
        server.close()

    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    loop = runner.get_loop()

    def run() -> None:
        with runner:
            runner.run(serve())

    thread = threading.Thread(target=run, name=key.lstrip("-"), daemon=True)
    thread.start()
    try:
        yield bound_address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        listening.close()


def _listen(address: str, *, key: str, far: str | None) -> tuple[socket.socket, str]:
    """Open a listening socket; return it with its address and actual port."""
    if not address.startswith(_UNIX):
        host, port = _parse(address, key=key, far=far)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        bound = listening.getsockname()[1]
        return listening, f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
    listening = socket.socket(UNIX_SOCKETS)
    try:
        bind_socket(listening, Path(address.removeprefix(_UNIX)), key=key, backlog=_BACKLOG)
    except ConfigError:
        listening.close()
        raise
    return listening, address


async def _answer(head: bytes, respond: Respond) -> bytes:
    """Build the HTTP response to a request with the headers `head`; known paths accept only GET."""
    match = re.match(rb"([A-Z]+) ([!-~]+) HTTP/1\.[01]\r\n", head)
    status, kind, content = 400, "application/json", b"{}\n"
    if match is not None:
        status, kind, content = await respond(match[2].decode().partition("?")[0])
        if status != HTTPStatus.NOT_FOUND and match[1] != b"GET":
            status, content = 405, b"{}\n"
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"content-type: {kind}",
        f"content-length: {len(content)}",
        "cache-control: no-store",
        "connection: close",
        *(["allow: GET"] if status == HTTPStatus.METHOD_NOT_ALLOWED else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def send_probe(address: str, path: str = "/health") -> tuple[int, str]:
    """Send one request, without a proxy; return status and body.

    Raises:
        OSError: no process listens at the address.
        http.client.HTTPException: the answer is not HTTP.
    """
    is_unix = address.startswith(_UNIX)
    host, port = ("localhost", 80) if is_unix else _parse(address, key=_KEY, far=None)
    connection = http.client.HTTPConnection(host, port, timeout=_REQUEST_S)
    try:
        if is_unix:
            connection.sock = socket.socket(UNIX_SOCKETS)
            connection.sock.settimeout(_REQUEST_S)
            connection.sock.connect(address.removeprefix(_UNIX))
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(_REQUEST_BYTES).decode("utf-8", "replace")
    finally:
        connection.close()


def _parse(address: str, *, key: str, far: str | None) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = "127.0.0.1" if host == "localhost" else host[1:-1] if bracketed else host
    try:
        known = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(key, address, _BOUND) from None
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16) or bracketed != (known.version == 6):
        raise ConfigError(key, address, _BOUND)
    if far is not None and not known.is_loopback:
        raise ConfigError(key, address, far)
    return host, int(port)


def main(arguments: list[str]) -> int:
    """Probe an endpoint once; return 0 for status 200, 1 for any other result, and 2 for invalid arguments."""
    try:
        address, path = (*arguments, "/health")[:2] if 1 <= len(arguments) <= 2 else ("", "")
        status, body = send_probe(address, path)
    except ConfigError as error:
        sys.stderr.write(f"fedtune: {error}\n")
        return error.exit_code
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"fedtune: no answer at {address} ({type(error).__name__})\n")
        return 1
    sys.stdout.write(body)
    return 0 if status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
