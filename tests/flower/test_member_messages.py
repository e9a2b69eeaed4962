"""Messages of a member through the server: only answers to its own open questions, within the size limit."""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

from fedtune.federation.replies import StoppingRule
from fedtune.federation.spec import FederationSpec
from fedtune.flower.internals import set_sender_ids
from fedtune.ops.wire import bounded_http, gate, message_objects
from fedtune.ops.wire.bounded_http import ResponseLimitExceeded
from fedtune.ops.wire.message_objects import pull_message
from fedtune.ops.wire.remote_grid import RemoteGrid
from fedtune.ops.wire.site_calls import SiteCalls

from .loopback import Loopback
from .member import Member, Question, make_object
from .test_remote_grid import list_answering_sites, make_questions


@pytest.fixture(autouse=True)
def skip_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the lead's wait for a certificate refusal at each connection."""
    monkeypatch.setattr(bounded_http, "_ALERT_S", 0.05)


@pytest.fixture
def member(network: Loopback) -> Iterator[Member]:
    new_member = Member(network, "b")
    new_member.activate()
    yield new_member
    new_member.leave()


@pytest.fixture
def question(network: Loopback, member: Member) -> Iterator[Question]:
    """A question that stays open at the server after the lead has stopped waiting."""
    with network.grid(["b"]) as grid, ThreadPoolExecutor(1) as pool:
        pool.submit(list, grid.receive(make_questions(1), timeout=1))
        yield member.asked(grid._open_session.grid.run.run_id)


class Round:
    def __init__(self, network: Loopback, member: Member, pool: ThreadPoolExecutor, grid: RemoteGrid) -> None:
        self.honest = Member(network, "a")
        self.honest.activate()
        self._answers = pool.submit(list, grid.receive(make_questions(1, 2), timeout=60))
        self.run_id = grid._open_session.grid.run.run_id
        self.question = member.asked(self.run_id)

    def ends(self) -> dict[int, str]:
        content = RecordDict({"about": ConfigRecord({"site": "a"})})
        self.honest.reply(self.honest.asked(self.run_id), Message(content, SUPERLINK_NODE_ID, "train"))
        return list_answering_sites(self._answers.result(timeout=60))


@pytest.fixture
def round_(network: Loopback, member: Member) -> Iterator[Round]:
    over = Event()

    class Closed(StoppingRule):
        """Also when the test is over: the lead waited out its minute otherwise."""

        def is_over(self, **counts: int) -> bool:
            return over.is_set() or super().is_over(**counts)

    # The honest answer suffices, so nobody waits for another answer of the member.
    spec = FederationSpec(num_sites=2, enough_sites=1, straggler_grace_s=0.4)
    with network.grid(["a", "b"], closing=lambda: Closed(spec)) as grid, ThreadPoolExecutor(1) as pool:
        new_round = Round(network, member, pool, grid)
        yield new_round
        over.set()
    new_round.honest.leave()


def test_only_an_answer_to_a_members_own_question_is_accepted(network: Loopback, member: Member, round_: Round) -> None:
    question, sent = round_.question, set()
    # Flower passes on whatever claims to be from the lead to the lead, which once ended the lead's run.
    to_lead = {"src_node_id": SUPERLINK_NODE_ID, "dst_node_id": SUPERLINK_NODE_ID}
    ((a,),) = network.rows("SELECT node_id FROM node WHERE name = 'a'")
    unsigned = (a % (1 << 64)) if a < 0 else a
    for status, reason, changed in (
        (403, "the message names another sender", {"reply_to_message_id": "", **to_lead}),
        (403, "the message names another sender", {"reply_to_message_id": "", **to_lead, "dst_node_id": unsigned}),
        (403, "the message names another sender", {"src_node_id": unsigned}),
        (403, "the message is not addressed to the lead", {"dst_node_id": unsigned}),
        (403, "the message is not addressed to the lead", {"dst_node_id": member.node_id}),
        (403, "the message answers no question", {"reply_to_message_id": ""}),
        (409, "the question is not open", {"reply_to_message_id": "ab" * 32}),
        (403, "the question belongs to another run", {"run_id": 7}),
        (403, "the message type differs from the question's", {"message_type": "query"}),
        (403, "the message type differs from the question's", {"group_id": "other"}),
        (403, "the message has too many objects or an invalid object id", {"message_id": "x"}),
    ):
        request = member.build_answer(question, **changed)
        answer = member.push(request)
        assert (answer.status_code, answer.json()["reason"]) == (status, reason), changed
        sent.add((request.messages_list[0].metadata.message_id,))
    stored = network.rows("SELECT message_id FROM message_ins UNION SELECT message_id FROM message_res")
    assert not sent & set(stored)
    assert round_.ends() == {1: "a"}
    audited = {(line["event"], line.get("reason"), line.get("member")) for line in network.audit()}
    assert ("message refused", "the message names another sender", "b") in audited
    assert ("run started", None, None) in audited


