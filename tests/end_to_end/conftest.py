"""Runs that several files here look at, each made once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import run_command, simulate


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end, which tests copy."""
    return Path(simulate(into=tmp_path_factory.mktemp("finished")))


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """That run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def find_run_folder(given: list[str]) -> Path:
    """Of the run of these overrides."""
    said = dict(one.partition("=")[::2] for one in given)
    return Path(said["tracking.output_dir"].strip("'"), said["name"])


@pytest.fixture(scope="module")
def run(settings: Callable[..., list[str]]) -> Callable[..., Path]:
    """Of overrides the folder of their finished run, which is made when it is first asked for."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(*overrides: str, task: str = "classification") -> Path:
        key = (*overrides, task)
        if key not in made:
            given = settings(*overrides, task=task, name=f"run-{len(made)}")
            assert run_command("simulate", *given).code == 0
            made[key] = find_run_folder(given)
        return made[key]

    return make
