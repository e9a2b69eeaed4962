"""Connections of the server: authentication, limits on their number, and a timeout for every phase.

uvicorn limits neither the number of connections nor the time for handshakes and headers.  In this server, every
connection is counted when it is accepted, must finish its handshake and send its headers within seconds, and is closed
after some minutes or when its certificate expires.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from cryptography import x509
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fedtune.ops.kits.certificates import encode_public_pem, get_common_name
from fedtune.ops.wire.audit_log import AuditLog
from fedtune.ops.wire.gate import PEER, Peer
from fedtune.ops.wire.identity import Tls
from fedtune.system import resource

_RESERVED_FILES = 128  # file descriptors that are reserved for database, roster, health endpoint and logs
_MAX_CONNECTIONS, _MIN_CONNECTIONS = 2048, 16
_SHUTDOWN_S, _PAUSE_S = 2.0, 0.1
_BACKLOG = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """Limits on the number and duration of connections.

    Attributes:
        of_address: maximum number of simultaneous connections from one address, which many sites may share; never more
            than half of all connections.
        of_certificate: maximum number of simultaneous connections with one certificate's key; a site uses up to ten.
        handshake_s: seconds for the TLS handshake.
        head_s: seconds for the headers of the first request.
        idle_s: seconds until the headers of the next request must have arrived; a site's client closes idle connections
            after 5 s.
        life_s: lifetime of a connection in seconds, after which it accepts no more requests.
        answer_s: seconds for finishing a current request when the lifetime ends.
    """

    of_address: int = 256
    of_certificate: int = 16
    handshake_s: float = 10.0
    head_s: float = 10.0
    idle_s: float = 15.0
    life_s: float = 600.0
    answer_s: float = 300.0


def create_server_context(tls: Tls) -> ssl.SSLContext:
    """Create the server's TLS context: TLS 1.3, with required client certificates from the federation's authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(tls.certificate, tls.key)
    context.load_verify_locations(tls.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # a resumed session would skip the check of the certificate's validity
    return context


def compute_max_connections() -> int:
    """Raise the process's limit of open files if necessary, and return the maximum number of connections."""
    if resource is None:
        return _MIN_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_CONNECTIONS + _RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = wanted if soft == resource.RLIM_INFINITY else soft
    return max(_MIN_CONNECTIONS, min(_MAX_CONNECTIONS, room - _RESERVED_FILES))


class TlsListener:
    """Listener that accepts TLS connections within the limits on their number and duration.

    Args:
        context: the TLS context; a replacement applies to new connections.
        limits: the limits on connections.
        member: returns the name of the member with a connection key; an empty string if there is none.
        audit: the log of refused connections and handshakes.
        of_certificate: the number of open connections by the public key of their certificate.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        limits: ConnectionLimits,
        *,
        member: Callable[[bytes], str],
        audit: AuditLog,
        of_certificate: Counter[bytes],
    ) -> None:
        self.context, self.limits, self.audit, self.member = context, limits, audit, member
        self.of_certificate = of_certificate
        self._most = compute_max_connections()
        self._of_address: Counter[str] = Counter()
        self._shaking: dict[asyncio.Task[None], str] = {}  # handshakes in progress, oldest first -> their addresses
        self._accepting: list[asyncio.Task[None]] = []

    def open(self, host: str, port: int, make: Callable[[str], Http]) -> None:
        """Start accepting connections at an address.

        Args:
            host: address to listen on.
            port: port to listen on.
            make: creates the protocol that serves a connection from an address.

        Raises:
            OSError: the address cannot be bound.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        listening.setblocking(False)
        self._accepting.append(asyncio.get_running_loop().create_task(self._accept(listening, make)))

    async def close(self) -> None:
        """Stop listening, and abort all handshakes in progress."""
        tasks = [*self._accepting, *self._shaking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def release_slot(self, address: str) -> None:
        origin = _group_address(address)
        self._of_address[origin] -= 1
        if not self._of_address[origin]:
            del self._of_address[origin]

    async def _accept(self, listening: socket.socket, make: Callable[[str], Http]) -> None:
        loop = asyncio.get_running_loop()
        with listening:
            while True:
                try:
                    connection, name = await loop.sock_accept(listening)
                except OSError:  # the client disconnected, or no file descriptor is left
                    await asyncio.sleep(_PAUSE_S)
                    continue
                address = str(name[0])
                if not self._may_connect(address):
                    connection.close()
                    continue
                self._of_address[_group_address(address)] += 1
                http = make(address)
                task = loop.create_task(self._perform_handshake(connection, http, address))
                self._shaking[task] = address
                # A callback, because a task that is cancelled before its start executes no code of its own.
                task.add_done_callback(partial(self._finish_handshake, connection, http, address))

    def _finish_handshake(self, connection: socket.socket, http: Http, address: str, task: asyncio.Task[None]) -> None:
        self._shaking.pop(task, None)
        if http.transport is None:  # otherwise connection_lost releases the slot
            connection.close()
            self.release_slot(address)

    def _may_connect(self, address: str) -> bool:
        origin = _group_address(address)
        if self._of_address[origin] >= min(self.limits.of_address, self._most // 2):
            self.audit.log_event("connection refused", address=address, reason="too many from this address")
            return self._evict_oldest(task for task, other in self._shaking.items() if _group_address(other) == origin)
        if self._of_address.total() >= self._most:
            self.audit.log_event("connection refused", address=address, reason="too many connections")
            return self._evict_oldest(self._shaking)
        return True

    def _evict_oldest(self, shaking: Iterable[asyncio.Task[None]]) -> bool:
        """Abort the oldest unfinished handshake; return True if there was one."""
        if (oldest := next(iter(shaking), None)) is not None:
            del self._shaking[oldest]
            oldest.cancel()
        return oldest is not None

    async def _perform_handshake(self, connection: socket.socket, http: Http, address: str) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: http,
                connection,
                ssl=self.context,
                ssl_handshake_timeout=self.limits.handshake_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            self.audit.log_event("handshake refused", address=address, reason=_explain_handshake_error(error))


def _group_address(address: str) -> str:
    """Return the group of an address for the limits: an IPv4 address, or an IPv6 /64 network.

    A single machine may own a whole /64 network.
    """
    if ":" not in address:
        return address
    return str(ipaddress.ip_network((ipaddress.ip_address(address.partition("%")[0]), 64), strict=False))


def _explain_handshake_error(error: BaseException) -> str:
    """Return OpenSSL's reason for a failed handshake, which names only the type of the error."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS").replace("_", " ").lower()
    return "too slow" if isinstance(error, TimeoutError | ConnectionAbortedError) else "hung up"


class Http(H11Protocol):
    """HTTP protocol over mutual TLS with a timeout for every phase of a connection."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], *, door: TlsListener, address: str
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._door, self._address, self._key = door, address, b""
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer, until = _read_peer(transport, self._address)
        limits, self._key = self._door.limits, peer.key
        self.app_state = {**self.app_state, PEER: peer}
        about = {"address": peer.address, "certificate": peer.certificate, "member": self._door.member(peer.key)}
        self._door.of_certificate[self._key] += 1
        if self._door.of_certificate[self._key] > limits.of_certificate:
            self._door.audit.log_event("connection refused", reason="too many with this certificate", **about)
            transport.abort()
            return
        self._door.audit.log_event("connected", **about)
        left = (until - datetime.now(UTC)).total_seconds()
        self._schedule("life", min(limits.life_s, max(0.0, left)), self._end_lifetime)
        self._schedule("head", limits.head_s, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._door.release_slot(self._address)
        self._door.of_certificate[self._key] -= 1
        if not self._door.of_certificate[self._key]:
            del self._door.of_certificate[self._key]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and (timer := self._timers.pop("head", None)):
            timer.cancel()

    def on_response_complete(self) -> None:
        if self.cycle is not None and self.cycle.more_body:
            # A refused call is still sending its body; a regular TLS shutdown would keep reading for seconds.
            self.transport.abort()
        self._schedule("head", self._door.limits.idle_s, self._hang_up)
        super().on_response_complete()
        self._unset_keepalive_if_required()

    def _schedule(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = self.loop.call_later(seconds, call)

    def _hang_up(self) -> None:
        """Close a connection that has not sent a complete request in time."""
        self.transport.close()

    def _end_lifetime(self) -> None:
        """Close the connection when its lifetime or certificate has expired; a current request may finish first."""
        self._schedule("life", self._door.limits.answer_s, self.transport.abort)
        self.shutdown()


def _read_peer(transport: asyncio.Transport, address: str) -> tuple[Peer, datetime]:
    """Return the authenticated peer of a connection, and the expiry of its certificate."""
    shown = x509.load_der_x509_certificate(transport.get_extra_info("ssl_object").getpeercert(True))
    peer = Peer(address=address, certificate=get_common_name(shown.subject) or "", key=encode_public_pem(shown))
    return peer, shown.not_valid_after_utc
