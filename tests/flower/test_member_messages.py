"""What a member may send through the server: the answer to its own open question, in its size, and nothing else."""

import gzip
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

from fedtune.federation.replies import Closing
from fedtune.federation.spec import FederationSpec
from fedtune.ops.wire import bounded_http, gate, message_objects
from fedtune.ops.wire.remote_grid import RemoteGrid
from fedtune.ops.wire.site_calls import SiteCalls

from .loopback import Loopback
from .member import Member, Question, an_object
from .test_remote_grid import questions, sites_of


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's certificate is refused here, which is what a lead waits for at each connection."""
    monkeypatch.setattr(bounded_http, "_ALERT_S", 0.05)


@pytest.fixture
def member(network: Loopback) -> Iterator[Member]:
    made = Member(network, "b")
    made.activate()
    yield made
    made.leave()


@pytest.fixture
def question(network: Loopback, member: Member) -> Iterator[Question]:
    """One that stays open at the server; the lead does not wait for it any more."""
    with network.grid(["b"]) as grid, ThreadPoolExecutor(1) as pool:
        pool.submit(list, grid.receive(questions(1), timeout=1))
        yield member.asked(grid._opened.grid.run.run_id)


class Round:
    """One in which the member `b` and the honest site `a` are asked."""

    def __init__(self, network: Loopback, member: Member, pool: ThreadPoolExecutor, grid: RemoteGrid) -> None:
        self.honest = Member(network, "a")
        self.honest.activate()
        self._answers = pool.submit(list, grid.receive(questions(1, 2), timeout=60))
        self.run_id = grid._opened.grid.run.run_id
        self.question = member.asked(self.run_id)

    def ends(self) -> dict[int, str]:
        """Let the honest site answer, and wait for the end of the round."""
        content = RecordDict({"about": ConfigRecord({"site": "a"})})
        self.honest.reply(self.honest.asked(self.run_id), Message(content, SUPERLINK_NODE_ID, "train"))
        return sites_of(self._answers.result(timeout=60))


@pytest.fixture
def round_(network: Loopback, member: Member) -> Iterator[Round]:
    over = Event()

    class Closed(Closing):
        """Also when the test is over: the lead waited out its minute otherwise."""

        def is_over(self, **counts: int) -> bool:
            return over.is_set() or super().is_over(**counts)

    # The honest answer suffices: nobody waits for another one of the member's.
    spec = FederationSpec(num_sites=2, enough_sites=1, grace_s=0.4)
    with network.grid(["a", "b"], closing=lambda: Closed(spec)) as grid, ThreadPoolExecutor(1) as pool:
        made = Round(network, member, pool, grid)
        yield made
        over.set()
    made.honest.leave()


def test_nothing_but_an_answer_to_its_own_question_is_taken(network: Loopback, member: Member, round_: Round) -> None:
    question, sent = round_.question, set()
    # Flower hands the lead whatever says that it is from the lead and to the lead: the lead's run once died of that.
    to_lead = {"src_node_id": SUPERLINK_NODE_ID, "dst_node_id": SUPERLINK_NODE_ID}
    ((a,),) = network.rows("SELECT node_id FROM node WHERE name = 'a'")
    other = (a % (1 << 64)) if a < 0 else a
    for status, reason, changed in (
        (403, "in another sender's name", {"reply_to_message_id": "", **to_lead}),
        (403, "in another sender's name", {"reply_to_message_id": "", **to_lead, "dst_node_id": other}),
        (403, "in another sender's name", {"src_node_id": other}),
        (403, "not to the lead", {"dst_node_id": other}),
        (403, "not to the lead", {"dst_node_id": member.node_id}),
        (403, "answers no question", {"reply_to_message_id": ""}),
        (409, "the question is not open", {"reply_to_message_id": "ab" * 32}),
        (403, "another run's question", {"run_id": 7}),
        (403, "of another kind than the question", {"message_type": "query"}),
        (403, "of another kind than the question", {"group_id": "other"}),
        (403, "too many objects, or objects without a name", {"message_id": "x"}),
    ):
        request = member.answer_to(question, **changed)
        answer = member.push(request)
        assert (answer.status_code, answer.json()["reason"]) == (status, reason), changed
        sent.add((request.messages_list[0].metadata.message_id,))
    stored = network.rows("SELECT message_id FROM message_ins UNION SELECT message_id FROM message_res")
    assert not sent & set(stored)
    assert round_.ends() == {1: "a"}
    noted = {(line["event"], line.get("reason"), line.get("member")) for line in network.audit()}
    assert ("message refused", "in another sender's name", "b") in noted
    assert ("run started", None, None) in noted


