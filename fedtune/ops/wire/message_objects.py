"""Fetching a message of Flower's, which comes as a tree of objects, within bounded memory and time.

What an object holds may name its parts more than once: some kilobytes that name one part a thousand times would fill a
machine's memory when they are put together.  So the size of the whole is computed before.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from itertools import islice

from fedtune.flower.internals import Message, core, inflating, message_pb2, objects
from fedtune.ops.wire.bounded_http import OutOfBounds

MOST_OBJECTS = 4096
MOST_BYTES = 1 << 30  # of a whole message: an adapter of 268 million float32 values
MOST_BESIDE_BYTES = 4 << 20
"""Of all its objects but arrays' bytes: these become Python objects, which are many times as large."""
MOST_S = 3600.0

_PARTS = {
    "Message": ("RecordDict",),
    "RecordDict": ("ArrayRecord", "ConfigRecord", "MetricRecord"),
    "ArrayRecord": ("Array",),
    "Array": ("ArrayChunk",),
    "ArrayChunk": (),
    "ConfigRecord": (),
    "MetricRecord": (),
}
"""What each kind of object is made of."""


class NotWhole(OutOfBounds):
    """A message that is larger, or built otherwise, than any honest one: its maker's doing, not the line's."""


def pull_message(
    tree: message_pb2.ObjectTree,
    pull: Callable[[str], bytes],
    confirm: Callable[[str], None],
    *,
    most_bytes: float = math.inf,
    most_s: float = math.inf,
) -> Message:
    """The message whose objects `tree` names, each fetched by `pull`; `confirm` is told when all have come.

    Args:
        tree: of the message.
        pull: fetches the object with an id.
        confirm: tells that the message has come.
        most_bytes: that it may stand for, if that is less than `MOST_BYTES`.
        most_s: seconds that it may take, if that is less than `MOST_S`.

    Raises:
        NotWhole: it is larger, slower or built otherwise than any honest lead's.
        ObjectPullError: an object is no longer there.
    """
    ids = list(dict.fromkeys(node.object_id for node in islice(objects.iterate_object_tree(tree), MOST_OBJECTS + 1)))
    if len(ids) > MOST_OBJECTS:
        raise NotWhole(f"a message of more than {MOST_OBJECTS} objects")
    most_bytes, most_s = min(most_bytes, MOST_BYTES), min(most_s, MOST_S)
    contents = inflating.pull_objects(ids, _Budget(pull, most_s), max_time=most_s)
    if (size := _size(tree.object_id, "Message", contents, {})) > most_bytes:
        raise NotWhole(f"a message of {size} bytes, and it may have {most_bytes}")
    confirm(tree.object_id)
    message = inflating.inflate_object_from_contents(tree.object_id, contents)
    assert isinstance(message, Message)  # as `_size` required
    return message


class _Budget:
    """`pull`, until bytes or time of one message are used up."""

    def __init__(self, pull: Callable[[str], bytes], most_s: float) -> None:
        self._pull, self._most_s, self._ends = pull, most_s, time.monotonic() + most_s
        self._bytes = self._beside = 0  # two threads may add to them: the figures are bounds of memory, not a price

    def __call__(self, object_id: str) -> bytes:
        if time.monotonic() > self._ends:
            raise NotWhole(f"a message that takes more than {self._most_s:g} s")
        content = self._pull(object_id)
        self._bytes += len(content)
        if not content.startswith(b"ArrayChunk "):
            self._beside += len(content)
        if self._bytes > MOST_BYTES or self._beside > MOST_BESIDE_BYTES:
            bound = f"{MOST_BYTES} bytes, of which {MOST_BESIDE_BYTES} may be no array's"
            raise NotWhole(f"a message of more than {bound}")
        return content


def _size(id: str, kind: str, contents: Mapping[str, bytes], known: dict[str, int]) -> int:
    """Bytes of the object `id` of this kind when all its parts are put in, each as often as it is named.

    `known` keeps the size of each object: a few hundred that share their parts would keep a machine busy for hours if
    each were read again for everything that names it.
    """
    content = contents[id]
    found, children, _ = objects.get_object_head_values_from_object_content(content)
    if found != kind:
        raise NotWhole(f"a {kind} that is something else")
    if id not in known:
        parts = _PARTS[kind]
        kinds = {child: _kind(contents[child], parts) for child in children}
        named = _named(kind, content, children) if parts else []
        if set(named) != kinds.keys():
            raise NotWhole(f"a {kind} whose parts are not those that it names")
        sizes = {child: _size(child, kinds[child], contents, known) for child in kinds}
        known[id] = len(content) + sum(sizes[part] for part in named)
    return known[id]


def _kind(content: bytes, allowed: tuple[str, ...]) -> str:
    kind = content[:16].decode("latin-1").partition(" ")[0]
    if kind not in allowed:
        raise NotWhole("a message whose parts do not belong together")
    return kind


def _named(kind: str, content: bytes, children: list[str]) -> list[str]:
    """The parts that an object names, as often as it does."""
    if kind == "Message":
        return children
    body = json.loads(content[content.index(core.HEAD_BODY_DIVIDER) + len(core.HEAD_BODY_DIVIDER) :])
    return [children[number] for number in body["arraychunk_ids"]] if kind == "Array" else list(body.values())
