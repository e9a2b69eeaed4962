"""One call at the server, as ASGI has it: read within bounds, handed on as it was read, answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from fedtune.flower.signed_calls import NotAllowed

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY_S, _BODY_BYTES_A_SECOND = 30.0, 16 << 10
"""A body may take so long, and longer for what has come of it."""


def check_form(scope: Scope, headers: dict[str, str]) -> None:
    """Pass a call in the form that Flower reads: it authenticates no other, and inflates nothing.

    Raises:
        NotAllowed: it has another.
    """
    if scope.get("method") != "POST":
        raise NotAllowed(405, "not a POST")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != PROTOBUF_MEDIA_TYPE:
        raise NotAllowed(415, "not a message of Flower's")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise NotAllowed(415, "a compressed body")


def headers_of(scope: Scope) -> dict[str, str]:
    """Each header once: the last of its name."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def as_read(scope: Scope, headers: dict[str, str]) -> Scope:
    """The call as it was read here, for Flower to read it the same way.

    Of a header that came twice Flower takes the first; and it takes a call's kind from its URL, in which an older
    Starlette has whatever the caller says that the host's name is.
    """
    kept = {**headers, "host": "server"}
    for name in ("content-length", "transfer-encoding"):
        kept.pop(name, None)
    lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept.items()]
    return {**scope, "headers": lines, "query_string": b""}


async def read_body(receive: Receive, headers: dict[str, str], *, most_bytes: int) -> bytes:
    """A whole body that comes in time.

    Raises:
        NotAllowed: it does not, or it is too large, or the caller hung up.
    """
    announced = headers.get("content-length", "0")
    if not (announced.isascii() and announced.isdigit()) or int(announced[:20]) > most_bytes:
        raise NotAllowed(413, "too large")
    parts, size, began = [], 0, asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(_BODY_S) as limit:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise NotAllowed(400, "hung up")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most_bytes:
                    raise NotAllowed(413, "too large")
                if not message.get("more_body"):
                    return b"".join(parts)
                limit.reschedule(began + _BODY_S + size / _BODY_BYTES_A_SECOND)
    except TimeoutError:
        raise NotAllowed(408, "too slow") from None


def again(body: bytes, receive: Receive) -> Receive:
    """Gives `body`, then what comes."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def answer(send: Send, status: int, content: dict[str, object]) -> None:
    """Answer with JSON."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):  # the rest of the body is not waited for
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
