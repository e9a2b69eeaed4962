"""The server's audit log: what is written, what is counted, and how large it becomes."""

import json
import logging
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.ops.wire.audit_log import AuditLog


@pytest.fixture
def clock() -> Mock:
    return Mock(return_value=0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audit(path: Path, clock: Mock) -> AuditLog:
    return AuditLog(path, clock=clock)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_a_line_for_its_owner_alone(path: Path, audit: AuditLog) -> None:
    audit.note("call refused", address="10.0.0.7", member="north", reason="revoked", path="")
    (line,) = lines(path)
    assert line.pop("time").endswith("+00:00")
    assert line == {"event": "call refused", "address": "10.0.0.7", "member": "north", "reason": "revoked"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_repeats_is_counted_and_the_count_is_written(path: Path, audit: AuditLog, clock: Mock) -> None:
    for _ in range(5000):
        audit.note("call refused", address="10.0.0.7", reason="revoked")
    audit.note("call refused", address="10.0.0.8", reason="revoked")
    assert len(lines(path)) == 2
    clock.return_value = 601.0
    audit.flush()
    counted = [("10.0.0.7", None), ("10.0.0.8", None), ("10.0.0.7", 4999)]
    assert [(line["address"], line.get("again")) for line in lines(path)] == counted
    audit.note("call refused", address="10.0.0.7", reason="revoked")
    assert len(lines(path)) == 4, "it is news again"


def test_many_addresses_do_not_fill_the_disk(path: Path, audit: AuditLog, clock: Mock) -> None:
    for number in range(5000):
        audit.note("handshake refused", address=str(number))
    assert len(lines(path)) == 1000
    clock.return_value = 601.0
    audit.flush()
    assert lines(path)[-1]["event"] == "events not written"
    assert lines(path)[-1]["again"] == 4000


def test_files_are_bounded_and_the_oldest_goes(tmp_path: Path, clock: Mock) -> None:
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, clock=clock, most_bytes=1000)
    for number in range(200):
        audit.note("connected", member=str(number))
    kept = ["audit.jsonl", *(f"audit.jsonl.{number}" for number in (1, 2, 3))]
    assert sorted(file.name for file in tmp_path.iterdir()) == kept
    assert all(file.stat().st_size < 1200 for file in tmp_path.iterdir())
    audit.note("connected", member="last")
    assert lines(path)[-1]["member"] == "last"


def test_a_long_name_is_cut(path: Path, audit: AuditLog) -> None:
    audit.note("connected", certificate="x" * 100_000)
    assert path.stat().st_size < 500


def test_a_disk_that_is_full_stops_no_call(tmp_path: Path, clock: Mock, caplog: pytest.LogCaptureFixture) -> None:
    audit = AuditLog(tmp_path / "nowhere" / "audit.jsonl", clock=clock)
    with caplog.at_level(logging.ERROR):
        for number in range(5):
            audit.note("connected", member=str(number))
    assert len(caplog.records) == 1


def test_whoever_makes_many_lines_hides_nobody_else_s(path: Path, audit: AuditLog) -> None:
    for number in range(2000):
        audit.note("call refused", member="south", path=f"/{number}", reason="no such call")
        audit.note("handshake refused", address=f"127.0.{number // 250}.{number % 250}", reason="hung up")
    assert audit.note("call refused", member="north", path="/v1/fleet/push-messages", reason="wrong signature")
    assert audit.note("message refused", member="south", reason="answers no question")
    assert audit.note("run started", certificate="lead")
    assert audit.note("member revoked", member="south")
    assert sum(line.get("member") == "south" for line in lines(path)) <= 103
    assert sum("handshake" in line["event"] for line in lines(path)) <= 1000
