"""The lead's `Transport` over a Flower grid that yields each answer on arrival."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from flwr.app import ArrayRecord
from flwr.app import Message as Message
from flwr.app import RecordDict as RecordDict

from fedtune.federation.protocol import OTHER_PROTOCOL, Reply
from fedtune.federation.transport import Question
from fedtune.flower import flower_records
from fedtune.privacy.release import Reason, Receipt, Refusal
from fedtune.spec import WIRE_SCHEMA, ConfigError, RunError, StuckError
from fedtune.version import build

log = logging.getLogger(__name__)
_T = TypeVar("_T")
_POLL_S = 0.2


class StreamingGrid(Protocol):
    """Interface of fedtune's grids, which yield each answer on arrival."""

    def get_node_ids(self) -> Iterable[int]: ...

    def receive(self, messages: Iterable[Message], *, timeout: float) -> Iterator[Message]:
        """Send `messages`, and yield the answers that arrive within `timeout` seconds."""


class GridTransport:
    """Transport to the sites of a grid; `nodes` maps node ids to site names.

    Without `nodes`, the transport queries each node for its site name.
    """

    def __init__(self, grid: StreamingGrid, nodes: Mapping[int, str] | None = None) -> None:
        self._grid, self._nodes = grid, dict(nodes or {})
        self._bytes_down = self._bytes_up = 0  # since the last call of `take_traffic`
        self._apart: dict[str, str] = {}  # site -> its protocol version, if it refused that of the lead

    def wait_for_sites(self, sites: Collection[str], *, timeout_s: float) -> Collection[str]:
        if not self._nodes:
            deadline = time.monotonic() + timeout_s
            while len(node_ids := list(self._grid.get_node_ids())) < len(sites) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            questions = [Message(RecordDict(), node_id, "query") for node_id in sorted(node_ids)]
            for message in self._grid.receive(questions, timeout=timeout_s):
                if not message.has_error():
                    name = message.content.config_records[flower_records.SITE]["name"]
                    self._nodes[message.metadata.src_node_id] = str(name)
        return self._nodes.values()

    def invite(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Reply]]:
        return self._exchange_messages(f"query.{flower_records.INVITE}", questions, flower_records.to_reply, timeout_s)

    def train(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Reply]]:
        return self._exchange_messages("train", questions, flower_records.to_reply, timeout_s)

    def take_sum_step(
        self, questions: Sequence[Question], *, timeout_s: float
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        return self._exchange_messages(f"query.{flower_records.SUM}", questions, flower_records.to_step, timeout_s)

    def end(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Receipt | None]]:
        return self._exchange_messages(f"query.{flower_records.END}", questions, flower_records.to_receipt, timeout_s)

    def take_traffic(self) -> tuple[int, int]:
        traffic = self._bytes_down, self._bytes_up
        self._bytes_down = self._bytes_up = 0
        return traffic

    @contextmanager
    def explain_protocol_mismatch(self) -> Iterator[None]:
        """Convert a RunError for too few sites to a ConfigError if sites have another protocol version.

        The error names these sites and their protocol versions.
        """
        try:
            yield
        except RunError as error:
            if isinstance(error, StuckError) or not self._apart:
                raise
            sites = "; ".join(f"{site} uses {spoken}" for site, spoken in self._apart.items())
            bound = f"is not the protocol of all sites, and this lead runs fedtune {build()}: {sites}; {error}"
            raise ConfigError("protocol", WIRE_SCHEMA, bound) from error

    def _exchange_messages(
        self, kind: str, questions: Sequence[Question], read: Callable[[RecordDict], _T], timeout_s: float
    ) -> Iterator[tuple[str, _T]]:
        numbers = {site: node_id for node_id, site in self._nodes.items()}
        self._apart = {}
        # Encode each adapter only once for all sites.
        adapters: dict[int, ArrayRecord] = {}
        messages = []
        for question in questions:
            if question.adapter is not None and id(question.adapter) not in adapters:
                adapters[id(question.adapter)] = flower_records.from_adapter(question.adapter)
            content = flower_records.from_question(question, adapters.get(id(question.adapter)))
            self._bytes_down += flower_records.count_payload_bytes(content)
            messages.append(Message(content, numbers[question.site], kind))
        for message in self._grid.receive(messages, timeout=timeout_s):
            site = self._nodes.get(message.metadata.src_node_id)
            if site is None or message.has_error():
                log.warning("site %s: Flower delivered an error instead of a reply", site)
                continue
            try:
                answer = read(message.content)
            except ConfigError as error:
                log.warning("site %s sent an unreadable answer: %s", site, error)
                continue
            self._bytes_up += flower_records.count_payload_bytes(message.content)
            body = getattr(answer, "body", answer)
            unread = body.allowed or "" if isinstance(body, Refusal) and body.reason is Reason.MALFORMED_REQUEST else ""
            if OTHER_PROTOCOL.fullmatch(unread):
                self._apart[site] = unread
            # Flower's records form a reference cycle, which would hold the memory until the next garbage collection.
            for record in message.content.array_records.values():
                record.clear()
            yield site, answer
