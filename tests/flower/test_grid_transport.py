"""The lead's transport over a grid of Flower's own, as its Ray engine has it."""

from collections.abc import Iterable
from unittest.mock import MagicMock

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.federation.protocol import Signed
from fedtune.federation.transport import Question
from fedtune.flower import flower_records
from fedtune.flower.grid_transport import GridTransport
from fedtune.flower.internals import identify, set_metadata


def test_answers_of_known_nodes_come_one_by_one_until_the_time_is_up() -> None:
    identify(run_id=7, node_id=0, task_id=0)
    given, grid = dict[str, Message](), MagicMock(spec=Grid)

    def push(messages: Iterable[Message]) -> list[str]:
        for message in messages:
            set_metadata(message, message_id=str(message.metadata.dst_node_id))
            given[message.metadata.message_id] = Message(flower_records.from_receipt(None), reply_to=message)
        return list(given)

    def pull(ids: Iterable[str]) -> list[Message]:
        return [given.pop(id) for id in ids if id in given and id != "3" and (id == "2" or "2" not in given)]

    grid.push_messages.side_effect, grid.pull_messages.side_effect = push, pull
    transport = GridTransport(grid, {1: "a", 2: "b", 3: "c"})
    signed = Signed(text="{}", signature="")
    answers = transport.end([Question(site=site, signed=signed) for site in "abc"], timeout_s=1)
    assert (next(answers), set(given)) == (("b", None), {"1", "3"}), "the next answer waits until it is asked for"
    assert list(answers) == [("a", None)]
    assert (min(transport.traffic()) > 0, transport.traffic()) == (True, (0, 0))
    grid.get_node_ids.assert_not_called()
