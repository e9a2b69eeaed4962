"""Forking a preloaded process, following what it tells, and killing it."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from observer import Outside
from points import Doomed, Kill, Place

LIMIT_S = 120.0
"""A process that takes longer hangs; it is killed, and that counts as a failure."""

Job = Callable[[Doomed, Outside], None]


@dataclass(frozen=True, kw_only=True)
class End:
    """How a process ended.

    Attributes:
        killed: by SIGKILL; otherwise it came to an end of its own.
        failure: what went wrong, where neither happened as it should.
        phase: that it was last in; `point`, that it crossed last.
        told: lines that came through the pipe.
    """

    killed: bool
    failure: str
    phase: str
    point: str
    told: list[dict[str, Any]] = field(repr=False)


def live(job: Job, *, kill: Kill | None, folder: Path) -> End:
    """Fork, run `job` in the child, kill it as asked, and wait for its end.

    Args:
        folder: holds the child's log, and the requests that were sent.
    """
    threads = Path("/proc/self/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, "only a single thread can be forked safely"
    place, (reading, writing) = Place(), os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _become_child(job, kill, place, Outside(writing, folder / "requests"), folder / "log.txt")
    os.close(writing)
    try:
        told, hung = _follow(pid, reading, kill)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
        _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not hung
    failure = "it hung" if hung else "" if killed or status == 0 else (folder / "log.txt").read_text()[-2000:]
    return End(killed=killed, failure=failure, phase=place.phase, point=place.point, told=told)


def _become_child(job: Job, kill: Kill | None, place: Place, outside: Outside, log: Path) -> None:
    """Never returns: whatever happens, the copy of the parent ends here."""
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        job(Doomed(kill, place, arm=lambda: outside.tell("armed")), outside)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _follow(pid: int, reading: int, kill: Kill | None) -> tuple[list[dict[str, Any]], bool]:
    """Read until the child is gone; strike when its delay has passed."""
    told: list[dict[str, Any]] = []
    deadline, strike, rest, hung = time.monotonic() + LIMIT_S, float("inf"), b"", False
    while True:
        wait_s = min(LIMIT_S, max(0.0, min(deadline, strike) - time.monotonic()))
        readable, _, _ = select.select([reading], [], [], wait_s)
        if readable:
            data = os.read(reading, 1 << 16)
            if not data:
                return told, hung
            *lines, rest = (rest + data).split(b"\n")
            told += [json.loads(line) for line in lines]
            if kill is not None and kill.delay_s is not None and any(line["what"] == "armed" for line in told):
                strike = min(strike, time.monotonic() + kill.delay_s)
        now = time.monotonic()
        if now >= min(deadline, strike):
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still the child's
            hung |= now >= deadline
            deadline = strike = float("inf")
