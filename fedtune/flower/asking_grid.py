"""Grids that send the lead's questions to its sites over a Flower server, with retries until an answer or a timeout.

A question is repeated if its site comes back online, if its answer was lost in transit, or if a person at the site has
not approved the run yet.  Requests are idempotent: a site answers a repeated request with the same bytes and charges it
once.

`RetryingGrid` implements the retries; its subclasses transport the messages.  `FlowerGrid` uses only Flower's public
Grid, in a ServerApp that a SuperExec starts (`bundle.py`).  `fedtune.ops.wire.remote_grid` uses fedtune's own protocol.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.federation.replies import StoppingRule
from fedtune.spec import RunError

log = logging.getLogger(__name__)

_POLL_S, RECONNECT_S, _WORKING_AFTER_S = 0.2, 1.0, 15.0  # a site that refuses answers before the last of these
_LOST_S = 3.0  # delay before the retry for an incomplete answer
CLOCKS_S = 120.0  # tolerated difference between the clocks of lead and server


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifiedAnswer:
    """Classification of a site's answer, which decides whether the question is repeated and the exchange goes on."""

    good: bool  # whether the answer is usable
    again_s: float | None = None  # delay before the question is repeated; None: the answer is final
    idle: bool = False  # whether the exchange may end before this site gives another answer


@dataclass
class OpenQuestion:
    """A question to one site, open until the site has answered."""

    question: Message
    message_ids: set[str]  # ids of all copies sent; an answer to any copy is accepted
    # the site's activation time at the last attempt; after a later activation the site may have lost the question
    activation: str = ""
    # a message that may be only partly uploaded to the server
    unsent: Message | None = None
    not_before: float = 0.0  # monotonic time of the next attempt, at the earliest
    asked: float = 0.0  # monotonic time of the last attempt
    provisional: Message | None = None  # an answer that a retry may change
    idle: bool = False  # `ClassifiedAnswer.idle` of the provisional answer

    @property
    def has_begun(self) -> bool:
        """True if the site has not answered for `_WORKING_AFTER_S` seconds after the last request.

        Such a site is probably working on the request and may already have charged the round.
        """
        return bool(self.message_ids) and time.monotonic() - self.asked >= _WORKING_AFTER_S


Questions = Mapping[int, OpenQuestion]
Pulled = tuple[str, Message | None, bool]
"""Tuple of the question's message id, the answer (None if it is invalid), and whether the answer was lost in transit.
"""


