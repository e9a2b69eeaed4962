"""Audit log of the server: connections, and refusals with their reasons, as JSON lines in files of limited size.

A line can contain addresses, member names, certificate names and paths, but never a secret or part of a message.  A
repeated event from the same source is written once and then only counted, so that callers cannot fill the disk.
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
_MAX_BYTES, _NUM_OLD = 4 << 20, 3
_REPEAT_S = 600.0  # period over which repetitions of an event are counted before the count is written
_MAX_KINDS, _MAX_KINDS_PER_CALLER = 1000, 100
"""Maximum number of distinct lines per event, and per event and member (or address), within the period.  The second
limit prevents one caller from using up the quota of all other callers."""
_ALWAYS: frozenset[Event] = frozenset(
    {
        *("server started", "server stopped", "run started", "run ended"),
        *("member registered", "member revoked", "member not registered"),
    }
)
"""Events without a quota, because only the lead and the roster cause them."""
_MAX_LENGTH = 200


_Kind = tuple[tuple[str, str], ...]


def _list_quota_keys(kind: _Kind) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of the two quotas of a line: per event, and per event and member (or address if unknown)."""
    fields = dict(kind)
    return (fields["event"],), (fields["event"], fields.get("member") or fields.get("address", ""))


class AuditLog:
    """Thread-safe audit log, which never blocks a call, even on a full disk.

    Args:
        path: the current file; None disables the log.  Up to three older files are stored next to it, with numbers.
        most_bytes: maximum size of one file.
    """

    def __init__(
        self, path: Path | None, *, most_bytes: int = _MAX_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._most_bytes, self._clock = path, most_bytes, clock
        self._lock = threading.Lock()
        self._counts: dict[_Kind, tuple[int, float]] = {}
        self._kinds: Counter[tuple[str, ...]] = Counter()  # quota key -> number of distinct lines
        self._left_out, self._told, self._failed = 0, clock(), False

    def log_event(self, event: Event, **about: str) -> bool:
        """Write an event, or only count it if an identical event was written within the last ten minutes.

        Returns True if the event was written.
        """
        # Truncate long values, such as the name in a certificate.
        fields = {name: value[:_MAX_LENGTH] for name, value in about.items() if value}
        kind = (("event", event), *sorted(fields.items()))
        of_event, of_one = _list_quota_keys(kind)
        with self._lock:
            self._flush(self._clock())
            has_room = self._kinds[of_event] < _MAX_KINDS and self._kinds[of_one] < _MAX_KINDS_PER_CALLER
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
        """Write the counts of repeated events that are older than ten minutes; with `all_`, write all counts."""
        with self._lock:
            self._flush(float("inf") if all_ else self._clock())

    def _flush(self, moment: float) -> None:
        # The oldest events are first, so that a call checks only a few.
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
