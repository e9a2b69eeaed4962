"""The lead's connection to the server: a Flower grid over mutual TLS that recovers from restarts of server and sites.

`RetryingGrid` decides when a question is repeated.  This grid also repeats a question if the server has lost the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx

from fedtune.flower import asking_grid
from fedtune.flower.asking_grid import Pulled, Questions, RetryingGrid
from fedtune.flower.flower_records import count_payload_bytes
from fedtune.flower.internals import Message, inflating
from fedtune.ops.wire.identity import Tls, explain_tls_refusal
from fedtune.ops.wire.lead_session import LeadSession, build_start_error, explain_clock_error
from fedtune.privacy.keys import SigningKey

log = logging.getLogger(__name__)

_SLACK_BYTES = 1 << 20


class RemoteGrid(RetryingGrid):
    """Connection of the lead to its sites.

    Args:
        server: host:port.
        sites: site name -> public connection key in PEM format, as in the roster.
        key: the lead's key, which signs its calls.
        has_new_certificate: returns whether the files of `tls` contain a new certificate; called during an exchange.
        patience_s: maximum time to wait for an unavailable server before the first connection.
        rules: `hear` and `closing` of `RetryingGrid`.
    """

    retryable_errors = (httpx.HTTPError, inflating.ObjectPushError)

    def __init__(
        self,
        server: str,
        tls: Tls,
        *,
        sites: Mapping[str, bytes],
        key: SigningKey,
        has_new_certificate: Callable[[], bool] = lambda: False,
        patience_s: float = 0.0,
        **rules: Any,
    ) -> None:
        super().__init__(sites, **rules)
        self._server, self._tls, self._key = server, tls, key
        self._has_new_certificate = has_new_certificate
        self._session: LeadSession | None = None
        self._patience_s, self._said = patience_s, ""

    def __enter__(self) -> RemoteGrid:
        deadline = time.monotonic() + self._patience_s
        while self._session is None:
            try:
                self._open()
            except httpx.HTTPError as error:
                if not (_is_temporary(error) and time.monotonic() < deadline):
                    raise build_start_error(self._server, error) from error
                self._wait_for_server(error)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _list_nodes(self) -> Mapping[int, Any]:
        if self._has_new_certificate() and self._session is not None:
            self._session.reload_certificate()
        self._open()
        return self._open_session.find_online_sites(self._numbers)

    def _push(self, message: Message) -> str | None:
        return self._open_session.push(message)

    def _pull(self, message_ids: Sequence[str], questions: Questions, *, left_s: float) -> Iterator[Pulled]:
        self._said = ""
        # An answer has about the size of its question: both contain an adapter, or both contain texts.
        asked_bytes = max(count_payload_bytes(question.question.content) for question in questions.values())
        return self._open_session.fetch_answers(message_ids, most_bytes=2 * asked_bytes + _SLACK_BYTES, most_s=left_s)

    def _recover(self, error: Exception, questions: Questions) -> None:
        if not isinstance(error, httpx.HTTPStatusError) or error.response.is_redirect or _is_temporary(error):
            self._wait_for_server(error)
            return
        if self._session is None:
            raise build_start_error(self._server, error) from error
        log.warning("the server lost this run (%s); repeating the open questions", error.response.status_code)
        self._close()
        for question in questions.values():
            question.message_ids.clear()
            question.unsent = None

    @property
    def _open_session(self) -> LeadSession:
        assert self._session is not None, "use the grid as a context manager"
        return self._session

    def _open(self) -> None:
        if self._session is None:
            self._session = LeadSession(self._server, self._tls, self._key)

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _wait_for_server(self, error: Exception) -> None:
        problem = explain_clock_error(error) or f"cannot be reached ({type(error).__name__})"
        if problem != self._said:  # log each problem only once
            log.warning("%s %s; trying again", self._server, problem)
        self._said = problem
        time.sleep(asking_grid.RECONNECT_S)


def _is_temporary(error: httpx.HTTPError) -> bool:
    """Return True if the server is down, failing or has a wrong clock, so that a retry may succeed."""
    if not isinstance(error, httpx.HTTPStatusError):
        return explain_tls_refusal(error) is None
    return error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR or bool(explain_clock_error(error))
