"""Definitions that all layers share: the `spec` decorator, validators and the exception hierarchy.

A *spec* is a small frozen settings class, defined next to the code that uses it. It is a plain dataclass, so that the
privacy core needs no pydantic. The class attribute that `spec` sets makes pydantic forbid unknown keys when
`fedtune.config` composes the specs into one `RunConfig`.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from numbers import Real
from types import NoneType
from typing import Any, ClassVar, Final, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

T = TypeVar("T")
_NOT_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?|.*\.", re.IGNORECASE)

# Version numbers of the formats. A changed format needs a new number or a migration; readers reject other numbers.
LEDGER_SCHEMA: Final = 8  # ledger.db and its anchor
REPORT_SCHEMA: Final = 10  # report.json
RUN_SCHEMA: Final = 7  # a run folder's config.yaml, run.json, environment.json, audit.json, and adapter/fedtune.json
KIT_SCHEMA: Final = 3  # kit.toml, roster.json, join requests, and the lead's files next to them
WIRE_SCHEMA: Final = 11  # messages between lead and sites


class FedtuneError(Exception):
    """Base class of all errors that fedtune raises deliberately, with the command line's `exit_code`."""

    exit_code: ClassVar[int] = 1


NOT_GIVEN: Final = object()  # the value of an error without a value


class ConfigError(FedtuneError, ValueError):
    """Invalid user input, described by a key, its value and the accepted values.

    Attributes:
        key: dotted key or file, as the user would write it.
        value: the invalid value; `NOT_GIVEN` for a missing key, and for an option without a value.
        bound: the accepted values, as the end of a sentence ("must be greater than 0").
        remedy: a fix, as a command or the end of a sentence ("set the clock"); empty if `bound` suffices.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, key: str, value: object, bound: str, *, remedy: str = "") -> None:
        self.key, self.value, self.bound, self.remedy = key, value, bound, remedy
        setting = key if value is NOT_GIVEN else f"{key} = {format_value(value)}"
        super().__init__(": ".join(filter(None, (setting, bound, remedy))))

    def under(self, prefix: str) -> ConfigError:
        """Return a copy of the error with a prefixed key (`epsilon` becomes `privacy.epsilon`)."""
        return type(self)(f"{prefix}.{self.key}" if prefix else self.key, self.value, self.bound, remedy=self.remedy)

    def in_file(self, path: object) -> ConfigError:
        """Return a copy of the error whose key is preceded by the file that contains it."""
        return type(self)(f"{path}: {self.key}", self.value, self.bound, remedy=self.remedy)


class DataError(ConfigError):
    """A missing or malformed data file.  The key contains file, line and field."""


class RefusedError(FedtuneError):
    """The refusal of a request by a policy or a budget."""

    exit_code: ClassVar[int] = 3


class RunError(FedtuneError):
    """A failure during a run, such as too few sites or an unwritable checkpoint."""


class StuckError(RunError):
    """A failure that would recur if the run were resumed."""


class LibraryPanic(Exception):
    """A library's `BaseException` that is not an `Exception`, such as a Rust panic.  It is stored as `__cause__`."""


@contextmanager
def name_file_in_errors(path: object) -> Iterator[None]:
    """Add the file name to every ConfigError about the content of a file."""
    try:
        yield
    except ConfigError as error:
        raise error.in_file(path) from None


