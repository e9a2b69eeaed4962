"""The lead's session with the server: one Flower run, from its start to its end."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import httpx

from fedtune.flower.asking_grid import Pulled
from fedtune.flower.internals import (
    Message,
    RunStarter,
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    constant,
    control_pb2,
    core,
    fab_pb2,
    fetching,
    get_http_client,
    inflating,
    make_http_grid,
    message_pb2,
    node_pb2,
    rpc,
    run_from_proto,
    runtime_pb2,
    set_sender_ids,
)
from fedtune.ops.files import make_zip
from fedtune.ops.wire.bounded_http import replace_ssl_context
from fedtune.ops.wire.identity import TOLERANCE_S, LeadSignature, Tls, describe_clock_difference, harden_client
from fedtune.ops.wire.message_objects import InvalidMessageError, pull_message
from fedtune.privacy.keys import SigningKey
from fedtune.spec import RunError

log = logging.getLogger(__name__)

_HEARTBEAT_S = 10.0
_BUNDLE = b"""\
[project]
name = "fedtune"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedtune"
[tool.flwr.app.components]
serverapp = "none:none"
clientapp = "none:none"
[tool.flwr.app.config]
"""
"""Empty app bundle, because Flower requires a bundle for every run; it contains no code and is never fetched."""


class LeadSession:
    """A Flower run that this process starts, claims, keeps alive with heartbeats, and ends.

    Attributes:
        grid: Flower's own grid, over this session's connection.
    """

    def __init__(self, server: str, tls: Tls, key: SigningKey) -> None:
        signature, version = LeadSignature(key), RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")

        def client(*token: RuntimeTokenHttpInterceptor) -> RunStarter:
            signed: tuple[rpc.ProtobufClientInterceptor, ...] = (version, *token, signature)
            return harden_client(
                RunStarter(f"https://{server}", interceptors=signed, verify=tls.create_client_context())
            )

        with translate_read_errors():
            with client() as opening:
                bundle = make_zip({"pyproject.toml": _BUNDLE}, moment=datetime.now(UTC))
                opening.start_run(control_pb2.StartRunRequest(fab=fab_pb2.Fab(content=bundle)))
                # Another process may have started the returned run; any new run can be used.
                token = opening.AcquireTask(
                    runtime_pb2.AcquireTaskRequest(supported_task_types=[core.TaskType.SERVER_APP])
                ).token
            if not token:
                raise RunError(f"{server} started a run, but did not return it")
            self._client, self._tls = client(RuntimeTokenHttpInterceptor(token)), tls
            task = self._client.PullTaskInput(runtime_pb2.PullTaskInputRequest())
        set_sender_ids(run_id=task.run.run_id, node_id=task.context.node_id, task_id=task.task_id)
        self.grid = make_http_grid(server, token, self._client)
        self.grid.set_run(run_from_proto(task.run))
        self._nodes: dict[int, node_pb2.NodeInfo] = {}
        self._looked = float("-inf")
        self._stop = threading.Event()
        threading.Thread(target=self._send_heartbeats, name="lead's heartbeats", daemon=True).start()

    def find_online_sites(self, numbers: Mapping[bytes, int]) -> Mapping[int, node_pb2.NodeInfo]:
        """Return the online nodes by number, cached for one second."""
        if time.monotonic() - self._looked > 1.0:
            with translate_read_errors():
                online = self.grid.get_nodes()
                self._nodes = {numbers[bytes(n.public_key)]: n for n in online if bytes(n.public_key) in numbers}
            self._looked = time.monotonic()
        return self._nodes

    def push(self, message: Message) -> str | None:
        """Send a question and return its message id.

        The id is empty if the node no longer exists, and None if the message exceeds the server's size limit.
        """
        with translate_read_errors():
            ids = list(self.grid.push_messages([message]))
            if len(ids) > 1:
                raise ValueError("the response is larger than requested")
        return ids[0] if ids else None

    def fetch_answers(self, message_ids: Sequence[str], *, most_bytes: int, most_s: float) -> Iterator[Pulled]:
        """Yield the answers to these questions; each is fetched on demand, so that memory holds one answer at a time.

        Flower's own function fails completely if one answer is damaged, and trusts the metadata of every answer.
        """
        with translate_read_errors():
            response = self._client.PullMessages(runtime_pb2.PullAppMessagesRequest(message_ids=message_ids))
        ends = time.monotonic() + most_s
        pairs = zip(response.messages_list, response.message_object_trees, strict=False)
        for about, tree in pairs:
            message, is_lost = None, False
            try:
                message = self._fetch_message(tree, most_bytes=most_bytes, most_s=max(1.0, ends - time.monotonic()))
            except inflating.ObjectPullError:
                is_lost = True
            if message is not None and message.has_error() and not about.HasField("error"):
                message = None  # only the server may report an error
            yield about.metadata.reply_to_message_id, message, is_lost

    def _fetch_message(self, tree: message_pb2.ObjectTree, *, most_bytes: int, most_s: float) -> Message | None:
        """Fetch a message with its content from the server; None if the content is invalid."""
        node, run_id = self.grid.node, self.grid.run.run_id
        try:
            return pull_message(
                tree,
                fetching.make_pull_object_fn_protobuf(self._client.PullObject, node, run_id),
                fetching.make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, run_id),
                most_bytes=most_bytes,
                most_s=most_s,
            )
        except InvalidMessageError as error:
            log.warning("ignoring an answer: %s", error)
            return None
        except (inflating.ObjectPullError, httpx.HTTPError):
            raise
        except Exception as error:  # Flower's parsers raise various errors for bytes that a site chose
            log.warning("ignoring a reply that cannot be read (%s)", type(error).__name__)
            return None

    def reload_certificate(self) -> None:
        """Load the kit's current certificate for all new connections."""
        replace_ssl_context(get_http_client(self._client), self._tls.create_client_context())

    def close(self) -> None:
        """End the run, upon which the server deletes its unfetched messages."""
        self._stop.set()
        with contextlib.suppress(httpx.HTTPError):  # without heartbeats, the run ends anyway
            self._client.PushTaskOutput(
                runtime_pb2.PushTaskOutputRequest(sub_status=constant.SubStatus.COMPLETED, details="")
            )
        self._client.close()

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(_HEARTBEAT_S):
            try:
                self._client.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest())
            except (httpx.HTTPError, RuntimeError):
                continue  # the thread that sends questions fails with the same error


