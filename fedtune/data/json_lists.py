"""Parsing of lists in cells of data files: JSON, printed Python lists, and objects of lists."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_PRINTED = re.compile(
    r"""'((?:[^'\\]|\\['"\\])*+)'|"((?:[^"\\]|\\['"\\])*+)"|([+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?)""",
    re.ASCII,
)
_ITEMS = rf"\s*+(?:(?:{_PRINTED.pattern})(?:[\s,]++|(?=[\])}}])))*+"
_PRINTED_LIST = re.compile(
    rf"(?:array\()?\[(?:{_ITEMS})\](?:(?:, dtype=\w+)?\))?|\((?:{_ITEMS})\)|\{{(?:{_ITEMS})\}}|set\(\)", re.ASCII
)
"""Pattern of a list, tuple, set or array as Python, numpy and pandas print it, with or without commas."""


def parse_list(value: object) -> list[Any] | None:
    """Parse a cell as a list; blank text becomes an empty list, and text that is not a list returns None.

    Any other value that is not a list is wrapped in a list of one item.
    """
    try:
        listed = parse_json_list(value.strip() or "[]") if isinstance(value, str) else value
    except RecursionError:
        listed = [None]
    if isinstance(value, str) and listed is None:
        text = value.strip()
        if not _PRINTED_LIST.fullmatch(text):
            return None
        inner = text.removeprefix("array(").rpartition(", dtype=")[0] or text
        quoted = ((re.sub(r"\\(.)", r"\1", one or other), number) for one, other, number in _PRINTED.findall(inner))
        listed = [float(number) if set(number) & set(".eE") else number or text for text, number in quoted]
    return listed if isinstance(listed, list) else [listed]


def parse_json_list(text: str) -> list[Any] | None:
    """Parse text as a JSON list; return None for any other text."""
    if not text.startswith("["):
        return None
    try:
        parsed: list[Any] = json.loads(text)
    except ValueError:
        return None
    return parsed


def convert_columns_to_rows(value: object) -> object:
    """Convert an object of equally long lists, the columnar form of Hugging Face, to a list of objects.

    An object with `messages`, as in OpenAI's format, is converted to its messages, unless it also has tools.  Other
    values are returned unchanged.
    """
    if isinstance(value, dict) and "messages" in value and not value.get("tools"):
        return value["messages"]
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    if len(set(map(len, value.values()))) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def to_compact_json(values: Sequence[object]) -> str:
    """Format a list as compact JSON, the form of a record's field."""
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False)