class RetryingGrid(ABC):
    """Base class of the lead's grids, which number the nodes 1, 2, ... in the order of `sites`, whether online or not.

    Args:
        sites: name -> the public part of the site's connection key, as PEM, from the roster.
        hear: classifies an answer; its arguments are the node number, the question and the answer.
        closing: creates the rule that may end an exchange before its timeout.
    """

    retryable_errors: tuple[type[Exception], ...]
    """Exceptions that the abstract methods raise while the server is unreachable or overloaded."""

    def __init__(
        self,
        sites: Mapping[str, bytes],
        *,
        hear: Callable[[int, Message, Message], ClassifiedAnswer],
        closing: Callable[[], StoppingRule],
    ) -> None:
        self._numbers = {node_key: number for number, node_key in enumerate(sites.values(), 1)}
        self._hear, self._closing = hear, closing

    @abstractmethod
    def _list_nodes(self) -> Mapping[int, Any]:
        """Return Flower's node information for each online node, by node number."""

    @abstractmethod
    def _push(self, message: Message) -> str | None:
        """Send a question and return its message id.

        The id is empty if the node no longer exists, and None if the message exceeds the server's size limit.
        """

    @abstractmethod
    def _pull(self, message_ids: Sequence[str], questions: Questions, *, left_s: float) -> Iterator[Pulled]:
        """Yield the answers to `message_ids` that have arrived at the server."""

    @abstractmethod
    def _recover(self, error: Exception, questions: Questions) -> None:
        """Wait or reconnect after one of `retryable_errors`; raise an error if a retry cannot help."""

    def get_node_ids(self) -> Sequence[int]:
        return list(self._numbers.values())

    def list_online_nodes(self) -> list[int]:
        """Return the numbers of the nodes that are connected to the server."""
        return sorted(self._list_nodes())

    def receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages and yield the answers until the timeout (in seconds) or the end by the stopping rule."""
        open_ = {message.metadata.dst_node_id: OpenQuestion(message, set()) for message in messages}
        closing, good = self._closing(), 0
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while open_ and (left := deadline - time.monotonic()) > 0:
            try:
                online = self._send_open_questions(open_, ttl=left)
                for answer, heard in self._collect(open_, left_s=left):
                    good += heard.good
                    yield answer
                at_work = sum(n in online and (pending.has_begun or not pending.idle) for n, pending in open_.items())
                if closing.is_over(good=good, at_work=at_work, others=len(open_) - at_work):
                    break
            except self.retryable_errors as error:
                self._recover(error, open_)
            else:
                time.sleep(_POLL_S)
        yield from [pending.provisional for pending in open_.values() if pending.provisional and not pending.has_begun]

    def _send_open_questions(self, questions: Questions, *, ttl: float) -> Mapping[int, Any]:
        """Send every new or possibly lost question whose site is online; return the online nodes by number."""
        online, now = self._list_nodes(), time.monotonic()
        for number, node in online.items():
            question = questions.get(number)
            if question is None or now < question.not_before:
                continue
            if question.message_ids and node.last_activated_at == question.activation:
                continue
            about = question.question.metadata
            question.unsent = question.unsent or Message(
                question.question.content, node.node_id, about.message_type, group_id=about.group_id, ttl=ttl + CLOCKS_S
            )
            message_id = self._push(question.unsent)
            if message_id is None:
                raise RunError("the server or a proxy rejected a message because of its size: raise its size limit")
            question.unsent = None
            if message_id:
                question.message_ids.add(message_id)
                question.asked = now
                question.activation = node.last_activated_at
        return online

    def _collect(
        self, questions: dict[int, OpenQuestion], *, left_s: float
    ) -> Iterator[tuple[Message, ClassifiedAnswer]]:
        """Yield the final answers that have arrived; each question is closed before its answer is yielded."""
        nodes = {id: number for number, question in questions.items() for id in question.message_ids}
        if not nodes:
            return
        for message_id, message, is_lost in self._pull_or_ask_again(list(nodes), questions, left_s=left_s):
            number = nodes.get(message_id)
            if number is None:
                log.warning("ignoring an answer that matches no question of this run")
                continue
            question = questions.get(number)
            if question is None:
                continue  # a duplicate answer
            question.message_ids.discard(message_id)
            if is_lost:  # the site may have begun to work since its provisional answer
                question.provisional, question.not_before = None, time.monotonic() + _LOST_S
                continue
            if message is None:
                del questions[number]  # an invalid answer, which a retry would not change
                continue
            if message.has_error():
                question.provisional = None
                continue  # the site is offline or lost the question, which is repeated when the site is online
            # Use our own node number as the sender, because the server's number may have changed.
            answer = Message(message.content, reply_to=question.question)
            heard = self._hear(number, question.question, answer)
            if heard.again_s is None:
                del questions[number]
                yield answer, heard
            else:
                question.provisional, question.idle = answer, heard.idle
                question.not_before = time.monotonic() + heard.again_s

    def _pull_or_ask_again(
        self, message_ids: Sequence[str], questions: Questions, *, left_s: float
    ) -> Iterator[Pulled]:
        try:
            yield from self._pull(message_ids, questions, left_s=left_s)
        except self.retryable_errors:
            # The server delivers an answer only once, so an answer in transit is lost unless the question is repeated.
            for question in questions.values():
                question.activation = ""
            raise


class _SuperLinkUnavailable(Exception):
    """The SuperLink is unreachable, or its answer is unreadable."""


class FlowerGrid(RetryingGrid):
    """Grid of sites behind unmodified SuperNodes, over the public Grid that Flower passes to a ServerApp."""

    retryable_errors = (_SuperLinkUnavailable,)

    def __init__(self, grid: Grid, sites: Mapping[str, bytes], **rules: Any) -> None:
        super().__init__(sites, **rules)
        self._grid = grid

    def __enter__(self) -> FlowerGrid:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing, because Flower opens and closes the connection."""

    def _list_nodes(self) -> Mapping[int, Any]:
        with _translate_client_errors():
            online = {bytes(node.public_key): node for node in self._grid.get_nodes()}
        return {number: online[key] for key, number in self._numbers.items() if key in online}

    def _push(self, message: Message) -> str | None:
        with _translate_client_errors():
            ids = list(self._grid.push_messages([message]))
        return (ids[0] or "") if ids else None  # the public Grid returns no id for an oversized message

    def _pull(self, message_ids: Sequence[str], questions: Questions, *, left_s: float) -> Iterator[Pulled]:
        with _translate_client_errors():
            answers = list(self._grid.pull_messages(message_ids))
        for answer in answers:
            if answer.has_error():  # the app failed, for example because the site's process was not running
                log.info("no answer (Flower error %d); repeating the question", answer.error.code)
            yield answer.metadata.reply_to_message_id, answer, answer.has_error()

    def _recover(self, error: Exception, questions: Questions) -> None:
        log.warning("the SuperLink cannot be reached (%s); trying again", error)
        time.sleep(RECONNECT_S)


@contextmanager
def _translate_client_errors() -> Iterator[None]:
    """Convert every error of Flower's client, which has no public error classes, to `_SuperLinkUnavailable`."""
    try:
        yield
    except Exception as error:
        raise _SuperLinkUnavailable(type(error).__name__) from error
