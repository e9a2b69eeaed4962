"""Logging for long-running processes: JSON lines on stderr that never contain data of a record.

The text of an exception may quote a record (`int("a cell")`, an undeclared label), and so may a library's message.  The
content of a log line therefore depends on the logger:

- fedtune: the message with its arguments and extra fields.  Texts, numbers and paths are written in full; any other
  object is replaced by the name of its type.
- The network libraries in `CARRIERS`, which never process a record: the same as for fedtune.
- Every other library, including torch, transformers, tokenizers, peft, opacus and numpy: the level and the source
  location of a warning or an error.  The text is withheld, because it may quote a record.
- Exceptions from any logger: type and frames (file:line function) of the exception and its causes.  The text is written
  only for `RefusedError`, `RunError` and `ConfigError` (but not `DataError`), which quote only settings and file names.

Messages in fedtune's code must never include a value from a data file.  The handlers of other libraries, uncaught
exceptions and warnings are all redirected to this logger.  Text that a library prints directly to stdout or stderr is
not covered.
"""

from __future__ import annotations

import errno
import json
import logging
import numbers
import os
import ssl
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO, get_args

from fedtune.spec import ConfigError, DataError, RefusedError, RunError, check_one_of, describe_full_disk

OWN = "fedtune"
CARRIERS = frozenset({"flwr", "httpcore", "httpx", "requests", "urllib3", "uvicorn"})
WITHHELD = "text withheld: it may quote a record"

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_MAX_CHARACTERS = 4000
_MAX_FRAMES = 40
_MAX_ERRORS = 16
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# The longest path first, because site-packages is inside the folder of the standard library.
_ROOTS = sorted(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    key=len,
    reverse=True,
)
Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = get_args(Level)

_log = logging.getLogger(__name__)


def configure_logs(level: Level) -> None:
    """Redirect all logs of this process to stderr as JSON lines; a second call replaces the first.

    The threshold is `level` for fedtune's own messages and "warning" for other libraries.  At level "debug", it is
    "info" for the libraries in `CARRIERS`.  The redirection is permanent, and covers the handlers of other libraries
    (including those imported later), warnings, and uncaught exceptions in all threads.

    Raises:
        ConfigError: the level is unknown.
    """
    check_one_of("--log-level", level, LEVELS)
    handler = _Lines(sys.stderr)
    lowest = logging.getLevelNamesMapping()[level.upper()]
    handler.addFilter(lambda record: _should_log(record, lowest))

    def make_record(name: str, *rest: Any, **more: Any) -> logging.LogRecord:
        """Create a log record, after removing every handler that would write the record without redaction.

        Libraries add their handlers on import, which may be long after logging was configured, so the handlers are
        checked for every record.
        """
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            _install_handler(logger, handler)
            logger = logger.parent
        return logging.LogRecord(name, *rest, **more)

    for name, least in (("", min(lowest, logging.WARNING)), (OWN, lowest)):
        _install_handler(logging.getLogger(name), handler)
        logging.getLogger(name).setLevel(least)
    logging.setLogRecordFactory(make_record)
    sys.excepthook, threading.excepthook = _log_uncaught, _log_uncaught_in_thread
    sys.unraisablehook, warnings.showwarning = _log_unraisable, _log_warning


class _Lines(logging.StreamHandler[TextIO]):
    """Handler that writes each record as a line of JSON with time, level, logger, event, extra fields and `error`."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_record_fields(record))  # ASCII-only, hence always a single line

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a record that cannot be written, because the default handler would print its message and arguments."""


def _install_handler(logger: logging.Logger, handler: logging.Handler) -> None:
    wanted = [handler] if logger.parent is None else []
    if logger.handlers != wanted:
        logger.handlers = wanted
    logger.propagate = True


