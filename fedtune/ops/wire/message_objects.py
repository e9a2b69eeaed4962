"""Download of a Flower message, which is a tree of objects, with limited memory and time.

An object may reference the same part many times, so that a message of a few kilobytes could exhaust the memory when it
is assembled.  The size of the assembled message is therefore computed first.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from itertools import islice

from fedtune.flower.internals import Message, core, inflating, message_pb2, objects
from fedtune.ops.wire.bounded_http import ResponseLimitExceeded

MAX_OBJECTS = 4096
MAX_BYTES = 1 << 30  # maximum size of a message: an adapter of 268 million float32 values
MAX_BESIDE_BYTES = 4 << 20
"""Maximum size of all data outside of arrays, which becomes Python objects of many times the size."""
MAX_S = 3600.0

_PARTS = {
    "Message": ("RecordDict",),
    "RecordDict": ("ArrayRecord", "ConfigRecord", "MetricRecord"),
    "ArrayRecord": ("Array",),
    "Array": ("ArrayChunk",),
    "ArrayChunk": (),
    "ConfigRecord": (),
    "MetricRecord": (),
}
"""Type of object -> allowed types of its parts."""


class InvalidMessageError(ResponseLimitExceeded):
    """Raised for a message that exceeds the limits or has an invalid structure, which is the fault of its sender."""


def pull_message(
    tree: message_pb2.ObjectTree,
    pull: Callable[[str], bytes],
    confirm: Callable[[str], None],
    *,
    most_bytes: float = math.inf,
    most_s: float = math.inf,
) -> Message:
    """Download all objects in `tree` with `pull` and assemble the message; `confirm` is called after the last object.

    Args:
        tree: the message's object tree.
        pull: fetches an object by its id.
        confirm: tells the server that the message has arrived.
        most_bytes: maximum size of the assembled message, if lower than `MAX_BYTES`.
        most_s: maximum duration in seconds, if lower than `MAX_S`.

    Raises:
        InvalidMessageError: the message exceeds the limits on size or time, or its structure is invalid.
        ObjectPullError: the server no longer has one of the objects.
    """
    ids = list(dict.fromkeys(node.object_id for node in islice(objects.iterate_object_tree(tree), MAX_OBJECTS + 1)))
    if len(ids) > MAX_OBJECTS:
        raise InvalidMessageError(f"the message has more than {MAX_OBJECTS} objects")
    most_bytes, most_s = min(most_bytes, MAX_BYTES), min(most_s, MAX_S)
    contents = inflating.pull_objects(ids, _PullLimit(pull, most_s), max_time=most_s)
    if (size := _compute_assembled_size(tree.object_id, "Message", contents, {})) > most_bytes:
        raise InvalidMessageError(f"the message has {size} bytes, but at most {most_bytes} are allowed")
    confirm(tree.object_id)
    message = inflating.inflate_object_from_contents(tree.object_id, contents)
    assert isinstance(message, Message)  # `_compute_assembled_size` has checked this
    return message


class _PullLimit:
    """Wrapper of `pull` that raises InvalidMessageError when a message exceeds its limits on bytes or time."""

    def __init__(self, pull: Callable[[str], bytes], most_s: float) -> None:
        self._pull, self._most_s, self._ends = pull, most_s, time.monotonic() + most_s
        self._bytes = self._beside = 0  # approximate, because two threads may update them at the same time

    def __call__(self, object_id: str) -> bytes:
        if time.monotonic() > self._ends:
            raise InvalidMessageError(f"the message took more than {self._most_s:g} s")
        content = self._pull(object_id)
        self._bytes += len(content)
        if not content.startswith(b"ArrayChunk "):
            self._beside += len(content)
        if self._bytes > MAX_BYTES or self._beside > MAX_BESIDE_BYTES:
            bound = f"{MAX_BYTES} bytes, or more than {MAX_BESIDE_BYTES} outside of arrays"
            raise InvalidMessageError(f"the message has more than {bound}")
        return content


def _compute_assembled_size(id: str, kind: str, contents: Mapping[str, bytes], known: dict[str, int]) -> int:
    """Compute the size in bytes of the object `id` after assembly; each reference to a part counts.

    `known` caches the size of each object, because a few hundred objects with shared parts would otherwise take hours.
    """
    content = contents[id]
    actual, children, _ = objects.get_object_head_values_from_object_content(content)
    if actual != kind:
        raise InvalidMessageError(f"an object is not a {kind}, as its parent declares")
    if id not in known:
        parts = _PARTS[kind]
        kinds = {child: _read_object_kind(contents[child], parts) for child in children}
        named = _list_named_parts(kind, content, children) if parts else []
        if set(named) != kinds.keys():
            raise InvalidMessageError(f"the parts of a {kind} differ from its references")
        sizes = {child: _compute_assembled_size(child, kinds[child], contents, known) for child in kinds}
        known[id] = len(content) + sum(sizes[part] for part in named)
    return known[id]


def _read_object_kind(content: bytes, allowed: tuple[str, ...]) -> str:
    kind = content[:16].decode("latin-1").partition(" ")[0]
    if kind not in allowed:
        raise InvalidMessageError("the message contains an object of the wrong type")
    return kind


def _list_named_parts(kind: str, content: bytes, children: list[str]) -> list[str]:
    """List the parts that an object references, with repetitions."""
    if kind == "Message":
        return children
    body = json.loads(content[content.index(core.HEAD_BODY_DIVIDER) + len(core.HEAD_BODY_DIVIDER) :])
    return [children[number] for number in body["arraychunk_ids"]] if kind == "Array" else list(body.values())