def test_objects_of_the_lead_cannot_be_redefined(member: Member, round_: Round) -> None:
    # Flower trusts the first sender that names an object: the lead's settings are one object in every round, and if
    # other parts were announced for it, the lead could no longer send questions.
    for id in round_.question.object_ids:
        request = member.build_answer(round_.question)
        request.message_object_trees[0].children.add(object_id=id).children.add(object_id="ab" * 32)
        answer = member.push(request)
        assert (answer.status_code, answer.json()["reason"]) == (403, "the lead's object with this id has other parts")
    assert round_.ends() == {1: "a"}


def test_answer_must_have_one_message_and_one_tree_without_content(member: Member, question: Question) -> None:
    right = member.build_answer(question)
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


def test_only_announced_objects_within_the_size_limit_are_accepted(
    network: Loopback, member: Member, round_: Round
) -> None:
    question, stored = round_.question, "SELECT coalesce(sum(length(content)), 0) FROM objects"
    before = network.rows(stored)[0][0]
    junk, large = make_object(1 << 16), make_object(1 << 21)
    assert member.push_object(question, "", junk).status_code == 409, "an unannounced object must be refused"
    announced = member.build_answer(question, large)
    session = member.read_session(member.push(announced))
    second = member.push(member.build_answer(question))
    assert (second.status_code, second.json()["reason"]) == (409, "the question was already answered")
    assert member.push(announced).status_code == 200, "a repeated announcement must be accepted"
    assert member.push_object(question, session, junk).status_code == 409, "this answer has no such object"
    assert member.push_object(question, session, large).status_code == 413, "small questions have small answers"
    assert member.push_object(question, session, b"x" * (40 << 20)).status_code == 413
    assert network.rows(stored)[0][0] < before + (1 << 14), "only the lead's question to the other site may be stored"
    # The lead does not wait for the rest, as it would for minutes with stock Flower.
    assert round_.ends() == {1: "a"}


@pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # from Flower's migrations
def test_partially_uploaded_answer_is_not_passed_to_the_lead(network: Loopback, member: Member, round_: Round) -> None:
    # Flower would deliver it in parts and close the question: only complete answers may be delivered.
    state = SqlLinkState(str(network.folder / "state.db"), NoOpFederationManager(), InMemoryObjectStore())
    state.initialize()
    request = PullAppMessagesRequest(message_ids=[round_.question.metadata.message_id, "unknown"]).SerializeToString()
    for announced in (False, True):
        if announced:
            member.read_session(member.push(member.build_answer(round_.question, make_object(8))))
        passed = PullAppMessagesRequest.FromString(SiteCalls(state).keep_complete_answers(request))
        assert list(passed.message_ids) == ["unknown"], "Flower must report an unknown message"


