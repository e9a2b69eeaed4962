"""The server process: start, roster, audit log and shutdown."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from flwr.server.superlink.linkstate import LinkState
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories

from fedtune.ops.wire import superlink
from fedtune.ops.wire.audit_log import AuditLog
from fedtune.ops.wire.fleet import HELLO, Unauthorized, ask_site_name
from fedtune.ops.wire.superlink import apply_roster

from . import loopback
from .certificates import Authority, to_public_pem
from .loopback import Loopback, Program, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # from Flower's database

AUDIT = AuditLog(None)


@pytest.fixture
def own_network(tmp_path: Path) -> Iterator[Loopback]:
    network = Loopback(tmp_path / "network")
    network.add_member("a")
    yield network
    network.stop()


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A server shared by tests that do not stop it."""
    with loopback.run_server(tmp_path_factory.mktemp("running"), add_member=["a"]) as network:
        yield network


def test_keyboard_interrupt_ends_the_server_with_exit_code_0(own_network: Loopback) -> None:
    # SIGTERM is tested below.
    own_network.start()
    site = own_network.site("a")
    site.wait_for("activated")
    own_network.process.signal(signal.SIGINT)
    assert own_network.process.end(seconds=15) == 0
    site.wait_for("trouble")
    assert site.code is None, "a site must outlive its server"
    assert "Traceback" not in own_network.output


def test_occupied_port_is_an_error(running_server: Loopback) -> None:
    assert Program("server_process.py", running_server.folder).end(seconds=60) == 1
    assert "Address already in use" in running_server.output


def test_unreadable_roster_leaves_registered_sites_unchanged(running_server: Loopback) -> None:
    roster, whole = running_server.folder / "roster.json", (running_server.folder / "roster.json").read_bytes()
    roster.write_bytes(whole[:-5])
    wait_for(lambda: "the roster could not be read; the sites stay unchanged" in running_server.output)
    running_server.site("a").wait_for("activated")
    roster.write_bytes(whole)
    newcomer = running_server.add_member("b")
    wait_for(lambda: "b is registered" in running_server.output)
    assert ask_site_name(running_server.address, newcomer) == "b"
    running_server.stop_sites()


def test_full_disk_is_reported_and_greetings_still_work(running_server: Loopback) -> None:
    message, (soft, hard) = (
        running_server.folder / "works",
        resource.prlimit(running_server.process.pid, resource.RLIMIT_FSIZE),
    )

    def says(text: str) -> None:
        wait_for(lambda: message.exists() and message.read_text() == text, seconds=15, what=text)

    says("True")
    # No file may grow beyond 1 KiB, which a database sees as a full disk.
    resource.prlimit(running_server.process.pid, resource.RLIMIT_FSIZE, (1024, hard))
    says("False")
    assert ask_site_name(running_server.address, running_server.tls["a"]) == "a"
    resource.prlimit(running_server.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
    says("True")


def test_server_creates_its_database_and_logs_connections(own_network: Loopback) -> None:
    own_network.migrates = True
    own_network.start()
    assert ask_site_name(own_network.address, own_network.tls["a"]) == "a"
    own_network.set_revoked("a")
    wait_for(lambda: "a was revoked" in own_network.output, seconds=15)
    with pytest.raises(Unauthorized, match="revoked"):
        ask_site_name(own_network.address, own_network.tls["a"])
    own_network.process.ask_to_end()
    assert own_network.process.end(seconds=15) == 0
    audited = own_network.audit()
    for line in audited:
        assert set(line) <= {"time", "event", "address", "member", "certificate", "path", "reason", "again"}
        del line["time"]
    a = {"address": "127.0.0.1", "certificate": "a", "member": "a"}
    refused = {"event": "call refused", **a, "path": HELLO, "reason": "revoked"}
    of_member = [{"event": f"member {change}", "member": "a"} for change in ("registered", "revoked")]
    for expected in ({"event": "server started"}, *of_member, {"event": "connected", **a}, refused):
        assert expected in audited, audited
    assert audited[-1] == {"event": "server stopped"}


@pytest.mark.nightly
def test_flower_telemetry_is_disabled() -> None:
    # Flower reads the variable on import, and would otherwise send telemetry at every start.
    code = "import fedtune.ops.wire.superlink, flwr.supercore.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)"
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "1"}
    out = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], env=environment, text=True, timeout=60)
    assert out.strip() == "0"


def read_state(folder: Path) -> LinkState:
    """Read a server's state as at its start."""
    _, factory = get_objectstore_linkstate_factories(str(folder / "state.db"), get_federation_manager(False))
    return factory.state()


@pytest.fixture
def state(tmp_path: Path) -> LinkState:
    return read_state(tmp_path)


@pytest.fixture
def roster(tmp_path: Path) -> list[Any]:
    keys = map(to_public_pem, map(Authority(tmp_path / "ca").issue, ("one", "other")))
    return [SimpleNamespace(site=name, node_key=key, revoked=False) for name, key in zip("ab", keys, strict=True)]


def change_member(member: Any, **fields: Any) -> Any:
    return SimpleNamespace(**vars(member) | fields)


def list_registered(state: LinkState) -> dict[str, int]:
    return {node.name: node.node_id for node in state.get_node_info() if node.status != "unregistered"}


