"""Checkpoints in a run folder, and suggestions for a folder without a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from fedtune.config import read_saved_settings
from fedtune.federation.lead import Checkpoints, LeadState
from fedtune.federation.run_folder import RunFolder, suggest_run_folders
from fedtune.spec import ConfigError, RunError

from .conftest import make_adapter, make_receipt, round_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, "digest")


def make_state(round: int) -> LeadState:
    results = [
        round_of(
            number,
            failed_sites={"b": "site_error"},
            metrics={"loss": float("nan") if number == 1 else 0.25},
            site_scores={"a": (0.5, -0.125)} if number == 2 else {},
        )
        for number in range(1, round + 1)
    ]
    moments = {"m/head": np.arange(4, dtype=np.float64) / 3, "v/head": np.ones(4, np.float32)}
    fields = {
        "strategy": moments,
        "receipts": {"a": make_receipt(charged=round)},
        "unanswered": {"b": 1},
        "seconds": 1.5,
    }
    return LeadState(round=round, adapter=make_adapter(), rounds=results, metrics_before={"loss": 1 / 3}, **fields)


def test_checkpoint_round_trips_through_its_file(checkpoints: Checkpoints) -> None:
    def to_plain(state: LeadState) -> Any:
        arrays = {name: (value.dtype, value.tobytes()) for name, value in state.strategy.items()}
        fields = (state.round, state.receipts, state.unanswered, state.seconds, state.metrics_before)
        return state.adapter.digest(), arrays, fields, repr(list(state.rounds))

    checkpoints.save(make_state(2))
    loaded = checkpoints.load()
    assert to_plain(loaded) == to_plain(make_state(2))
    assert loaded.strategy["m/head"].dtype == np.float64, "a moment rounded to float32 would change the next round"
    assert loaded.receipts["a"].has_valid_signature(), "the site must be able to verify its own receipt"


def test_newest_checkpoint_is_loaded_and_its_predecessor_kept(checkpoints: Checkpoints, folder: Path) -> None:
    # The newest checkpoint has the largest number, which is not the last name.
    for round in (9998, 9999, 10_000, 10_001):
        checkpoints.save(replace(make_state(1), round=round))
    assert checkpoints.load().round == 10_001
    assert sorted(path.stem for path in folder.iterdir()) == ["round-10000", "round-10001"]
    assert [path.stem for path in RunFolder(folder.parent).saved_checkpoints] == ["round-10000", "round-10001"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("unanswered", {"a": -9}), ("unanswered", {"a": "1"}), ("unanswered", {"a": 0.5})),
        *(("unanswered", [["a", 1]]), ("round", "1"), ("round", -1), ("receipts", {"a": {"charged_rounds": -5}})),
        ("receipts", {"a": {"charged_rounds": "3"}}),
    ],
)
def test_invalid_counts_in_a_checkpoint_are_reported_as_damage(
    checkpoints: Checkpoints, folder: Path, name: str, value: Any
) -> None:
    checkpoints.save(make_state(1))
    (path,) = folder.glob("round-*")
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = json.loads(header["__metadata__"]["fedtune"])
    metadata[name] = {"a": metadata["receipts"]["a"] | value["a"]} if name == "receipts" else value
    path.write_bytes(save(load(data), metadata={"fedtune": json.dumps(metadata)}))
    with pytest.raises(RunError, match="is damaged"):
        checkpoints.load()


def test_rounds_requested_after_the_checkpoint_count_as_unanswered(checkpoints: Checkpoints) -> None:
    checkpoints.record_request(1, ["a", "b"])
    checkpoints.save(make_state(1))
    for _ in range(2):
        checkpoints.record_request(2, ["a", "b"])
    assert checkpoints.load().unanswered == {"a": 2, "b": 3}


def test_missing_or_mismatched_checkpoint_is_refused(checkpoints: Checkpoints, folder: Path) -> None:
    with pytest.raises(ConfigError, match="has no checkpoint: start a new run"):
        checkpoints.load()
    checkpoints.save(make_state(1))
    with pytest.raises(ConfigError, match="has a checkpoint of a different configuration"):
        Checkpoints(folder, "other").load()
    (folder / "round-0002.safetensors.partial").write_bytes(b"half")
    assert checkpoints.load().round == 1, "a partially written checkpoint must not count"


@pytest.mark.parametrize("end", [0, 4, 200, -1])
def test_truncated_checkpoint_is_reported_as_damaged(checkpoints: Checkpoints, folder: Path, end: int) -> None:
    checkpoints.save(make_state(1))
    file = folder / "round-0001.safetensors"
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(RunError, match=r"round-0001\.safetensors is damaged"):
        checkpoints.load()


def test_truncated_journal_line_is_dropped_by_the_next_request(checkpoints: Checkpoints, folder: Path) -> None:
    checkpoints.save(make_state(1))
    (folder / "asked.jsonl").write_bytes(b'[2, ["a"]]\n[2, ["b')
    assert checkpoints.load().unanswered == {"a": 1, "b": 1}, "a request truncated by a crash was never sent"
    checkpoints.record_request(2, ["a", "b"])
    assert checkpoints.load().unanswered == {"a": 2, "b": 2}
    for line in (b"not JSON\n", b"[2, 5]\n", b"[2.5, []]\n"):
        (folder / "asked.jsonl").write_bytes(line)
        with pytest.raises(RunError, match="damaged"):
            checkpoints.load()


# The layout of a run folder, and the message if there is none.


@pytest.fixture
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runs/mails and runs/chats, and one folder without a run."""
    monkeypatch.chdir(tmp_path)
    for name in ("mails", "chats", "neither"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("mails", "chats"):
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("# Hydra's, and no run's\ndefaults:\n  - _self_\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("runs/mial", "; did you mean runs/mails?"),
        ("mails", "; did you mean runs/mails?"),
        ("runs", "; there are runs/chats, runs/mails"),
        ("runs/neither", "; there are runs/chats, runs/mails"),
        ("elsewhere/x", "; there are runs/chats, runs/mails"),
    ],
)
def test_similar_run_folders_are_suggested(runs_folder: Path, name: str, hint: str) -> None:
    assert suggest_run_folders(Path(name)) == hint
    with pytest.raises(ConfigError) as error:
        read_saved_settings(Path(name))
    assert str(error.value) == f"run folder = {name!r}: must contain a config.yaml{hint}"


def test_number_of_suggested_run_folders_is_limited(tmp_path: Path) -> None:
    assert suggest_run_folders(tmp_path / "gone") == ""
    for number in range(12):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}" / "config.yaml").touch()
    assert suggest_run_folders(tmp_path / "gone").endswith(f"{tmp_path / '09'} and 2 more")
