"""ASGI gate in front of the server's Flower app: an allowlist for calls of registered sites and signed calls of the
lead.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from fedtune.flower.internals import PROTOBUF_MEDIA_TYPE, asymmetric, constant, core, now
from fedtune.ops.wire.audit_log import AuditLog, Event
from fedtune.ops.wire.fleet import HELLO
from fedtune.ops.wire.identity import CallRefused, SeenCalls, verify_body_hash
from fedtune.ops.wire.waiting import WAIT, Questions

if TYPE_CHECKING:  # SQLAlchemy takes time to import
    from fedtune.ops.kits.members import Member
    from fedtune.ops.wire.site_calls import SiteCalls

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY_S, _BODY_BYTES_A_SECOND = 30.0, 16 << 10  # time limit of a body: a constant, plus time per received byte

_SITE_CALLS = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "pull-object",
        "push-object",
        "confirm-message-received",
    )
)
"""The Fleet calls that a site may make; registering a node and fetching the app bundle are excluded."""
_LEAD_CALLS = frozenset(
    {"/v1/control/start-run", "/v1/control/stop-run"}
    | {
        f"/v1/runtime/{call}"
        for call in (
            "acquire-task",
            "send-task-heartbeat",
            "pull-task-input",
            "push-task-output",
            "get-nodes",
            "push-messages",
            "pull-messages",
            "push-object",
            "pull-object",
            "confirm-message-received",
        )
    }
)
_PUSH_QUESTIONS, _PULL_ANSWERS = "/v1/runtime/push-messages", "/v1/runtime/pull-messages"
_OF_RUNS: dict[str, Event] = {
    "/v1/control/start-run": "run started",
    "/v1/control/stop-run": "run ended",
    "/v1/runtime/push-task-output": "run ended",
}
_LEAD_BYTES = 1 << 30  # maximum size of the body of a lead's call
_UNSIGNED = "not signed by the lead, or its clock is wrong"
_MAX_DIGITS = 18
PEER = "fedtune peer"  # key of the `Peer` in a scope's state


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """The client at the other end of a connection, authenticated by TLS."""

    address: str  # without the port
    certificate: str  # the common name of the certificate
    key: bytes  # the public key of the certificate in PEM format


@dataclass(kw_only=True, slots=True)
class Traffic:
    """Traffic counters since the start of the server.

    Only the server's event loop writes them; any thread may read them.
    """

    began: float = field(default_factory=time.time)  # Unix time of the start of the server
    received: int = 0  # bytes in the bodies of calls
    sent: int = 0  # bytes in the bodies of answers
    waiting: int = 0  # number of long-polling calls that are waiting for a question of the lead
    heard: dict[str, float] = field(default_factory=dict)  # site -> Unix time of its last accepted call
    # public key of a certificate -> number of open connections
    connections: Counter[bytes] = field(default_factory=Counter)

    def count_bytes(self, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Wrap `receive` and `send` to count the bytes of all bodies."""

        async def receive_counted() -> MutableMapping[str, Any]:
            message = await receive()
            self.received += len(message.get("body", b""))
            return message

        async def send_counted(message: MutableMapping[str, Any]) -> None:
            self.sent += len(message.get("body", b""))
            await send(message)

        return receive_counted, send_counted


Roster = Callable[[], Sequence["Member"]]  # returns the members in the current roster


