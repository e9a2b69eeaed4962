"""Formatting of numbers, counts, keys and names, shared by all layers."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from enum import Enum
from typing import Any

_ABBREVIATED = frozenset({"f1", "auroc", "ece", "mae", "rmse"})


def convert_infinite_to_none(value: float | None) -> float | None:
    """Convert an infinite or undefined number to None for JSON."""
    return None if value is None or not math.isfinite(value) else float(value)


def convert_none_to_infinite(value: float | None) -> float:
    """Convert None to infinity, the inverse of `convert_infinite_to_none`."""
    return math.inf if value is None else value


def total(figures: Iterable[float]) -> float:
    """Add floats as decimal numbers, without binary rounding: deltas of 1e-5 and 2e-5 add up to exactly 3e-5."""
    return float(sum(Decimal(repr(float(figure))) for figure in figures))


def group_hex(digits: str) -> str:
    """Format a hex key or fingerprint in groups of four digits, for comparison by people.

    An Ed25519 public key (of a lead or a site) is its own fingerprint, in policies, ledgers and reports.

    >>> group_hex("691bee4ac4c3f951")
    '691b ee4a c4c3 f951'
    """
    return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def format_key_start(digits: str) -> str:
    """Format the first four groups of a hex key, for lines too short for the whole key."""
    return f"{group_hex(digits[:16])} ..."


def convert_to_jsonable(value: Any) -> Any:
    """Convert nested data and dataclasses to JSON values, with None for non-finite numbers."""
    match value:
        case Enum():
            return value.value
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {key: convert_to_jsonable(inner) for key, inner in value.items()}
        case list() | tuple():
            return [convert_to_jsonable(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return convert_to_jsonable(dataclasses.asdict(value))
    return value


def flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings to (dotted key, value) pairs."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def format_score_name(name: str) -> str:
    """Format the name of a score for display, such as macro F1 or AUROC."""
    return " ".join(word.upper() if word in _ABBREVIATED else word for word in name.split("_"))


def pluralize(count: int, noun: str) -> str:
    """Format a count with its noun: `1 round`, `2 rounds`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_size(num_bytes: float) -> str:
    """Format a number of bytes: `312 bytes`, `1.5 MiB`."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} bytes"
    for unit in ("KiB", "MiB"):
        num_bytes /= 1024
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} GiB"


def format_html_table(title: str, rows: Iterable[Sequence[object]]) -> str:
    """Format rows as an HTML table for a notebook, with all texts escaped.

    >>> format_html_table("a <b>", [("epsilon", 3)])
    '<table><caption>a &lt;b&gt;</caption><tr><td>epsilon</td><td>3</td></tr></table>'
    """
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table><caption>{html.escape(title)}</caption>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
