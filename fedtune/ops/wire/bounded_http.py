"""HTTP client for a potentially malicious server, with limits on answer size, duration and connection age.

httpx applies its timeout to each read, so that a server that slowly sends single bytes can block a call forever, and it
decompresses every answer.  In this client, every call has a deadline, and compressed answers are refused.  The client
uses internals of httpx 0.28 and httpcore 1.0; tests/flower/test_bounded_http.py fails if they change.
"""

from __future__ import annotations

import selectors
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpcore
import httpx

_MIB = 1 << 20
MAX_AGE_S = 300.0
"""Maximum age of a connection in seconds; a new connection detects expired and replaced certificates."""
_ALERT_S, _MIN_ALERT_S, _HANDSHAKES = 0.5, 0.1, 5
"""Maximum and minimum wait, in seconds, for the server to reject our certificate, and a factor of the handshake time.

Under TLS 1.3, the server rejects a certificate one round trip after the handshake, and data that the client sends in
the meantime can make the alert get lost.  The handshake takes at least one round trip, so a multiple of its duration is
enough."""
_WRITTEN_AT_ONCE = 1 << 14  # size of a TLS record; the deadline is checked after each


class ResponseLimitExceeded(httpx.TransportError):
    """Raised for an answer that exceeds the limits on size or duration, or is compressed."""


class PeerClosed(ConnectionError):
    """Raised if the server closes a connection right after the handshake without sending a TLS alert."""


_OBJECT, _OTHER = (16 * _MIB, 180.0), (4 * _MIB, 60.0)
"""Maximum bytes and seconds of a call that transfers an object (Flower splits arrays into objects of 5 MB), and of any
other call."""


def bound_client(client: httpx.Client) -> None:
    """Apply the limits to every call of `client`, including calls through a proxy, and disable redirects."""
    client.follow_redirects = False
    client._transport = _Bounded(client._transport)
    client._mounts = {pattern: transport and _Bounded(transport) for pattern, transport in client._mounts.items()}


def replace_ssl_context(client: httpx.Client, context: ssl.SSLContext) -> None:
    """Use `context`, which contains another certificate, for all new connections of a bounded client.

    The context is replaced because an SSL context in use must not be changed.
    """
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, _Bounded):
            transport._inner._pool._ssl_context = context


class _Bounded(httpx.BaseTransport):
    def __init__(self, inner: httpx.BaseTransport) -> None:
        assert isinstance(inner, httpx.HTTPTransport)
        self._inner, self._deadline = inner, _Deadline()
        inner._pool._network_backend = _Backend(inner._pool._network_backend, self._deadline)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        most_bytes, most_s = _OBJECT if request.url.path.endswith(("/pull-object", "/push-object")) else _OTHER
        request.headers["accept-encoding"] = "identity"
        self._deadline.begin(most_s)
        response = self._inner.handle_request(request)
        try:
            if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                raise ResponseLimitExceeded("it is compressed although the request did not allow compression")
            length = response.headers.get("content-length", "0")
            if length.isdigit() and int(length) > most_bytes:
                raise ResponseLimitExceeded(f"it has {length} bytes, but at most {most_bytes} are allowed")
        except ResponseLimitExceeded:
            response.close()
            raise
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _Counted(response.stream, most_bytes)
        return response

    def close(self) -> None:
        self._inner.close()


class _Counted(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, most_bytes: int) -> None:
        self._inner, self._most_bytes = inner, most_bytes

    def __iter__(self) -> Iterator[bytes]:
        received = 0
        for part in self._inner:
            received += len(part)
            if received > self._most_bytes:
                raise ResponseLimitExceeded(f"it has more than the allowed {self._most_bytes} bytes")
            yield part

    def close(self) -> None:
        self._inner.close()


class _Deadline(threading.local):
    """Deadline of the current call, separate for each thread."""

    at = float("inf")

    def begin(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def limit_timeout(self, timeout: float | None, expired: type[httpcore.TimeoutException]) -> float:
        """Return the smaller of `timeout` and the time until the deadline; raise `expired` after the deadline."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise expired("the call took too long")
        return left if timeout is None else min(timeout, left)


class _Backend(httpcore.NetworkBackend):
    """Wrapper of httpcore's network backend that enforces the deadline on its connections."""

    def __init__(self, inner: httpcore.NetworkBackend, deadline: _Deadline) -> None:
        self._inner, self._deadline = inner, deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        within = self._deadline.limit_timeout(timeout, httpcore.ConnectTimeout)
        stream = self._inner.connect_tcp(host, port, within, local_address, socket_options)
        return _Stream(stream, self._deadline)

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._inner, self._deadline, self._made = inner, deadline, time.monotonic()

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._deadline.limit_timeout(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        view = memoryview(buffer)
        for start in range(0, len(view), _WRITTEN_AT_ONCE):
            part = bytes(view[start : start + _WRITTEN_AT_ONCE])
            self._inner.write(part, self._deadline.limit_timeout(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        within, began = self._deadline.limit_timeout(timeout, httpcore.ConnectTimeout), time.monotonic()
        stream = self._inner.start_tls(ssl_context, server_hostname, within)
        alert_s = min(_ALERT_S, _MIN_ALERT_S + _HANDSHAKES * (time.monotonic() - began))
        try:
            _raise_if_rejected(stream.get_extra_info("socket"), within_s=alert_s)
        except OSError as error:
            stream.close()
            raise httpcore.ConnectError(str(error)) from error
        return _Stream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        # The pool closes idle connections that are readable, so report an old connection as readable.
        if info == "is_readable" and time.monotonic() - self._made > MAX_AGE_S:
            return True
        return self._inner.get_extra_info(info)


def _raise_if_rejected(connection: object, *, within_s: float) -> None:
    """Wait up to `within_s` seconds for the server to reject our certificate, and raise an error if it does.

    Raises:
        OSError: the `ssl` error with the server's alert, or `PeerClosed`.
    """
    if not isinstance(connection, ssl.SSLSocket):  # TLS inside a proxy's TLS
        return
    with selectors.DefaultSelector() as waiting:
        waiting.register(connection, selectors.EVENT_READ)
        if not connection.pending() and not waiting.select(within_s):
            return
    connection.setblocking(False)
    try:
        data = connection.recv(1)
    except (ssl.SSLWantReadError, BlockingIOError):
        return  # the data was a session ticket
    except (ssl.SSLEOFError, ConnectionError):
        data = b""
    raise ConnectionError("the server sent data before the first request") if data else PeerClosed
