"""The command line as tests call it, and the smallest settings with which a whole run still happens."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.main import main

# Flower's command line imports typer, which imports names that click 8.4 announces to remove.
_CLICK = r"'click\."
warnings.filterwarnings("ignore", _CLICK, DeprecationWarning)  # while the other conftest files are imported


def pytest_configure(config: pytest.Config) -> None:
    """Let through what libraries say about each other; everything else stays an error."""
    config.addinivalue_line("filterwarnings", f"ignore:{_CLICK}:DeprecationWarning")


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line that a person is told; anything more, or a traceback, fails the test."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("fedtune: ")
        return lines[0].removeprefix("fedtune: ")


def run_command(*arguments: str) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def command() -> Callable[..., Outcome]:
    """`fedtune` in this process."""
    return run_command


@pytest.fixture(scope="session")
def tiny() -> Callable[..., list[str]]:
    """Overrides of a run that takes well under a second: given noise saves the search for it.

    The keyword `into` is the folder for run folders.  Positional overrides come last, and so win.
    """

    def make(*overrides: str, into: Path, name: str = "run") -> list[str]:
        return [
            "experiment=debug",
            f"tracking.output_dir='{into}'",
            f"name={name}",
            "runtime.device=cpu",
            "runtime.num_threads=1",
            "privacy.noise_multiplier=4.0",
            "data.train_fraction=0.02",
            "data.declared_sizes=90",
            "data.max_length=16",
            "data.validation_rows=10",
            "data.test_rows=10",
            *overrides,
        ]

    return make


@pytest.fixture(scope="session")
def simulate(tiny: Callable[..., list[str]]) -> Callable[..., Path]:
    """Run the tiny federation to its end and return its folder."""

    def run(*overrides: str, into: Path, name: str = "run") -> Path:
        outcome = run_command("simulate", *tiny(*overrides, into=into, name=name))
        assert outcome.code == 0, outcome.err
        return into / name

    return run


@pytest.fixture(scope="session")
def result_of() -> Callable[[Path], Any]:
    """The run.json of a run folder."""
    return lambda folder: json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="session")
def adapter_of() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of a finished run's tensors."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted((folder / "adapter").glob("*.safetensors"))}
