"""The lead's end of the line: a Flower grid over mutual TLS whose questions survive restarts at either end.

A question stays open until it is answered or its time is up: it is asked again when its site comes back, or when the
server forgot it.  That is safe, because a site answers the same request twice with the same bytes, charged once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx
from flwr.app import Message

from fedtune.federation.replies import Closing
from fedtune.flower.flower_records import num_bytes
from fedtune.flower.internals import inflating, set_metadata
from fedtune.ops.wire.identity import TOLERANCE_S, Tls, refusal
from fedtune.ops.wire.lead_session import LeadSession, Pulled, clock_of, not_started
from fedtune.privacy.keys import SigningKey
from fedtune.spec import RunError

log = logging.getLogger(__name__)

_POLL_S, _RECONNECT_S, _SAYS_SO_AGAIN_S = 0.2, 1.0, 15.0
_LOST_S = 3.0  # how soon to ask again for an answer that did not come whole
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """The meaning of an answer for the exchange that it belongs to."""

    good: bool  # it is of the kind that was hoped for
    again_s: float | None = None  # seconds after which to ask once more, since it may change; None: it is final
    idle: bool = False  # until it changes, the exchange need not wait for this site


@dataclass
class _Question:
    """The question to one site, until it has answered."""

    question: Message
    message_ids: set[str]  # under which it was asked; an answer to any of them will do
    # when the site had last come online as it was asked; a later one means that it may have forgotten
    activation: str = ""
    # a message that may have reached the server in part: the site waits for the rest of it
    unsent: Message | None = None
    not_before: float = 0.0  # earliest moment, by the monotonic clock, to ask again
    asked: float = 0.0  # by the monotonic clock, when it was asked last
    provisional: Message | None = None  # an answer that asking again may change
    idle: bool = False  # so far it says that nobody needs to wait

    @property
    def has_begun(self) -> bool:
        """The site, asked again, has not said the same again: it works, and may be charged by now."""
        return bool(self.message_ids) and time.monotonic() - self.asked >= _SAYS_SO_AGAIN_S


class RemoteGrid:
    """The lead's connection to its sites.  Nodes are numbered 1, 2, ... in the order of `sites`, online or not.

    Args:
        server: host:port.
        sites: name -> PEM of its connection key's public half, as the roster has them.
        key: the lead's, with which it signs its calls.
        hear: says of a node, what it was asked and its answer what the answer means.
        closing: makes the rule by which one exchange ends before its time is up.
        has_new_certificate: asked during an exchange whether the files of `tls` have another one than before.
        patience_s: how long to wait for a server that is away when the first connection is made.
    """

    def __init__(
        self,
        server: str,
        tls: Tls,
        *,
        sites: Mapping[str, bytes],
        key: SigningKey,
        hear: Callable[[int, Message, Message], Heard],
        closing: Callable[[], Closing],
        has_new_certificate: Callable[[], bool] = lambda: False,
        patience_s: float = 0.0,
    ) -> None:
        self._server, self._tls, self._key = server, tls, key
        self._numbers = {node_key: number for number, node_key in enumerate(sites.values(), 1)}
        self._hear, self._closing, self._has_new_certificate = hear, closing, has_new_certificate
        self._session: LeadSession | None = None
        self._patience_s, self._said = patience_s, ""

    def __enter__(self) -> RemoteGrid:
        deadline = time.monotonic() + self._patience_s
        while self._session is None:
            try:
                self._open()
            except httpx.HTTPError as error:
                if _is_away(error) and time.monotonic() < deadline:
                    self._wait_for_server(error)
                    continue
                raise not_started(self._server, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def get_node_ids(self) -> Sequence[int]:
        return list(self._numbers.values())

    def online(self) -> list[int]:
        """The nodes that the server hears now."""
        return sorted(self._opened.nodes(self._numbers))

    def receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The answers that come within `timeout` seconds, or until the rule closes, each from the node asked."""
        open_ = {message.metadata.dst_node_id: _Question(message, set()) for message in messages}
        closing, good = self._closing(), 0
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while open_ and (left := deadline - time.monotonic()) > 0:
            try:
                if self._has_new_certificate() and self._session is not None:
                    self._session.show_certificate()
                self._open()
                online = self._ask(open_, ttl=left)
                for answer, heard in self._collect(open_, left_s=left):
                    good += heard.good
                    yield answer
                at_work = sum(n in online and (one.has_begun or not one.idle) for n, one in open_.items())
                if closing.is_over(good=good, at_work=at_work, others=len(open_) - at_work):
                    break
            except httpx.HTTPStatusError as error:
                if error.response.is_redirect or _is_away(error):
                    self._wait_for_server(error)
                elif self._session is None:
                    raise not_started(self._server, error) from error
                else:
                    log.warning("the server forgot this run (%s); asking again", error.response.status_code)
                    self._close()
                    for one in open_.values():
                        one.message_ids.clear()
                        one.unsent = None
            except (httpx.HTTPError, inflating.ObjectPushError) as error:
                self._wait_for_server(error)
            else:
                self._said = ""
                time.sleep(_POLL_S)
        yield from [one.provisional for one in open_.values() if one.provisional and not one.has_begun]

    def _ask(self, questions: Mapping[int, _Question], *, ttl: float) -> Collection[int]:
        """Send what was not sent yet, or may have been forgotten, to the sites that are online; returns these."""
        session, now = self._opened, time.monotonic()
        online = session.nodes(self._numbers)
        for number, node in online.items():
            question = questions.get(number)
            if question is None or now < question.not_before:
                continue
            if question.message_ids and node.last_activated_at == question.activation:
                continue
            about, late = question.question.metadata, ttl + TOLERANCE_S  # the clocks of lead and server may differ
            question.unsent = question.unsent or Message(
                question.question.content, node.node_id, about.message_type, group_id=about.group_id, ttl=late
            )
            message_id = session.push(question.unsent)
            if message_id is None:
                raise RunError(f"{self._server}, or a proxy in between, takes no message of this size")
            question.unsent = None
            if message_id:
                question.message_ids.add(message_id)
                question.asked = now
                question.activation = node.last_activated_at
        return online.keys()

    def _collect(self, questions: dict[int, _Question], *, left_s: float) -> Iterator[tuple[Message, Heard]]:
        """The final answers that are there, one after the other; the question of each is closed before it is given."""
        asked = {id: number for number, question in questions.items() for id in question.message_ids}
        if not asked:
            return
        for message_id, answer, is_lost in self._pull(list(asked), questions, left_s=left_s):
            number = asked.get(message_id)
            if number is None:
                log.warning("an answer to no question of this run's is left aside")
                continue
            question = questions.get(number)
            if question is None:
                continue  # its second answer
            question.message_ids.discard(message_id)
            if is_lost:
                question.not_before = time.monotonic() + _LOST_S
                continue
            if answer is None:
                del questions[number]  # what it sent is no reply, and would be none again
                continue
            if answer.has_error():
                question.provisional = None
                continue  # the site is offline, or what it was asked was lost: it is asked again when it is there
            set_metadata(answer, src_node_id=number)
            heard = self._hear(number, question.question, answer)
            if heard.again_s is None:
                del questions[number]
                yield answer, heard
            else:
                question.provisional, question.idle = answer, heard.idle
                question.not_before = time.monotonic() + heard.again_s

    def _pull(self, message_ids: list[str], questions: Mapping[int, _Question], *, left_s: float) -> Iterator[Pulled]:
        # An answer holds what its question holds, with other numbers: an adapter, or words.
        asked_bytes = max(num_bytes(question.question.content) for question in questions.values())
        try:
            yield from self._opened.answers(message_ids, most_bytes=2 * asked_bytes + _SLACK_BYTES, most_s=left_s)
        except httpx.HTTPError:
            # The server gives an answer once: one that was on its way is lost, unless its site is asked again.
            for question in questions.values():
                question.activation = ""
            raise

    @property
    def _opened(self) -> LeadSession:
        assert self._session is not None, "used as a context manager"
        return self._session

    def _open(self) -> None:
        if self._session is None:
            self._session = LeadSession(self._server, self._tls, self._key)

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _wait_for_server(self, error: Exception) -> None:
        said = clock_of(error) or f"cannot be reached ({type(error).__name__})"
        if said != self._said:  # once, however long it lasts
            log.warning("%s %s; trying again", self._server, said)
        self._said = said
        time.sleep(_RECONNECT_S)


def _is_away(error: httpx.HTTPError) -> bool:
    """The server is out of reach or out of order, or its clock is: waiting may help, and no run need end."""
    if not isinstance(error, httpx.HTTPStatusError):
        return refusal(error) is None
    return error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR or bool(clock_of(error))
