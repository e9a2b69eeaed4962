"""What may reach the server's Flower: the few calls of a registered site, and the lead's signed ones."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from fedtune.flower.fleet import HELLO
from fedtune.flower.signed_calls import body_of_lead

log = logging.getLogger(__name__)

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
"""What a site needs.  Not among them: registering itself, and fetching the app bundle."""
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
_MOST_BYTES = 1 << 30
"""Of one call's body, from whoever may call at all."""
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """A site as the server knows it.

    Attributes:
        node_key: PEM of its connection key's public half.
        revoked: it was, and is no longer, a member.
    """

    site: str
    node_key: bytes
    revoked: bool


Roster = Callable[[], Sequence[Registered]]
"""The sites as they stand when it is called."""


class Gate:
    """ASGI middleware that answers everything with 404 but what sites and the lead need."""

    def __init__(self, app: Asgi, *, lead: str, roster: Roster) -> None:
        self._app, self._lead, self._roster = app, lead, roster

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            return
        elif path in _SITE_CALLS:
            await self._site_call(scope, receive, send)
        elif path in _LEAD_CALLS:
            await self._lead_call(scope, receive, send)
        elif path == HELLO:
            await _answer(send, *_hello(_headers(scope), self._roster))
        else:
            await _answer(send, 404, {"reason": "no such call"})

    async def _site_call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Flower authenticates it again; but only after it has read a body, which a revoked site may make large."""
        status, about = _hello(_headers(scope), self._roster)
        if status == 200:
            await self._app(scope, _limited(receive), send)
        else:
            await _answer(send, 401, about)

    async def _lead_call(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        signed = body_of_lead(_headers(scope), path=path, lead=self._lead, now=time.time())
        body = await _body(_limited(receive)) if signed else None
        if body is None or hashlib.sha256(body).hexdigest() != signed:
            log.warning("a call to %s without the lead's signature", path)
            await _answer(send, 401, {"reason": "not signed by the lead, or its clock is wrong"})
            return
        given = False

        async def again() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


def _hello(headers: dict[str, str], roster: Roster) -> tuple[int, dict[str, object]]:
    """Status and content of the answer to who asks how the server knows it."""
    try:
        key = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = base64.b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        moment = headers[TIMESTAMP_HEADER]
        age = (now() - datetime.datetime.fromisoformat(moment)).total_seconds()
        signed = verify_signature(bytes_to_public_key(key), moment.encode("ascii"), signature)
    except Exception:  # a key of another kind is an AttributeError, an unknown curve cryptography's own
        return 401, {"reason": "malformed"}
    if not signed:
        return 401, {"reason": "wrong signature"}
    if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE:
        return 403, {"reason": f"its clock is {abs(age):.0f} s {'behind' if age > 0 else 'ahead'}"}
    known = [member for member in roster() if member.node_key == key]
    if not known:
        return 403, {"reason": "unknown"}
    if known[0].revoked:
        return 403, {"reason": "revoked"}
    return 200, {"site": known[0].site, "time": time.time()}


def _limited(receive: Receive) -> Receive:
    """A caller that sends too much is taken to have hung up."""
    left = _MOST_BYTES

    async def limited() -> MutableMapping[str, Any]:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return limited


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):  # nor after a hang-up
            return b"".join(parts)


async def _answer(send: Send, status: int, content: dict[str, object]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
