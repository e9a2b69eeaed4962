"""HTTP client for a potentially malicious server, with limits on answer size, duration and connection age.

httpx applies its timeout to each read, so a server that sends a byte now and then can hold a call forever, and it
decompresses any answer.  Here every call has a deadline, and compressed answers are refused.  Written for httpx 0.28
and httpcore 1.0, whose internals it uses; tests/flower/test_bounded_http.py fails if they change.
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
MOST_AGE_S = 300.0
"""After so long a connection is closed and made anew, so that certificates that ended or were replaced are noticed."""
_ALERT_S, _LEAST_ALERT_S, _HANDSHAKES = 0.5, 0.1, 5
"""How long at most to wait for the server to refuse our certificate: under TLS 1.3 it does so after the handshake, one
way there and back later, and what is sent meanwhile can make its reason get lost.  The handshake took as long at least,
so that several times its length is enough."""
_WRITTEN_AT_ONCE = 1 << 14  # a TLS record, so that the deadline is looked at after each


class OutOfBounds(httpx.TransportError):
    """Error for an answer that exceeds the limits on size, duration or encoding."""


class HungUp(ConnectionError):
    """Error for a connection that the server closed right after the handshake without an alert."""


_OBJECT, _OTHER = (16 * _MIB, 180.0), (4 * _MIB, 60.0)
"""Most bytes and seconds of an answer with an object, for Flower cuts arrays into objects of 5 MB, and of another."""


def bound_client(client: httpx.Client) -> None:
    """Apply the limits to every call of `client`, including calls through a proxy, and disable redirects."""
    client.follow_redirects = False
    client._transport = _Bounded(client._transport)
    client._mounts = {pattern: transport and _Bounded(transport) for pattern, transport in client._mounts.items()}


def replace_ssl_context(client: httpx.Client, context: ssl.SSLContext) -> None:
    """Use the TLS context `context`, with another certificate, for all new connections of a bounded client.

    An SSL context that is in use must not be changed, so it is replaced.
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
                raise OutOfBounds("it is compressed, which was not requested")
            said = response.headers.get("content-length", "0")
            if said.isdigit() and int(said) > most_bytes:
                raise OutOfBounds(f"it has {said} bytes, but at most {most_bytes} are allowed")
        except OutOfBounds:
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
                raise OutOfBounds(f"it has more than the allowed {self._most_bytes} bytes")
            yield part

    def close(self) -> None:
        self._inner.close()


class _Deadline(threading.local):
    """Thread-local deadline of the current call."""

    at = float("inf")

    def begin(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def limit_timeout(self, timeout: float | None, expired: type[httpcore.TimeoutException]) -> float:
        """Return `timeout`, shortened to the time until the deadline."""
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
        alert_s = min(_ALERT_S, _LEAST_ALERT_S + _HANDSHAKES * (time.monotonic() - began))
        try:
            _raise_if_rejected(stream.get_extra_info("socket"), within_s=alert_s)
        except OSError as error:
            stream.close()
            raise httpcore.ConnectError(str(error)) from error
        return _Stream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        # The pool closes an idle connection that can be read: the other end has hung up, or we do.
        if info == "is_readable" and time.monotonic() - self._made > MOST_AGE_S:
            return True
        return self._inner.get_extra_info(info)


def _raise_if_rejected(connection: object, *, within_s: float) -> None:
    """Wait up to `within_s` seconds for the server to reject our certificate, and raise an error if it does.

    Raises:
        OSError: the `ssl` error with the server's alert, or `HungUp`.
    """
    if not isinstance(connection, ssl.SSLSocket):  # TLS inside a proxy's TLS
        return
    with selectors.DefaultSelector() as waiting:
        waiting.register(connection, selectors.EVENT_READ)
        if not connection.pending() and not waiting.select(within_s):
            return
    connection.setblocking(False)
    try:
        said = connection.recv(1)
    except (ssl.SSLWantReadError, BlockingIOError):
        return  # it was a ticket
    except (ssl.SSLEOFError, ConnectionError):
        said = b""
    raise ConnectionError("the server spoke first") if said else HungUp
