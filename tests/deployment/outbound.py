"""Complete decoding of a site's outgoing traffic: Flower's calls, their objects, and fedtune's own fields."""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.supercore.inflatable import inflatable_object
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import Message as Proto

CALLS: dict[str, type[Proto]] = {
    "/v1/fleet/activate-node": fleet_pb2.ActivateNodeRequest,
    "/v1/fleet/deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "/v1/fleet/send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "/v1/fleet/pull-messages": fleet_pb2.PullMessagesRequest,
    "/v1/fleet/push-messages": fleet_pb2.PushMessagesRequest,
    "/v1/fleet/pull-object": message_pb2.PullObjectRequest,
    "/v1/fleet/push-object": message_pb2.PushObjectRequest,
    "/v1/fleet/confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
}
"""All calls that a site may make, and their message types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def request(self) -> Any:
        """Decode the protobuf message of the call, without unknown or trailing bytes."""
        message = CALLS[self.path].FromString(self.body)
        assert message.SerializeToString(deterministic=True) is not None
        # Protobuf keeps fields that this version of Flower does not know, and serializes them again.
        known = CALLS[self.path]()
        known.CopyFrom(message)
        known.DiscardUnknownFields()
        assert known.ByteSize() == message.ByteSize() == len(self.body), self.path
        return message


def read_calls(path: Path) -> list[Call]:
    calls = []
    for line in map(json.loads, path.read_text().splitlines()):
        headers = [(name.lower(), value) for name, value in line["headers"]]
        calls.append(Call(**line | {"headers": headers, "body": base64.b64decode(line["body"])}))
    return calls


def collect_objects(calls: list[Call]) -> dict[str, bytes]:
    """Collect all pushed objects by id, which is their hash."""
    objects = {}
    for call in calls:
        if call.path == "/v1/fleet/push-object":
            content = call.request.object_content
            assert inflatable_object.get_object_id(content) == call.request.object_id
            objects[call.request.object_id] = content
    return objects


def collect_messages(calls: list[Call]) -> list[tuple[Any, RecordDict]]:
    """Reassemble each answer from its objects, as (announcement, content)."""
    objects, answers = collect_objects(calls), []
    for call in calls:
        if call.path == "/v1/fleet/push-messages":
            request = call.request
            (tree,), (announced,) = request.message_object_trees, request.messages_list
            message = inflate_object_from_contents(tree.object_id, dict(objects), keep_object_contents=True)
            assert isinstance(message, Message)
            assert not message.has_error()
            answers.append((request, message.content))
            assert not announced.HasField("content") or not announced.content.ByteSize()
    return answers


def list_announced_ids(calls: list[Call]) -> set[str]:
    trees = [call.request.message_object_trees for call in calls if call.path == "/v1/fleet/push-messages"]
    return {node.object_id for (tree,) in trees for node in inflatable_object.iterate_object_tree(tree)}


def read_object_kind(content: bytes) -> str:
    return str(inflatable_object.get_object_type_from_object_content(content))


def list_numbers(message: Proto) -> Iterator[tuple[str, float]]:
    """List every number in a protobuf message recursively, with the name of its field."""
    return ((name, value) for name, value in _iter_values(message) if isinstance(value, int | float))


def list_texts(message: Proto) -> Iterator[str]:
    return (value for _, value in _iter_values(message) if isinstance(value, str))


def _iter_values(message: Proto) -> Iterator[tuple[str, Any]]:
    for field, value in message.ListFields():
        for item in value if field.is_repeated else [value]:
            if isinstance(item, Proto):
                yield from _iter_values(item)
            else:
                yield field.full_name, item


def iter_leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from iter_leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from iter_leaves(item)
    else:
        yield value
