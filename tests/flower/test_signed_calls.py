"""A lead's calls: exactly this path, this body, about now, by this key."""

import hashlib
import math
import time
from typing import Any

import httpx
import pytest
from flwr.supercore.protobuf.client import ProtobufRequestContext
from hypothesis import given
from hypothesis import strategies as st

from fedtune.ops.wire.identity import (
    BODY,
    SIGNATURE,
    TIME,
    TOLERANCE_S,
    LeadSignature,
    NotAllowed,
    SeenCalls,
    _message,
    body_of_lead,
)
from fedtune.privacy.keys import SigningKey

from ..privacy.builders import make_key

KEY, OTHER = make_key(1), make_key(2)
NOW = 1.8e9


def is_from_lead(headers: Any, *, path: str, body: bytes, lead: str, now: float) -> bool:
    """As the gate asks it, which has the headers before it has read the body."""
    return body_of_lead(headers, path=path, lead=lead, now=now) == hashlib.sha256(body).hexdigest()


def headers_of(
    path: str, body: bytes, *, moment: str = repr(NOW), key: SigningKey = KEY, purpose: str = "call"
) -> dict[str, str]:
    digest = hashlib.sha256(body).hexdigest()
    return {TIME: moment, BODY: digest, SIGNATURE: key.sign(purpose, _message(path, moment, digest))}


def accepted(headers: dict[str, str], *, path: str = "/p", body: bytes = b"b", now: float = NOW) -> bool:
    return is_from_lead(headers, path=path, body=body, lead=KEY.public, now=now)


def test_a_client_s_call_carries_its_signature() -> None:
    sent: list[httpx.Request] = []

    def transport(context: ProtobufRequestContext) -> httpx.Response:
        sent.append(context.request)
        return httpx.Response(200)

    request = httpx.Request("POST", "https://server:1/v1/control/start-run?x=1", content=b"body")
    context: Any = ProtobufRequestContext(rpc_method="", message=None, request=request)  # type: ignore[arg-type]
    LeadSignature(KEY).intercept(context, transport)
    headers = dict(sent[0].headers)
    assert sent[0].read() == b"body"
    for path, right in (("/v1/control/start-run", True), ("/v1/control/stop-run", False)):
        assert is_from_lead(headers, path=path, body=b"body", lead=KEY.public, now=time.time()) is right


@given(path=st.text(max_size=20), body=st.binary(max_size=50), other=st.binary(max_size=50))
def test_any_other_body_path_time_or_key_is_refused(path: str, body: bytes, other: bytes) -> None:
    right = headers_of(path, body)
    assert accepted(right, path=path, body=body)
    assert accepted(right, path=path, body=other) is (other == body)
    assert not accepted(right, path=path + "/", body=body)
    assert not accepted(right | {TIME: repr(NOW + 1)}, path=path, body=body)
    assert not accepted(headers_of(path, body, key=OTHER), path=path, body=body)
    assert not is_from_lead(right, path=path, body=body, lead=OTHER.public, now=NOW)
    # Who swaps the digest with the body does not hold the key.
    assert not accepted(right | {BODY: hashlib.sha256(b"x" + body).hexdigest()}, path=path, body=b"x" + body)


@pytest.mark.parametrize("age", [0.0, TOLERANCE_S, 1.5, TOLERANCE_S + 1, 86400.0, 1e300])
def test_clocks_may_differ_a_little_and_a_call_played_again_later_is_refused(age: float) -> None:
    for now in (NOW + age, NOW - age):
        assert accepted(headers_of("/p", b"b"), now=now) is (age <= TOLERANCE_S)


@pytest.mark.parametrize("moment", ["nan", "inf", "-inf", "", "now", "0x7", "1e999", "1,8", "\u0661" * 10])
def test_a_time_that_is_none_is_refused_though_it_was_signed(moment: str) -> None:
    assert not accepted(headers_of("/p", b"b", moment=moment))
    assert not accepted(headers_of("/p", b"b", moment=moment), now=math.inf)


def test_missing_headers_are_refused() -> None:
    right = headers_of("/p", b"b")
    for name in (TIME, BODY, SIGNATURE):
        assert not accepted({key: value for key, value in right.items() if key != name})
    assert not accepted({})
    assert not accepted(right | {SIGNATURE: right[SIGNATURE].upper()}), "a signature has one spelling"
    spelt = right | {BODY: right[BODY].upper()}
    assert body_of_lead(spelt, path="/p", lead=KEY.public, now=NOW) is None, "and so has a digest"


def test_a_signature_for_another_purpose_is_refused() -> None:
    # What a lead signed for a site must not start a run at the server.
    assert accepted(headers_of("/p", b"b", purpose="call"))
    for purpose in ("round request", "end of run", ""):
        assert not accepted(headers_of("/p", b"b", purpose=purpose))
    moved = headers_of(f"/p\n{NOW!r}", b"b", moment=repr(NOW))
    assert not accepted(moved, path="/p"), "lines cannot be moved between path and time"


def test_a_signature_passes_once_while_it_is_good_and_few_are_remembered() -> None:
    seen = SeenCalls(most=3)
    calls = [headers_of("/p", b"b", moment=repr(NOW + number)) for number in range(4)]
    for call in calls[:3]:
        seen.take(call, now=NOW)
    with pytest.raises(NotAllowed) as used:
        seen.take(calls[1], now=NOW + TOLERANCE_S)
    assert used.value.status == 401
    # A lead that calls too often is told to wait, as by a server that has no time; nothing is forgotten too early.
    with pytest.raises(NotAllowed) as full:
        seen.take(calls[3], now=NOW)
    assert full.value.status == 503
    seen.take(calls[3], now=NOW + TOLERANCE_S + 1)
