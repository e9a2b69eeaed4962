"""How a site hears of the lead's questions: it waits in a call that the server answers when there is one.

A site that asked Flower every second would cost the server as much as a round does, and learn of a question late.
Nothing but speed depends on this: a site still asks Flower itself, after each such answer and once in a while.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

import httpx

from fedtune.ops.wire.bounded_http import bounded, show
from fedtune.ops.wire.fleet import signed_headers
from fedtune.ops.wire.identity import Tls

WAIT = "/v1/fedtune/wait"
"""Of the server: `?heard=N` is answered with the number of questions to this node once that is not N."""
_HELD_S = 15.0
"""So long the server holds a call: a line that died is noticed soon, and nobody's proxy ends it before."""
_CALL_TIMEOUT_S, _AGAIN_S = 30.0, 10.0


class Questions:
    """The server's count of the lead's questions to each node, since it started; of one event loop."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._waiting: dict[int, asyncio.Event] = {}
        self._closed = False

    def asked(self, nodes: Iterable[int]) -> None:
        """Count one more to each, once Flower has it, and answer those who wait for that."""
        for node in nodes:
            self._counts[node] += 1
            if event := self._waiting.pop(node, None):
                event.set()

    async def count(self, node: int, *, heard: int) -> int:
        """The node's number, as soon as it is not `heard`, or after some seconds."""
        if self._counts[node] == heard and not self._closed:
            event = self._waiting.setdefault(node, asyncio.Event())
            with suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), _HELD_S)
        return self._counts[node]

    def close(self) -> None:
        """Hold nobody any longer."""
        self._closed = True
        for event in self._waiting.values():
            event.set()


class Bell:
    """At a site: an event that is set when the server has a question, by a thread that waits for it.

    Attributes:
        rung: set then; the thread that looks clears it.
    """

    def __init__(self, server: str, tls: Tls, rung: threading.Event) -> None:
        self.rung = rung
        self._address, self._tls = f"https://{server}{WAIT}", tls
        self._client = httpx.Client(verify=tls.client_context(), timeout=_CALL_TIMEOUT_S)
        bounded(self._client)
        self._works, self._stop = False, threading.Event()
        threading.Thread(target=self._listen, name="bell", daemon=True).start()

    @property
    def works(self) -> bool:
        """Whether the server is known to ring it; not so one that is away."""
        return self._works

    def show_certificate(self) -> None:
        """Show the certificate that the kit has now, in connections that are made from here on."""
        show(self._client, self._tls.client_context())

    def close(self) -> None:
        """Wait no longer than the call that is under way."""
        self._stop.set()

    def _listen(self) -> None:
        heard = -1  # so that the first answer comes at once
        with self._client as client:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    answer = client.get(self._address, params={"heard": heard}, headers=signed_headers(self._tls))
                    count = int(answer.raise_for_status().json()["questions"])
                except Exception:  # who asks Flower meets the same trouble, and reports it
                    self._works = False
                    self._stop.wait(_AGAIN_S)
                    continue
                self._works = True
                if count != heard:
                    self.rung.set()
                elif time.monotonic() - began < _HELD_S / 2:  # a server that answers at once, for nothing
                    self._stop.wait(_AGAIN_S)
                heard = count
