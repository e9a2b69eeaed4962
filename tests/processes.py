"""Processes of a federation: real processes with a log file, waits with a timeout, and termination by pid."""

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
"""Timeouts in seconds for starting, and for finishing a run, on a slow machine."""


def wait_for(
    condition: Callable[[], Any], *, seconds: float = 60.0, what: str = "what it needs", needs: Process | None = None
) -> None:
    """Wait until `condition` holds; fail after `seconds`, or once the process `needs` has exited."""
    deadline = time.monotonic() + seconds
    while True:
        ended = needs is not None and needs.code is not None
        if condition():
            return
        assert not ended, f"{needs and needs.name} ended before {what}; its last words:\n{needs and needs.text[-2000:]}"
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.02)


def make_environment(**extra: str) -> dict[str, str]:
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    # The processes must not use a proxy of this machine.
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**inherited, **variables, **extra}


class Process:
    """A command-line process in a folder; its stdout and stderr are appended to `log`."""

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
        """The output so far, without that of earlier processes in the same file."""
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    def lines(self, event: str) -> list[dict[str, Any]]:
        whole = [line for line in self.text.splitlines(keepends=True) if line.endswith("\n") and line.startswith("{")]
        return [line for line in map(json.loads, whole) if line["event"] == event]

    def wait_for_text(self, text: str, *, count: int = 1, seconds: float = START_S) -> None:
        """Wait until the output contains `text` at least this many times."""
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
        """Kill the process without warning, as a power cut would."""
        assert self.code is None, f"{self.name} had ended by itself with {self.code}"
        self._process.kill()
        assert self.end(seconds=30) == -signal.SIGKILL

    def ask_to_end(self) -> None:
        """Send SIGTERM, also to a stopped process."""
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
