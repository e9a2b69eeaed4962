"""A run's folder, looked at again and again while a run may be writing to it; nothing is ever written here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from fedtune.config import RunConfig
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.plan import Plan
from fedtune.report.record.run_record import read_run
from fedtune.report.watch.watch_model import RunNow
from fedtune.report.watch.watch_state import Seen, run_now, time_left
from fedtune.spec import FedtuneError

_AGAIN_S = 0.1
_Marks = tuple[tuple[str, int, int, int], ...]


class WatchedFolder:
    """A run folder and what it held when it last changed.

    Args:
        folder: the run's.
        config: of its `config.yaml`.
        is_running: whether a process works on the folder; must not change it.
    """

    def __init__(self, folder: Path, config: RunConfig, *, is_running: Callable[[Path], bool]) -> None:
        self._folder, self._config, self._is_running = folder, config, is_running
        self._plan: Plan | None = None
        self._known: tuple[bool, _Marks] | None = None
        self._seen = Seen(config=config, record=None, running=False)
        self._now = run_now(self._seen)

    def now(self, *, at: datetime | None = None) -> RunNow:
        """The run at this moment; files are read again only where one of them changed.

        A folder that cannot be read is told as one, with what was last known of the run: it may be mended.
        """
        # Looked at before it is read: a change in between is found the next time.
        marks = _marks(self._folder)
        running = self._is_running(self._folder)
        if (running, marks) != self._known:
            self._seen = self._look(running=running)
            self._now = run_now(self._seen)
            self._known = None if self._seen.problem else (running, marks)
        return replace(self._now, left=time_left(self._seen, at=at or datetime.now(UTC)))

    def _look(self, *, running: bool) -> Seen:
        problem = None
        for wait_s in (0.0, _AGAIN_S):  # a checkpoint may be followed by the next while it is read
            time.sleep(wait_s)
            try:
                return self._read(running=running)
            except (FedtuneError, OSError) as error:
                problem = str(error)
        return replace(self._seen, running=running, problem=problem)

    def _read(self, *, running: bool) -> Seen:
        files = RunFolder(self._folder)
        if not files.saved_checkpoints and not files.result.exists():
            # Raises where there is no folder any more: a run that fails before it begins takes it away.
            files.config.stat()
            return Seen(config=self._config, record=None, running=running)
        asked, answers = tuple(_asked(self._folder)), _answers(self._folder)
        record = read_run(self._folder, plan=self._plan)
        self._plan = record.plan
        return Seen(config=record.config, record=record, running=running, asked=asked, answers=answers)


def _marks(folder: Path) -> _Marks:
    """Names, times and sizes of all files that the page depends on."""
    files = RunFolder(folder)
    paths = [files.config, files.result, files.answers, files.environment, *sorted(files.checkpoints.glob("*"))]

    def found() -> Iterator[tuple[str, int, int, int]]:
        for path in paths:
            try:
                about = path.stat()
            except OSError:
                continue
            yield path.name, about.st_ino, about.st_mtime_ns, about.st_size

    return tuple(found())


def _asked(folder: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The journal of rounds that were asked for; what it means for the budget is read with the checkpoint."""
    path = RunFolder(folder).asked
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if line.endswith(b"\n"):
            try:
                fields = json.loads(line)
                yield int(fields["round"]), tuple(map(str, fields["sites"]))
            except (ValueError, TypeError, KeyError):
                continue


def _answers(folder: Path) -> Mapping[str, Mapping[str, str]]:
    """What real sites last answered; a simulation has none."""
    path = RunFolder(folder).answers
    try:
        known = json.loads(path.read_bytes()) if path.exists() else {}
        return {site: {key: str(answer[key]) for key in ("what", "time")} for site, answer in known.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
