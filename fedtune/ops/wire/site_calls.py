"""Validation of a site's calls: each message must match its sender, its receiver and an open question of the lead.

Flower 1.41 authenticates the caller and validates nothing else: it stores messages between any two nodes, and delivers
every message that is addressed to the lead.  The queries use Flower's tables; tests/flower/test_internals.py fails if
they change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from fedtune.flower.internals import (
    PROTOBUF_REQUEST_TYPES,
    constant,
    fleet_pb2,
    message_pb2,
    now,
    objects,
    runtime_pb2,
    uint64_to_int64,
)
from fedtune.ops.wire.identity import CallRefused

if TYPE_CHECKING:
    from fedtune.flower.internals import SqlLinkState

FLEET = "/v1/fleet/"
_SMALL_BYTES, _ANNOUNCED_BYTES = 1 << 16, 1 << 20
_OBJECT_BYTES = 1 << 23  # Flower splits arrays into objects of 5 MiB
_MAX_OBJECTS = 4096
_SLACK_BYTES = 1 << 20
_UNKNOWN_BYTES = 1 << 30  # limit for an answer if the question was fetched before this process started
_REMEMBERED, _REMEMBERED_OBJECTS = 4096, 1 << 17

_QUESTION = text("""
SELECT q.run_id, q.src_node_id, q.dst_node_id, q.group_id, q.message_type, q.created_at + q.ttl AS until,
       (SELECT message_id FROM message_res WHERE reply_to_message_id = q.message_id) AS answer
FROM message_ins AS q WHERE q.message_id = :id""")
_NUM_BYTES = text("""
WITH RECURSIVE part(id) AS (
  SELECT :id UNION SELECT child_id FROM object_children JOIN part ON parent_id = part.id)
SELECT coalesce(sum(length(content)), 0) FROM objects JOIN part ON object_id = part.id""")
_IS_ASKED = text("""
WITH RECURSIVE whole(id) AS (
  SELECT :object UNION SELECT parent_id FROM object_children JOIN whole ON child_id = whole.id)