def test_only_the_revoked_site_is_removed(state: LinkState, roster: list[Any], tmp_path: Path, caplog: Any) -> None:
    a, b = roster
    apply_roster(state, [a, b], AUDIT)
    first = list_registered(state)
    apply_roster(state, [change_member(a, revoked=True), b], AUDIT)
    assert list_registered(state) == {"b": first["b"]}
    assert state.get_node_id_by_public_key(a.node_key) is None
    # An old roster copied by mistake revokes no key: Flower never accepts a revoked key again, nor does the next
    # server.
    state = read_state(tmp_path)
    apply_roster(state, [], AUDIT)
    assert list_registered(state) == {"b": first["b"]}
    with caplog.at_level(logging.ERROR):
        apply_roster(state, [a, b], AUDIT)
    assert "a: its connection key was revoked; provision the site with a new key" in caplog.text
    assert list_registered(state) == {"b": first["b"]}


def test_renewed_key_is_registered_next_to_the_old_key(state: LinkState, roster: list[Any]) -> None:
    rosters_seen = []
    for member in roster:
        apply_roster(state, [change_member(member, site="a")], AUDIT)
        rosters_seen.append(state.get_node_id_by_public_key(member.node_key))
    assert rosters_seen[1] not in (None, rosters_seen[0])


def test_revocation_takes_effect_without_database_writes(
    state: LinkState, roster: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rosters = [roster, [change_member(member, revoked=True) for member in roster]]
    current = superlink._CurrentRoster(lambda: rosters.pop(0), state, AUDIT)  # type: ignore[arg-type]
    current.refresh_roster()

    monkeypatch.setattr(superlink, "apply_roster", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        current.refresh_roster()
    assert all(member.revoked for member in current.members)


@pytest.fixture
def clock() -> Mock:
    return Mock(return_value=0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audit(path: Path, clock: Mock) -> AuditLog:
    return AuditLog(path, clock=clock)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_audit_event_is_one_line_readable_only_by_its_owner(path: Path, audit: AuditLog) -> None:
    audit.log_event("call refused", address="10.0.0.7", member="north", reason="revoked", path="")
    (line,) = read_lines(path)
    assert line.pop("time").endswith("+00:00")
    assert line == {"event": "call refused", "address": "10.0.0.7", "member": "north", "reason": "revoked"}
    assert path.stat().st_mode & 0o777 == 0o600
    audit.log_event("connected", certificate="x" * 100_000)
    assert path.stat().st_size < 1000, "a long name must be truncated"


def test_repeated_audit_events_are_counted(path: Path, audit: AuditLog, clock: Mock) -> None:
    for _ in range(5000):
        audit.log_event("call refused", address="10.0.0.7", reason="revoked")
    audit.log_event("call refused", address="10.0.0.8", reason="revoked")
    assert len(read_lines(path)) == 2
    clock.return_value = 601.0
    audit.flush()
    counted = [("10.0.0.7", None), ("10.0.0.8", None), ("10.0.0.7", 4999)]
    assert [(line["address"], line.get("again")) for line in read_lines(path)] == counted
    audit.log_event("call refused", address="10.0.0.7", reason="revoked")
    assert len(read_lines(path)) == 4, "after the interval it must be logged again"


def test_audit_log_is_limited_for_many_addresses(path: Path, audit: AuditLog, clock: Mock) -> None:
    for number in range(5000):
        audit.log_event("handshake refused", address=str(number))
    assert len(read_lines(path)) == 1000
    clock.return_value = 601.0
    audit.flush()
    assert read_lines(path)[-1]["event"] == "events not written"
    assert read_lines(path)[-1]["again"] == 4000


def test_audit_files_are_rotated_and_the_oldest_is_deleted(tmp_path: Path, path: Path, clock: Mock) -> None:
    audit = AuditLog(path, clock=clock, most_bytes=1000)
    for number in range(200):
        audit.log_event("connected", member=str(number))
    current = ["audit.jsonl", *(f"audit.jsonl.{number}" for number in (1, 2, 3))]
    assert sorted(file.name for file in tmp_path.iterdir()) == current
    assert all(file.stat().st_size < 1200 for file in tmp_path.iterdir())
    audit.log_event("connected", member="last")
    assert read_lines(path)[-1]["member"] == "last"


def test_full_disk_does_not_block_audited_calls(tmp_path: Path, clock: Mock, caplog: pytest.LogCaptureFixture) -> None:
    audit = AuditLog(tmp_path / "nowhere" / "audit.jsonl", clock=clock)
    with caplog.at_level(logging.ERROR):
        for number in range(5):
            audit.log_event("connected", member=str(number))
    assert len(caplog.records) == 1


def test_noisy_member_does_not_hide_events_of_others(path: Path, audit: AuditLog) -> None:
    for number in range(2000):
        audit.log_event("call refused", member="south", path=f"/{number}", reason="no such call")
        audit.log_event("handshake refused", address=f"127.0.{number // 250}.{number % 250}", reason="hung up")
    assert audit.log_event("call refused", member="north", path="/v1/fleet/push-messages", reason="wrong signature")
    assert audit.log_event("message refused", member="south", reason="the message answers no question")
    assert audit.log_event("run started", certificate="lead")
    assert audit.log_event("member revoked", member="south")
    assert sum(line.get("member") == "south" for line in read_lines(path)) <= 103
    assert sum("handshake" in line["event"] for line in read_lines(path)) <= 1000
