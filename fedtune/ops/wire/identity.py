"""Authentication at both ends of a connection, by certificates of the federation's authority and signatures of the
lead.

Flower's Control and Runtime APIs accept every client that passes TLS authentication, and thus every member of the
federation.  The server therefore forwards a call to them only if the lead has signed its path, time and body.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

import httpx

from fedtune.flower.asking_grid import CLOCKS_S
from fedtune.flower.internals import add_headers, get_http_client, rpc
from fedtune.ops.wire.bounded_http import PeerClosed, bound_client
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.spec import iter_causes

_Client = TypeVar("_Client", bound=rpc.ProtobufClient)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """PEM files for one end of a TLS connection."""

    ca: Path  # certificate of the federation's authority, the only one that is trusted
    certificate: Path  # the certificate of this end
    key: Path  # its private key, EC P-384 for sites and leads; a site also signs its Flower calls with it

    def create_client_context(self) -> ssl.SSLContext:
        """Create a TLS context with the client certificate, which trusts only `ca` and verifies the server's name."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.certificate, self.key)
        return context


def harden_client(client: _Client) -> _Client:
    """Limit the calls of a Flower client and disable its redirects; return the client.

    Flower's client would follow redirects and send its signed headers along.  A malicious server could thus make a site
    or a lead call any address in its own network, even without TLS.
    """
    bound_client(get_http_client(client))
    return client


_OF_CERTIFICATES = (
    "BAD_CERTIFICATE",
    "UNSUPPORTED_CERTIFICATE",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_UNKNOWN",
    "CERTIFICATE_REQUIRED",
    "UNKNOWN_CA",
    "ACCESS_DENIED",
)
"""TLS alerts that concern the certificate of this end; all other alerts concern protocols and ciphers."""


def explain_tls_refusal(error: BaseException) -> str | None:
    """Explain which end rejected the certificate of the other end, and why; None for an error with another cause."""
    for cause in iter_causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted here: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError) and "_ALERT_" in (cause.reason or ""):
            alert = cause.reason.rpartition("_ALERT_")[2]
            reason = alert.replace("_", " ").lower()
            if alert in _OF_CERTIFICATES:
                return f"it does not accept this site's certificate: {reason}"
            return f"it ended the encryption: {reason}"
        if isinstance(cause, PeerClosed):  # for example asyncio servers, which send no alert
            return (
                "it closed the connection right after the handshake; if this continues, it does not "
                "accept this site's certificate"
            )
    return None


CALL = "call"  # purpose of the lead's signatures
TIME, BODY, SIGNATURE = "fedtune-time", "fedtune-body", "fedtune-signature"
TOLERANCE_S = CLOCKS_S  # maximum age of a lead's signature, and maximum time that it may be in the future


class CallRefused(Exception):
    """Raised for a call that the server refuses; contains the HTTP status and the reason for the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


_TIME_ERROR, _TIMEX_BYTES = 5, 1024  # adjtimex(2): result for an unsynchronized clock, and a buffer for its struct
_MAX_SEEN = 1 << 17  # enough for two minutes with five hundred calls per second


class SeenCalls:
    """Replay protection for the lead's calls: accepts each signature once, and stores it until it expires.

    A client creates a new signature for a retry.
    """

    def __init__(self, most: int = _MAX_SEEN) -> None:
        self._most = most
        self._until: dict[str, float] = {}

    def check_unused(self, headers: Mapping[str, str]) -> None:
        """Check that a signature is unused.

        Raises:
            CallRefused: the signature was used before.
        """
        if headers[SIGNATURE] in self._until:
            raise CallRefused(401, "the lead's signature was used before")

    def use_signature(self, headers: Mapping[str, str], *, now: float) -> None:
        """Mark the signature of a valid request as used, to prevent replays.

        Raises:
            CallRefused: the signature was used before, or too many signatures are stored.
        """
        signature = headers[SIGNATURE]
        self.check_unused(headers)
        if len(self._until) >= self._most:
            self._until = {earlier: until for earlier, until in self._until.items() if until >= now}
        if len(self._until) >= self._most:
            raise CallRefused(503, "too many calls from the lead within two minutes")
        self._until[signature] = float(headers[TIME]) + TOLERANCE_S


class LeadSignature:
    """Interceptor that signs each call of a Flower client with the lead's key."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key

    def intercept(self, context: rpc.ProtobufRequestContext, call_next: rpc.ProtobufCall) -> httpx.Response:
        request = context.request
        moment, digest = repr(time.time()), hashlib.sha256(request.read()).hexdigest()
        signature = self._key.sign(CALL, _build_signed_message(request.url.path, moment, digest))
        add_headers(request, {TIME: moment, BODY: digest, SIGNATURE: signature})
        return call_next(context)


def verify_body_hash(headers: Mapping[str, str], *, path: str, lead: str, now: float) -> str | None:
    """Verify the lead's signature of a call; return the signed SHA-256 of the body, in hex, or None if it is invalid.

    The function requires only the headers, so that the server never reads the bodies of other callers.
    """
    moment, body = headers.get(TIME, ""), headers.get(BODY, "")
    try:
        age = now - float(moment)
    except ValueError:
        return None
    if not (math.isfinite(age) and abs(age) <= TOLERANCE_S):
        return None
    signed = is_signed(lead, CALL, _build_signed_message(path, moment, body), headers.get(SIGNATURE, ""))
    return body if signed else None


def describe_clock_difference(answer: httpx.Response, *, most_s: float) -> str:
    """Describe the offset between the server's clock and this machine's clock; empty if it is at most `most_s` seconds.

    If this machine's clock is synchronized, the text says that the server's clock is wrong.
    """
    try:
        ahead = parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()
    except (KeyError, ValueError):
        return ""
    if abs(ahead) <= most_s:
        return ""
    kept = is_clock_synchronized()
    whose = "this machine's is synchronized, so the server's is wrong" if kept else "one of them is wrong"
    return f"the server's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's: {whose}"


def is_clock_synchronized() -> bool:
    """Return True if the kernel reports that this machine's clock is synchronized."""
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    return adjtimex is not None and adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)) not in (-1, _TIME_ERROR)


def _build_signed_message(path: str, moment: str, body: str) -> bytes:
    return f"{path}\n{moment}\n{body}".encode()
