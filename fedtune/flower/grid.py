"""An in-process Flower grid: every message runs its ClientApp here and now.

One frozen base model serves all sites, there is no daemon and no start-up.  Sites take their turns, each with all
threads, so that results do not depend on scheduling.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtune.federation.lead import LeadState
from fedtune.flower.server import make_server_app

_RUN_ID = 1
_SERVER_NODE_ID = 0


class InProcessGrid(Grid):
    """Runs `num_nodes` virtual nodes, with ids 1, 2, ..., by calling `client_app` directly.

    Args:
        client_app: called with each message and its node's context; must answer, never raise.
        num_nodes: how many nodes there are.
        replied: called with the number of replies so far in a round of training.
    """

    def __init__(self, client_app: ClientApp, num_nodes: int, *, replied: Callable[[int], None]) -> None:
        self._client_app, self._replied = client_app, replied
        self._contexts = {node_id: _context(node_id, num_nodes) for node_id in range(1, num_nodes + 1)}
        self._replies: dict[str, Message] = {}
        # Flower's Message constructor reads who is sending from here; outside a Flower process nobody has set it.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, _SERVER_NODE_ID, 0

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("an in-process grid has one run")

    @property
    def run(self) -> Run:
        raise NotImplementedError("an in-process grid has no Flower run")

    def create_message(  # the base class's signature
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Sequence[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        message_ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            context = self._contexts[message.metadata.dst_node_id]
            self._replies[message_id] = self._client_app(message, context)
            message_ids.append(message_id)
            if message.metadata.message_type == MessageType.TRAIN:
                self._replied(len(message_ids))
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def _context(node_id: int, num_nodes: int) -> Context:
    return Context(
        run_id=_RUN_ID,
        node_id=node_id,
        node_config={"partition-id": node_id - 1, "num-partitions": num_nodes},
        state=RecordDict(),
        run_config={},
    )


def in_process(run: Callable[[Grid], LeadState], grid: InProcessGrid) -> LeadState:
    """Run the ServerApp over `grid`, here and now, and return what `run` returns."""
    outcome: list[LeadState] = []
    server_app = make_server_app(lambda given: outcome.append(run(given)))
    server_app(grid, _context(_SERVER_NODE_ID, num_nodes=0))
    return outcome[0]
