"""Long polling: the server answers a site's call as soon as the lead has a question for the site.

Asking Flower every second would cost the server as much as a round, and the site would still learn of questions late.
Long polling only affects speed: a site still asks Flower itself, after each such answer and from time to time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

import httpx

from fedtune.ops.wire.bounded_http import bound_client, replace_ssl_context
from fedtune.ops.wire.fleet import sign_headers
from fedtune.ops.wire.identity import Tls

WAIT = "/v1/fedtune/wait"
"""Path on the server: `?heard=N` is answered with this node's number of questions, once it differs from N."""
_HELD_S = 15.0
"""How long the server holds a call: short enough to notice a dead connection, and for proxies not to end it."""
_CALL_TIMEOUT_S, _AGAIN_S = 30.0, 10.0


class Questions:
    """Counters of the lead's questions to each node since the start of the server, for use in a single event loop."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._waiting: dict[int, asyncio.Event] = {}
        self._closed = False

    def count_questions(self, nodes: Iterable[int]) -> None:
        """Increment the counters of nodes after Flower has stored their questions, and answer the waiting calls."""
        for node in nodes:
            self._counts[node] += 1
            if event := self._waiting.pop(node, None):
                event.set()

    async def wait_for_count(self, node: int, *, heard: int) -> int:
        """Return the node's number of questions as soon as it differs from `heard`, or after a timeout of some
        seconds.
        """
        if self._counts[node] == heard and not self._closed:
            event = self._waiting.setdefault(node, asyncio.Event())
            with suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), _HELD_S)
        return self._counts[node]

    def close(self) -> None:
        """Answer all held calls and hold no further calls."""
        self._closed = True
        for event in self._waiting.values():
            event.set()


class Bell:
    """Thread of a site that long-polls the server and sets an event when there is a question.

    Attributes:
        rung: the event; the thread that handles questions clears it.
        works: whether the server answered the last call.
    """

    def __init__(self, server: str, tls: Tls, rung: threading.Event) -> None:
        self.rung, self.works = rung, False
        self._address, self._tls = f"https://{server}{WAIT}", tls
        self._client = httpx.Client(verify=tls.create_client_context(), timeout=_CALL_TIMEOUT_S)
        bound_client(self._client)
        self._stop = threading.Event()
        threading.Thread(target=self._listen, name="bell", daemon=True).start()

    def reload_certificate(self) -> None:
        """Use the kit's current certificate in new connections."""
        replace_ssl_context(self._client, self._tls.create_client_context())

    def close(self) -> None:
        """Stop after the current call."""
        self._stop.set()

    def _listen(self) -> None:
        heard = -1  # so that the first answer comes at once
        with self._client as client:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    answer = client.get(self._address, params={"heard": heard}, headers=sign_headers(self._tls))
                    count = int(answer.raise_for_status().json()["questions"])
                except Exception:  # the thread that asks Flower meets the same error, and reports it
                    self.works = False
                    self._stop.wait(_AGAIN_S)
                    continue
                self.works = True
                if count != heard:
                    self.rung.set()
                elif time.monotonic() - began < _HELD_S / 2:  # a server that does not hold calls
                    self._stop.wait(_AGAIN_S)
                heard = count
