"""Finished runs that several test files share."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import run_command, simulate


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of finished runs, which tests copy."""
    return Path(simulate(into=tmp_path_factory.mktemp("finished")))


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """The folder of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def find_run_folder(arguments: list[str]) -> Path:
    """Return the folder of the finished run with these overrides."""
    overrides = dict(argument.partition("=")[::2] for argument in arguments)
    return Path(overrides["tracking.output_dir"].strip("'"), overrides["name"])


@pytest.fixture(scope="module")
def run(settings: Callable[..., list[str]]) -> Callable[..., Path]:
    """Return the folder of the finished run with these overrides; the run is made on first use."""
    folders: dict[tuple[Any, ...], Path] = {}

    def make(*overrides: str, task: str = "classification") -> Path:
        key = (*overrides, task)
        if key not in folders:
            arguments = settings(*overrides, task=task, name=f"run-{len(folders)}")
            assert run_command("simulate", *arguments).code == 0
            folders[key] = find_run_folder(arguments)
        return folders[key]

    return make
