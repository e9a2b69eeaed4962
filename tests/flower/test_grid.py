from __future__ import annotations

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.flower.grid import InProcessGrid


@pytest.fixture
def grid() -> InProcessGrid:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        answers.append(int(context.node_config["partition-id"]))
        return Message(RecordDict(), reply_to=message)

    answers: list[int] = []
    grid = InProcessGrid(app, 3, replied=replied.append)
    grid.__dict__["answers"] = answers
    return grid


replied: list[int] = []


def test_each_message_reaches_its_node_and_comes_back(grid: InProcessGrid) -> None:
    replied.clear()
    assert list(grid.get_node_ids()) == [1, 2, 3]
    messages = [grid.create_message(RecordDict(), "train", node, "1") for node in (3, 1)]
    answers = grid.send_and_receive(messages)
    assert [answer.metadata.src_node_id for answer in answers] == [3, 1]
    assert [answer.metadata.reply_to_message_id for answer in answers] == [m.metadata.message_id for m in messages]
    assert grid.__dict__["answers"] == [2, 0]
    assert replied == [1, 2]


def test_a_reply_is_handed_out_once(grid: InProcessGrid) -> None:
    ids = grid.push_messages([grid.create_message(RecordDict(), "train", 2, "1")])
    assert len(grid.pull_messages(ids)) == 1
    assert grid.pull_messages(ids) == []


def test_what_it_cannot_do_it_says(grid: InProcessGrid) -> None:
    with pytest.raises(NotImplementedError):
        _ = grid.run
    with pytest.raises(NotImplementedError):
        grid.set_run(None)  # type: ignore[arg-type]
