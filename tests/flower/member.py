"""A malicious member of the federation, which makes arbitrary calls with its own certificate and key."""

import base64
import itertools
from dataclasses import dataclass, field
from typing import Any

import httpx
from flwr.app import ConfigRecord, Message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, SUPERLINK_NODE_ID, TIMESTAMP_HEADER
from flwr.proto import fleet_pb2, message_pb2, recorddict_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable import inflatable_object
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from fedtune.ops.kits.certificates import read_connection_key
from fedtune.ops.wire.identity import Tls

from .loopback import Loopback, wait_for

_NUMBERS = itertools.count()
UNIT = recorddict_pb2.RecordDict()


def sign_headers(tls: Tls, *, moment: str | None = None) -> dict[str, str]:
    private = read_connection_key(tls.key)
    moment = moment or now().isoformat()
    return {
        "content-type": PROTOBUF_MEDIA_TYPE,
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public_key_to_bytes(private.public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(private, moment.encode())).decode(),
        TIMESTAMP_HEADER: moment,
    }


def make_object(size: int) -> bytes:
    """Create a unique Flower object of about `size` bytes without children."""
    return ConfigRecord({"x": "x" * size, "number": next(_NUMBERS)}).deflate()


@dataclass
class Question:
    metadata: Any
    tree: Any

    @property
    def object_ids(self) -> list[str]:
        return [node.object_id for node in inflatable_object.iterate_object_tree(self.tree)]


@dataclass
class Member:
    """A member with a connection to a server; close it after use."""

    network: Loopback
    name: str
    node_id: int = 0
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.tls = self.network.tls[self.name]
        self.client = httpx.Client(
            verify=self.tls.create_client_context(), base_url=f"https://{self.network.address}", timeout=30
        )

    def post(self, call: str, request: Any, **headers: str) -> httpx.Response:
        content = request.SerializeToString() if hasattr(request, "SerializeToString") else request
        return self.client.post(f"/v1/fleet/{call}", content=content, headers={**sign_headers(self.tls), **headers})

    @property
    def node(self) -> Node:
        return Node(node_id=self.node_id)

    def activate(self) -> None:
        public = base64.b64decode(sign_headers(self.tls)[FLEET_HTTP_PUBLIC_KEY_HEADER])
        request = fleet_pb2.ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        answer = self.post("activate-node", request)
        assert answer.status_code == 200, answer.text
        self.node_id = fleet_pb2.ActivateNodeResponse.FromString(answer.content).node_id

    def leave(self) -> None:
        if self.node_id:
            self.post("deactivate-node", fleet_pb2.DeactivateNodeRequest(node_id=self.node_id))
        self.client.close()

    def asked(self, run_id: int) -> Question:
        """Wait for the member's next question of a run, ignoring those of earlier tests."""
        questions: list[Question] = []

        def pull() -> bool:
            answer = self.post("pull-messages", fleet_pb2.PullMessagesRequest(node=self.node))
            assert answer.status_code == 200, answer.text
            response = fleet_pb2.PullMessagesResponse.FromString(answer.content)
            if response.messages_list and response.messages_list[0].metadata.run_id == run_id:
                questions.append(Question(response.messages_list[0].metadata, response.message_object_trees[0]))
            return bool(questions)

        wait_for(pull, seconds=30, what="a question")
        return questions[0]

    def push(self, request: Any) -> httpx.Response:
        return self.post("push-messages", request)

    def push_object(self, question: Question, session: str, content: bytes, **changed: Any) -> httpx.Response:
        fields = {"node": self.node, "run_id": question.metadata.run_id, "session_id": session}
        fields |= {"object_id": get_object_id(content), "object_content": content}
        return self.post("push-object", message_pb2.PushObjectRequest(**{**fields, **changed}))

    def reply(self, question: Question, message: Message) -> None:
        objects = {id: part.deflate() for id, part in inflatable_object.get_all_nested_objects(message).items()}
        self.send(question, inflatable_object.get_object_tree(message), objects)

    def send(self, question: Question, tree: Any, objects: dict[str, bytes]) -> None:
        request = self.build_answer(question, message_id=tree.object_id)
        request.message_object_trees[0].CopyFrom(tree)
        session = self.read_session(self.push(request))
        for content in objects.values():
            assert self.push_object(question, session, content).status_code == 200

    def read_session(self, answer: httpx.Response) -> str:
        assert answer.status_code == 200, answer.text
        return fleet_pb2.PushMessagesResponse.FromString(answer.content).session_id

    def build_answer(self, question: Question, *objects: bytes, **changed: Any) -> Any:
        """Build an answer with the correct metadata except for the fields in `changed`."""
        root = make_object(8)
        fields = {
            "run_id": question.metadata.run_id,
            "message_id": get_object_id(root),
            "src_node_id": self.node_id,
            "dst_node_id": SUPERLINK_NODE_ID,
            "reply_to_message_id": question.metadata.message_id,
            "group_id": question.metadata.group_id,
            "ttl": 10.0,
            "message_type": question.metadata.message_type,
            "created_at": now().timestamp(),
        }
        metadata = message_pb2.Metadata(**{**fields, **changed})
        tree = message_pb2.ObjectTree(
            object_id=metadata.message_id,
            children=[message_pb2.ObjectTree(object_id=get_object_id(content)) for content in objects],
        )
        return fleet_pb2.PushMessagesRequest(
            node=self.node,
            messages_list=[message_pb2.Message(metadata=metadata, content=UNIT)],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
