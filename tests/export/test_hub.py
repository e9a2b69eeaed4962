"""Failed uploads to the hub: error messages, and no partial uploads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from fedtune.export.hub import push
from fedtune.spec import ConfigError, RunError

from ..conftest import read_files
from .stand_in_hub import TOKEN, Repository, StandInHub, stand_in_hub

NAME = "bank/tickets"
OTHERS = {"model.bin": b"existing"}


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with stand_in_hub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("---\ntags: [fedtune]\n---\n# A card\n")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "weights.safetensors").write_bytes(bytes(100))
    return tmp_path


def push_all(folder: Path) -> str:
    return push(folder, [path for path in folder.rglob("*") if path.is_file()], NAME, public=False)


def test_only_listed_files_are_uploaded(hub: StandInHub, folder: Path) -> None:
    files = read_files(folder)
    listed = [folder / name for name in files]
    (folder / "records.csv").write_text("secret")
    assert push(folder, listed, NAME, public=False) == f"{hub.address}/{NAME}"
    assert hub.repositories == {NAME: Repository(private=True, files=files)}


@pytest.mark.parametrize(
    ("call", "status", "error", "message"),
    [
        ("/repos/create", 401, ConfigError, "hf auth login"),
        ("/repos/create", 403, ConfigError, "a token with write access"),
        ("/repos/create", 501, RunError, "nothing was uploaded"),
        ("/models/bank/tickets", 501, RunError, "nothing was uploaded"),
        ("/validate-yaml", 403, ConfigError, "a token with write access"),
        ("/objects/batch", 501, RunError, "nothing was uploaded"),
        ("/commit/main", 409, ConfigError, "already exists"),
        ("/commit/main", 501, RunError, "nothing was uploaded"),
    ],
)
def test_failed_upload_explains_the_error_and_uploads_no_file(
    hub: StandInHub, folder: Path, call: str, status: int, error: type[Exception], message: str
) -> None:
    hub.refusals[call], hub.has_large_files = status, call == "/objects/batch"
    with pytest.raises(error, match=message) as raised:
        push_all(folder)
    assert TOKEN not in str(raised.value)
    assert [repository.files for repository in hub.repositories.values()] == [{}] * len(hub.repositories)
    hub.refusals, hub.has_large_files = {}, False
    push_all(folder)
    assert hub.repositories == {NAME: Repository(private=True, files=read_files(folder))}


@pytest.mark.parametrize("existing", [Repository(private=True, files=OTHERS), Repository(private=False)])
def test_push_refuses_nonempty_and_public_repositories(hub: StandInHub, folder: Path, existing: Repository) -> None:
    hub.repositories[NAME] = existing
    with pytest.raises(ConfigError, match="already exists"):
        push_all(folder)
    assert hub.repositories == {NAME: Repository(existing.private, existing.files.copy())}
    assert not [path for _, path in hub.asked if path.endswith(("preupload/main", "commit/main"))]


def test_push_aborts_if_the_new_repository_is_public(hub: StandInHub, folder: Path) -> None:
    hub.ignores_private = True
    with pytest.raises(ConfigError, match="another visibility"):
        push_all(folder)
    assert hub.repositories == {NAME: Repository(private=False)}


def test_offline_mode_and_unreachable_hub_are_explained(
    hub: StandInHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        push_all(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=f"nothing was uploaded to {NAME} at http://127.0.0.1:9"):
        push_all(folder)
    assert hub.asked == []
