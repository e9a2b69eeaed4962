"""Strict decoding of JSON or TOML data into frozen dataclasses, based on the types of their fields.

Unknown keys, missing keys and wrong types raise errors, and the only conversion is from int to float.
The module needs only the standard library, so that `fedtune.privacy` can be audited with it.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
import stat
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from fedtune.spec import NOT_GIVEN, ConfigError

T = TypeVar("T")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
MAX_BYTES = 64 << 20  # size limit of a file from outside
_LONGEST_KEY, _MAX_LEVELS, _MAX_WHOLE = 60, 64, 1 << 63
_PLAIN = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
_hints = lru_cache(maxsize=256)(typing.get_type_hints)


def require_regular_file(path: Path) -> None:
    """Check before a file is opened that it is no pipe or device: a pipe could block forever, a device may have no end.

    Raises:
        OSError: the file does not exist, or is a pipe, a device or a socket. A folder passes: it cannot be opened.
    """
    if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_regular_file(path: Path) -> bytes:
    """Read a regular file of any size.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    require_regular_file(path)
    return path.read_bytes()


def read_bounded_file(path: Path, *, key: str, bound: str = "must be a readable file", name: str = "") -> bytes:
    """Read a file from outside: a regular file of at most `MAX_BYTES`, since reading a pipe could wait forever.

    Args:
        path: path of the file.
        key: name of the file, for error messages.
        bound: the accepted file, for error messages.
        name: what the user calls the file, for error messages; "": its path.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not a regular file.
    """
    try:
        file = path.stat()
        if not stat.S_ISREG(file.st_mode) or file.st_size > MAX_BYTES:
            raise ConfigError(key, name or str(path), f"{bound}, of at most {MAX_BYTES >> 20} MiB")
        return read_regular_file(path)
    except OSError as error:
        raise ConfigError(key, name or str(path), f"{bound} ({error.strerror})") from None


def parse_json(data: bytes | str, *, key: str, bound: str) -> dict[str, Any]:
    """Parse a JSON object from an untrusted source.

    Args:
        data: the JSON text.
        key: name of the source, for error messages.
        bound: the accepted form, for error messages.

    Raises:
        ConfigError: the data is not a JSON object, is nested too deeply, has a key twice, or contains NaN or an
            infinity, which JSON does not have. The message quotes nothing of `data`, because a link could point to
            another file.
    """
    try:
        parsed = json.loads(data, object_pairs_hook=reject_duplicate_keys)
        json.dumps(parsed, allow_nan=False)
    except (ValueError, RecursionError):  # ValueError: invalid JSON or UTF-8, or a huge integer
        parsed = None
    inner = [parsed]
    for _ in range(_MAX_LEVELS):
        inner = [item for value in inner for item in list_items(value)]
    if inner or not isinstance(parsed, dict):  # deeper nesting could be parsed, but neither copied nor written
        raise ConfigError(key, "something else", bound)
    return parsed


def read_json_object(path: Path, *, key: str) -> dict[str, Any]:
    """Read a JSON object from a file of at most `MAX_BYTES`; `key` names the file in error messages.

    Raises:
        ConfigError: the file cannot be read, is too large, or does not contain a JSON object (`parse_json`).
    """
    return parse_json(read_bounded_file(path, key=key), key=key, bound="must be an object")


def hash_json(fields: object) -> str:
    """Return the SHA-256 of the canonical JSON of `fields`, in hex: keys in order, and only ASCII characters."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def reject_duplicate_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object for `json.loads`; readers of JSON differ in which value of a repeated key they use.

    Raises:
        ValueError: a key is repeated.
    """
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a key is repeated")
    return fields


