"""Calls that only a lead may make, each signed over its path, its time and its body.

TLS alone tells the server that somebody of the federation calls, not who; Flower's Control and Runtime APIs ask for no
more than that, so the server lets a call through to them only with the signature of the federation's lead.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping

import httpx
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from fedtune.privacy.keys import SigningKey, is_signed

CALL = "call"
"""Purpose of the signatures."""
TIME, BODY, SIGNATURE = "fedtune-time", "fedtune-body", "fedtune-signature"
TOLERANCE_S = 120.0
"""How far the clocks of lead and server may differ; a signature is good for so long."""


class NotAllowed(Exception):
    """A call that the server does not take, with the status that it gets."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


_MOST_SEEN = 1 << 17
"""Two minutes of a lead that calls five hundred times a second."""


class SeenCalls:
    """The lead's signatures that were used, for as long as they are good; each passes once.  A retry is signed anew."""

    def __init__(self, most: int = _MOST_SEEN) -> None:
        self._most = most
        self._until: dict[str, float] = {}

    def check(self, headers: Mapping[str, str]) -> None:
        """Pass a signature that was not used yet.

        Raises:
            NotAllowed: it was.
        """
        if headers[SIGNATURE] in self._until:
            raise NotAllowed(401, "the lead's signature was used before")

    def take(self, headers: Mapping[str, str], *, now: float) -> None:
        """Use the signature of a call that is the lead's.

        Raises:
            NotAllowed: it was used before, or too many are remembered.
        """
        signature = headers[SIGNATURE]
        self.check(headers)
        if len(self._until) >= self._most:
            self._until = {one: until for one, until in self._until.items() if until >= now}
        if len(self._until) >= self._most:
            raise NotAllowed(503, "too many calls of the lead's within two minutes")
        self._until[signature] = float(headers[TIME]) + TOLERANCE_S


class LeadSignature:
    """Signs each of a Flower client's calls."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        request = context.request
        moment, body = repr(time.time()), hashlib.sha256(request.read()).hexdigest()
        signature = self._key.sign(CALL, _message(request.url.path, moment, body))
        add_headers(request, {TIME: moment, BODY: body, SIGNATURE: signature})
        return call_next(context)


def body_of_lead(headers: Mapping[str, str], *, path: str, lead: str, now: float) -> str | None:
    """SHA-256, in hex, of the body that the lead signed for this call; None where its signature is not there.

    It takes the headers alone, so that nobody else's body need be read.
    """
    moment, body = headers.get(TIME, ""), headers.get(BODY, "")
    try:
        age = now - float(moment)
    except ValueError:
        return None
    if not (math.isfinite(age) and abs(age) <= TOLERANCE_S):
        return None
    return body if is_signed(lead, CALL, _message(path, moment, body), headers.get(SIGNATURE, "")) else None


def _message(path: str, moment: str, body: str) -> bytes:
    return f"{path}\n{moment}\n{body}".encode()
