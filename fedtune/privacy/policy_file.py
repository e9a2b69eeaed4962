"""`site.toml` to a `Policy`, strictly: an unknown key, a missing one or a wrong type is an error, never ignored."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from fedtune.privacy.durable import write_durably
from fedtune.privacy.site_policy import Policy
from fedtune.spec import NOT_GIVEN, ConfigError

T = TypeVar("T")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_LONGEST_KEY = 60
_PLAIN = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def read_policy(path: Path) -> Policy:
    """The policy in the file `path`.

    Raises:
        ConfigError: names the file, the key, its value and what would be accepted.
    """
    table = read_toml(path, key="policy")
    try:
        return from_table(Policy, table)
    except ConfigError as error:
        raise error.in_file(path) from None


def read_toml(path: Path, *, key: str) -> dict[str, Any]:
    """The tables of the TOML file `path`, which a person calls `key`.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.  Nothing in it is quoted: a link may lead to another file.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(key, str(path), f"must be a readable file ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # ValueError: no TOML, no UTF-8, an integer of thousands of digits
        place = re.search(r" \((at [^()]*)\)$", str(error))
        raise ConfigError(key, str(path), f"must be TOML{f'; there is an error {place[1]}' if place else ''}") from None


def policy_of(fields: object) -> Policy:
    """The policy that `Policy.to_json` wrote.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError("policy", fields, "must be a table")
    table = _without_nulls(fields)
    budget = table.get("budget")
    if isinstance(budget, dict):
        budget.setdefault("max_epsilon", math.inf)  # JSON has no infinity
    return from_table(Policy, table)


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, Mapping) else value
        for key, value in fields.items()
        if value is not None
    }


def write_policy(policy: Policy, path: Path) -> None:
    """Write `policy` so that `read_policy` gives it back."""
    write_durably(path, "\n".join(_lines(dataclasses.asdict(policy))).lstrip("\n").encode() + b"\n")


def _lines(table: Mapping[str, Any], name: str = "") -> Iterator[str]:
    """A TOML table: plain values first, then the tables inside it; what is null is left out."""
    plain = {key: value for key, value in table.items() if value is not None and not _holds_tables(value)}
    for key, value in plain.items():
        yield f"{key if _BARE_KEY.fullmatch(key) else _toml(key)} = {_toml(value)}"
    for key, value in table.items():
        inner = f"{name}.{key}" if name else key
        if isinstance(value, Mapping):
            lines = list(_lines(value, inner))
            yield from ("", f"[{inner}]", *lines) if lines else ()
        elif _holds_tables(value):
            for item in value:
                yield from ("", f"[[{inner}]]", *_lines(item, inner))


def _holds_tables(value: object) -> bool:
    many = isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)
    return many or isinstance(value, Mapping)


def _toml(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    # TOML's strings are JSON's, but for pairs of surrogates and a bare DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def from_table(cls: type[T], table: Mapping[str, Any], *, default: T | None = None) -> T:
    """An instance of the spec `cls` from a TOML table, which may leave out what `default` has."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            # Neither a value nor what only a file of another kind has as a key is quoted.
            named = key if len(key) <= _LONGEST_KEY and _BARE_KEY.fullmatch(key) else "one of the keys"
            raise ConfigError(named, NOT_GIVEN, f"is not a key here; known are {', '.join(fields)}")
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and default is None and key not in table:
            raise ConfigError(key, NOT_GIVEN, "is required")
    values = {key: _value(key, value, hints[key], fields[key].default) for key, value in table.items()}
    return cls(**values) if default is None else dataclasses.replace(default, **values)  # type: ignore[type-var]


def _value(key: str, value: Any, hint: Any, default: Any = None) -> Any:
    """`value` as the type `hint`; nothing is converted but a whole number to a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:  # JSON has it, TOML has not
            return None
        return _value(key, value, next(argument for argument in arguments if argument is not type(None)))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        _require(key, value, isinstance(value, dict), f"must be a table, as in [{key}]")
        return _under(key, hint, value, default if isinstance(default, hint) else None)
    if origin is tuple:
        _require(key, value, isinstance(value, list), "must be a list")
        if dataclasses.is_dataclass(arguments[0]):
            return tuple(_under(f"{key}[{n}]", arguments[0], _table(key, item)) for n, item in enumerate(value, 1))
        return tuple(_value(key, item, arguments[0]) for item in value)
    if origin is Literal:
        _require(key, value, value in arguments, f"must be one of {', '.join(map(str, arguments))}")
        return value
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _require(key, value, isinstance(value, dict), f"must be a table, as in [{key}]")
        return {name: _value(f"{key}.{name}", item, arguments[1]) for name, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    _require(key, value, type(value) is hint, f"must be {_PLAIN[hint]}")
    return value


def _under(key: str, cls: Any, table: Mapping[str, Any], default: Any = None) -> Any:
    try:
        return from_table(cls, table, default=default)
    except ConfigError as error:
        raise error.under(key) from None


def _table(key: str, item: Any) -> dict[str, Any]:
    _require(key, item, isinstance(item, dict), f"must be tables, as in [[{key}]]")
    return dict(item)


def _require(key: str, value: object, right: bool, bound: str) -> None:
    if not right:
        raise ConfigError(key, value, bound)
