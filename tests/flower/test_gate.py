"""The routes of a real Flower server that are reachable from outside."""

import asyncio
import contextlib
import hashlib
import math
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from hypothesis import given
from hypothesis import strategies as st

from fedtune.ops.files import make_zip
from fedtune.ops.wire import gate, identity
from fedtune.ops.wire.fleet import HELLO
from fedtune.ops.wire.identity import (
    BODY,
    CALL,
    SIGNATURE,
    TIME,
    TOLERANCE_S,
    CallRefused,
    _build_signed_message,
    verify_body_hash,
)
from fedtune.ops.wire.lead_session import _BUNDLE
from fedtune.privacy.keys import SigningKey

from ..privacy.builders import make_key, stranger_key
from .certificates import LOOPBACK
from .loopback import Loopback
from .member import Member, sign_headers

CLOSED = {"reason": "no such call"}
START = "/v1/control/start-run"
RUN = StartRunRequest(fab=Fab(content=make_zip({"pyproject.toml": _BUNDLE}, moment=now()))).SerializeToString()
PULL = PullObjectRequest(node=Node(node_id=1), run_id=1, object_id="ab" * 32).SerializeToString()


@pytest.fixture
def call_gate(network: Loopback) -> Iterator[Any]:
    options = {"base_url": f"https://{network.address}", "timeout": 20}
    with contextlib.ExitStack() as stack:
        yield lambda tls: stack.enter_context(httpx.Client(verify=tls.create_client_context(), **options))


def sign_lead_headers(key: SigningKey, path: str, body: bytes) -> dict[str, str]:
    moment, digest = repr(time.time()), hashlib.sha256(body).hexdigest()
    signature = key.sign(CALL, _build_signed_message(path, moment, digest))
    return {"content-type": PROTOBUF_MEDIA_TYPE, TIME: moment, BODY: digest, SIGNATURE: signature}


def test_all_other_flower_routes_are_closed(network: Loopback, list_flower_routes: Any, call_gate: Any) -> None:
    closed = {(m, path) for m, path in list_flower_routes if path not in gate._SITE_CALLS | gate._LEAD_CALLS}
    for path in (
        *("/docs", "/openapi.json", "/health", "/v1/fleet/register-node", "/v1/fleet/unregister-node"),
        *("/v1/fleet/get-fab", "/v1/fleet/get-run", "/v1/control/list-runs", "/v1/control/register-node"),
        *("/v1/control/list-nodes", "/v1/control/pull-artifacts", "/v1/runtime/create-task"),
    ):
        assert any(path == other for _, other in closed), f"{path} is not a closed route"
    assert len(closed) > 50
    site, lead = call_gate(network.tls["a"]), call_gate(network.lead_tls)
    for method, path in sorted(closed):
        for client, headers in (
            (site, sign_headers(network.tls["a"])),
            (lead, sign_lead_headers(network.lead_key, path, b"")),
        ):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 404, (method, path)
            assert method == "HEAD" or answer.json() == CLOSED, "the gate must answer, not Flower"


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/v1/fleet/pull-messages/", "//v1/fleet/pull-messages", "/v1/fleet/%2e%2e/control/start-run"),
        *("/V1/fleet/pull-messages", "/v1/control/start-run;x", "/v1/fedtune/hello/", "/v1/fedtune", "/favicon.ico"),
    ],
)
def test_paths_similar_to_allowed_calls_are_closed(network: Loopback, call_gate: Any, path: str) -> None:
    headers = sign_lead_headers(network.lead_key, path, b"")
    raw = httpx.URL(f"https://{network.address}").copy_with(raw_path=path.encode())
    assert call_gate(network.lead_tls).post(raw, headers=headers).json() == CLOSED


def test_lead_calls_require_the_signature_of_the_lead(network: Loopback, call_gate: Any) -> None:
    """Other invalid calls are tested below."""
    runs = network.rows("SELECT count(*) FROM run")
    for certificate in (network.lead_tls, network.tls["a"]):
        client = call_gate(certificate)
        for path in sorted(gate._LEAD_CALLS):
            right = sign_lead_headers(network.lead_key, path, RUN)
            for reason, headers, sent in (
                ("unsigned", {"content-type": PROTOBUF_MEDIA_TYPE}, RUN),
                ("a site's", sign_headers(network.tls["a"]), RUN),
                ("another key's", sign_lead_headers(stranger_key, path, RUN), RUN),
                ("of another body", right, RUN + b"\0"),
            ):
                answer = client.post(path, content=sent, headers=headers)
                assert answer.status_code == 401, (path, reason)
                assert "not signed by the lead" in answer.text
    assert network.rows("SELECT count(*) FROM run") == runs


