"""The record reader: accepts exactly the declared types, and names the key in every error."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import pytest

from fedtune.codec import MAX_BYTES, decode, parse_json, read_bounded_file, read_toml
from fedtune.config import read_plain_yaml
from fedtune.federation.lead import Checkpoints
from fedtune.federation.run_folder import ASKED, RunFolder
from fedtune.ops.backup import open_backup
from fedtune.ops.kits.members import JoinRequest, Roster
from fedtune.ops.services.lead_and_server import read_latest_answers
from fedtune.ops.services.site_state import SiteState
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import Head
from fedtune.report.group_scores import read_group_scores
from fedtune.runs.environment import read_environments
from fedtune.spec import ConfigError, RunError
from fedtune.tasks.saved import SavedAdapter

from .cli import snapshots


class Color(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Part:
    size: float = 1.0


@dataclass(frozen=True)
class Whole:
    color: Color
    pairs: tuple[tuple[int, str], ...]
    path: frozenset[tuple[int, str]]
    counts: dict[str, int]
    cap: float | None
    part: Part = Part(2.0)
    layers: tuple[int, ...] | Literal["all"] = "all"


JSON = {"color": "red", "pairs": [[1, "a"]], "path": [[2, "b"]], "counts": {"r": 3}, "cap": 4}


def test_record_is_decoded_according_to_its_types() -> None:
    whole = decode(Whole, JSON)
    assert whole == Whole(Color.RED, ((1, "a"),), frozenset({(2, "b")}), {"r": 3}, 4.0)
    assert type(whole.cap) is float
    assert [decode(Whole, JSON | {"layers": value}).layers for value in ([1], "all")] == [(1,), "all"]
    assert decode(Whole, JSON | {"part": {}}).part == Part(2.0), "a table leaves out values equal to their defaults"


@snapshots.parametrize_mistakes("mistakes-records")
def test_invalid_record_error_names_the_key(typed: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode(Whole, JSON | json.loads(typed.replace('"HUGE"', f"1{'0' * 400}")))
    snapshots.check_message("mistakes-records", typed, str(error.value))


DEEP = b'{"a":' * 64 + b"{}" + b"}" * 64


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 10**5, b'{"a": ' + b"1" * 5000 + b"}", DEEP])
def test_invalid_json_is_not_quoted_in_the_error(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^file = 'something else': must be JSON$"):
        parse_json(data, key="file", bound="must be JSON")
    assert parse_json(DEEP[5:-1], key="file", bound="must be JSON"), "of 64 levels"


def read_groups(path: Path) -> Any:
    return read_group_scores(path, adapter_digest="", primary_metric="loss", key="--groups", bound="must be groups")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
@pytest.mark.parametrize(
    "read",
    [
        Roster.read,
        Head.read,
        JoinRequest.read,
        read_groups,
        partial(read_toml, key="rules"),
        partial(read_plain_yaml, key="c"),
        SigningKey.load,
        lambda path: open_backup(path, kind="server").__enter__(),
    ],
)
def test_named_pipe_is_refused_without_waiting_for_its_writer(read: Callable[..., Any], tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe"):
        read(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
def test_named_pipe_in_a_run_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fedtune.json")
    with pytest.raises(ConfigError, match="must contain an adapter's settings"):
        SavedAdapter.read(tmp_path)
    os.mkfifo(RunFolder(tmp_path).environment)
    with pytest.raises(RunError, match="is damaged"):
        read_environments(tmp_path)
    os.mkfifo(RunFolder(tmp_path).answers)
    with pytest.raises(RunError, match="cannot be read"):
        read_latest_answers(tmp_path)
    os.mkfifo(tmp_path / ASKED)
    with pytest.raises(RunError, match=r"the journal .* is damaged"):
        Checkpoints(tmp_path, "").list_requests(after=0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
def test_named_pipe_in_the_state_of_a_site_is_refused(tmp_path: Path) -> None:
    state = SiteState.in_kit(tmp_path)
    (state.folder / "pending").mkdir()
    os.mkfifo(state.folder / "pending/x.json")
    assert state.list_pending_runs() == []
    os.mkfifo(state.folder / "ledger_id")
    with pytest.raises(OSError, match="not a regular file"):
        state.open_ledger(Mock())


@pytest.mark.parametrize("size", [None, MAX_BYTES + 1])
def test_file_from_outside_is_bounded(size: int | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if size is None:
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, size)
    with pytest.raises(ConfigError, match=r"file.*must be a readable file, of at most 64 MiB"):
        read_bounded_file(path, key="rules")
    with pytest.raises(ConfigError, match=r"absent.*No such file"):
        read_toml(tmp_path / "absent", key="rules")
