"""Retries of the lead's questions over Flower's public Grid, here a fake grid."""

import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.federation.replies import StoppingRule
from fedtune.federation.spec import FederationSpec
from fedtune.flower import asking_grid
from fedtune.flower.asking_grid import ClassifiedAnswer, FlowerGrid
from fedtune.flower.internals import set_metadata, set_sender_ids
from fedtune.spec import RunError

KEYS = {"north": b"key of north", "south": b"key of south"}


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    set_sender_ids(run_id=7, node_id=1, task_id=0)
    for name, value in (("_POLL_S", 0.01), ("RECONNECT_S", 0.01), ("_LOST_S", 0.05)):
        monkeypatch.setattr(asking_grid, name, value)


class FakeGrid(Grid):
    """A fake SuperLink with nodes of these keys and arbitrary node ids; `answer` produces a node's answer or raises."""

    def __init__(self, answer: Callable[[Message, int], Any], **activated: str) -> None:
        self.answer, self.asked = answer, list[tuple[int, str]]()
        self.activated = activated or {"south": "1", "north": "1", "stranger": "1"}
        self.replies: dict[str, Any] = {}
        self.fails: list[Exception] = []
        self.takes = True

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise AssertionError("not needed")

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise AssertionError("deprecated")

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        raise AssertionError("asks once")

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[Any]:
        if self.fails:
            raise self.fails.pop()
        for number, (name, when) in enumerate(self.activated.items(), 700):
            key = KEYS.get(name, b"?")
            yield SimpleNamespace(node_id=number, public_key=key, last_activated_at=when)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[Any]:
        (message,) = messages
        if not self.takes:
            return []
        id = f"m-{len(self.asked)}"
        set_metadata(message, message_id=id)
        node = message.metadata.dst_node_id
        self.asked.append((node, message.metadata.message_type))
        replies = self.answer(message, len(self.asked))
        if replies is not None:
            self.replies[id] = replies
        return [id]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for id in message_ids:
            if isinstance(self.replies.get(id), Exception):
                raise self.replies.pop(id)
        return [self.replies.pop(id) for id in list(message_ids) if id in self.replies]


def says(message: Message, word: str) -> Message:
    return Message(RecordDict({"said": ConfigRecord({"word": word})}), reply_to=message)


def read_word(answer: Message) -> str:
    return str(answer.content.config_records["said"]["word"])


def make_grid(fake: FakeGrid, *, hear: Any = lambda *_: ClassifiedAnswer(good=True), **waiting: Any) -> FlowerGrid:
    spec = FederationSpec(num_sites=2, site_names=tuple(KEYS), **waiting)
    return FlowerGrid(fake, KEYS, hear=hear, closing=lambda: StoppingRule(spec))


def make_questions(*numbers: int) -> list[Message]:
    return [Message(RecordDict(), number, "train") for number in numbers]


def receive_words(grid: FlowerGrid, *numbers: int, timeout: float = 20) -> dict[int, str]:
    return {one.metadata.src_node_id: read_word(one) for one in grid.receive(make_questions(*numbers), timeout=timeout)}


def test_sites_are_numbered_by_the_roster() -> None:
    fake = FakeGrid(lambda message, _: says(message, str(message.metadata.dst_node_id)))
    grid = make_grid(fake)
    assert (list(grid.get_node_ids()), grid.list_online_nodes()) == ([1, 2], [1, 2])
    assert receive_words(grid, 1, 2) == {1: "701", 2: "700"}
    assert sorted(fake.asked) == [(700, "train"), (701, "train")], "an unlisted node must receive no question"


def test_reconnected_site_is_asked_again_and_answers_once() -> None:
    fake = FakeGrid(lambda message, number: says(message, "again") if number > 1 else None, north="1")

    def activate_again() -> list[Any]:
        fake.activated = {"north": "2"} if fake.asked else {"north": "1"}
        return list(FakeGrid.get_nodes(fake))

    fake.get_nodes = activate_again  # type: ignore[method-assign]
    assert receive_words(make_grid(fake), 1) == {1: "again"}
    assert len(fake.asked) == 2


