"""The layout of a run folder, and what is said where none is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config import saved_settings
from fedtune.federation.run_folder import run_folders_near
from fedtune.spec import ConfigError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runs/mails and runs/chats, and one that is no run."""
    monkeypatch.chdir(tmp_path)
    for name in ("mails", "chats", "neither"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("mails", "chats"):
        (tmp_path / "runs" / name / "config.yaml").touch()
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
def test_runs_that_may_be_meant_are_named(here: Path, name: str, hint: str) -> None:
    assert run_folders_near(Path(name)) == hint
    with pytest.raises(ConfigError) as caught:
        saved_settings(Path(name))
    assert str(caught.value) == f"run folder = {name!r}: must hold a config.yaml{hint}"


def test_of_many_runs_some_are_named_and_of_none_nothing_is(tmp_path: Path) -> None:
    assert run_folders_near(tmp_path / "gone") == ""
    for number in range(12):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}" / "config.yaml").touch()
    assert run_folders_near(tmp_path / "gone").endswith(f"{tmp_path / '09'} and 2 more")
