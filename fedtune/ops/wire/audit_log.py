"""Audit log of the server: connections and refusals with their reasons, as JSON lines in files of bounded size.

A line contains addresses, members, certificates and paths, and never a secret or part of a message.  A repeated event
from the same source is written once and then only counted, so that repeated calls cannot fill the disk.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)

Event = Literal[
    "server started",
    "server stopped",
    "connected",
    "handshake refused",
    "connection refused",
    "connection ended",
    "call refused",
    "lead's call refused",
    "message refused",
    "run started",
    "run ended",
    "member registered",
    "member revoked",
    "member not registered",
    "events not written",
]
FILE_NAME = "audit.jsonl"
_MOST_BYTES, _NUM_OLD = 4 << 20, 3
_REPEAT_S = 600.0  # for how long the same event is counted before its number is written
_MOST_KINDS, _MOST_OF_ONE = 1000, 100
"""Different lines of one event that are told apart, and of those one member's or one address's: a caller who
makes many hides no other's."""
_ALWAYS: frozenset[Event] = frozenset(
    {
        *("server started", "server stopped", "run started", "run ended"),
        *("member registered", "member revoked", "member not registered"),
    }
)
"""Made by lead and roster alone."""
_MOST_LENGTH = 200


_Kind = tuple[tuple[str, str], ...]


def _list_quota_keys(kind: _Kind) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the quotas of a line: one per event, and one per event and member (or address, if the member is unknown)."""
    fields = dict(kind)
    return (fields["event"],), (fields["event"], fields.get("member") or fields.get("address", ""))


class AuditLog:
    """Thread-safe audit log, which never blocks a call, even on a full disk.

    Args:
        path: the file; None: nothing is written.  Up to three older files with numbers are next to it.
        most_bytes: maximum size of one file.
    """

    def __init__(
        self, path: Path | None, *, most_bytes: int = _MOST_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._most_bytes, self._clock = path, most_bytes, clock
        self._lock = threading.Lock()
        self._counts: dict[_Kind, tuple[int, float]] = {}
        self._kinds: Counter[tuple[str, ...]] = Counter()  # of an event, and of who makes it
        self._left_out, self._told, self._failed = 0, clock(), False

    def log_event(self, event: Event, **about: str) -> bool:
        """Write an event, or only count it if an identical event was written within ten minutes; return True if it was
        written.
        """
        # Flower's paths, our reasons and a certificate's name: bounded, should one of them be long.
        fields = {name: value[:_MOST_LENGTH] for name, value in about.items() if value}
        kind = (("event", event), *sorted(fields.items()))
        of_event, of_one = _list_quota_keys(kind)
        with self._lock:
            self._flush(self._clock())
            has_room = self._kinds[of_event] < _MOST_KINDS and self._kinds[of_one] < _MOST_OF_ONE
            if kind in self._counts:
                count, since = self._counts[kind]
                self._counts[kind] = (count + 1, since)
            elif event not in _ALWAYS and not has_room:
                self._left_out += 1
            else:
                self._counts[kind] = (0, self._clock())
                self._kinds.update((of_event, of_one))
                self._write({"event": event, **fields})
                return True
        return False

    def flush(self, *, all_: bool = False) -> None:
        """Write the counts of repeated events after their ten minutes; with `all_`, write every count."""
        with self._lock:
            self._flush(float("inf") if all_ else self._clock())

    def _flush(self, moment: float) -> None:
        # The oldest come first, so that a call looks at few.
        while self._counts:
            kind, (count, since) = next(iter(self._counts.items()))
            if moment - since < _REPEAT_S:
                break
            del self._counts[kind]
            self._kinds -= Counter(_list_quota_keys(kind))
            if count:
                self._write({**dict(kind), "again": count})
        if self._left_out and moment - self._told >= _REPEAT_S:
            self._write({"event": "events not written", "again": self._left_out})
            self._left_out, self._told = 0, moment

    def _write(self, fields: dict[str, object]) -> None:
        if (path := self._path) is None:
            return
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}) + "\n"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "a") as file:
                file.write(line)
                full = file.tell() >= self._most_bytes
            if full:
                for number in range(_NUM_OLD, 0, -1):
                    older = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
                    if older.exists():
                        os.replace(older, path.with_name(f"{path.name}.{number}"))
        except OSError as error:
            if not self._failed:
                log.error("the audit log cannot be written (%s)", error.strerror)
            self._failed = True
        else:
            self._failed = False
