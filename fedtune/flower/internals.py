"""All uses of Flower's private interface, isolated in this module.

`Message` is re-exported for `fedtune.ops.wire`, which does not import Flower itself.

tests/flower/test_internals.py lists these internals, so that a new release of Flower can be tested against them.  Slow
imports, such as the server's, are local to the functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common import constant
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.proto import control_pb2, fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, node_pb2, runtime_pb2
from flwr.supercore import constant as core
from flwr.supercore.date import now
from flwr.supercore.inflatable import inflatable_object as objects
from flwr.supercore.inflatable import inflatable_protobuf_utils as fetching
from flwr.supercore.inflatable import inflatable_utils as inflating
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives import asymmetric
from flwr.supercore.protobuf import client as rpc
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import uint64_to_int64
from flwr.supernode.fleet_http_client import FleetHttpClient

if TYPE_CHECKING:
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
    from flwr.superlink.grid import HttpGrid


def set_sender_ids(**numbers: int) -> None:
    """Set the `run_id`, `node_id` or `task_id` that this process writes as the sender of all its messages."""
    for name, number in numbers.items():
        setattr(TaskIdentity, name, number)


def set_metadata(message: Message, **values: str | int) -> None:
    """Set a message's `message_id` or sender `src_node_id`, for which Flower has no setters."""
    message.metadata.__dict__.update({f"_{name}": value for name, value in values.items()})


def get_http_client(client: rpc.ProtobufClient) -> httpx.Client:
    """Return the httpx client that a Flower client wraps."""
    return client._client


class RunStarter(RuntimeHttpClient):
    """Client for Flower's Runtime API, extended by the Control API call that starts a run."""

    def start_run(self, request: control_pb2.StartRunRequest) -> control_pb2.StartRunResponse:
        return self._unary_unary(
            path="/v1/control/start-run",
            rpc_method="/flwr.proto.Control/StartRun",
            request=request,
            response_type=control_pb2.StartRunResponse,
        )


def make_http_grid(server: str, token: str, client: RuntimeHttpClient) -> HttpGrid:
    """Create Flower's grid with `client`, because the grid's default client presents no TLS certificate."""
    from flwr.superlink.grid import HttpGrid

    grid = HttpGrid(server, token=token)
    grid._client = client
    return grid


def make_node_authentication(
    private: ec.EllipticCurvePrivateKey, public: ec.EllipticCurvePublicKey
) -> rpc.ProtobufClientInterceptor:
    """Create the interceptor that signs each call of a node to Flower's server."""
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    return NodeAuthHttpInterceptor(private, public)


def create_superlink_app(
    *, ca: Path, certificate: Path, key: Path, host: str, port: int, database: Path
) -> tuple[Any, SqlLinkState]:
    """Create Flower's SuperLink as an ASGI application; return the application and its link state.

    The SuperLink authenticates nodes, runs apps in other processes and installs no dependencies.  All other endpoints
    are unauthenticated, so a gate must be in front of the application.
    """
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    off = ("insecure", "enable_event_log", "simulation", "runtime_dependency_install")
    absent = ("artifact_provider", "fleet_api_address", "health_server_address", "superexec_auth_secret")
    plugins = ("event_log_plugin", "fleet_event_log_plugin")
    without: dict[str, Any] = dict.fromkeys(off, False) | dict.fromkeys((*absent, *plugins))
    config = SuperLinkLifespanConfig(
        control_address="",
        host=host,
        port=port,
        certificates=(ca.read_bytes(), certificate.read_bytes(), key.read_bytes()),
        authn_plugin=NoOpControlAuthnPlugin(),
        enable_supernode_auth=True,
        fleet_api_type=constant.TRANSPORT_TYPE_GRPC_RERE,
        ssl_ca_certfile=str(ca),
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        database=str(database),
        isolation=constant.ISOLATION_MODE_PROCESS,
        **without,
    )
    app = create_app(config, SuperLinkLifespan)
    return app, app.state.linkstate_factory.state()
