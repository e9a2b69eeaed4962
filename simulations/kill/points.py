"""A process that is to be killed: where it is, and named points around all that it writes, trains and sends.

All wrapping happens in a forked process; fedtune itself has no hooks.
"""

from __future__ import annotations

import functools
import mmap
import os
import signal
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedtune.federation.lead as lead
import fedtune.privacy.durable as durable
import fedtune.privacy.keys as keys
import fedtune.privacy.ledger.site_ledger as ledger
import fedtune.privacy.ledger.store as event_store
import fedtune.privacy.policy_file as policy_file
import fedtune.runs.federation_run as federation_run
import fedtune.sites.virtual_site as virtual_site
import fedtune.training.local as local

START = "lead: before"
"""The point that a process crosses first."""
WRITES = {
    **dict.fromkeys(("open", "reserve", "commit", "refusal", "end of run"), "COMMIT"),
    **dict.fromkeys(("anchor", "site files", "journal", "checkpoint"), "fsync"),
}
"""Phases that make something durable, the last two at the lead, and the call that does it."""
PHASES = (*WRITES, "answer", "training", "step", "reply", "lead")
"""Phases that must have named points, or the study would be empty where a function was renamed."""
_FIELD = 64


@dataclass(frozen=True, kw_only=True)
class Kill:
    """When a process dies.

    Attributes:
        point: name of the point, as in "reserve: before COMMIT".
        number: at which crossing of it, from 1.
        delay_s: None: exactly there, by its own hand; else that long after, by its parent's.
        spill: SQLite may keep a single page in memory, so that a transaction is half written before its COMMIT.
    """

    point: str
    number: int = 1
    delay_s: float | None = None
    spill: bool = False


class Place:
    """The phase and the point that a process passed last, in memory that outlives it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2 * _FIELD)

    def clear(self) -> None:
        self._memory[:] = bytes(2 * _FIELD)

    @property
    def phase(self) -> str:
        return self._read(0)

    @phase.setter
    def phase(self, name: str) -> None:
        self._write(0, name)

    @property
    def point(self) -> str:
        return self._read(_FIELD)

    @point.setter
    def point(self, name: str) -> None:
        self._write(_FIELD, name)

    def _read(self, start: int) -> str:
        return self._memory[start : start + _FIELD].rstrip(b"\0").decode()

    def _write(self, start: int, name: str) -> None:
        self._memory[start : start + _FIELD] = name.encode().ljust(_FIELD, b"\0")


class Doomed:
    """This process, on its way to its end.

    Args:
        arm: tells the parent that its delay begins now.
    """

    def __init__(self, kill: Kill | None, place: Place, arm: Callable[[], None]) -> None:
        self._kill, self._place, self._arm = kill, place, arm
        self._phases = ["start"]
        self.crossed: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        place.phase = self.phase

    @property
    def phase(self) -> str:
        """The innermost phase that the process is in."""
        return self._phases[-1]

    def cross(self, point: str) -> None:
        """Pass a point, if it is not the last one."""
        self.crossed[point] += 1
        self._place.point = point
        kill = self._kill
        if kill is not None and (kill.point, kill.number) == (point, self.crossed[point]):
            if kill.delay_s is None:
                os.kill(os.getpid(), signal.SIGKILL)
            self._arm()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Be in `phase`, between a point before it and one after it."""
        self.cross(f"{phase}: before")
        began = time.perf_counter()
        self._phases.append(phase)
        self._place.phase = phase
        try:
            yield
        finally:
            self._phases.pop()
            self._place.phase = self.phase
        self.seconds[phase].append(time.perf_counter() - began)
        self.cross(f"{phase}: after")

    def around(self, function: Callable[..., Any], phase: Callable[..., str] | str) -> Callable[..., Any]:
        """`function` with a point before and after; `phase` may depend on its arguments."""

        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            with self.within(phase if isinstance(phase, str) else phase(*arguments, **named)):
                return function(*arguments, **named)

        return wrapped

    def sub_points(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`function` with points in the current phase, as "anchor: before replace"."""

        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.cross(f"{self.phase}: before {name}")
            began = time.perf_counter()
            result = function(*arguments, **named)
            self.seconds[f"{self.phase}: {name}"].append(time.perf_counter() - began)
            self.cross(f"{self.phase}: after {name}")
            return result

        return wrapped


def install(doomed: Doomed, *, spill: bool) -> None:
    """Put the points into this process."""
    for owner, method, phase in (
        (ledger.SiteLedger, "__init__", "open"),
        (ledger.SiteLedger, "reserve", "reserve"),
        (ledger.SiteLedger, "commit", "commit"),
        (ledger.SiteLedger, "record_refusal", "refusal"),
        (ledger.SiteLedger, "end_run", "end of run"),
        (virtual_site.Participants, "site", "site files"),
        (local, "take_dp_sgd_step", "step"),
        (event_store, "write_durably", "anchor"),
        (lead, "write_durably", _which_file),
        (policy_file, "write_durably", "site files"),
        (federation_run, "write_durably", "result"),
    ):
        setattr(owner, method, doomed.around(getattr(owner, method), phase))
    for module in (durable, keys):
        module.os = _WatchedOs(doomed)  # type: ignore[assignment, attr-defined]
    sqlite3.connect = functools.partial(sqlite3.connect, factory=_watched_connection(doomed, spill))  # type: ignore


def _which_file(path: Path, data: bytes) -> str:
    return {"asked.jsonl": "journal", "receipts.json": "receipts"}.get(path.name, "checkpoint")


class _WatchedOs:
    """The module `os`, with points around the calls that make a file durable."""

    def __init__(self, doomed: Doomed) -> None:
        for name in ("fsync", "replace", "link"):
            setattr(self, name, doomed.sub_points(getattr(os, name), name))

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _watched_connection(doomed: Doomed, spill: bool) -> type[sqlite3.Connection]:
    """Connections with points around the COMMIT of every transaction that appends events."""

    class Watched(sqlite3.Connection):
        appends = False

        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if sql.startswith("BEGIN IMMEDIATE") and spill:
                super().execute("PRAGMA cache_size = 1")
            self.appends |= sql.startswith("INSERT INTO events")
            if sql != "COMMIT" or not self.appends:
                return super().execute(sql, *parameters)
            return doomed.sub_points(super().execute, "COMMIT")(sql)

    return Watched
