"""Flower's private names, calls, tables, routes and messages that fedtune relies on.

Only `fedtune/flower/internals.py` imports them. If this file passes with a new release of Flower, everything else
should, too: run it first, and fix what it names.
"""

import ast
import importlib
import inspect
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from sqlalchemy import TextClause

from fedtune.flower import internals
from fedtune.ops.wire import gate, message_objects, site_calls

from .loopback import _create_empty_database

ROOM = Path(internals.__file__).parent
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.simulation"}


def list_imports(path: Path) -> Iterator[tuple[str, str]]:
    """List (module, name) of all imports from Flower in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("flwr"))


def test_only_one_module_imports_flower_internals() -> None:
    for path in set(ROOM.parent.rglob("*.py")) - {ROOM / "internals.py"}:
        assert {module for module, _ in list_imports(path)} <= PUBLIC, path


def test_every_imported_flower_internal_exists() -> None:
    imported = list(list_imports(ROOM / "internals.py"))
    assert len(imported) > 20
    for module, name in imported:
        assert hasattr(importlib.import_module(module), name), f"Flower no longer has {module}.{name}"
    # Names are also read from modules that are exported as a whole.
    modules = {name: value for name, value in vars(internals).items() if inspect.ismodule(value)}
    uses = [
        (node.value.id, node.attr)
        for folder in (ROOM, ROOM.parent / "ops" / "wire")
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    ]
    assert len(uses) > 50
    for module, name in uses:
        assert hasattr(modules[module], name), f"Flower no longer has {modules[module].__name__}.{name}"


CALLS: list[tuple[Callable[..., Any], int, tuple[str, ...]]] = [
    (SqlLinkState.get_node_id_by_public_key, 2, ()),
    (SqlLinkState.delete_node, 3, ()),
    (SqlLinkState.create_node, 5, ("name",)),
    (SqlLinkState.session, 1, ()),
    (create_app, 2, ()),
    (HttpGrid, 1, ("token",)),
    (HttpGrid.set_run, 2, ()),
    (HttpGrid.get_nodes, 1, ()),
    (HttpGrid.push_messages, 2, ()),
    (FleetHttpClient, 1, ("interceptors", "verify", "timeout")),
    (RuntimeHttpClient, 1, ("interceptors", "verify")),
    (RuntimeHttpClient._unary_unary, 1, ("path", "rpc_method", "request", "response_type")),
    (internals.RuntimeVersionHttpInterceptor, 0, ("component_name",)),
    (NodeAuthHttpInterceptor, 2, ()),
    (internals.RuntimeTokenHttpInterceptor, 1, ()),
    (internals.fetching.make_pull_object_fn_protobuf, 3, ()),
    (internals.fetching.make_push_object_fn_protobuf, 4, ()),
    (internals.fetching.make_confirm_message_received_fn_protobuf, 3, ()),
    (internals.inflating.push_objects, 2, ("object_ids_to_push",)),
    (internals.inflating.pull_objects, 2, ("max_time",)),
    (internals.inflating.inflate_object_from_contents, 2, ()),
    (internals.objects.get_object_head_values_from_object_content, 1, ()),
]
"""For each call: the number of positional arguments, and the names of keyword arguments."""


def test_flower_internals_accept_the_expected_calls() -> None:
    for called, positional, named in CALLS:
        inspect.signature(called).bind(*[None] * positional, **dict.fromkeys(named))
    for client, calls in (
        (FleetHttpClient, "ActivateNode DeactivateNode SendNodeHeartbeat PullMessages PushMessages"),
        (RuntimeHttpClient, "AcquireTask PullTaskInput PushTaskOutput SendTaskHeartbeat GetNodes"),
    ):
        for call in (*calls.split(), "PullMessages", "PullObject", "ConfirmMessageReceived", "PushObject"):
            assert callable(getattr(client, call)), call


def test_sql_queries_match_the_flower_schema() -> None:
    queries = [query.text for query in vars(site_calls).values() if isinstance(query, TextClause)]
    assert len(queries) == 5
    names = ("id", "object", "node", "run", "session", "time", "now")
    with sqlite3.connect(":memory:") as database:
        database.deserialize(_create_empty_database())
        for query in queries:
            database.execute(f"EXPLAIN {query}", dict.fromkeys(names))
    database.close()


def test_every_permitted_call_is_a_flower_route(list_flower_routes: set[tuple[str, str]]) -> None:
    for path in gate._SITE_CALLS | gate._LEAD_CALLS:
        assert ("POST", path) in list_flower_routes, f"Flower's protocol changed: {path}"
        assert ("POST", path) in PROTOBUF_REQUEST_TYPES
    # Flower authenticates a site's calls by the beginning of the path.
    assert all(path.startswith("/v1/fleet/") for path in gate._SITE_CALLS)
    assert not any(path.startswith("/v1/fleet/") for path in gate._LEAD_CALLS)


def test_message_parts_match_the_flower_inflatable_classes() -> None:
    assert set(message_objects._PARTS) == set(inflatable_class_registry)
    assert all(issubclass(kind, InflatableObject) for kind in inflatable_class_registry.values())


def test_message_metadata_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 7, raising=False)
    metadata = Message(RecordDict(), 5, "train").metadata
    assert (metadata.run_id, metadata.src_node_id) == (7, 7), "TaskIdentity must supply the sender"
    metadata.__dict__.update(_message_id="ab", _src_node_id=3)
    assert (metadata.message_id, metadata.src_node_id) == ("ab", 3)
