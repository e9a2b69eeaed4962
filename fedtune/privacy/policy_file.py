"""`site.toml` to a `Policy` and back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtune.codec import BARE_KEY, decode
from fedtune.privacy.durable import write_durably
from fedtune.privacy.site_policy import Policy
from fedtune.spec import ConfigError, errors_in


def read_policy(path: Path) -> Policy:
    """The policy in the file `path`.

    Raises:
        ConfigError: names the file, the key, its value and what would be accepted.
    """
    table = read_toml(path, key="policy")
    with errors_in(path):
        return decode(Policy, table)


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
    return decode(Policy, table)


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
        yield f"{key if BARE_KEY.fullmatch(key) else _toml(key)} = {_toml(value)}"
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
