"""Logs of processes that run for months: JSON lines on stderr or in a file, for everything that speaks in the process.

`fedtune.deploy.log_lines` says what a line may hold.  This module sees to it that nothing goes around it: handlers of
other libraries, uncaught exceptions, warnings.  What a library prints to stdout or stderr by itself is not covered.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO, get_args

from fedtune.deploy.log_lines import CARRIERS, OWN, WITHHELD, JsonLines, owner_of, short
from fedtune.spec import ConfigError, check_one_of

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = get_args(Level)

_log = logging.getLogger(__name__)
_current: _Logs | None = None


def configure_logs(level: Level, *, file: Path | None = None) -> None:
    """Send everything that this process logs to stderr, or to `file`, as JSON lines; a second call replaces the first.

    fedtune's own messages are kept from `level` on, other libraries' from warnings on; at "debug" also what the
    libraries that carry messages say from "info" on.  It takes over for good: the handlers of other libraries (also of
    those that are imported later), warnings, and the uncaught exceptions of every thread.  `file` is made for its owner
    alone to read, and is made anew after it was moved away (logrotate needs no signal).

    Raises:
        ConfigError: there is no such level, or the file cannot be written.
    """
    global _current
    made = _Logs(level, file=file, stream=None)
    if _current is not None:
        _current.restore()
    _current = made
    made.take_over()


@contextmanager
def configured_logs(level: Level, *, file: Path | None = None, stream: TextIO | None = None) -> Iterator[None]:
    """`configure_logs` for the block only; what was there before is back afterwards.

    Args:
        level: of fedtune's own messages.
        file: as for `configure_logs`.
        stream: where to instead of stderr, where `file` is None.
    """
    global _current
    made, before = _Logs(level, file=file, stream=stream), _current
    _current = None
    made.take_over()
    try:
        yield
    finally:
        if _current is not None:  # one that was made inside the block
            _current.restore()
        _current = before
        made.restore()


class _Logs:
    """One configuration of the process's logging, and what there was before it."""

    def __init__(self, level: Level, *, file: Path | None, stream: TextIO | None) -> None:
        check_one_of("--log-level", level, LEVELS)
        self._level = logging.getLevelNamesMapping()[level.upper()]
        self._handler = _handler(file, stream)
        self._handler.setFormatter(JsonLines())
        self._handler.addFilter(self._is_kept)
        self._loggers: dict[logging.Logger, tuple[list[logging.Handler], bool, int]] = {}
        self._factory: Callable[..., logging.LogRecord] = logging.LogRecord

    def take_over(self) -> None:
        self._before = logging.getLogRecordFactory()
        around = getattr(self._before, "__self__", None)
        # Inside another configuration, only the inner one takes over.
        self._factory = around._factory if isinstance(around, _Logs) else self._before
        self._hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning)
        for name, level in (("", min(self._level, logging.WARNING)), (OWN, self._level)):
            logger = logging.getLogger(name)
            self._adopt(logger)
            logger.setLevel(level)
        logging.setLogRecordFactory(self._make_record)
        sys.excepthook, threading.excepthook = _uncaught, _uncaught_in_thread
        sys.unraisablehook, warnings.showwarning = _unraisable, _warned

    def restore(self) -> None:
        logging.setLogRecordFactory(self._before)
        sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = self._hooks
        for logger, (handlers, propagate, level) in self._loggers.items():
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        self._handler.close()

    def _is_kept(self, record: logging.LogRecord) -> bool:
        owner = owner_of(record)
        if owner == OWN:
            return record.levelno >= self._level
        carried = self._level <= logging.DEBUG and owner in CARRIERS
        return record.levelno >= max(self._level, logging.INFO if carried else logging.WARNING)

    def _make_record(self, name: str, *rest: Any, **more: Any) -> logging.LogRecord:
        """A record, after every handler was taken from its way that would write it in full.

        It is done here because libraries add theirs when they are first imported, long after logs were configured.
        """
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            self._adopt(logger)
            logger = logger.parent
        return self._factory(name, *rest, **more)

    def _adopt(self, logger: logging.Logger) -> None:
        wanted = [self._handler] if logger.parent is None else []
        self._loggers.setdefault(logger, (logger.handlers, logger.propagate, logger.level))
        if logger.handlers != wanted:
            logger.handlers = wanted
        logger.propagate = True


class _QuietStream(logging.StreamHandler[TextIO]):
    """A handler that drops what it cannot write; the library's own way shows the message and its arguments."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _QuietFile(WatchedFileHandler):
    """The same, for a file that its owner alone may read."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="ascii", opener=lambda path, flags: os.open(path, flags, 0o600))

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _handler(file: Path | None, stream: TextIO | None) -> logging.Handler:
    if file is None:
        return _QuietStream(sys.stderr if stream is None else stream)
    try:
        return _QuietFile(file)
    except OSError as error:
        raise ConfigError("log file", str(file), f"must be a file that can be written ({error.strerror})") from None


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _log.warning("interrupted from the keyboard")
    else:
        _log.critical("the process ends by an error", exc_info=(kind, error, trace))


def _uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_value is not None and not isinstance(found.exc_value, SystemExit):
        name = found.thread.name if found.thread else None
        _log.critical("a thread ended by an error", exc_info=found.exc_value, extra={"in_thread": name})


def _unraisable(found: Any) -> None:
    # Python's own words would show the object whose clean-up failed; the frames say enough.
    _log.error("an error where nothing could catch it", exc_info=found.exc_value)


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In place of `warnings.showwarning`, whose parameters these are."""
    where = f"{short(filename)}:{lineno}"
    _log.warning("%s: %s", category.__name__, WITHHELD, extra={"where": where})
