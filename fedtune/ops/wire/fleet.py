"""A site's client for the server: the node's side of Flower's Fleet protocol, over mutual TLS.

The client replaces Flower's SuperNode, so that a single process polls, trains and answers, and its model stays loaded.
Flower's app bundle is never requested or installed.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

from fedtune.flower.internals import (
    FleetHttpClient,
    Message,
    RuntimeVersionHttpInterceptor,
    asymmetric,
    constant,
    core,
    fetching,
    fleet_pb2,
    get_http_client,
    heartbeat_pb2,
    inflating,
    make_node_authentication,
    message_to_proto,
    node_pb2,
    now,
    objects,
    remove_content_from_message,
    set_metadata,
    set_sender_ids,
)
from fedtune.ops.kits.certificates import read_connection_key
from fedtune.ops.wire.bounded_http import ResponseLimitExceeded, bound_client, replace_ssl_context
from fedtune.ops.wire.identity import Tls, describe_clock_difference, explain_tls_refusal, harden_client
from fedtune.ops.wire.line_errors import MessageGone, NotFedtuneServer, Unauthorized, Unreachable
from fedtune.ops.wire.message_objects import pull_message

HELLO = "/v1/fedtune/hello"  # fedtune's own call, which returns the name of the calling site in the roster
_MAX_REASON = 300
_CALL_TIMEOUT_S = 30.0
_MAX_APART_S = 3.0  # below every clock offset that a gate refuses
_LONGEST_S = 30 * 86400.0  # maximum time that a lead waits for an answer
_HEARTBEAT_S = constant.HEARTBEAT_MIN_INTERVAL / 2


class Fleet:
    """Connection of a site's node to the server.

    Args:
        server: host:port.
        tls: the site's certificates and key.
        heard: called whenever the server answers a heartbeat, even while the site answers a message.
    """

    def __init__(self, server: str, tls: Tls, *, heard: Callable[[], None] = lambda: None) -> None:
        self._server, self._tls, self._heard = server, tls, heard
        private = read_connection_key(tls.key)
        public = private.public_key()
        self._public = asymmetric.public_key_to_bytes(public)
        self._client = harden_client(
            FleetHttpClient(
                f"https://{server}",
                interceptors=[
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    make_node_authentication(private, public),
                ],
                verify=tls.create_client_context(),
                timeout=_CALL_TIMEOUT_S,
            )
        )
        self._node: node_pb2.Node | None = None
        self._may_have_lost_one = False
        # An answer whose upload may be incomplete.
        self._begun: dict[str, fleet_pb2.PushMessagesResponse] = {}
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def activate(self) -> None:
        """Register the node as online and start the heartbeats.

        Raises:
            Unauthorized: the server does not know the key.
            Unreachable: there is no connection, or an earlier process of this node ended within the last twenty
                seconds.
        """
        request = fleet_pb2.ActivateNodeRequest(
            public_key=self._public, heartbeat_interval=constant.HEARTBEAT_MIN_INTERVAL
        )
        try:
            with translate_line_errors():
                self._node = node_pb2.Node(node_id=self._client.ActivateNode(request).node_id)
        except Unauthorized as error:
            ask_site_name(self._server, self._tls)  # raises the server's reason if it rejects the key
            raise Unreachable("an earlier connection of this site is still open, or the site was just added") from error
        self._may_have_lost_one = False
        # From here on, Flower's messages contain this node as the sender.
        set_sender_ids(node_id=self._node.node_id, task_id=0)
        if self._beating is None:
            self._beating = threading.Thread(target=self._send_heartbeats, name="heartbeats", daemon=True)
            self._beating.start()

    def receive(self) -> Message | None:
        """Fetch the next message for this node; None if there is none.

        Raises:
            MessageGone: the server no longer has the message.
            Unauthorized, Unreachable: as for `activate`.
        """
        if self._may_have_lost_one:
            # Go offline and online again: the server delivers a message only once, and the lead repeats its question to
            # a site that comes back online. It answers Unauthorized if it considers the node offline already.
            with contextlib.suppress(Unauthorized), translate_line_errors():
                self._client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self._active_node.node_id))
            self.activate()
        self._may_have_lost_one = True
        message = self._receive_next_message()
        self._may_have_lost_one = False
        return message

    def _receive_next_message(self) -> Message | None:
        node = self._active_node
        with translate_line_errors():
            answer = self._client.PullMessages(fleet_pb2.PullMessagesRequest(node=node))
            if not answer.messages_list:
                return None
            run_id = answer.messages_list[0].metadata.run_id
            tree = answer.message_object_trees[0]
            message = pull_message(
                tree,
                fetching.make_pull_object_fn_protobuf(self._client.PullObject, node, run_id),
                fetching.make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, run_id),
            )
        set_metadata(message, message_id=tree.object_id)
        set_sender_ids(run_id=run_id)
        return message

    def reply(self, reply: Message) -> None:
        """Send an answer; the call is idempotent, so that it can be repeated after an error.

        Raises:
            MessageGone: the Flower run has ended, or is missing in the server's database.
            Unauthorized, Unreachable: as for `activate`.
        """
        node, run_id, id = self._active_node, reply.metadata.run_id, reply.object_id
        set_metadata(reply, message_id=id)
        in_doubt, self._may_have_lost_one = self._may_have_lost_one, True
        try:
            with translate_line_errors(), objects.no_object_id_recompute():
                begun = self._begun.get(id)
                self._begun = {id: begun or self._announce(reply)}
                send = fetching.make_push_object_fn_protobuf(
                    self._client.PushObject, node, run_id, self._begun[id].session_id
                )

                def push(object_id: str, content: bytes) -> None:
                    # After an interrupted upload, the server has some objects already.  If the answer does not arrive,
                    # the lead repeats its question.
                    with contextlib.suppress(*(inflating.ObjectPushError,) if begun else ()):
                        send(object_id, content)

                inflating.push_objects(
                    objects.get_all_nested_objects(reply), push, object_ids_to_push={*self._begun[id].objects_to_push}
                )
        except Unauthorized as error:
            self.activate()  # succeeds if the server lost its database and has registered the node again
            raise MessageGone("the server has lost the question to this answer") from error
        self._begun, self._may_have_lost_one = {}, in_doubt

    @staticmethod
    def is_past_deadline(message: Message, *, now: float) -> bool:
        """Return True if the server no longer accepts an answer to the message at the Unix time `now`."""
        until = message.metadata.created_at + message.metadata.ttl
        return not now <= until <= now + _LONGEST_S  # a time may be NaN or infinite

    def _announce(self, reply: Message) -> fleet_pb2.PushMessagesResponse:
        request = fleet_pb2.PushMessagesRequest(
            node=self._active_node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[objects.get_object_tree(reply)],
            # Flower reports the training time here, which would reveal the true number of records.
            clientapp_runtime_list=[0.0],
        )
        return self._client.PushMessages(request)

    def reload_certificate(self) -> None:
        """Load the kit's current certificate for all new connections."""
        replace_ssl_context(get_http_client(self._client), self._tls.create_client_context())

    def close(self) -> None:
        """Notify the server, if it is reachable, that the node goes offline, and close the connection."""
        self._stop.set()
        if self._beating is not None:
            self._beating.join(timeout=_CALL_TIMEOUT_S)
        if self._node is not None:
            with contextlib.suppress(httpx.HTTPError):  # otherwise, the server detects the missing heartbeats
                self._client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    @property
    def _active_node(self) -> node_pb2.Node:
        assert self._node is not None, "call activate first"
        return self._node

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(_HEARTBEAT_S):
            # A server that lost its database assigns a new node id.
            request = heartbeat_pb2.SendNodeHeartbeatRequest(
                node=self._node, heartbeat_interval=constant.HEARTBEAT_MIN_INTERVAL
            )
            try:
                self._client.SendNodeHeartbeat(request)
            except Exception:  # the polling thread fails with the same error, and reports it
                continue
            self._heard()