def test_lead_call_is_accepted_once_and_not_over_a_site_connection(network: Loopback, call_gate: Any) -> None:
    # An observer, such as a proxy that terminates TLS, could otherwise replay it for two minutes.
    lead, site = call_gate(network.lead_tls), call_gate(network.tls["a"])
    runs = network.rows("SELECT count(*) FROM run")[0][0]
    headers = sign_lead_headers(network.lead_key, START, RUN)
    stolen = site.post(START, content=RUN, headers=headers)
    assert (stolen.status_code, lead.post(START, content=RUN, headers=headers).status_code) == (401, 200)
    for client in (lead, site):
        assert client.post(START, content=RUN, headers=headers).status_code == 401
    assert network.rows("SELECT count(*) FROM run") == [(runs + 1,)]
    repeated = lead.post(START, content=RUN, headers=sign_lead_headers(network.lead_key, START, RUN))
    assert repeated.status_code == 200, "a retry must be signed again"
    audited = {(line["event"], line.get("reason"), line.get("member")) for line in network.audit()}
    assert ("lead's call refused", "the lead's signature was used before", None) in audited
    assert ("lead's call refused", f"{gate._UNSIGNED}; the connection belongs to a site", "a") in audited


def test_site_signature_is_valid_only_on_its_own_connection(network: Loopback, call_gate: Any) -> None:
    # The signature covers only the time: an observer could use it for any call within a minute.
    stolen = sign_headers(network.tls["a"])
    answer = call_gate(network.tls["b"]).get(HELLO, headers=stolen)
    assert (answer.status_code, answer.json()["reason"]) == (
        401,
        "signed with a key other than that of the connection's certificate",
    )
    assert call_gate(network.tls["a"]).get(HELLO, headers=stolen).status_code == 200


def test_request_body_is_limited_in_time_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_BODY_S", 0.1)

    async def send_slowly() -> dict[str, Any]:
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"x", "more_body": True}

    pour = AsyncMock(return_value={"type": "http.request", "body": b"x" * 600, "more_body": True})
    unread_body = AsyncMock(side_effect=AssertionError("the body must not be read"))
    large = [(unread_body, {"content-length": length}, 413) for length in ("1001", "9" * 5000, "-1")]
    for receive, headers, status in ((send_slowly, {}, 408), (pour, {}, 413), *large):
        with pytest.raises(CallRefused) as refused:
            asyncio.run(gate.read_body(receive, headers, most_bytes=1000))
        assert refused.value.status == status


def test_site_calls_require_the_signature_of_the_site(network: Loopback, call_gate: Any) -> None:
    client = call_gate(network.tls["a"])
    for path in sorted(gate._SITE_CALLS):
        for reason, headers in (
            ("unsigned", {"content-type": PROTOBUF_MEDIA_TYPE}),
            ("the lead's", sign_lead_headers(network.lead_key, path, PULL)),
            ("of a key that nobody knows", sign_headers(network.lead_tls)),
            ("of another node's number", sign_headers(network.tls["a"])),
            ("old", sign_headers(network.tls["a"], moment="2020-01-01T00:00:00+00:00")),
            ("unsigned, and not what Flower understands", {"content-type": "application/json"}),
        ):
            answer = client.post(path, content=PULL, headers=headers)
            assert answer.status_code in (400, 401, 412), (path, reason, answer.text)
        # Flower checks a signature only for calls that it can parse.
        right = sign_headers(network.tls["a"])
        assert client.post(path, content=PULL, headers=right | {"content-type": "text/plain"}).status_code == 415
        assert client.get(path, headers=right).status_code == 405


@pytest.mark.parametrize("host", ["x/v1/runtime/pull-object?", "x/v1/runtime/pull-object#", "x/nowhere?", "a@b:1"])
def test_forged_host_header_does_not_bypass_the_signature(network: Loopback, call_gate: Any, host: str) -> None:
    # Flower uses the request's URL, which contains the host name that the caller sends.
    headers = {"content-type": PROTOBUF_MEDIA_TYPE, "host": host}
    answer = call_gate(network.tls["b"]).post("/v1/fleet/pull-object", content=PULL, headers=headers)
    assert answer.status_code in (400, 401)