SELECT 1 FROM message_ins JOIN whole ON message_id = whole.id WHERE dst_node_id = :node AND run_id = :run""")
_IS_AWAITED = text("""
SELECT 1 FROM object_push_session_pending AS object JOIN object_push_sessions USING (session_id)
WHERE session_id = :session AND object_id = :object AND run_id = :run""")
_UNANSWERED = text("""
SELECT q.message_id FROM message_ins AS q JOIN node ON node_id = q.dst_node_id
WHERE q.created_at + q.ttl > :time AND online_until > :time
AND NOT EXISTS (SELECT 1 FROM message_res WHERE reply_to_message_id = q.message_id)
UNION
SELECT reply_to_message_id FROM message_res JOIN object_push_session_roots ON root_object_id = message_id
JOIN object_push_sessions USING (session_id) WHERE pending_count > 0 AND expires_at > :now""")


@dataclass
class _Answer:
    """Answer that a site has announced and is uploading."""

    object_ids: frozenset[str]
    most_bytes: int  # maximum size of all its objects together
    until: float  # Unix time at which its question expires
    num_bytes: dict[str, int] = field(default_factory=dict)  # object id -> size of the received object


class SiteCalls:
    """Thread-safe validator that checks the sites' calls against Flower's database.

    Args:
        state: Flower's link state, stored in a database.
    """

    def __init__(self, state: SqlLinkState) -> None:
        self._state, self._lock = state, threading.Lock()
        self._answers: dict[int, dict[str, _Answer]] = {}  # node -> message id -> answer
        self._sizes: dict[str, int] = {}  # sizes of fetched questions, whose objects Flower deletes
        self._asked: dict[str, frozenset[str]] = {}  # the lead's objects -> the ids of their parts

    def get_max_body_bytes(self, path: str) -> int:
        """Return the size limit in bytes for the body of a call."""
        call = path.removeprefix(FLEET)
        return {"push-messages": _ANNOUNCED_BYTES, "push-object": _OBJECT_BYTES}.get(call, _SMALL_BYTES)

    def check_call(self, path: str, key: bytes, body: bytes) -> None:
        """Check that the site with the connection key `key` may make this call.

        Raises:
            CallRefused: the site may not make the call.
        """
        try:
            request: Any = PROTOBUF_REQUEST_TYPES["POST", path].FromString(body)
        except Exception:  # an error of protobuf, which has no type stubs
            raise CallRefused(400, "the body is not a request of this call") from None
        node = self.find_node(key)
        call = path.removeprefix(FLEET)
        if call == "activate-node":
            same = request.public_key == key
        else:
            same = node is not None and (request.node_id if call == "deactivate-node" else request.node.node_id) == node
        if not same:
            raise CallRefused(401, "the call names another node")
        if call == "push-messages":
            self._check_answer(request, node or 0)
        elif call == "push-object":
            self._check_object(request, node or 0)
        elif call == "pull-object":
            run, mine = uint64_to_int64(request.run_id), uint64_to_int64(node or 0)
            if not any(self._run_query(_IS_ASKED, object=request.object_id, node=mine, run=run)):
                raise CallRefused(409, "the object does not belong to a question to this node")
        elif call == "confirm-message-received":
            self._check_confirmed(request, node or 0)

    def find_node(self, key: bytes) -> int | None:
        """Return the id of the node with this connection key; None if there is no such node."""
        return self._state.get_node_id_by_public_key(key)

    def register_questions(self, body: bytes) -> list[int]:
        """Register the parts of the lead's questions, and return the nodes to which the questions are addressed.

        Flower identifies objects by their content across all runs and nodes, and trusts the first sender of an object.
        If a site announced one of the lead's objects with other parts, the lead could no longer send any question.
        """
        try:
            request = runtime_pb2.PushAppMessagesRequest.FromString(body)
        except Exception:  # an error of protobuf; Flower refuses the call
            return []
        with self._lock:
            for tree in request.message_object_trees:
                for part in islice(_iter_objects(tree), _MAX_OBJECTS):
                    self._asked.pop(part.object_id, None)
                    self._asked[part.object_id] = frozenset(child.object_id for child in part.children)
            while len(self._asked) > _REMEMBERED_OBJECTS:
                del self._asked[next(iter(self._asked))]
        return [message.metadata.dst_node_id for message in request.messages_list]

    def keep_complete_answers(self, body: bytes) -> bytes:
        """Restrict the lead's request for answers to complete answers, and return the new request body.

        Flower would make the lead wait for the missing parts of an incomplete answer.  For offline sites, Flower itself
        creates an error answer.
        """
        request = runtime_pb2.PullAppMessagesRequest.FromString(body)
        moment = now()
        rows = self._run_query(_UNANSWERED, time=moment.timestamp(), now=moment.isoformat(sep=" "))
        unanswered = {row[0] for row in rows}
        ids = [id for id in request.message_ids if id not in unanswered]
        if len(ids) == len(request.message_ids):
            return body
        complete: bytes = runtime_pb2.PullAppMessagesRequest(message_ids=ids).SerializeToString()
        return complete

    def _check_answer(self, request: fleet_pb2.PushMessagesRequest, node: int) -> None:
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise CallRefused(403, "the call must contain exactly one message")
        if any(request.clientapp_runtime_list):
            raise CallRefused(403, "the call must not contain a training time")
        (message,), (tree,) = request.messages_list, request.message_object_trees
        if message.HasField("error") or message.content.ByteSize():
            raise CallRefused(403, "the message must not contain inline content")
        about = message.metadata
        object_ids = self._list_object_ids(tree)
        if tree.object_id != about.message_id:
            raise CallRefused(403, "the object tree belongs to another message")
        until = self._check_metadata(about, node)
        size = max(self._count_bytes(about.reply_to_message_id), self._sizes.get(about.reply_to_message_id, 0))
        most = 2 * size + _SLACK_BYTES if size else _UNKNOWN_BYTES
        answer = _Answer(object_ids=object_ids, most_bytes=most, until=until)
        with self._lock:
            before = self._open_answers(node).get(about.message_id)
            if before is None or before.object_ids != object_ids:  # otherwise, the same answer is announced again
                self._answers[node][about.message_id] = answer

    def _list_object_ids(self, tree: message_pb2.ObjectTree) -> frozenset[str]:
        parts = list(islice(_iter_objects(tree), _MAX_OBJECTS + 1))
        if len(parts) > _MAX_OBJECTS or not all(objects.is_valid_sha256_hash(part.object_id) for part in parts):
            raise CallRefused(403, "the message has too many objects or an invalid object id")
        with self._lock:
            for part in parts:
                made_of = frozenset(child.object_id for child in part.children)
                if self._asked.get(part.object_id, made_of) != made_of:
                    raise CallRefused(403, "the lead's object with this id has other parts")
        return frozenset(part.object_id for part in parts)

    def _check_metadata(self, about: message_pb2.Metadata, node: int) -> float:
        """Check that a message answers an open question of the lead to this node.

        Returns:
            The Unix time at which the question expires.

        Raises:
            CallRefused: the message does not answer such a question.
        """
        if about.src_node_id != node:
            raise CallRefused(403, "the message names another sender")
        if about.dst_node_id != constant.SUPERLINK_NODE_ID:
            raise CallRefused(403, "the message is not addressed to the lead")
        rows = list(self._run_query(_QUESTION, id=about.reply_to_message_id))
        if not about.reply_to_message_id:
            raise CallRefused(403, "the message answers no question")
        if not rows or rows[0].until <= time.time():
            raise CallRefused(409, "the question is not open")
        (question,) = rows
        if question.dst_node_id != uint64_to_int64(node) or question.src_node_id != constant.SUPERLINK_NODE_ID:
            raise CallRefused(403, "the question was sent to another node")
        if question.run_id != uint64_to_int64(about.run_id):
            raise CallRefused(403, "the question belongs to another run")
        if (about.message_type, about.group_id) != (question.message_type, question.group_id):
            raise CallRefused(403, "the message type differs from the question's")
        if question.answer not in (None, about.message_id):
            raise CallRefused(409, "the question was already answered")
        return float(question.until)

    def _check_object(self, request: Any, node: int) -> None:
        id, size = request.object_id, len(request.object_content)
        with self._lock:
            announced = next((answer for answer in self._open_answers(node).values() if id in answer.object_ids), None)
            if announced is not None:
                others = sum(announced.num_bytes.values()) - announced.num_bytes.get(id, 0)
                if others + size > announced.most_bytes:
                    raise CallRefused(413, "the answer exceeds the size limit of its question")
                announced.num_bytes[id] = size
                return
        # Only its owner knows a session id, so a session from before the start of this process is accepted.
        run = uint64_to_int64(request.run_id)
        if not any(self._run_query(_IS_AWAITED, session=request.session_id, object=id, run=run)):
            raise CallRefused(409, "no receiver waits for this object")

    def _check_confirmed(self, request: message_pb2.ConfirmMessageReceivedRequest, node: int) -> None:
        id = request.message_object_id
        rows = list(self._run_query(_QUESTION, id=id))
        if not rows or rows[0].dst_node_id != uint64_to_int64(node):
            raise CallRefused(409, "the message is not a question to this node")
        size = self._count_bytes(id)
        with self._lock:
            while len(self._sizes) >= _REMEMBERED:
                del self._sizes[next(iter(self._sizes))]
            self._sizes[id] = max(self._sizes.pop(id, 0), size)

    def _open_answers(self, node: int) -> dict[str, _Answer]:
        kept = {id: answer for id, answer in self._answers.get(node, {}).items() if answer.until > time.time()}
        self._answers[node] = kept
        return kept

    def _count_bytes(self, id: str) -> int:
        return int(next(iter(self._run_query(_NUM_BYTES, id=id)))[0])

    def _run_query(self, query: Any, **values: object) -> Iterable[Any]:
        with self._state.session() as session:
            return session.execute(query, values).all()


def _iter_objects(tree: message_pb2.ObjectTree) -> Iterator[message_pb2.ObjectTree]:
    """Yield all objects of a tree; protobuf limits the recursion depth."""
    yield tree
    for child in tree.children:
        yield from _iter_objects(child)