def ask_site_name(server: str, tls: Tls) -> str:
    """Ask the server for this site's name in the roster; the call has no side effects.

    Raises:
        Unauthorized: the server does not know this site, or the site is revoked; the error contains the reason.
        NotFedtuneServer: the answer does not come from a fedtune server.
        Unreachable: there is no connection.
    """
    headers = sign_headers(tls)
    with translate_line_errors(), httpx.Client(verify=tls.create_client_context(), timeout=_CALL_TIMEOUT_S) as client:
        bound_client(client)
        answer = client.get(f"https://{server}{HELLO}", headers=headers)
    if answer.status_code != httpx.codes.OK:
        parse_refusal_reason(answer, server)  # raises Foreign if the server is not a fedtune server
        raise _build_refusal_error(answer, "the server refused this site")
    return parse_answer_field(answer, "site", server)


def parse_refusal_reason(answer: httpx.Response, server: str) -> str:
    """Parse the reason from a fedtune server's answer to a refused call.

    Raises:
        NotFedtuneServer: the answer does not come from a fedtune server.
    """
    reason = parse_answer_field(answer, "reason", server)
    if not reason.isprintable() or len(reason) > _MAX_REASON:  # not a text for people
        raise NotFedtuneServer(f"the service at {server} is not a fedtune server ({answer.status_code})")
    return reason