@contextmanager
def translate_read_errors() -> Iterator[None]:
    """Raise TransportError for a response that is not in Flower's format, such as a proxy's error page."""
    try:
        yield
    except (httpx.HTTPError, inflating.ObjectPushError, RunError):
        raise
    except Exception as error:  # the libraries raise various errors for unexpected bytes
        raise httpx.TransportError(f"the answer cannot be parsed ({type(error).__name__})") from error


def build_start_error(server: str, error: httpx.HTTPError) -> RunError:
    """Build the RunError that explains why the server did not start a run."""
    if not isinstance(error, httpx.HTTPStatusError):
        return RunError(f"{server} cannot be reached ({type(error).__name__}: {error})")
    if apart := explain_clock_error(error):
        return RunError(f"{server}: {apart}")
    if error.response.status_code == httpx.codes.UNAUTHORIZED:
        return RunError(f"{server} does not accept this lead's signature: the kit or the clock is wrong")
    if error.response.is_redirect:
        return RunError(f"{server} sent a redirect ({error.response.status_code}), and redirects are never followed")
    return RunError(f"{server} cannot start a run ({error.response.status_code})")


def explain_clock_error(error: Exception) -> str:
    """Describe the clock offset if it is the reason why the server refused the lead's call; otherwise return ""."""
    if not (isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED):
        return ""
    return describe_clock_difference(error.response, most_s=TOLERANCE_S - 1)
