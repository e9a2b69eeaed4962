"""Long polling: the server answers a site's call as soon as the lead has a question for the site.

Polling Flower every second would load the server as much as a round, and still delay each question.  Long polling only
reduces latency: a site still polls Flower, after each of these answers and at longer intervals.
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
"""Path on the server.  The answer to `?heard=N` is the node's number of questions, sent when it differs from N."""
_HELD_S = 15.0
"""Maximum duration of a long-polling call: short enough to detect dead connections and to avoid proxy timeouts."""
_CALL_TIMEOUT_S, _AGAIN_S = 30.0, 10.0


class Questions:
    """Counters of the lead's questions to each node since the start of the server, for use in a single event loop."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._waiting: dict[int, asyncio.Event] = {}
        self._closed = False

    def count_questions(self, nodes: Iterable[int]) -> None:
        """Increment the counters of `nodes` after Flower has stored their questions, and answer their waiting calls."""
        for node in nodes:
            self._counts[node] += 1
            if event := self._waiting.pop(node, None):
                event.set()

    async def wait_for_count(self, node: int, *, heard: int) -> int:
        """Wait for a number of questions other than `heard`, at most `_HELD_S` seconds; return the number."""
        if self._counts[node] == heard and not self._closed:
            event = self._waiting.setdefault(node, asyncio.Event())
            with suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), _HELD_S)
        return self._counts[node]

    def close(self) -> None:
        """Answer all waiting calls, and answer later calls at once."""
        self._closed = True
        for event in self._waiting.values():
            event.set()


class Bell:
    """Thread of a site that long-polls the server and sets an event when there is a question.

    Attributes:
        rung: the event; the thread that handles questions clears it.
        works: whether the last long-polling call succeeded.
    """

    def __init__(self, server: str, tls: Tls, rung: threading.Event) -> None:
        self.rung, self.works = rung, False
        self._address, self._tls = f"https://{server}{WAIT}", tls
        self._client = httpx.Client(verify=tls.create_client_context(), timeout=_CALL_TIMEOUT_S)
        bound_client(self._client)
        self._stop = threading.Event()
        threading.Thread(target=self._listen, name="bell", daemon=True).start()

    def reload_certificate(self) -> None:
        """Load the kit's current certificate for all new connections."""
        replace_ssl_context(self._client, self._tls.create_client_context())

    def close(self) -> None:
        """Stop the thread after its current call."""
        self._stop.set()

    def _listen(self) -> None:
        heard = -1  # so that the server answers the first call at once
        with self._client as client:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    answer = client.get(self._address, params={"heard": heard}, headers=sign_headers(self._tls))
                    count = int(answer.raise_for_status().json()["questions"])
                except Exception:  # the thread that polls Flower fails with the same error, and reports it
                    self.works = False
                    self._stop.wait(_AGAIN_S)
                    continue
                self.works = True
                if count != heard:
                    self.rung.set()
                elif time.monotonic() - began < _HELD_S / 2:  # the server does not support long polling
                    self._stop.wait(_AGAIN_S)
                heard = count