class Gate:
    """ASGI middleware that answers 404 to all requests except an allowlist of calls by sites and the lead.

    Args:
        app: Flower's application.
        lead: the public key of the lead, who may start runs.
        roster: returns the current members.
        rules: the validator of sites' calls.
        audit: the log of runs and refused calls.
        traffic: the counters to update.
    """

    def __init__(
        self,
        app: Asgi,
        *,
        lead: str,
        roster: Roster,
        rules: SiteCalls,
        audit: AuditLog,
        traffic: Traffic | None = None,
    ) -> None:
        self._app, self._lead, self._roster, self._rules, self._audit = app, lead, roster, rules, audit
        self._traffic = traffic or Traffic()
        self._seen, self._questions = SeenCalls(), Questions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return
        path = scope.get("path", "")
        receive, send = self._traffic.count_bytes(receive, send)
        try:
            if path in _SITE_CALLS:
                await self._handle_site_call(scope, receive, send)
            elif path in _LEAD_CALLS:
                await self._handle_lead_call(scope, receive, send)
            elif path == WAIT:
                await self._handle_wait_call(scope, send)
            elif path == HELLO:
                site = self._authenticate_member(map_headers(scope), _read_peer(scope)).site
                await send_json(send, 200, {"site": site, "time": time.time()})
            else:
                raise CallRefused(404, "no such call")
        except CallRefused as refusal:
            self._log_refusal(scope, refusal)
            await send_json(send, refusal.status, {"reason": refusal.reason})

    async def _handle_wait_call(self, scope: Scope, send: Send) -> None:
        """Handle a long-polling call, which waits until the lead has a question for the site; see `waiting.py`."""
        member = self._authenticate_member(map_headers(scope), _read_peer(scope))
        try:
            ((name, heard),) = parse_qsl(scope["query_string"].decode("ascii"), strict_parsing=True)
            number = int(heard[:_MAX_DIGITS])
        except ValueError:
            name, number = "", 0
        if name != "heard":
            raise CallRefused(400, "malformed")
        if (node := await asyncio.to_thread(self._rules.find_node, member.node_key)) is None:
            raise CallRefused(403, "unknown")
        self._traffic.waiting += 1
        try:
            count = await self._questions.wait_for_count(node, heard=number)
        finally:
            self._traffic.waiting -= 1
        await send_json(send, 200, {"questions": count})

    def close(self) -> None:
        """Answer all waiting long-polling calls before the server shuts down."""
        self._questions.close()

    async def _handle_site_call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authenticate and validate a site's call, and forward it to Flower.

        Flower also authenticates the call, but only after reading its body, which could be large.
        """
        headers, path = map_headers(scope), scope["path"]
        try:
            member = self._authenticate_member(headers, _read_peer(scope))
        except CallRefused as refusal:
            raise CallRefused(401, refusal.reason) from None
        check_call_format(scope, headers)
        body = await read_body(receive, headers, most_bytes=self._rules.get_max_body_bytes(path))
        await asyncio.to_thread(self._rules.check_call, path, member.node_key, body)
        await self._app(normalize_scope(scope, headers), replay_body(body, receive), send)

    async def _handle_lead_call(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path, peer = map_headers(scope), scope["path"], _read_peer(scope)
        body = await self._read_signed_body(scope, receive)
        check_call_format(scope, headers)
        if path in _OF_RUNS:
            self._audit.log_event(_OF_RUNS[path], **self._describe_peer(peer))
        nodes: list[int] = []
        if path == _PUSH_QUESTIONS:
            nodes = await asyncio.to_thread(self._rules.register_questions, body)
        if path == _PULL_ANSWERS:
            body = await asyncio.to_thread(self._rules.keep_complete_answers, body)
        await self._app(normalize_scope(scope, headers), replay_body(body, receive), send)
        self._questions.count_questions(nodes)

    async def _read_signed_body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the body of a call and verify the lead's signature.

        Raises:
            CallRefused: the lead's signature is missing, covers another body or was used before, or the call came over
                a site's connection.
        """
        headers, path, peer = map_headers(scope), scope["path"], _read_peer(scope)
        signed = verify_body_hash(headers, path=path, lead=self._lead, now=time.time())
        if signed is None:
            raise CallRefused(401, _UNSIGNED)
        if peer is not None and self._find_member_by_key(peer.key):
            raise CallRefused(401, f"{_UNSIGNED}; the connection belongs to a site")
        self._seen.check_unused(headers)  # before reading the body, which may be large
        body = await read_body(receive, headers, most_bytes=_LEAD_BYTES)
        if hashlib.sha256(body).hexdigest() != signed:
            raise CallRefused(401, _UNSIGNED)
        self._seen.use_signature(headers, now=time.time())
        return body

    def _authenticate_member(self, headers: dict[str, str], peer: Peer | None) -> Member:
        """Authenticate the member that makes a call over its own connection.

        Raises:
            CallRefused: the caller is not a member, or was revoked.
        """
        try:
            key = base64.b64decode(headers[core.FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
            signature = base64.b64decode(headers[core.FLEET_HTTP_SIGNATURE_HEADER], validate=True)
            moment = headers[constant.TIMESTAMP_HEADER]
            age = (now() - datetime.datetime.fromisoformat(moment)).total_seconds()
            signed = asymmetric.verify_signature(asymmetric.bytes_to_public_key(key), moment.encode("ascii"), signature)
        except Exception:  # another type of key raises AttributeError, an unknown curve an error of cryptography
            raise CallRefused(401, "malformed") from None
        if not signed:
            raise CallRefused(401, "wrong signature")
        if not -constant.SYSTEM_TIME_TOLERANCE < age < constant.TIMESTAMP_TOLERANCE:
            raise CallRefused(403, f"its clock is {abs(age):.0f} s {'behind' if age > 0 else 'ahead'}")
        if (known := self._find_member_by_key(key)) is None:
            raise CallRefused(403, "unknown")
        if known.revoked:
            raise CallRefused(403, "revoked")
        if peer is None or peer.key != key:
            # A site signs only the time, so a party that has seen the signature must not be able to reuse it.
            raise CallRefused(401, "signed with a key other than that of the connection's certificate")
        self._traffic.heard[known.site] = time.time()
        return known

    def _find_member_by_key(self, key: bytes) -> Member | None:
        """Return the member with a connection key, including revoked members; None if there is none."""
        return next((member for member in self._roster() if member.node_key == key), None)

    def find_member_name(self, key: bytes) -> str:
        """Return the name of the member with a connection key; an empty string if there is none."""
        member = self._find_member_by_key(key)
        return member.site if member else ""

    def _log_refusal(self, scope: Scope, refusal: CallRefused) -> None:
        path, peer = scope.get("path", ""), _read_peer(scope)
        event: Event = "call refused"
        if path in _LEAD_CALLS:
            event = "lead's call refused"
        elif path in _SITE_CALLS and refusal.status != 401:
            event = "message refused"
        reason = "its clock is wrong" if refusal.reason.startswith("its clock") else refusal.reason
        # Omit unknown paths, because a caller could choose arbitrarily many of them to fill the log.
        named = path if path in {HELLO, WAIT} | _SITE_CALLS | _LEAD_CALLS else ""
        about = {"path": named, "reason": reason, **self._describe_peer(peer)}
        if self._audit.log_event(event, **about):
            log.warning("%s: %s", event, reason, extra=about)

    def _describe_peer(self, peer: Peer | None) -> dict[str, str]:
        if peer is None:
            return {}
        return {"address": peer.address, "certificate": peer.certificate, "member": self.find_member_name(peer.key)}


def _read_peer(scope: Scope) -> Peer | None:
    peer = scope.get("state", {}).get(PEER)
    return peer if isinstance(peer, Peer) else None


def check_call_format(scope: Scope, headers: dict[str, str]) -> None:
    """Check that a call is an uncompressed POST in Flower's format.

    Raises:
        CallRefused: the method, content type or encoding is different.
    """
    if scope.get("method") != "POST":
        raise CallRefused(405, "the method must be POST")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != PROTOBUF_MEDIA_TYPE:
        raise CallRefused(415, "the content type must be Flower's protobuf")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise CallRefused(415, "the body must not be compressed")


def map_headers(scope: Scope) -> dict[str, str]:
    """Return the headers as a dict; if a name occurs several times, the last value is used."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def normalize_scope(scope: Scope, headers: dict[str, str]) -> Scope:
    """Normalize the headers of a call, so that Flower interprets the call in the same way as the gate.

    Flower uses the first of several headers with the same name.  It also derives the type of a call from its URL, which
    in older versions of Starlette contains the host name that the caller sent.
    """
    kept = {**headers, "host": "server"}
    for name in ("content-length", "transfer-encoding"):
        kept.pop(name, None)
    lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept.items()]
    return {**scope, "headers": lines, "query_string": b""}


async def read_body(receive: Receive, headers: dict[str, str], *, most_bytes: int) -> bytes:
    """Read the whole body of a call within limits on time and size.

    Raises:
        CallRefused: the body is too slow or too large, or the caller hung up.
    """
    announced = headers.get("content-length", "0")
    if not (announced.isascii() and announced.isdigit()) or int(announced[:20]) > most_bytes:
        raise CallRefused(413, "too large")
    parts, size, began = [], 0, asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(_BODY_S) as limit:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise CallRefused(400, "hung up")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most_bytes:
                    raise CallRefused(413, "too large")
                if not message.get("more_body"):
                    return b"".join(parts)
                limit.reschedule(began + _BODY_S + size / _BODY_BYTES_A_SECOND)
    except TimeoutError:
        raise CallRefused(408, "too slow") from None


def replay_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` function that yields `body` first and then the messages of `receive`."""
    delivered = False

    async def replay_body() -> MutableMapping[str, Any]:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay_body


async def send_json(send: Send, status: int, content: dict[str, object]) -> None:
    """Send a JSON response."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status >= 400:  # do not wait for the body of a refused call
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
