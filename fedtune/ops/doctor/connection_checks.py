"""Which of name, proxy, connection, encryption and authentication keeps a site from its server."""

from __future__ import annotations

import base64
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from fedtune.ops.doctor.check import SERVER, Check, Status, failed, ok, skipped, warning
from fedtune.ops.kits.certificates import SOON_DAYS
from fedtune.ops.kits.kit_file import Kit
from fedtune.spec import RunError

DNS, TCP, TLS, AUTHENTICATION = "name (DNS)", "connection (TCP)", "encryption (TLS)", "authentication"
_MOST_ANSWER_BYTES = 1 << 16
_ALERT_S = 0.2
"""How long to wait for the server to refuse our certificate before anything is sent: under TLS 1.3 it does so after the
handshake, and what is sent meanwhile can make its reason get lost."""
_PROXY_FIX = "Set HTTPS_PROXY to your network's proxy, or unset it where none is needed."
_failed = partial(failed, exit_code=SERVER)
_OTHER_AUTHORITY = (
    "is not issued by the federation's authority: a wrong server, or TLS inspection, which opens connections on their "
    "way",
    "Have {server} exempted from TLS inspection, or ask the lead whether the address is right; "
    "`openssl s_client -connect {server}` shows whose certificate it is.",
)
_OTHER_HOST = (
    "is not for {host}",
    "Ask the lead to add {host} to also_known_as and run `fedtune provision renew-server`.",
)
_ANY_OTHER = ("is wrong ({why})", "Ask the lead to run `fedtune provision renew-server`.")
_WRONG_CERTIFICATES = {
    9: ("is not valid yet", "Set this machine's clock."),
    10: ("has expired", "Ask the lead to run `fedtune provision renew-server`, or set this clock if it runs ahead."),
    **dict.fromkeys((2, 7, 18, 19, 20, 21, 24, 26), _OTHER_AUTHORITY),
    **dict.fromkeys((62, 64), _OTHER_HOST),
}
"""OpenSSL's number for what is wrong with the server's certificate -> what that means, and whom to ask."""


class ProxyRefused(ConnectionError):
    """A proxy answered, and did not connect us: its answer, and what to do about it."""


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
            status = re.match(rb"HTTP/1\.[01] (\d{3})\b", _head(connection, timeout_s=timeout_s))
            if status is None:
                fix = "Set HTTPS_PROXY to your network's proxy, as http://HOST:PORT."
                raise ProxyRefused("does not answer as an HTTP proxy", fix)
            if not status[1].startswith(b"2"):
                fix = f"Have CONNECT to {server} allowed on the proxy, or put the host into NO_PROXY to go round it."
                if status[1] == b"407":
                    fix = "Put the proxy's user and password into HTTPS_PROXY, as http://USER:PASSWORD@HOST:PORT."
                raise ProxyRefused(f"refused to connect to {server} ({status[1].decode()})", fix)
        except BaseException:
            connection.close()
            raise
        return connection


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


def _head(connection: socket.socket, *, timeout_s: float) -> bytes:
    """An HTTP answer up to its empty line, or as far as it came."""
    answer, ends = b"", time.monotonic() + timeout_s
    while b"\r\n\r\n" not in answer and len(answer) < _MOST_ANSWER_BYTES:
        # For the whole answer: one byte now and then must not keep a person waiting.
        connection.settimeout(max(0.001, ends - time.monotonic()))
        part = connection.recv(4096)
        if not part:
            break
        answer += part
    return answer