def parse_answer_field(answer: httpx.Response, field: str, server: str) -> str:
    """Parse a field of a fedtune server's JSON response.

    Raises:
        NotFedtuneServer: the answer does not come from a fedtune server.
    """
    try:
        return str(answer.json()[field])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise NotFedtuneServer(f"the service at {server} is not a fedtune server ({answer.status_code})") from error


def sign_headers(tls: Tls) -> dict[str, str]:
    """Return the headers that authenticate a site in fedtune's own calls; they have Flower's format."""
    private, timestamp = read_connection_key(tls.key), now().isoformat()
    public = asymmetric.public_key_to_bytes(private.public_key())
    signature = asymmetric.sign_message(private, timestamp.encode())
    return {
        core.FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public).decode(),
        constant.TIMESTAMP_HEADER: timestamp,
        core.FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode(),
    }


def _build_refusal_error(answer: httpx.Response, what: str) -> Unauthorized | Unreachable:
    """Build the error for a refused call, with the server's reason (such as "revoked") if the answer contains one.

    If the clocks differ too much, the error is Unreachable, so that the site retries until the clocks are corrected.
    """
    with contextlib.suppress(NotFedtuneServer, httpx.StreamError):
        reason = parse_refusal_reason(answer, "")
        if "clock" in reason and (apart := describe_clock_difference(answer, most_s=_MAX_APART_S)):
            return Unreachable(apart)
        what += f": {reason}"
    return Unauthorized(what)


@contextmanager
def translate_line_errors() -> Iterator[None]:
    """Convert errors of Flower and httpx to the errors of `line_errors.py`."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if error.response.is_redirect:
            raise Unreachable(f"the server sent a redirect ({status}), and redirects are never followed") from error
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.PRECONDITION_FAILED):
            what = f"the server does not accept this site's key ({status})"
            raise _build_refusal_error(error.response, what) from error
        if status < httpx.codes.INTERNAL_SERVER_ERROR:
            raise MessageGone(f"the server no longer accepts this message ({status})") from error
        raise Unreachable(f"the server answered with status {status}") from error
    except (inflating.ObjectPullError, inflating.ObjectPushError) as error:
        raise MessageGone("the server no longer stores this message") from error
    except ResponseLimitExceeded as error:
        raise Unreachable(f"the server's answer is not accepted: {error}") from error
    except httpx.HTTPError as error:
        cut = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.WriteError)
        what = explain_tls_refusal(error) or ("the connection was cut" if cut else type(error).__name__)
        raise Unreachable(f"no connection to the server ({what})") from error
    except Exception as error:  # a proxy's error page or an invalid message; each library raises other errors
        raise Unreachable(f"the server's answer cannot be read ({type(error).__name__})") from error
