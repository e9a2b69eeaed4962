"""What one line of a log may say, so that nothing in it was read from a record.

An exception's own text may quote a record (`int("a cell")`, a label that is not declared), and so may a library's
message.  Who speaks decides what is written:

- fedtune itself: the message with its plain arguments (texts, numbers, paths) and extra fields; of any other object
  only its type.
- The libraries that carry messages between organisations (`CARRIERS`) and see no record: their message, likewise.
- Everybody else, torch, transformers, tokenizers, peft, opacus and numpy among them: that there was a warning or an
  error, and where in the library.  Its text is withheld: a fixed text looks like one that a record went into.
- Exceptions, whoever logs them: type and frames (file:line function), and those of the cause.  The text only where
  it is made of settings and of fedtune's own files: `ConfigError` without `DataError`, `RefusedError`, `RunError`.

What fedtune's own messages say is in the hands of who writes them: never a value that was read from a data file.
"""

from __future__ import annotations

import errno
import json
import logging
import numbers
import os
import ssl
import sysconfig
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from fedtune.spec import ConfigError, DataError, RefusedError, RunError

OWN = "fedtune"
CARRIERS = frozenset({"flwr", "httpcore", "httpx", "requests", "urllib3", "uvicorn"})
WITHHELD = "text withheld: it may quote a record"

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_MOST_CHARACTERS = 4000
_MOST_FRAMES = 40
_MOST_ERRORS = 16
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# The longest first, since site-packages lies inside the standard library's folder.
_ROOTS = sorted(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    key=len,
    reverse=True,
)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, event, then extra fields and `error` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_fields(record))  # ASCII, and so one line, whatever it holds


def owner_of(record: logging.LogRecord) -> str:
    """The package that speaks: the first part of the logger's name."""
    return record.name.partition(".")[0]


def described(error: BaseException) -> dict[str, Any]:
    """What may be written of an exception: type, frames, cause; its text only where that is made of settings."""
    return _described(error, set())


def short(file: str) -> str:
    """A source file from its package on; only its name where it is of no package, since folders are the site's own."""
    if file.startswith(_PACKAGE):
        return f"{OWN}/{file.removeprefix(_PACKAGE)}"
    root = next((root for root in _ROOTS if file.startswith(root)), None)
    return os.path.basename(file) if root is None else file.removeprefix(root)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    owner = owner_of(record)
    may_speak = owner == OWN or owner in CARRIERS
    fields: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": _message(record) if may_speak else WITHHELD,
    }
    if not may_speak:
        fields["where"] = f"{short(record.pathname)}:{record.lineno} {record.funcName}"
    if owner == OWN:
        fields |= {key: _json(value) for key, value in vars(record).items() if key not in _STANDARD | fields.keys()}
    if record.exc_info and record.exc_info[1] is not None:
        fields["error"] = described(record.exc_info[1])
    return fields


def _message(record: logging.LogRecord) -> str:
    text, arguments = str(_plain(record.msg)), record.args
    try:
        if isinstance(arguments, Mapping):
            text %= {key: _plain(value) for key, value in arguments.items()}
        elif arguments:
            text %= tuple(map(_plain, arguments))
    except (TypeError, ValueError, KeyError):
        text += " (with arguments that do not fit)"
    return _bounded(text)


def _plain(value: object) -> object:
    """`value` where it is plain; of anything else its type."""
    if isinstance(value, BaseException):
        return str(value) if _is_of_settings(value) else _type_name(value)
    return value if value is None or isinstance(value, str | numbers.Number | os.PathLike) else f"<{_type_name(value)}>"


def _json(value: object) -> object:
    plain = _plain(value)
    if plain is None or isinstance(plain, bool | int) or (isinstance(plain, float) and abs(plain) < float("inf")):
        return plain
    return _bounded(str(plain))


def _bounded(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "…"


def _described(error: BaseException, seen: set[int]) -> dict[str, Any]:
    seen.add(id(error))
    fields: dict[str, Any] = {"type": _type_name(error), **_codes(error)}
    if _is_of_settings(error):
        fields["text"] = _bounded(str(error))
    fields["frames"] = _frames(error.__traceback__)
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for key, among in (("cause", [cause] if cause else []), ("among", inner)):
        found = [_described(one, seen) for one in among if id(one) not in seen and len(seen) < _MOST_ERRORS]
        if found:
            fields[key] = found[0] if key == "cause" else found
    return fields


def _is_of_settings(error: BaseException) -> bool:
    return isinstance(error, ConfigError | RefusedError | RunError) and not isinstance(error, DataError)


def _codes(error: BaseException) -> dict[str, str]:
    """The operating system's and OpenSSL's own names of what went wrong: constants, and often enough to go by."""
    fields = {}
    if isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        fields["errno"] = errno.errorcode[error.errno]
    if isinstance(error, ssl.SSLError) and isinstance(error.reason, str):
        fields["reason"] = error.reason
    return fields


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _frames(trace: TracebackType | None) -> list[str]:
    """The innermost frames, outermost first."""
    walked = [(frame.f_code, line) for frame, line in traceback.walk_tb(trace)]
    return [f"{short(code.co_filename)}:{line} {code.co_qualname}" for code, line in walked[-_MOST_FRAMES:]]