class Connection:
    """Tries to reach the server of a site's kit, one step after another.

    Attributes:
        clock_ahead_s: by how much this machine's clock is ahead of the server's, where that is known, and how far off
            that figure may be; None until `checks` has been through.
    """

    def __init__(self, kit: Kit, *, timeout_s: float = 10.0) -> None:
        self._kit, self._timeout_s = kit, timeout_s
        self._host, self._server = kit.host, kit.server
        self._tls = kit.tls()
        self._proxy: Proxy | None = proxy_for(kit.host)
        self.clock_ahead_s: tuple[float, float] | None = None

    def checks(self) -> Iterator[Check]:
        """One line for each step; what lies behind a step that failed has no meaning."""
        steps: list[tuple[str, Callable[[], Check]]] = [
            (DNS, self._resolve),
            (TCP, self._connect),
            (TLS, self._encrypt),
            (AUTHENTICATION, self._authenticate),
        ]
        if self._proxy is not None and not self._proxy.can_be_tried:
            for name, _ in steps[:3]:
                yield skipped(name, "HTTPS_PROXY is not of the form http://HOST:PORT, which alone can be tried here")
            del steps[:3]
        broken = ""
        for name, step in steps:
            check = skipped(name, f"{broken} failed") if broken else step()
            yield check
            if check.status is Status.FAILED:
                broken = name

    def _resolve(self) -> Check:
        host, port = (self._proxy.host, self._proxy.port) if self._proxy else (self._host, self._kit.port)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no name"
            fix = f"Have {host} put into your network's DNS, or ask the lead whether the address is right."
            fix = _PROXY_FIX if self._proxy else fix
            return _failed(DNS, f"{host} does not resolve ({why})", fix=fix)
        if self._proxy:
            return ok(DNS, f"the proxy's name {host} resolves; {self._host} is for the proxy to resolve")
        address = str(found[0][4][0])
        return ok(DNS, f"{host} is an address" if address == host else f"{host} is {address}")

    def _connect(self) -> Check:
        via = f" through the proxy {self._proxy}, as HTTPS_PROXY says" if self._proxy else ""
        goal = str(self._proxy) if self._proxy else self._server
        try:
            self._plain = self._open()  # TLS goes on with it: a connection without any is an attack to the server
        except ProxyRefused as refused:
            found, fix = refused.args
            return _failed(TCP, f"the proxy {self._proxy} {found}", fix=fix)
        except ConnectionRefusedError:
            fix = _PROXY_FIX if self._proxy else "Ask the lead whether the server runs, and at this port."
            return _failed(TCP, f"{goal} refuses connections", fix=fix)
        except TimeoutError:
            fix = f"Have outgoing TCP connections to {goal} allowed in your network's firewall."
            return _failed(TCP, f"{goal} gave no answer in {self._timeout_s:g} s", fix=fix)
        except OSError as error:
            fix = f"Have a route and outgoing TCP connections to {goal} set up in your network."
            return _failed(TCP, f"{goal} cannot be reached ({error.strerror or error})", fix=fix)
        return ok(TCP, f"{self._server} accepts connections{via}")

    def _open(self) -> socket.socket:
        """A connection to the server's port, through the proxy where there is one."""
        if self._proxy is None:
            return socket.create_connection((self._host, self._kit.port), timeout=self._timeout_s)
        return self._proxy.open(self._server, timeout_s=self._timeout_s)

    def _encrypt(self) -> Check:
        with closing(self._plain) as plain:
            try:
                context = self._tls.client_context()
            except OSError as error:
                found = f"the kit's certificates cannot be used ({getattr(error, 'reason', None) or error.strerror})"
                return failed(TLS, found, fix="Put right what the lines on kit and certificate name.")
            try:
                with context.wrap_socket(plain, server_hostname=self._host) as encrypted:
                    _wait_for_alert(encrypted)
                    answer = self._ask(encrypted)
                    return self._encrypted(encrypted, answer)
            except ssl.SSLCertVerificationError as error:
                found, fix = _WRONG_CERTIFICATES.get(error.verify_code, _ANY_OTHER)
                about = {"host": self._host, "server": self._server, "why": error.verify_message}
                return _failed(TLS, "the server's certificate " + found.format(**about), fix=fix.format(**about))
            except ssl.SSLError as error:
                return self._tls_failed(error)
            except TimeoutError:
                fix = "Ask the lead whether the server is well, and your network's people what lies between."
                found = f"{self._server} accepts connections, and gave no answer in {self._timeout_s:g} s"
                return _failed(TLS, found, fix=fix)
            except OSError as error:  # a reset, mostly: who refuses a certificate may hang up before saying so
                people = "your network's people into what breaks TLS connections"
                fix = f"Have the lead look into the server's log, and {people}."
                found = f"{self._server} hung up on the TLS connection ({error.strerror or type(error).__name__})"
                return _failed(TLS, found, fix=fix)

    def _ask(self, encrypted: ssl.SSLSocket) -> bytes:
        """The head of an HTTP answer; also sets the clocks' difference."""
        encrypted.settimeout(self._timeout_s)
        before = time.time()
        with suppress(ConnectionError):  # it hung up, and what it said before that is still to be read
            encrypted.sendall(f"GET / HTTP/1.1\r\nHost: {self._server}\r\nConnection: close\r\n\r\n".encode())
        answer = _head(encrypted, timeout_s=self._timeout_s)
        after = time.time()
        if found := re.search(rb"(?im)^date: ([^\r\n]{1,60})\r?$", answer):
            try:
                theirs = parsedate_to_datetime(found[1].decode("latin-1")).timestamp() + 0.5  # the date cuts it off
            except ValueError:
                return answer
            self.clock_ahead_s = ((before + after) / 2 - theirs, (after - before) / 2 + 0.5)
        return answer

    def _encrypted(self, encrypted: ssl.SSLSocket, answer: bytes) -> Check:
        if not answer.startswith(b"HTTP/"):
            found = "the server's certificate is right, and its answer is not HTTP"
            return _failed(TLS, found, fix="Ask the lead whether the server runs at this port.")
        ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(str((encrypted.getpeercert() or {})["notAfter"])), UTC)
        days = (ends - datetime.now(UTC)).days
        found = f"{encrypted.version()}; the federation's own server, whose certificate ends on {ends:%Y-%m-%d}"
        if days < SOON_DAYS:
            return warning(TLS, found, fix="Tell the lead to run `fedtune provision renew-server` before that day.")
        return ok(TLS, found)

    def _tls_failed(self, error: ssl.SSLError) -> Check:
        reason = error.reason or type(error).__name__
        if "ALERT" in reason and re.search("UNKNOWN_CA|CERTIFICATE|ACCESS_DENIED", reason):
            said = re.sub(r"^.*ALERT_", "", reason).replace("_", " ").lower()
            fix = f"Ask the lead for a new kit (`fedtune provision renew-site {self._kit.site}`), and unzip it here."
            return _failed(TLS, f"the server refused this site's certificate ({said})", fix=fix)
        fix = "Ask the lead whether the server's address and port are right, and your network what lies between."
        return _failed(TLS, f"{self._server} does not speak TLS as expected ({reason})", fix=fix)

    def _authenticate(self) -> Check:
        from fedtune.ops.wire.fleet import Foreign, Unauthorised, hello  # Flower takes a second to import

        site = self._kit.site
        try:
            known = hello(self._server, self._tls)
        except (RunError, OSError) as error:
            found = f"the server could not be asked ({type(error).__name__})"
            fix = "Mend what the lines above name, or ask the lead whether the server is well."
            if isinstance(error, Unauthorised):
                fix = _remedy(str(error), site=site or "")
            elif isinstance(error, Foreign):
                fix = "Ask the lead whether a fedtune server of this version runs at this address."
            return _failed(AUTHENTICATION, str(error) if isinstance(error, RunError) else found, fix=fix)
        if known != site:
            fix = "Ask the lead to provision this site again: names and keys were mixed up."
            return _failed(AUTHENTICATION, f"the server knows this key as {known}, and the kit is for {site}", fix=fix)
        return ok(AUTHENTICATION, f"the server knows this key as {site}")


def _wait_for_alert(encrypted: ssl.SSLSocket) -> None:
    encrypted.settimeout(_ALERT_S)
    try:
        if not encrypted.recv(1):
            raise ConnectionResetError("closed")
    except TimeoutError:
        return


def _remedy(refusal: str, *, site: str) -> str:
    if "revoked" in refusal:
        return "Ask the lead why this site was revoked, and for a new kit if it is to come back."
    if "clock" in refusal:
        return "Turn on time synchronisation on this machine, for instance with `timedatectl set-ntp true`."
    return f"Ask the lead whether `fedtune provision list` shows {site}, and whether the server has that roster."