def read_toml(path: Path, *, key: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: path of the file.
        key: name of the file, for error messages.

    Raises:
        ConfigError: the file cannot be read, or is not TOML. The message quotes nothing of the file, because a link
            could point to another file.
    """
    data = read_bounded_file(path, key=key)
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # ValueError: invalid TOML or UTF-8, or a huge integer
        place = re.search(r" \((at [^()]*)\)$", str(error))
        raise ConfigError(key, str(path), f"must be TOML{f'; there is an error {place[1]}' if place else ''}") from None


def decode(cls: type[T], table: object, *, default: T | None = None, skipped: Sequence[str] = ()) -> T:
    """Decode a table into an instance of the dataclass `cls`.

    Args:
        cls: a frozen dataclass.
        table: the decoded JSON or TOML table.
        default: values of missing fields; None: fields without a default are required.
        skipped: additional keys, which are ignored.

    Raises:
        ConfigError: a key or value is wrong. The message contains the key, its value and the accepted values.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(cls.__name__.lower(), table, "must be a table")
    table = {key: value for key, value in table.items() if key not in skipped}
    hints, fields = _hints(cls), {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            # The message quotes neither values nor unknown keys, which could come from another file.
            named = key if len(key) <= _LONGEST_KEY and _BARE_KEY.fullmatch(key) else "one of the keys"
            raise ConfigError(named, NOT_GIVEN, f"is not a known key; known keys: {', '.join([*fields, *skipped])}")
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and default is None and key not in table:
            raise ConfigError(key, NOT_GIVEN, "is required")
    values = {key: decode_value(key, value, hints[key], fields[key].default) for key, value in table.items()}
    return cls(**values) if default is None else dataclasses.replace(default, **values)  # type: ignore[type-var]


def decode_value(key: str, value: Any, hint: Any, default: Any = None) -> Any:
    """Decode a value as the type `hint`.

    Args:
        key: dotted key of the value, for error messages.
        value: the decoded JSON or TOML value.
        hint: a type annotation.
        default: values of missing fields if the type is a dataclass.

    Raises:
        ConfigError: the value does not match the type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:  # null exists in JSON, but not in TOML
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        words = [kind for kind in kinds if typing.get_origin(kind) is Literal and value in typing.get_args(kind)]
        return decode_value(key, value, [*words, *kinds][0])
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        require(key, value, isinstance(value, dict), f"must be a table, as in [{key}]")
        return _decode_nested(key, hint, value, default if isinstance(default, hint) else None)
    if origin in (tuple, frozenset) or hasattr(hint, "_fields"):
        return _decode_sequence(key, value, hint)
    if isinstance(hint, type) and issubclass(hint, tuple):  # a NamedTuple, serialized as a list
        return hint(*_decode_sequence(key, value, tuple[tuple(_hints(hint).values())]))  # type: ignore[misc]
    if origin is Literal:
        require(key, value, value in arguments, f"must be one of {', '.join(map(str, arguments))}")
        return value
    if isinstance(origin, type) and issubclass(origin, Mapping):
        require(key, value, isinstance(value, dict), f"must be a table, as in [{key}]")
        return {name: decode_value(f"{key}.{name}", item, arguments[1]) for name, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        require(key, value, value in [member.value for member in hint], "must be a known value")
        return hint(value)
    if hint is Any:
        return value
    whole = type(value) is int
    right = abs(value) < _MAX_WHOLE if whole and hint in (int, float) else type(value) is hint
    require(key, value, right, f"must be {_PLAIN[hint]}")
    return float(value) if whole and hint is float else value


def list_items(value: Any) -> Iterable[Any]:
    """Return the values of a dict or the items of a list, and no items for any other value."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _decode_sequence(key: str, value: Any, hint: Any) -> Any:
    """Decode a list into a homogeneous tuple, a frozenset, or a tuple of fixed length."""
    require(key, value, isinstance(value, list | tuple), "must be a list")
    if hasattr(hint, "_fields"):  # a NamedTuple
        return hint(*_decode_sequence(key, value, types.GenericAlias(tuple, (*_hints(hint).values(),))))
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and arguments[-1] is not Ellipsis:
        require(key, value, len(value) == len(arguments), f"must be a list of {len(arguments)}")
        return tuple(decode_value(key, item, argument) for item, argument in zip(value, arguments, strict=True))
    if dataclasses.is_dataclass(arguments[0]):
        for item in value:
            require(key, item, isinstance(item, dict), f"must be tables, as in [[{key}]]")
        return tuple(_decode_nested(f"{key}[{number}]", arguments[0], item) for number, item in enumerate(value, 1))
    return typing.get_origin(hint)(decode_value(key, item, arguments[0]) for item in value)


def _decode_nested(key: str, cls: Any, table: Mapping[str, Any], default: Any = None) -> Any:
    try:
        if default is None and hasattr(cls, "from_json"):  # such classes have rules beyond types
            return cls.from_json(table)
        return decode(cls, table, default=default)
    except ConfigError as error:
        raise error.under(key) from None


def require(key: str, value: object, right: bool, bound: str) -> None:
    """Raise a ConfigError that lists the accepted values, unless `right` is true.

    Args:
        key: dotted key of the value.
        value: the value.
        right: whether the value is accepted.
        bound: the accepted values, as the end of a sentence.
    """
    if not right:
        raise ConfigError(key, value, bound)


def to_toml(table: Mapping[str, Any]) -> str:
    """Serialize a table as TOML, with plain values before nested tables and without None values."""
    return "\n".join(_iter_toml_lines(table)).lstrip("\n") + "\n"


def _iter_toml_lines(table: Mapping[str, Any], name: str = "") -> Iterator[str]:
    plain = {key: value for key, value in table.items() if value is not None and not _contains_tables(value)}
    for key, value in plain.items():
        yield f"{key if _BARE_KEY.fullmatch(key) else _format_toml_value(key)} = {_format_toml_value(value)}"
    for key, value in table.items():
        inner = f"{name}.{key}" if name else key
        if isinstance(value, Mapping):
            lines = list(_iter_toml_lines(value, inner))
            yield from ("", f"[{inner}]", *lines) if lines else ()
        elif _contains_tables(value):
            for item in value:
                yield from ("", f"[[{inner}]]", *_iter_toml_lines(item, inner))


def _contains_tables(value: object) -> bool:
    many = isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)
    return many or isinstance(value, Mapping)


def _format_toml_value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_format_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    # TOML strings equal JSON strings, except for surrogate pairs and DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