def test_site_is_asked_again_after_its_app_failed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fake = FakeGrid(
        lambda message, number: (
            says(message, "yes") if number == 3 else Message(Error(0, "canary-31"), reply_to=message)
        ),
        north="1",
    )
    start = time.monotonic()
    assert receive_words(make_grid(fake), 1) == {1: "yes"}
    assert time.monotonic() - start >= 2 * asking_grid._LOST_S
    assert "no answer (Flower error" in caplog.text
    assert "canary-31" not in caplog.text


def test_provisional_answer_before_an_app_failure_is_discarded() -> None:
    def answer(message: Message, number: int) -> Message:
        return says(message, "paused") if number == 1 else Message(Error(0, "x"), reply_to=message)

    waits = make_grid(FakeGrid(answer, north="1"), hear=lambda *_: ClassifiedAnswer(good=False, again_s=0.05))
    assert receive_words(waits, 1, timeout=0.5) == {}


def test_late_site_is_asked_on_arrival_without_asking_other_sites_again() -> None:
    fake = FakeGrid(lambda message, _: says(message, "yes"), north="1")

    def hear(*_: Any) -> ClassifiedAnswer:
        fake.activated = {"north": "2", "south": "1"}
        return ClassifiedAnswer(good=True)

    assert receive_words(make_grid(fake, hear=hear), 1, 2) == {1: "yes", 2: "yes"}
    assert [node for node, _ in fake.asked] == [700, 701]


@pytest.mark.parametrize("paused", [False, True])
def test_provisional_answer_counts_at_the_timeout_or_during_a_pause(*, paused: bool) -> None:
    classified = {1: ClassifiedAnswer(good=False, again_s=60.0, idle=paused), 2: ClassifiedAnswer(good=True)}
    waiting = make_grid(
        FakeGrid(lambda message, number: says(message, f"{number}")),
        hear=lambda site, *_: classified[site],
        straggler_grace_s=0.05,
    )
    start = time.monotonic()
    assert sorted(receive_words(waiting, 1, 2, timeout=10 if paused else 0.5)) == [1, 2], "too early to ask again"
    waited_s = time.monotonic() - start
    assert waited_s < 5 if paused else waited_s >= 0.5


def test_paused_answer_before_an_unanswered_retry_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The site was paused at the first request but may have been charged at the second, so the lead must ask again."""
    monkeypatch.setattr(asking_grid, "_WORKING_AFTER_S", 0.1)
    fake = FakeGrid(lambda message, number: says(message, "paused") if number == 1 else None, north="1")
    grid = make_grid(fake, hear=lambda *_: ClassifiedAnswer(good=False, again_s=0.02, idle=True))
    assert receive_words(grid, 1, timeout=1) == {}
    assert len(fake.asked) == 2


def test_provisional_answer_is_requested_again_until_final() -> None:
    def hear(number: int, question: Message, answer: Message) -> ClassifiedAnswer:
        assert (number, question.metadata.dst_node_id) == (1, 1)
        return ClassifiedAnswer(good=True, again_s=None if read_word(answer) == "3" else 0.01)

    fake = FakeGrid(lambda message, number: says(message, str(number)), north="1")
    assert receive_words(make_grid(fake, hear=hear), 1) == {1: "3"}


@pytest.mark.parametrize("lost", [OSError("x"), ValueError("no protobuf"), KeyError("x")])
def test_lost_question_and_lost_answer_are_sent_again(lost: Exception, caplog: Any) -> None:
    fake = FakeGrid(lambda message, number: lost if number == 1 else says(message, "yes"), north="1")
    fake.fails = [RuntimeError("away"), RuntimeError("away")]
    assert receive_words(make_grid(fake), 1) == {1: "yes"}
    assert len(fake.asked) == 2, "Flower delivers an answer once, and this one was lost"
    assert caplog.text.count("cannot be reached (RuntimeError); trying again") == 2
    assert f"({type(lost).__name__})" in caplog.text


def test_oversized_message_ends_the_run() -> None:
    fake = FakeGrid(lambda *_: None, north="1")
    fake.takes = False
    with pytest.raises(RunError, match="rejected a message because of its size"):
        receive_words(make_grid(fake), 1)
