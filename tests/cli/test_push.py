"""`fedtune export --push`: uploaded files and refused models; upload failures are tested in tests/export."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fedtune.model.adapter_files import compute_adapter_digest

from ..conftest import Outcome, edit_config, edit_json, read_files, read_result, run_command
from ..export.stand_in_hub import TOKEN, Repository, StandInHub, stand_in_hub

NAME = "bank/tickets"
Push = Callable[..., Outcome]


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with stand_in_hub() as hub:
        yield hub


@pytest.fixture
def push(run_folder: Path) -> Push:
    return lambda *words, run=run_folder: run_command("export", str(run), "--push", NAME, *words)


@pytest.mark.parametrize("public", [False, True])
def test_push_uploads_exactly_the_exported_files(push: Push, hub: StandInHub, tmp_path: Path, public: bool) -> None:
    words = ["--public"] if public else []
    output = push("--to", str(tmp_path / "out"), "--yes", *words).printed
    assert hub.repositories == {NAME: Repository(private=not public, files=read_files(tmp_path / "out"))}
    for name in hub.repositories[NAME].files:
        assert name in output
    assert f"{hub.address}/{NAME}" in output
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert sum(path.endswith("/commit/main") for _, path in hub.asked) == 1
    assert TOKEN not in output
    card = ModelCard(hub.repositories[NAME].files["README.md"].decode())
    assert "differential-privacy" in card.data.tags


def test_push_without_folder_leaves_no_files(
    push: Push, hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    output = push().printed
    assert f"to {NAME}, a new private repository? [y/N]" in output
    assert len(hub.repositories[NAME].files) > 5
    assert [path.name for path in tmp_path.iterdir()] == ["one"], "the run, which is in the same folder"


def test_push_uploads_nothing_before_confirmation(
    push: Push, hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    outcome = push("--public")
    assert outcome.failed(1) == f"nothing was uploaded to {NAME}"
    assert "adapter_model.safetensors" in outcome.out
    assert "a new PUBLIC repository" in outcome.out
    assert hub.asked == []
    assert [path.name for path in tmp_path.iterdir()] == ["one"], "the run, which is in the same folder"


def _mark_as_audit(run: Path) -> None:
    (run / "AUDIT.txt").write_text("canaries\n")


def _mark_as_personalized(run: Path) -> None:
    edit_json(run / "adapter" / "fedtune.json", private_to="north")
    edit_json(run / "run.json", adapter_digest=compute_adapter_digest(run / "adapter"))


@pytest.mark.parametrize(("spoil", "reason"), [(_mark_as_audit, "is an audit"), (_mark_as_personalized, "private to")])
@pytest.mark.parametrize("words", [["--yes"], ["--yes", "--without-guarantee"]])
def test_push_refuses_audited_and_personalized_adapters(
    push: Push, hub: StandInHub, run_folder: Path, spoil: Callable[[Path], None], reason: str, words: list[str]
) -> None:
    spoil(run_folder)
    assert reason in push(*words).failed()
    assert hub.asked == []


def test_push_refuses_a_repository_named_like_the_adapter_folder(run_folder: Path, hub: StandInHub) -> None:
    message = run_command("export", str(run_folder), "--push", "bank/adapter", "--yes").failed()
    assert "--push = 'bank/adapter': has the name of the run's own folder" in message
    assert hub.asked == []


def _seed_noise(run: Path) -> None:
    edit_config(run, runtime={"seeded_noise": True})


def _start_from_unprotected_adapter(run: Path) -> None:
    start = {"digest": "a" * 64, "from": "other", "dataset": "mails", "unit": "record", "delta": 1e-5, "epsilon": None}
    edit_json(run / "run.json", provenance=read_result(run)["provenance"] | {"start_adapter": start})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(_seed_noise, "The noise came from a seed"), (_start_from_unprotected_adapter, "The privacy loss of an adapter")],
)
def test_push_without_guarantee_requires_consent_and_a_private_repository(
    push: Push,
    hub: StandInHub,
    run_folder: Path,
    spoil: Callable[[Path], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    spoil(run_folder)
    message = push("--yes").failed()
    assert reason in message
    assert "--without-guarantee" in message
    message = push("--public", "--without-guarantee").failed()
    assert "requires a model with a privacy guarantee" in message
    assert hub.asked == []
    outcome = push("--without-guarantee")
    assert outcome.failed(1) == f"nothing was uploaded to {NAME}"
    assert reason in outcome.out
    assert "a new private repository" in outcome.out


def test_push_refuses_a_noiseless_run(
    push: Push, hub: StandInHub, simulate: Callable[..., Path], tmp_path: Path
) -> None:
    words = ("privacy=none", "privacy.noise_multiplier=null", "federation.num_rounds=1", "training.local_steps=1")
    assert "No noise was added" in push("--yes", run=simulate(*words, into=tmp_path)).failed()
    assert hub.asked == []


def test_push_json_contains_the_repository_address(push: Push, hub: StandInHub) -> None:
    result = json.loads(push("--yes", "--json").printed)
    assert (result["repository"], result["public"], result["folder"]) == (f"{hub.address}/{NAME}", False, None)
