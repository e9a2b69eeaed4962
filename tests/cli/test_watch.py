"""`fedtune watch` as a process: what it prints, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

LOOPBACK = "must be an address of this machine alone: 127.0.0.1, ::1 or localhost"


@pytest.fixture(scope="module")
def folder(simulate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return simulate("report.language=de", into=tmp_path_factory.mktemp("runs"))


@contextmanager
def watching(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the address that it printed."""
    command = [sys.executable, "-m", "fedtune", "watch", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        guard = threading.Timer(120, process.kill)
        guard.start()
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()
            guard.cancel()


@pytest.mark.parametrize(
    ("number", "language", "shown"), [(signal.SIGINT, (), "de"), (signal.SIGTERM, ("--language", "en"), "en")]
)
def test_it_serves_until_a_signal_and_ends_well(
    folder: Path, number: signal.Signals, language: tuple[str, ...], shown: str
) -> None:
    """In the run's own language unless told otherwise, and also while a browser holds its connection."""
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with (
        watching(folder, *language) as (process, address),
        httpx.Client(trust_env=False, timeout=60, follow_redirects=True) as client,
    ):
        assert address.startswith("http://127.0.0.1:")
        answer = client.get(address)
        assert answer.status_code == 200
        assert f'<html lang="{shown}">' in client.get(address.split("?")[0]).text
        os.kill(process.pid, number)
        assert process.wait(timeout=60) == 0
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.read() + process.stderr.read()
    assert said == "Open it in a browser on this machine. Ctrl-C ends it.\n", "no log, and above all not the token"
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere"], "run folder = 'nowhere': must hold a config.yaml"),
    (["{folder}", "--host", "0.0.0.0"], f"--host = '0.0.0.0': {LOOPBACK}"),
    (["{folder}", "--host", "example.org"], f"--host = 'example.org': {LOOPBACK}"),
    (["{folder}", "--port", "70000"], "--port = 70000: must be from 0 (any that is free) to 65535"),
])  # fmt: skip
def test_mistakes_are_one_line(
    folder: Path, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where no run is that could be named
    outcome = command("watch", *(each.format(folder=folder) for each in arguments))
    assert (outcome.code, outcome.out, outcome.message) == (2, "", message)


@pytest.mark.parametrize("arguments", [[], ["--port", "many"], ["a", "b"], ["a", "--language", "fr"]])
def test_wrong_arguments(arguments: list[str], command: Any) -> None:
    assert command("watch", *arguments).code == 2