@pytest.mark.parametrize("kind", ["no message", "nonsense", "an error", "more than any", "in order"])
def test_unreadable_answer_is_discarded(member: Member, round_: Round, kind: str, monkeypatch: Any) -> None:
    content = RecordDict({"about": ConfigRecord({"site": "b"})})
    if kind == "an error":
        question = Message(RecordDict(), 5, "train")
        question.metadata.__dict__["_message_id"] = "ab" * 32
        member.reply(round_.question, Message(Error(code=1, reason="x"), reply_to=question))
    elif kind == "in order":
        # A message's own fields do not count: neither the question that it answers nor its sender.
        member.reply(round_.question, Message(content, SUPERLINK_NODE_ID, "train"))
    elif kind == "more than any":
        # A part may be referenced many times: a small message can expand to a large one.
        monkeypatch.setattr(message_objects, "MAX_BYTES", 1 << 16)
        zeros = ArrayRecord({"head": Array(np.zeros(1 << 16, np.float32))})
        member.reply(round_.question, Message(RecordDict({"arrays": zeros}), SUPERLINK_NODE_ID, "train"))
    elif kind == "no message":
        objects = {id: part.deflate() for id, part in get_all_nested_objects(content).items()}
        member.send(round_.question, get_object_tree(content), objects)
    else:
        root = Message(RecordDict(), SUPERLINK_NODE_ID, "train").deflate()[:-9] + b"\xff" * 9
        member.send(round_.question, message_pb2.ObjectTree(object_id=get_object_id(root)), {"": root})
    assert round_.ends() == ({1: "a", 2: "b"} if kind == "in order" else {1: "a"})


def test_site_fetches_and_confirms_only_its_own_questions(member: Member, round_: Round) -> None:
    reply_tree = round_.honest.asked(round_.run_id)
    run, id = reply_tree.metadata.run_id, reply_tree.metadata.message_id
    pull = message_pb2.PullObjectRequest(node=member.node, run_id=run, object_id=id)
    confirm = message_pb2.ConfirmMessageReceivedRequest(node=member.node, run_id=run, message_object_id=id)
    assert member.post("pull-object", pull).status_code == 409
    assert member.post("confirm-message-received", confirm).status_code == 409
    for object_id in reply_tree.object_ids:
        pull = message_pb2.PullObjectRequest(node=round_.honest.node, run_id=run, object_id=object_id)
        assert round_.honest.post("pull-object", pull).status_code == 200, "the other site is unaffected"


