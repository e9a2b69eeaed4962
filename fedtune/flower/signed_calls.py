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
TIME, SIGNATURE = "fedtune-time", "fedtune-signature"
TOLERANCE_S = 120.0
"""How far the clocks of lead and server may differ; a signature is good for so long."""


class LeadSignature:
    """Signs each of a Flower client's calls."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        request = context.request
        moment = repr(time.time())
        signature = self._key.sign(CALL, _message(request.url.path, moment, request.read()))
        add_headers(request, {TIME: moment, SIGNATURE: signature})
        return call_next(context)


def is_from_lead(headers: Mapping[str, str], *, path: str, body: bytes, lead: str, now: float) -> bool:
    """Whether the holder of the public key `lead` made this call within two minutes of `now` (seconds since 1970)."""
    moment = headers.get(TIME, "")
    try:
        age = now - float(moment)
    except ValueError:
        return False
    if not (math.isfinite(age) and abs(age) <= TOLERANCE_S):
        return False
    return is_signed(lead, CALL, _message(path, moment, body), headers.get(SIGNATURE, ""))


def _message(path: str, moment: str, body: bytes) -> bytes:
    return f"{path}\n{moment}\n{hashlib.sha256(body).hexdigest()}".encode()