@pytest.mark.parametrize("host", ["x/v1/runtime/push-messages?", "x/v1/runtime/get-nodes#", "x/nowhere?"])
def test_forged_host_header_does_not_change_the_route(network: Loopback, host: str) -> None:
    # With a member's own signature, an older Starlette would accept the bytes as another, unchecked kind of message.
    member = Member(network, "a")
    member.activate()
    try:
        answer = member.post("pull-messages", PullMessagesRequest(node=member.node), host=host)
        assert answer.status_code == 200, answer.text
    finally:
        member.leave()


@pytest.mark.parametrize("path", ["/docs", "/v1/fleet/pull-messages", "/v1/control/start-run"])
def test_websocket_upgrade_is_refused(network: Loopback, path: str) -> None:
    context = network.tls["a"].create_client_context()
    request = (
        f"GET {path} HTTP/1.1\r\nHost: {network.address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    with (
        socket.create_connection((LOOPBACK, network.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=LOOPBACK) as line,
    ):
        line.sendall(request.encode())
        try:
            answer = line.recv(200)
        except (ssl.SSLError, ConnectionError):
            answer = b""
    assert b" 101 " not in answer


def test_malformed_greeting_is_refused(network: Loopback, call_gate: Any) -> None:
    client, right = call_gate(network.tls["a"]), sign_headers(network.tls["a"])
    assert client.get(HELLO, headers=right).json()["site"] == "a"
    other = sign_headers(network.tls["b"])
    for reason, headers in (
        ("malformed", {}),
        ("malformed", right | {TIMESTAMP_HEADER: "yesterday"}),
        ("malformed", right | {TIMESTAMP_HEADER: now().replace(tzinfo=None).isoformat()}),
        ("malformed", right | {FLEET_HTTP_PUBLIC_KEY_HEADER: "AAAA"}),
        ("malformed", right | {FLEET_HTTP_SIGNATURE_HEADER: "no base64!"}),
        ("wrong signature", right | {FLEET_HTTP_SIGNATURE_HEADER: other[FLEET_HTTP_SIGNATURE_HEADER]}),
        ("wrong signature", right | {FLEET_HTTP_PUBLIC_KEY_HEADER: other[FLEET_HTTP_PUBLIC_KEY_HEADER]}),
        ("wrong signature", right | {TIMESTAMP_HEADER: now().isoformat()}),
    ):
        answer = client.get(HELLO, headers=headers)
        assert (answer.status_code, answer.json()) == (401, {"reason": reason})


def test_server_does_not_reveal_its_software(network: Loopback, call_gate: Any) -> None:
    for path in ("/", HELLO, "/v1/control/start-run"):
        answer = call_gate(network.tls["a"]).post(path)
        assert "server" not in answer.headers
        assert not {"uvicorn", "flwr", "python"} & set(answer.text.lower().split())


KEY, OTHER = make_key(1), make_key(2)
NOW = 1.8e9


def sign_lead_call(
    path: str, body: bytes, *, moment: str = repr(NOW), key: SigningKey = KEY, purpose: str = "call"
) -> dict[str, str]:
    digest = hashlib.sha256(body).hexdigest()
    return {
        TIME: moment,
        BODY: digest,
        SIGNATURE: key.sign(purpose, identity._build_signed_message(path, moment, digest)),
    }


def accepts_headers(
    headers: Any, *, path: str = "/p", body: bytes = b"b", lead: str = KEY.public, now: float = NOW
) -> bool:
    """Return True if the gate accepts the headers, which it reads before the body."""
    return verify_body_hash(headers, path=path, lead=lead, now=now) == hashlib.sha256(body).hexdigest()


def test_lead_client_signs_its_calls() -> None:
    transport = Mock(return_value=httpx.Response(200))
    request = httpx.Request("POST", "https://server:1/v1/control/start-run?x=1", content=b"body")
    context: Any = ProtobufRequestContext(rpc_method="", message=None, request=request)  # type: ignore[arg-type]
    identity.LeadSignature(KEY).intercept(context, transport)
    sent = transport.call_args.args[0].request
    headers = dict(sent.headers)
    assert sent.read() == b"body"
    for path, right in (("/v1/control/start-run", True), ("/v1/control/stop-run", False)):
        assert accepts_headers(headers, path=path, body=b"body", now=time.time()) is right


@given(path=st.text(max_size=20), body=st.binary(max_size=50), other=st.binary(max_size=50))
def test_changed_body_path_time_or_key_invalidates_the_signature(path: str, body: bytes, other: bytes) -> None:
    headers = sign_lead_call(path, body)
    assert accepts_headers(headers, path=path, body=body)
    assert accepts_headers(headers, path=path, body=other) is (other == body)
    assert not accepts_headers(headers, path=path + "/", body=body)
    assert not accepts_headers(headers | {TIME: repr(NOW + 1)}, path=path, body=body)
    assert not accepts_headers(sign_lead_call(path, body, key=OTHER), path=path, body=body)
    assert not accepts_headers(headers, path=path, body=body, lead=OTHER.public)
    # Replacing the digest with the body does not help without the key.
    assert not accepts_headers(headers | {BODY: hashlib.sha256(b"x" + body).hexdigest()}, path=path, body=b"x" + body)


@pytest.mark.parametrize("age", [0.0, TOLERANCE_S, 1.5, TOLERANCE_S + 1, 86400.0, 1e300])
def test_small_clock_differences_are_tolerated_and_replays_refused(age: float) -> None:
    for moment in (NOW + age, NOW - age):
        assert accepts_headers(sign_lead_call("/p", b"b"), now=moment) is (age <= TOLERANCE_S)


@pytest.mark.parametrize("moment", ["nan", "inf", "-inf", "", "now", "0x7", "1e999", "1,8", "\u0661" * 10])
def test_signed_invalid_time_is_refused(moment: str) -> None:
    assert not accepts_headers(sign_lead_call("/p", b"b", moment=moment))
    assert not accepts_headers(sign_lead_call("/p", b"b", moment=moment), now=math.inf)


def test_missing_headers_are_refused() -> None:
    headers = sign_lead_call("/p", b"b")
    for name in (TIME, BODY, SIGNATURE):
        assert not accepts_headers({key: value for key, value in headers.items() if key != name})
    assert not accepts_headers({})
    assert not accepts_headers(headers | {SIGNATURE: headers[SIGNATURE].upper()}), "a signature must have one spelling"
    spelt = headers | {BODY: headers[BODY].upper()}
    assert verify_body_hash(spelt, path="/p", lead=KEY.public, now=NOW) is None, "a digest must have one spelling"


def test_signature_for_another_purpose_is_refused() -> None:
    # A lead's signature for a site must not start a run at the server.
    assert accepts_headers(sign_lead_call("/p", b"b", purpose="call"))
    for purpose in ("round request", "end of run", ""):
        assert not accepts_headers(sign_lead_call("/p", b"b", purpose=purpose))
    signed = sign_lead_call(f"/p\n{NOW!r}", b"b", moment=repr(NOW))
    assert not accepts_headers(signed, path="/p"), "path and time must be separated"


def test_signature_is_accepted_once_and_the_replay_cache_is_bounded() -> None:
    seen = identity.SeenCalls(most=3)
    calls = [sign_lead_call("/p", b"b", moment=repr(NOW + number)) for number in range(4)]
    for call in calls[:3]:
        seen.use_signature(call, now=NOW)
    with pytest.raises(CallRefused) as used:
        seen.use_signature(calls[1], now=NOW + TOLERANCE_S)
    assert used.value.status == 401
    # A lead that calls too often must wait, as with a busy server; no call is forgotten too early.
    with pytest.raises(CallRefused) as full:
        seen.use_signature(calls[3], now=NOW)
    assert full.value.status == 503
    seen.use_signature(calls[3], now=NOW + TOLERANCE_S + 1)


def test_server_still_serves_after_all_refused_calls(network: Loopback) -> None:
    network.site("a").wait_for("activated")


def test_body_of_a_refused_call_is_not_read(network: Loopback, call_gate: Any) -> None:
    """Otherwise any holder of a certificate could upload gigabytes to the server."""
    sent = 0

    def iter_body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(256):
            sent += 1
            yield bytes(1 << 20)

    for path, headers in (
        ("/v1/runtime/push-object", {"content-type": PROTOBUF_MEDIA_TYPE}),
        (
            "/v1/fleet/push-object",
            sign_headers(network.tls["b"]),
        ),  # not signed with the key of the connection's certificate
    ):
        sent = 0
        with contextlib.suppress(httpx.TransportError):  # the upload is cut off, or answered early
            answer = call_gate(network.tls["a"]).post(path, content=iter_body(), headers=headers)
            assert answer.status_code == 401
        assert sent < 128, path