def test_compressed_body_is_not_read(member: Member) -> None:
    body = gzip.compress(fleet_pb2.PullMessagesRequest(node=member.node).SerializeToString() + b"\0" * (1 << 24))
    answer = member.post("pull-messages", body, **{"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["reason"]) == (415, "the body must not be compressed")


@pytest.mark.parametrize("path", sorted(gate._SITE_CALLS))
def test_random_bytes_are_refused_with_a_reason(member: Member, path: str) -> None:
    dice = random.Random(path)
    for size in (1, 3, 17, 200, 3000):
        answer = member.post(path.removeprefix("/v1/fleet/"), dice.randbytes(size))
        assert answer.status_code in (400, 401, 403, 409), (path, size)
        assert "reason" in answer.json()


def test_upload_started_before_a_server_restart_can_finish(
    network: Loopback, member: Member, question: Question
) -> None:
    part, other = make_object(100), make_object(101)
    session = member.read_session(member.push(member.build_answer(question, part, other)))
    assert member.push_object(question, session, part).status_code == 200
    network.process.kill()
    network.start()
    assert member.push_object(question, "ab" * 18, other).status_code == 409, "another site's object must be refused"
    assert member.push_object(question, session, other).status_code == 200
    stored = f"SELECT is_available FROM objects WHERE object_id IN ('{get_object_id(part)}', '{get_object_id(other)}')"
    assert network.rows(stored) == [(1,), (1,)]


# A small message that expands to a large one is refused before it is assembled.


Objects = dict[str, bytes]
set_sender_ids(run_id=0, node_id=0, task_id=0)  # Flower's messages need a sender


def make_honest_reply(values: np.ndarray) -> tuple[ObjectTree, Objects]:
    content = RecordDict({"arrays": ArrayRecord({"head": Array(values)}), "request": ConfigRecord({"json": "{}"})})
    message = Message(content, 1, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    nested = get_all_nested_objects(message)
    return get_object_tree(message), {id: each.deflate() for id, each in nested.items()}


def pull_tree(tree: ObjectTree, objects: Objects) -> Message:
    return pull_message(tree, objects.__getitem__, lambda id: None)


def find_by_kind(objects: Objects, kind: str) -> str:
    return next(id for id, content in objects.items() if content.startswith(f"{kind} ".encode()))


def rewrite(objects: Objects, kind: str, change: Callable[[dict[str, object]], None]) -> None:
    id = find_by_kind(objects, kind)
    head, body = objects[id].split(b"\x00", 1)
    fields = json.loads(body)
    change(fields)
    text = json.dumps(fields).encode()
    objects[id] = head.rpartition(b" ")[0] + f" {len(text)}".encode() + b"\x00" + text


def test_honest_message_is_reassembled() -> None:
    # Zeros are sent as one chunk that is referenced several times.
    values = np.zeros(6_000_000, np.float32)
    tree, objects = make_honest_reply(values)
    assert sum(map(len, objects.values())) < values.nbytes
    arrived = pull_tree(tree, objects).content
    assert np.array_equal(arrived.array_records["arrays"]["head"].numpy(), values)
    assert arrived.config_records["request"]["json"] == "{}"


def test_shared_object_parts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the parts of these 302 objects once per reference would take hours."""

    def put(kind: str, number: int, children: list[str], body: object) -> str:
        id, text = f"{kind}-{number}", b"" if kind == "ArrayChunk" else json.dumps(body).encode()
        objects[id] = f"{kind} {','.join(children)} {len(text)}".encode() + b"\x00" + text
        return id

    objects: Objects = {}
    chunks = [put("ArrayChunk", number, [], None) for number in range(100)]
    named = {"dtype": "float32", "shape": [0], "stype": "numpy.ndarray", "arraychunk_ids": list(range(100))}
    arrays = [put("Array", number, chunks, named | {"number": number}) for number in range(100)]
    records = [put("ArrayRecord", number, arrays, {f"{number}/{id}": id for id in arrays}) for number in range(100)]
    content = put("RecordDict", 0, records, {id: id for id in records})
    message = put("Message", 0, [content], {})
    read: list[bytes] = []
    original = message_objects._list_named_parts
    monkeypatch.setattr(
        message_objects,
        "_list_named_parts",
        lambda kind, data, below: read.append(data) or original(kind, data, below),
    )
    tree = ObjectTree(object_id=message, children=[ObjectTree(object_id=id) for id in objects if id != message])
    with pytest.raises(ResponseLimitExceeded, match=r"the message has [0-9]+ bytes"):
        pull_message(tree, objects.__getitem__, lambda id: None, most_bytes=1 << 20)
    assert len(read) == len(set(read)) == 202


CHANGES: dict[str, Callable[[ObjectTree, Objects], Any]] = {
    "the parts of a RecordDict differ from its references": lambda tree, objects: rewrite(
        objects, "RecordDict", lambda fields: fields.pop("request")
    ),
    "4096 objects": lambda tree, objects: tree.children.extend(
        ObjectTree(object_id=f"{number:064x}") for number in range(5000)
    ),
    "is not a Message": lambda tree, objects: objects.update(
        {tree.object_id: objects[find_by_kind(objects, "RecordDict")]}
    ),
    "the message has [0-9]+ bytes": lambda tree, objects: rewrite(
        objects, "Array", lambda fields: fields.update(arraychunk_ids=[0] * 100_000)
    ),
    # A record that contains itself, and a long request.
    "an object of the wrong type": lambda tree, objects: objects.update(
        {(id := find_by_kind(objects, "ArrayRecord")): f"ArrayRecord {id} 2".encode() + b"\x00{}"}
    ),
    "outside of arrays": lambda tree, objects: objects.update(
        {find_by_kind(objects, "ConfigRecord"): b"ConfigRecord  1\x00" + bytes(message_objects.MAX_BESIDE_BYTES)}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_malformed_and_expanding_objects_are_refused(change: str) -> None:
    tree, objects = make_honest_reply(np.arange(100_000, dtype=np.float32))
    CHANGES[change](tree, objects)
    with pytest.raises(ResponseLimitExceeded, match=change):
        pull_tree(tree, objects)


@pytest.mark.parametrize(("bound", "value"), [("MAX_BYTES", 1000), ("MAX_S", -1.0)])
def test_oversized_or_slow_message_is_refused(monkeypatch: pytest.MonkeyPatch, bound: str, value: float) -> None:
    monkeypatch.setattr(message_objects, bound, value)
    tree, objects = make_honest_reply(np.arange(1000, dtype=np.float32))
    with pytest.raises(
        ResponseLimitExceeded, match="more than 1000 bytes" if bound == "MAX_BYTES" else "took more than"
    ):
        pull_tree(tree, objects)