def test_a_site_says_nothing_of_what_the_lead_s_objects_are_made_of(member: Member, round_: Round) -> None:
    # Flower believes who names an object first: the lead's settings are one in every round, and with other parts
    # announced for it the lead could ask nobody any more.
    for id in round_.question.object_ids:
        request = member.answer_to(round_.question)
        request.message_object_trees[0].children.add(object_id=id).children.add(object_id="ab" * 32)
        answer = member.push(request)
        assert (answer.status_code, answer.json()["reason"]) == (403, "an object of the lead's, made of other parts")
    assert round_.ends() == {1: "a"}


def test_an_answer_has_one_message_one_tree_and_no_content_beside_it(member: Member, question: Question) -> None:
    right = member.answer_to(question)
    (message,), (tree,) = right.messages_list, right.message_object_trees
    parts = {"node": member.node, "messages_list": [message], "message_object_trees": [tree]}
    with_content, with_error = message_pb2.Message(), message_pb2.Message(metadata=message.metadata)
    with_content.CopyFrom(message)
    with_content.content.items.add()
    with_error.error.code = 1
    for changed in (
        {"messages_list": [message, message]},
        {"messages_list": []},
        {"message_object_trees": []},
        {"message_object_trees": [message_pb2.ObjectTree(object_id="ab" * 32)]},
        {"messages_list": [with_content]},
        {"messages_list": [with_error]},
        {"clientapp_runtime_list": [12.5]},
        {"message_object_trees": [message_pb2.ObjectTree(object_id=tree.object_id, children=[tree] * 5000)]},
    ):
        assert member.push(fleet_pb2.PushMessagesRequest(**{**parts, **changed})).status_code == 403, changed


def test_objects_are_taken_for_an_announced_answer_within_its_size(
    network: Loopback, member: Member, round_: Round
) -> None:
    question, stored = round_.question, "SELECT coalesce(sum(length(content)), 0) FROM objects"
    before = network.rows(stored)[0][0]
    junk, large = an_object(1 << 16), an_object(1 << 21)
    assert member.push_object(question, "", junk).status_code == 409, "not announced"
    announced = member.answer_to(question, large)
    session = member.session_of(member.push(announced))
    second = member.push(member.answer_to(question))
    assert (second.status_code, second.json()["reason"]) == (409, "the question is answered")
    assert member.push(announced).status_code == 200, "the same again, as after a call that was cut off"
    assert member.push_object(question, session, junk).status_code == 409, "of no announced answer"
    assert member.push_object(question, session, large).status_code == 413, "the question was a few hundred bytes"
    assert member.push_object(question, session, b"x" * (40 << 20)).status_code == 413
    assert network.rows(stored)[0][0] < before + (1 << 14), "the lead's question to the other site came meanwhile"
    # The lead is not kept waiting for the rest of it, as Flower would do for minutes.
    assert round_.ends() == {1: "a"}


@pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # of Flower's own migrations
def test_an_answer_that_is_announced_while_the_lead_asks_is_not_asked_for(
    network: Loopback, member: Member, round_: Round
) -> None:
    # Flower would give it out in parts, and the question would be closed: only what is whole may be asked for.
    state = SqlLinkState(str(network.folder / "state.db"), NoOpFederationManager(), InMemoryObjectStore())
    state.initialize()
    asked = PullAppMessagesRequest(message_ids=[round_.question.metadata.message_id, "unknown"]).SerializeToString()
    for announced in (False, True):
        if announced:
            member.session_of(member.push(member.answer_to(round_.question, an_object(8))))
        passed = PullAppMessagesRequest.FromString(SiteCalls(state).finished(asked))
        assert list(passed.message_ids) == ["unknown"], "which Flower answers for"


