"""A Flower grid that gives each answer as it comes, so that no more than one of them need be in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid


class StreamingGrid(Grid):
    """A grid with `receive`; Flower's own call waits for all answers, and holds them all."""

    @abstractmethod
    def receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send `messages`, and yield the answers as they come, within `timeout` seconds."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return list(self.receive(messages, timeout=timeout))

    def create_message(  # the base class's signature
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)


def receive(grid: Grid, messages: Iterable[Message], *, timeout: float) -> Iterator[Message]:
    """The answers as they come, or all at once from a grid of Flower's own, as Ray's engine has it."""
    if isinstance(grid, StreamingGrid):
        return grid.receive(messages, timeout=timeout)
    return iter(grid.send_and_receive(messages, timeout=timeout))