def _should_log(record: logging.LogRecord, lowest: int) -> bool:
    owner = _find_package(record)
    if owner == OWN:
        return record.levelno >= lowest
    carried = lowest <= logging.DEBUG and owner in CARRIERS
    return record.levelno >= max(lowest, logging.INFO if carried else logging.WARNING)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _log.warning("interrupted from the keyboard")
    else:
        _log.critical("uncaught exception: the process exits", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(hook_args: threading.ExceptHookArgs) -> None:
    if hook_args.exc_value is not None and not isinstance(hook_args.exc_value, SystemExit):
        name = hook_args.thread.name if hook_args.thread else None
        _log.critical("uncaught exception in a thread", exc_info=hook_args.exc_value, extra={"in_thread": name})


def _log_unraisable(unraisable: Any) -> None:
    # Python's default message would show the object whose clean-up failed.
    _log.error("an exception was raised in a destructor", exc_info=unraisable.exc_value)


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """Log the category and location of a warning, without its text; replaces `warnings.showwarning`."""
    where = f"{_shorten_source_path(filename)}:{lineno}"
    _log.warning("%s: %s", category.__name__, WITHHELD, extra={"where": where})


def _find_package(record: logging.LogRecord) -> str:
    """Return the top-level package of the record's logger."""
    return record.name.partition(".")[0]


def _shorten_source_path(file: str) -> str:
    """Shorten the path of a source file to start at its package.

    For a file outside any package, only the file name remains, because folder names are private to the site.
    """
    if file.startswith(_PACKAGE):
        return f"{OWN}/{file.removeprefix(_PACKAGE)}"
    root = next((root for root in _ROOTS if file.startswith(root)), None)
    return os.path.basename(file) if root is None else file.removeprefix(root)


def _record_fields(record: logging.LogRecord) -> dict[str, Any]:
    owner = _find_package(record)
    may_speak = owner == OWN or owner in CARRIERS
    fields: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": _format_event(record) if may_speak else WITHHELD,
    }
    if not may_speak:
        fields["where"] = f"{_shorten_source_path(record.pathname)}:{record.lineno} {record.funcName}"
    if owner == OWN:
        fields |= {
            key: _convert_to_json_value(value)
            for key, value in vars(record).items()
            if key not in _STANDARD | fields.keys()
        }
    if record.exc_info and record.exc_info[1] is not None:
        fields["error"] = _describe_exception(record.exc_info[1], set())
    return fields


def _format_event(record: logging.LogRecord) -> str:
    text, arguments = str(_to_builtin_or_type_name(record.msg)), record.args
    try:
        if isinstance(arguments, Mapping):
            text %= {key: _to_builtin_or_type_name(value) for key, value in arguments.items()}
        elif arguments:
            text %= tuple(map(_to_builtin_or_type_name, arguments))
    except (TypeError, ValueError, KeyError):
        text += " (the arguments do not match the format)"
    return _limit_length(text)


def _to_builtin_or_type_name(value: object) -> object:
    """Return `value` if it is a text, a number, a path or None, otherwise the name of its type."""
    if isinstance(value, BaseException):
        return str(value) if _is_safe_to_log(value) else _format_type_name(value)
    if value is None or isinstance(value, str | numbers.Number | os.PathLike):
        return value
    return f"<{_format_type_name(value)}>"


def _convert_to_json_value(value: object) -> object:
    plain = _to_builtin_or_type_name(value)
    if plain is None or isinstance(plain, bool | int) or (isinstance(plain, float) and abs(plain) < float("inf")):
        return plain
    return _limit_length(str(plain))


def _limit_length(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "…"


def _describe_exception(error: BaseException, seen: set[int]) -> dict[str, Any]:
    """Describe an exception by type, frames and cause, with its text only if `_is_safe_to_log` allows it."""
    seen.add(id(error))
    fields: dict[str, Any] = {"type": _format_type_name(error), **_list_error_codes(error)}
    if _is_safe_to_log(error):
        fields["text"] = _limit_length(str(error))
    # The innermost frames, in the order of the calls.
    walked = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)][-_MAX_FRAMES:]
    fields["frames"] = [f"{_shorten_source_path(code.co_filename)}:{line} {code.co_qualname}" for code, line in walked]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for key, among in (("cause", [cause] if cause else []), ("among", inner)):
        errors = [_describe_exception(one, seen) for one in among if id(one) not in seen and len(seen) < _MAX_ERRORS]
        if errors:
            fields[key] = errors[0] if key == "cause" else errors
    return fields


def _is_safe_to_log(error: BaseException) -> bool:
    return isinstance(error, ConfigError | RefusedError | RunError) and not isinstance(error, DataError)


def _list_error_codes(error: BaseException) -> dict[str, str]:
    """Return the symbolic error names of the operating system and OpenSSL, and the file name for a full disk."""
    fields = {}
    if isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        fields["errno"] = errno.errorcode[error.errno]
        if describe_full_disk(error) and isinstance(error.filename, str):
            fields["file"] = error.filename
    if isinstance(error, ssl.SSLError) and isinstance(error.reason, str):
        fields["reason"] = error.reason
    return fields


def _format_type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
