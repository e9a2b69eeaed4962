"""Processes of a federation: real ones, logged to a file, waited for with a limit, ended by their own pid."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .forked import Forked

FEDTUNE = (sys.executable, "-m", "fedtune")
REPOSITORY = Path(__file__).parents[1]
START_S, RUN_S = 150.0, 240.0
"""How long starting, and finishing a run, may take on a slow machine."""


def wait_for(
    condition: Callable[[], Any], *, seconds: float = 60.0, what: str = "what it needs", needs: Process | None = None
) -> None:
    """Wait until `condition` holds; fail when it does not within `seconds`, or once the process `needs` has ended."""
    deadline = time.monotonic() + seconds
    while True:
        ended = needs is not None and needs.code is not None
        if condition():
            return
        assert not ended, f"{needs and needs.name} ended before {what}; its last words:\n{needs and needs.text[-2000:]}"
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.02)


def make_environment(**more: str) -> dict[str, str]:
    given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    # A proxy of this machine's is none of theirs.
    own = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**own, **given, **more}


class Process:
    """One process in a folder, by its command line, with what it says on stdout and stderr added to `log`."""

    def __init__(
        self, name: str, words: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.log = name, log
        self._from = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = Forked(
                words,
                cwd=cwd,
                env=make_environment(**(env or {})),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        return self._process.poll()

    @property
    def text(self) -> str:
        """What it has said so far; not what an earlier process wrote into the same file."""
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    def lines(self, event: str) -> list[dict[str, Any]]:
        whole = [line for line in self.text.splitlines(keepends=True) if line.endswith("\n") and line.startswith("{")]
        return [line for line in map(json.loads, whole) if line["event"] == event]

    def wait_for_text(self, text: str, *, count: int = 1, seconds: float = START_S) -> None:
        """Wait until it has said `text` so many times."""
        wait_for(
            lambda: self.text.count(text) >= count, seconds=seconds, what=f"{self.name} to say {text!r}", needs=self
        )

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self, *, seconds: float = RUN_S) -> int:
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended within {seconds:g} s") from None

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.code is None, f"{self.name} had ended by itself with {self.code}"
        self._process.kill()
        assert self.end(seconds=30) == -signal.SIGKILL

    def ask_to_end(self) -> None:
        """Send SIGTERM, also to one that is stopped."""
        if self.code is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()

    def stop(self) -> None:
        if self.code is None:
            self.ask_to_end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=15)
        if self.code is None:
            self._process.kill()
            self._process.wait(timeout=30)