@pytest.mark.parametrize("kind", ["no message", "nonsense", "an error", "in order"])
def test_an_answer_that_cannot_be_read_is_none(member: Member, round_: Round, kind: str) -> None:
    content = RecordDict({"about": ConfigRecord({"site": "b"})})
    if kind == "an error":
        question = Message(RecordDict(), 5, "train")
        question.metadata.__dict__["_message_id"] = "ab" * 32
        member.reply(round_.question, Message(Error(code=1, reason="x"), reply_to=question))
    elif kind == "in order":
        # What a message says of itself does not count: neither whose question it answers, nor who sends it.
        member.reply(round_.question, Message(content, SUPERLINK_NODE_ID, "train"))
    elif kind == "no message":
        objects = {id: part.deflate() for id, part in get_all_nested_objects(content).items()}
        member.send(round_.question, get_object_tree(content), objects)
    else:
        root = Message(RecordDict(), SUPERLINK_NODE_ID, "train").deflate()[:-9] + b"\xff" * 9
        member.send(round_.question, message_pb2.ObjectTree(object_id=get_object_id(root)), {"": root})
    assert round_.ends() == ({1: "a", 2: "b"} if kind == "in order" else {1: "a"})


def test_an_answer_that_stands_for_more_than_any_message_is_none(
    member: Member, round_: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A part may be named many times: what comes is small, and what it stands for is not.
    monkeypatch.setattr(message_objects, "MOST_BYTES", 1 << 16)
    zeros = ArrayRecord({"head": Array(np.zeros(1 << 16, np.float32))})
    member.reply(round_.question, Message(RecordDict({"arrays": zeros}), SUPERLINK_NODE_ID, "train"))
    assert round_.ends() == {1: "a"}


def test_it_fetches_and_confirms_its_own_questions_alone(member: Member, round_: Round) -> None:
    theirs = round_.honest.asked(round_.run_id)
    run, id = theirs.metadata.run_id, theirs.metadata.message_id
    pull = message_pb2.PullObjectRequest(node=member.node, run_id=run, object_id=id)
    confirm = message_pb2.ConfirmMessageReceivedRequest(node=member.node, run_id=run, message_object_id=id)
    assert member.post("pull-object", pull).status_code == 409
    assert member.post("confirm-message-received", confirm).status_code == 409
    for own in theirs.object_ids:
        pull = message_pb2.PullObjectRequest(node=round_.honest.node, run_id=run, object_id=own)
        assert round_.honest.post("pull-object", pull).status_code == 200, "theirs is untouched"


def test_a_body_that_inflates_is_not_read(member: Member) -> None:
    body = gzip.compress(fleet_pb2.PullMessagesRequest(node=member.node).SerializeToString() + b"\0" * (1 << 24))
    answer = member.post("pull-messages", body, **{"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["reason"]) == (415, "a compressed body")


@pytest.mark.parametrize("path", sorted(gate._SITE_CALLS))
def test_bytes_that_are_no_message_are_refused_in_our_own_words(member: Member, path: str) -> None:
    dice = random.Random(path)
    for size in (1, 3, 17, 200, 3000):
        answer = member.post(path.removeprefix("/v1/fleet/"), dice.randbytes(size))
        assert answer.status_code in (400, 401, 403, 409), (path, size)
        assert "reason" in answer.json()


def test_an_answer_that_was_begun_before_a_restart_can_be_finished(
    network: Loopback, member: Member, question: Question
) -> None:
    part, other = an_object(100), an_object(101)
    session = member.session_of(member.push(member.answer_to(question, part, other)))
    assert member.push_object(question, session, part).status_code == 200
    network.kill()
    network.start()
    assert member.push_object(question, "ab" * 18, other).status_code == 409, "nobody else's"
    assert member.push_object(question, session, other).status_code == 200
    stored = f"SELECT is_available FROM objects WHERE object_id IN ('{get_object_id(part)}', '{get_object_id(other)}')"
    assert network.rows(stored) == [(1,), (1,)]


def test_after_all_that_the_server_still_serves(network: Loopback) -> None:
    assert network.process.poll() is None
    assert "Traceback" not in network.output
