"""The HTTP proxy that a site's connections go through, where its environment names one."""

from __future__ import annotations

import base64
import re
import socket
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

_MOST_ANSWER_BYTES = 1 << 14


class ProxyRefused(ConnectionError):
    """A proxy answered, and did not connect us.

    Attributes:
        fix: what to do about it, as a sentence.
    """

    def __init__(self, found: str, *, fix: str) -> None:
        super().__init__(found)
        self.fix = fix


@dataclass(frozen=True, kw_only=True, slots=True)
class Proxy:
    """A proxy; its text is host:port, never the user or password in its URL.

    Attributes:
        authorization: value of the header that names user and password; empty: none.
        can_be_tried: whether it is one that `open` can go through.
    """

    host: str
    port: int
    authorization: str
    can_be_tried: bool

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def open(self, server: str, *, timeout_s: float) -> socket.socket:
        """A connection to `server` (host:port).

        Raises:
            ProxyRefused: the proxy answered, and does not connect.
            OSError: the proxy cannot be reached.
        """
        connection = socket.create_connection((self.host, self.port), timeout=timeout_s)
        try:
            lines = [f"CONNECT {server} HTTP/1.1", f"Host: {server}"]
            lines += [f"Proxy-Authorization: {self.authorization}"] if self.authorization else []
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            self._require_connected(_head(connection), server)
        except BaseException:
            connection.close()
            raise
        return connection

    def _require_connected(self, answer: bytes, server: str) -> None:
        status = re.match(rb"HTTP/1\.[01] (\d{3})\b", answer)
        if status is None:
            fix = "Set HTTPS_PROXY to your network's proxy, as http://HOST:PORT."
            raise ProxyRefused("does not answer as an HTTP proxy", fix=fix)
        code = int(status[1])
        if code == 407:
            fix = "Put the proxy's user and password into HTTPS_PROXY, as http://USER:PASSWORD@HOST:PORT."
            raise ProxyRefused("wants a user and a password (407)", fix=fix)
        if not 200 <= code < 300:
            fix = f"Have CONNECT to {server} allowed on the proxy, or put the host into NO_PROXY to go round it."
            raise ProxyRefused(f"refused to connect to {server} ({code})", fix=fix)


def proxy_for(host: str) -> Proxy | None:
    """The proxy that HTTPS_PROXY, or else ALL_PROXY, names for `host`; None where there is none or NO_PROXY exempts it.

    The same variables count for every connection of a site: its HTTP client reads them too.
    """
    found = getproxies()
    url = found.get("https") or found.get("all") or ""
    if not url or proxy_bypass(host):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:  # a port that is no number
        port = 0
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return Proxy(
        host=parts.hostname or "",
        port=port,
        authorization=f"Basic {base64.b64encode(user.encode()).decode()}" if parts.username else "",
        can_be_tried=parts.scheme == "http" and bool(parts.hostname and port),
    )


def _head(connection: socket.socket) -> bytes:
    """An HTTP answer up to its empty line; nothing follows it until we speak."""
    answer = b""
    while b"\r\n\r\n" not in answer and len(answer) < _MOST_ANSWER_BYTES:
        part = connection.recv(4096)
        if not part:
            break
        answer += part
    return answer
