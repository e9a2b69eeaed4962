"""Checks of a site's connection to its server, step by step: DNS, proxy, TCP, TLS and authentication.

The checks make one call with the same HTTP client as the site's process, and report the step at which it fails.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from fedtune.ops.doctor.check import (
    SERVER,
    DoctorCheck,
    Status,
    build_failed_check,
    build_passed_check,
    build_skipped_check,
    build_warning,
)
from fedtune.ops.kits.certificates import SOON_DAYS, parse_ip_address
from fedtune.ops.kits.kit_file import Address, Kit
from fedtune.spec import ConfigError, iter_causes

DNS, TCP, TLS, AUTHENTICATION = "name (DNS)", "connection (TCP)", "encryption (TLS)", "authentication"
STEPS = (DNS, TCP, TLS, AUTHENTICATION)
_PROXY_FIX = "Set HTTPS_PROXY to your network's proxy, as http://HOST:PORT, or unset it if you need none."
_failed = partial(build_failed_check, exit_code=SERVER)
_OTHER_AUTHORITY = (
    "is not issued by the federation's authority: it is the wrong server, or TLS inspection intercepts the connection",
    "Have {server} exempted from TLS inspection, or ask the lead whether the address is right; "
    "`openssl s_client -connect {server}` shows who issued the certificate.",
)
_OTHER_HOST = (
    "is not for {host}",
    "Ask the lead to add {host} to also_known_as and run `fedtune provision renew-server`.",
)
_ANY_OTHER = ("is wrong ({why})", "Ask the lead to run `fedtune provision renew-server`.")
_WRONG_CERTIFICATES = {
    9: ("is not valid yet", "Correct this machine's clock."),
    10: ("has expired", "Ask the lead to run `fedtune provision renew-server`, or correct this clock if it is ahead."),
    **dict.fromkeys((2, 7, 18, 19, 20, 21, 24, 26), _OTHER_AUTHORITY),
    **dict.fromkeys((62, 64), _OTHER_HOST),
}
"""OpenSSL verification error code -> (finding, fix)."""


class Connection:
    """Test connection to the server that a site's kit names.

    Attributes:
        clock_ahead_s: the offset of this machine's clock from the server's clock and the uncertainty of the offset, in
            seconds; None if they are unknown, and until `run_checks` has finished.
    """

    def __init__(self, kit: Kit, *, timeout_s: float = 10.0) -> None:
        self._kit, self._timeout_s = kit, timeout_s
        self._host, self._server = Address.parse_address(kit.server).host, kit.server
        self._proxy = _find_proxy(self._host)
        self._encrypted: Any = None
        self._begun: dict[str, float] = {}  # trace event of the client -> its time
        self.clock_ahead_s: tuple[float, float] | None = None

    def run_checks(self) -> Iterator[DoctorCheck]:
        """Yield one check per step of the connection; steps after a failed step are skipped."""
        from fedtune.ops.wire.bounded_http import bound_client
        from fedtune.ops.wire.fleet import HELLO, sign_headers  # Flower takes a second to import

        tls = self._kit.tls()
        try:
            context, headers = tls.create_client_context(), sign_headers(tls)
        except (OSError, ConfigError):
            why = "the kit's key and certificates cannot be used"
            fix = "Fix the problem in the line of the check `certificate`."
            for name in STEPS:
                yield build_failed_check(TLS, why, fix=fix) if name == TLS else build_skipped_check(name, why)
            return
        try:
            client = httpx.Client(verify=context, timeout=self._timeout_s)
        except (ImportError, ValueError, httpx.InvalidURL):  # the error text may contain the proxy's password
            problem = "the value of HTTPS_PROXY cannot be used as an HTTP proxy"
            yield from self._report_steps_up_to(_failed(TCP, problem, fix=_PROXY_FIX))
            return
        with client:
            bound_client(client)
            try:
                address = f"https://{self._server}{HELLO}"
                answer = client.get(address, headers=headers, extensions={"trace": self._trace})
            except httpx.HTTPError as error:
                yield from self._report_steps_up_to(self._find_failed_step(error))
                return
            yield from self._report_steps_up_to(self._describe_encryption())
        self._compare_clocks(answer)
        yield self._check_authentication(answer)

    def _trace(self, event: str, about: dict[str, Any]) -> None:
        step = event.partition(".")[2]  # without the name of the client's component
        self._begun[step] = time.time()
        if step == "start_tls.complete":  # the server may disconnect later
            self._encrypted = about["return_value"].get_extra_info("ssl_object")

    def _report_steps_up_to(self, check: DoctorCheck) -> Iterator[DoctorCheck]:
        """Yield `check` after passed checks of the earlier steps; if it failed, yield the later steps as skipped."""
        via = f" through the proxy {self._proxy} (HTTPS_PROXY)" if self._proxy else ""
        resolved = f"{self._host} is an IP address" if parse_ip_address(self._host) else f"{self._host} resolves"
        before = {
            DNS: build_passed_check(DNS, f"{self._host} is resolved by the proxy" if self._proxy else resolved),
            TCP: build_passed_check(TCP, f"{self._server} accepts connections{via}"),
        }
        number = STEPS.index(check.name)
        yield from (before[name] for name in STEPS[:number])
        yield check
        if check.status is Status.FAILED:
            yield from (build_skipped_check(name, f"{check.name} failed") for name in STEPS[number + 1 :])

    def _find_failed_step(self, error: httpx.HTTPError) -> DoctorCheck:
        """Build the failed check for the step at which the HTTP client raised `error`."""
        causes = list(iter_causes(error))
        goal = f"the proxy {self._proxy}" if self._proxy else self._server
        if unresolved := next((cause for cause in causes if isinstance(cause, socket.gaierror)), None):
            name = goal if self._proxy else self._host
            fix = f"Have {name} added to your network's DNS, or ask the lead whether the address is right."
            problem = f"{name} does not resolve ({unresolved.strerror})"
            return _failed(DNS, problem, fix=_PROXY_FIX if self._proxy else fix)
        if "start_tls.started" in self._begun:
            return self._explain_tls_failure(error, causes)
        if isinstance(error, httpx.ProxyError):
            fix = f"Have CONNECT to {self._server} allowed on the proxy, or add the host to NO_PROXY to bypass it."
            if str(error).startswith("407"):
                fix = "Add the proxy's user and password to HTTPS_PROXY, as http://USER:PASSWORD@HOST:PORT."
            return _failed(TCP, f"{goal} refused to connect to {self._server} ({error})", fix=fix)
        if "connect_tcp.complete" in self._begun:
            return _failed(TCP, f"{goal} does not answer as an HTTP proxy", fix=_PROXY_FIX)
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
            fix = _PROXY_FIX if self._proxy else "Ask the lead whether the server is running on this port."
            return _failed(TCP, f"{goal} refuses connections", fix=fix)
        fix = f"Have outgoing TCP connections to {goal} allowed in your network's firewall."
        if isinstance(error, httpx.TimeoutException):
            return _failed(TCP, f"{goal} did not answer within {self._timeout_s:g} s", fix=fix)
        system = next((cause.strerror for cause in causes if isinstance(cause, OSError)), None)
        return _failed(TCP, f"{goal} cannot be reached ({system or type(error).__name__})", fix=fix)

    def _explain_tls_failure(self, error: httpx.HTTPError, causes: list[BaseException]) -> DoctorCheck:
        from fedtune.ops.wire.identity import explain_tls_refusal

        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                template, fix = _WRONG_CERTIFICATES.get(cause.verify_code, _ANY_OTHER)
                about = {"host": self._host, "server": self._server, "why": cause.verify_message}
                return _failed(TLS, "the server's certificate " + template.format(**about), fix=fix.format(**about))
        alert = explain_tls_refusal(error) or ""
        if alert.startswith("it does not accept this site's certificate"):
            fix = f"Ask the lead for a new kit (`fedtune provision renew-site {self._kit.site}`), and unzip it here."
            return _failed(TLS, f"the server refused this site's certificate ({alert.rpartition(': ')[2]})", fix=fix)
        fix = "Ask the lead whether the server runs on this port, and your network team which devices intercept it."
        if isinstance(error, httpx.TimeoutException):
            problem = f"{self._server} accepts connections, but did not answer within {self._timeout_s:g} s"
        elif "start_tls.complete" in self._begun:
            problem = "the server's certificate is valid, but its answer is not HTTP"
        else:
            reason = next((cause.reason for cause in causes if isinstance(cause, ssl.SSLError)), None)
            problem = f"{self._server} does not speak TLS as expected ({alert or reason or type(error).__name__})"
        return _failed(TLS, problem, fix=fix)

    def _describe_encryption(self) -> DoctorCheck:
        ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(self._encrypted.getpeercert()["notAfter"]), UTC)
        finding = f"{self._encrypted.version()}; the federation's own server, with a certificate until {ends:%Y-%m-%d}"
        if (ends - datetime.now(UTC)).days < SOON_DAYS:
            fix = "Tell the lead to run `fedtune provision renew-server` before that day."
            return build_warning(TLS, finding, fix=fix)
        return build_passed_check(TLS, finding)

    def _compare_clocks(self, answer: httpx.Response) -> None:
        sent, received = self._begun["send_request_headers.started"], self._begun["receive_response_headers.complete"]
        try:
            theirs = parsedate_to_datetime(answer.headers["date"]).timestamp() + 0.5  # the header is in whole seconds
        except (KeyError, ValueError):
            return
        self.clock_ahead_s = ((sent + received) / 2 - theirs, (received - sent) / 2 + 0.5)

    def _check_authentication(self, answer: httpx.Response) -> DoctorCheck:
        from fedtune.ops.wire.fleet import parse_answer_field, parse_refusal_reason
        from fedtune.ops.wire.line_errors import NotFedtuneServer

        site = self._kit.site or ""
        fix = f"Ask the lead whether `fedtune provision list` shows {site}, and whether the server uses that roster."
        try:
            if answer.status_code != httpx.codes.OK:
                reason = parse_refusal_reason(answer, self._server)
                if "revoked" in reason:
                    fix = "Ask the lead why this site was revoked, and for a new kit if it should rejoin."
                elif "clock" in reason:
                    fix = "Turn on time synchronization on this machine, for instance with `timedatectl set-ntp true`."
                return _failed(AUTHENTICATION, f"the server refused this site: {reason}", fix=fix)
            known = parse_answer_field(answer, "site", self._server)
        except NotFedtuneServer as error:
            fix = "Ask the lead whether a fedtune server of this version runs at this address."
            return _failed(AUTHENTICATION, str(error), fix=fix)
        if known != site:
            fix = "Ask the lead to provision this site again: names and keys do not match."
            return _failed(AUTHENTICATION, f"the server knows this key as {known}, but the kit is for {site}", fix=fix)
        return build_passed_check(AUTHENTICATION, f"the server knows this key as {site}")


_CONTROL = "Flower's control"
_CLOSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND)


def check_control_api(server: str, *, timeout_s: float) -> DoctorCheck:
    """Check that a stock SuperLink closes its Control API, through which callers could run code at the sites."""
    try:
        # The certificate is irrelevant, because the check only asks for access without credentials.
        answer = httpx.post(f"https://{server}/v1/control/list-nodes", verify=False, timeout=timeout_s)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError) as error:
        fix = "Ask the server's operators whether it is running; only this site's SuperNode connects to it."
        return _failed(_CONTROL, f"{server} cannot be reached ({type(error).__name__})", fix=fix)
    if answer.status_code in _CLOSED:
        finding = f"{server} does not accept outside calls to its Control API ({answer.status_code})"
        return build_passed_check(_CONTROL, finding)
    problem = (
        f"{server} answers calls to its Control API ({answer.status_code}): ANYONE WHO CAN REACH IT CAN RUN CODE AT "
        "EVERY SITE'S SUPERNODE, and remove or add sites"
    )
    fix = "Stop this site's SuperNode, and put deployment/flower/nginx.conf in front of it (docs/stock_flower.md)."
    return build_failed_check(_CONTROL, problem, fix=fix)


def _find_proxy(host: str) -> str:
    """Return the proxy for `host` as host:port, without user and password; empty if there is none.

    Reads HTTPS_PROXY, ALL_PROXY and NO_PROXY, as the site's HTTP client does.
    """
    proxies = getproxies()
    url = proxies.get("https") or proxies.get("all") or ""
    if not url or proxy_bypass(host):
        return ""
    return urlsplit(url if "://" in url else f"http://{url}").netloc.rpartition("@")[2]
