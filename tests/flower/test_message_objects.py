"""A message whose few bytes stand for many: it is refused before it is put together."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

import fedtune.ops.wire.message_objects as message_objects
from fedtune.ops.wire.bounded_http import OutOfBounds
from fedtune.ops.wire.message_objects import pull_message

Objects = dict[str, bytes]


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages ask who sends them."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 0, raising=False)


Change = Callable[[ObjectTree, Objects], None]


def honest(values: np.ndarray) -> tuple[ObjectTree, Objects]:
    """A message with these values, as a lead sends it."""
    content = RecordDict({"arrays": ArrayRecord({"head": Array(values)}), "request": ConfigRecord({"json": "{}"})})
    message = Message(content, 1, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    nested = get_all_nested_objects(message)
    return get_object_tree(message), {id: each.deflate() for id, each in nested.items()}


def pulled(tree: ObjectTree, objects: Objects) -> Message:
    return pull_message(tree, objects.__getitem__, lambda id: None)


def of_kind(objects: Objects, kind: str) -> str:
    return next(id for id, content in objects.items() if content.startswith(f"{kind} ".encode()))


def rewrite(objects: Objects, kind: str, change: Callable[[dict[str, object]], None]) -> None:
    """Change the JSON in the body of the object of this kind."""
    id = of_kind(objects, kind)
    head, body = objects[id].split(b"\x00", 1)
    fields = json.loads(body)
    change(fields)
    text = json.dumps(fields).encode()
    objects[id] = head.rpartition(b" ")[0] + f" {len(text)}".encode() + b"\x00" + text


def test_an_honest_message_arrives() -> None:
    # Zeros are sent as one chunk that is named several times.
    values = np.zeros(6_000_000, np.float32)
    tree, objects = honest(values)
    assert sum(map(len, objects.values())) < values.nbytes
    arrived = pulled(tree, objects).content
    assert np.array_equal(arrived.array_records["arrays"]["head"].numpy(), values)
    assert arrived.config_records["request"]["json"] == "{}"


def one_chunk_many_times(tree: ObjectTree, objects: Objects) -> None:
    rewrite(objects, "Array", lambda fields: fields.update(arraychunk_ids=[0] * 100_000))


def a_record_in_itself(tree: ObjectTree, objects: Objects) -> None:
    id = of_kind(objects, "ArrayRecord")
    objects[id] = f"ArrayRecord {id} 2".encode() + b"\x00{}"


def a_long_request(tree: ObjectTree, objects: Objects) -> None:
    id = of_kind(objects, "ConfigRecord")
    objects[id] = b"ConfigRecord  1\x00" + bytes(message_objects.MOST_BESIDE_BYTES)


def test_objects_that_share_their_parts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read again for each that names them, these 302 objects would take hours."""

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
    original = message_objects._named
    monkeypatch.setattr(
        message_objects, "_named", lambda kind, data, children: read.append(data) or original(kind, data, children)
    )
    tree = ObjectTree(object_id=message, children=[ObjectTree(object_id=id) for id in objects if id != message])
    with pytest.raises(OutOfBounds, match=r"a message of [0-9]+ bytes"):
        pull_message(tree, objects.__getitem__, lambda id: None, most_bytes=1 << 20)
    assert len(read) == len(set(read)) == 202


def not_named(tree: ObjectTree, objects: Objects) -> None:
    rewrite(objects, "RecordDict", lambda fields: fields.pop("request"))


def many_objects(tree: ObjectTree, objects: Objects) -> None:
    tree.children.extend(ObjectTree(object_id=f"{number:064x}") for number in range(5000))


def another_in_its_place(tree: ObjectTree, objects: Objects) -> None:
    objects[tree.object_id] = objects[of_kind(objects, "RecordDict")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (not_named, "a RecordDict whose parts are not those that it names"),
        (many_objects, "4096 objects"),
        (another_in_its_place, "something else"),
        (one_chunk_many_times, "a message of [0-9]+ bytes"),
        (a_record_in_itself, "do not belong together"),
        (a_long_request, "may be no array's"),
    ],
)
def test_objects_that_are_no_message_or_few_bytes_that_stand_for_many(change: Change, says: str) -> None:
    tree, objects = honest(np.arange(100_000, dtype=np.float32))
    change(tree, objects)
    with pytest.raises(OutOfBounds, match=says):
        pulled(tree, objects)


@pytest.mark.parametrize(
    ("bound", "value", "says"), [("MOST_BYTES", 1000, "more than 1000 bytes"), ("MOST_S", -1.0, "takes more than")]
)
def test_more_bytes_or_time_than_any_message_has(
    monkeypatch: pytest.MonkeyPatch, bound: str, value: float, says: str
) -> None:
    monkeypatch.setattr(message_objects, bound, value)
    tree, objects = honest(np.arange(1000, dtype=np.float32))
    with pytest.raises(OutOfBounds, match=says):
        pulled(tree, objects)