@contextmanager
def translate_panics() -> Iterator[None]:
    """Convert a library's `BaseException`s to `LibraryPanic`.  It can also be used as a decorator.

    A panic in a Rust library is a `BaseException`, which `except Exception` does not catch, so a malicious record could
    end a run. KeyboardInterrupt, SystemExit and GeneratorExit pass through unchanged.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise LibraryPanic(type(panic).__name__) from panic


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_SAY_SO = (*map(os.strerror, _FULL), "database or disk is full")
"""Messages about a full disk: of the operating system, as quoted by libraries in other languages, and of SQLite."""


def describe_full_disk(error: BaseException | None) -> str | None:
    """Return a message if a full disk or quota caused an error, else None."""
    for cause in iter_causes(error):
        says_so = any(words in str(cause) for words in _SAY_SO)
        if isinstance(cause, RunError) and says_so:
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return f"the disk is full: no room for {cause.filename}" if cause.filename else "the disk is full"
        if says_so and not isinstance(cause, FedtuneError):
            return "the disk is full"
    return None


def iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and its causes, starting with the error."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[T]) -> type[T]:
    """Turn a class into a frozen, keyword-only dataclass for which pydantic forbids extra keys.

    Fields of type `Literal`, or `Literal` or None, are also validated on construction in Python.
    """
    post_init = getattr(cls, "__post_init__", None)  # possibly inherited

    def check(self: Any) -> None:
        for name, allowed in _list_literals(type(self)):  # type: ignore[arg-type]
            check_one_of(name, getattr(self, name), allowed)
        if post_init is not None:
            post_init(self)

    cls.__post_init__ = check  # type: ignore[attr-defined]
    made: Any = dataclass(frozen=True, kw_only=True, slots=True)(cls)
    made.__pydantic_config__ = {"extra": "forbid"}
    return made  # type: ignore[no-any-return]


@cache
def _list_literals(cls: type) -> tuple[tuple[str, tuple[object, ...]], ...]:
    """List each `Literal` field with its allowed values.

    Called on first construction, when all forward references can be resolved.
    """
    literals = []
    for name, hint in get_type_hints(cls).items():
        kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
        if all(get_origin(kind) is Literal or kind is NoneType for kind in kinds):
            literals.append((name, tuple(value for kind in kinds for value in get_args(kind) or (None,))))
    return tuple(literals)


def check_positive(key: str, value: float) -> None:
    """Check that a value is finite and greater than 0."""
    if not (isinstance(value, Real) and 0 < value <= sys.float_info.max):
        raise ConfigError(key, value, "must be a finite number greater than 0")


def check_at_least(key: str, value: float, least: float) -> None:
    """Check that a value is finite and at least `least`."""
    if not (isinstance(value, Real) and least <= value <= sys.float_info.max):
        raise ConfigError(key, value, f"must be a finite number of at least {least:g}")


def check_at_most(key: str, value: float, most: float) -> None:
    """Check that a value is at most `most`."""
    if not (isinstance(value, Real) and value <= most):
        raise ConfigError(key, value, f"must be at most {most:g}")


def check_whole(key: str, value: object) -> None:
    """Check that a value is an int and not a bool."""
    if type(value) is not int:
        raise ConfigError(key, value, "must be a whole number")


def check_fraction(key: str, value: float, *, zero: bool = False, one: bool = False) -> None:
    """Check that a value is in (0, 1), where `zero` and `one` include the endpoints."""
    if not (isinstance(value, Real) and 0 <= value <= 1 and (zero or value > 0) and (one or value < 1)):
        raise ConfigError(key, value, f"must be in {'[' if zero else '('}0, 1{']' if one else ')'}")


def check_one_of(key: str, value: object, allowed: Collection[object]) -> None:
    """Check that a value is one of `allowed`."""
    if value not in tuple(allowed):  # a tuple, because unhashable values cannot be looked up in a set
        raise ConfigError(key, value, f"must be one of {', '.join(map(str, allowed))}")


def check_schema(key: str, found: object, schema: int, *, of: str) -> None:
    """Check the schema number of a file, which the error message describes as `of`."""
    if type(found) is not int or found != schema:
        bound = f"must be {schema}: another version of fedtune wrote this {of}; read it with that version"
        raise ConfigError(key, found if type(found) is int else NOT_GIVEN, bound)


def expand_home(path: str, *, key: str) -> str:
    """Expand `~` at the beginning of a path.

    Raises:
        ConfigError: the path names the home folder of an unknown user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise ConfigError(key, path, "starts with the home folder of an unknown user")
    return expanded


def check_name(key: str, name: str, *, most: int = 100, marks: str = "-_.") -> None:
    """Check that a name is valid as a folder name on every system, and safe in messages and command lines.

    Kits, ledgers and runs may be copied between operating systems.

    Args:
        key: setting of the name, for error messages.
        name: the name.
        most: maximum length.
        marks: allowed characters besides ASCII letters and digits.
    """
    is_text = isinstance(name, str) and len(name) <= most
    if not (is_text and re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9{re.escape(marks)}]*", name)):
        allowed = f"letters, digits, {', '.join(map(repr, marks[:-1]))} and {marks[-1]!r}"
        raise ConfigError(key, name, f"must consist of at most {most} {allowed}, and begin with a letter or digit")
    if _NOT_ON_WINDOWS.fullmatch(name):
        bound = "is not a valid folder name on Windows: choose another name without a dot at its end"
        raise ConfigError(key, name, bound)


def format_value(value: object, most: int = 120) -> str:
    """Format a value for an error message, with null and true instead of None and True.

    >>> format_value({"labels": ("a", None), "train": True})
    "{'labels': ['a', null], 'train': true}"
    """
    text = _format_plain(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _format_plain(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Mapping():
            return f"{{{', '.join(f'{_format_plain(key)}: {_format_plain(inner)}' for key, inner in value.items())}}}"
        case list() | tuple():
            return f"[{', '.join(map(_format_plain, value))}]"
    return repr(value)
