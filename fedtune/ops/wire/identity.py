"""Authentication at both ends of a connection, by certificates of the federation's authority and the lead's signatures.

TLS proves to the server that a member of the federation calls, but not which; Flower's Control and Runtime APIs check
no more than that.  The server therefore only lets a call through to them if the federation's lead has signed its path,
time and body.
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
from fedtune.ops.wire.bounded_http import HungUp, bound_client
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.spec import iter_causes

_Client = TypeVar("_Client", bound=rpc.ProtobufClient)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """PEM files for one end of a TLS connection."""

    ca: Path  # certificate of the federation's authority, the only one that is trusted
    certificate: Path  # this end's own
    key: Path  # its private key; a site's and a lead's is EC P-384, and a site signs its Flower calls with it too

    def create_client_context(self) -> ssl.SSLContext:
        """Create a client's TLS context, which trusts only this authority, verifies the server's name and has a client
        certificate.
        """
        context = ssl.create_default_context(cafile=str(self.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.certificate, self.key)
        return context


def harden_client(client: _Client) -> _Client:
    """Limit the calls of a Flower client and disable its redirects; return the client.

    Flower's client would follow a redirect with its signed headers: whoever runs the server could make a site or a lead
    call any address in its own network, even without TLS.
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
"""TLS alerts that are about the certificate that this end showed; others are about protocols and ciphers."""


def explain_tls_refusal(error: BaseException) -> str | None:
    """Explain which end rejected the other end's certificate and why; None if the error has another cause."""
    for cause in iter_causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted here: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError) and "_ALERT_" in (cause.reason or ""):
            alert = cause.reason.rpartition("_ALERT_")[2]
            said = alert.replace("_", " ").lower()
            if alert in _OF_CERTIFICATES:
                return f"it does not accept this site's certificate: {said}"
            return f"it ended the encryption: {said}"
        if isinstance(cause, HungUp):  # as asyncio's servers do, which send no alert
            return (
                "it closed the connection right after the handshake; if this continues, it does not "
                "accept this site's certificate"
            )
    return None


CALL = "call"  # purpose of the lead's signatures
TIME, BODY, SIGNATURE = "fedtune-time", "fedtune-body", "fedtune-signature"
TOLERANCE_S = CLOCKS_S  # a signature of the lead's is good for so long, either way


class NotAllowed(Exception):
    """Error for a call that the server refuses, with the HTTP status of the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


_TIME_ERROR, _TIMEX_BYTES = 5, 1024  # what adjtimex(2) answers of a clock that nothing keeps; more than its struct
_MOST_SEEN = 1 << 17  # two minutes of a lead that calls five hundred times a second


class SeenCalls:
    """Replay protection for the lead's calls: stores each signature while it is valid, and accepts it only once.

    A client signs a retry with a new signature.
    """

    def __init__(self, most: int = _MOST_SEEN) -> None:
        self._most = most
        self._until: dict[str, float] = {}

    def check_unused(self, headers: Mapping[str, str]) -> None:
        """Check that a signature is unused.

        Raises:
            NotAllowed: the signature was used before.
        """
        if headers[SIGNATURE] in self._until:
            raise NotAllowed(401, "the lead's signature was used before")

    def use_signature(self, headers: Mapping[str, str], *, now: float) -> None:
        """Mark the signature of a valid request as used, to prevent replays.

        Raises:
            NotAllowed: the signature was used before, or too many signatures are stored.
        """
        signature = headers[SIGNATURE]
        self.check_unused(headers)
        if len(self._until) >= self._most:
            self._until = {one: until for one, until in self._until.items() if until >= now}
        if len(self._until) >= self._most:
            raise NotAllowed(503, "too many calls from the lead within two minutes")
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

    Only the headers are needed, so that the bodies of other callers are never read.
    """
    moment, body = headers.get(TIME, ""), headers.get(BODY, "")
    try:
        age = now - float(moment)
    except ValueError:
        return None
    if not (math.isfinite(age) and abs(age) <= TOLERANCE_S):
        return None
    return (
        body if is_signed(lead, CALL, _build_signed_message(path, moment, body), headers.get(SIGNATURE, "")) else None
    )


def describe_clock_difference(answer: httpx.Response, *, most_s: float) -> str:
    """Describe an offset between the server's clock and this machine's clock above `most_s`; empty for a smaller
    offset.

    If this machine's clock is synchronized, the server's clock is at fault.
    """
    try:
        ahead = parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()
    except (KeyError, ValueError):
        return ""
    if abs(ahead) <= most_s:
        return ""
    whose = (
        "this machine's is synchronized, so the server's is wrong"
        if is_clock_synchronized()
        else "one of them is wrong"
    )
    return f"the server's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's: {whose}"


def is_clock_synchronized() -> bool:
    """Return True if the kernel reports that this machine's clock is synchronized."""
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    return adjtimex is not None and adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)) not in (-1, _TIME_ERROR)


def _build_signed_message(path: str, moment: str, body: str) -> bytes:
    return f"{path}\n{moment}\n{body}".encode()
