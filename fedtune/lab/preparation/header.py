"""Refusals of tables without a usable header or with incomplete image names, for the file's owner."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os.path import isfile
from pathlib import Path

from fedtune.data.images import SUFFIXES
from fedtune.data.text_rows import Row
from fedtune.lab.preparation.columns import NAMES, DataColumn, build_column_error

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def require_header(columns: Mapping[str, DataColumn], path: Path) -> None:
    """Raise a DataError for a table without a header, whose first record would become the column names."""
    filled = [one for one in columns.values() if one.filled]
    unnamed = [one for one in filled if one.name.startswith("(column ")]
    odd = [one for one in filled if one.name.startswith("# ") or re.search(r" \(column \d+\)$", one.name)]
    if odd or len(unnamed) > 1:
        raise build_column_error(path, "header", odd or unnamed)
    # Without a header most names are values: one of the column's own, a number, or as long a text as the others; half
    # of them suffice where the longest texts are no longer than their name.  A flag alone may be called as one of its
    # values is, and pixels are counted.
    numbers = {one.name: float(one.name) for one in filled if one.is_number and _NUMBER.fullmatch(one.name)}
    steps = {round(after - before, 6) for before, after in pairwise(numbers.values())}
    own = [one for one in filled if any(some[one.name.strip()] for some in one.values.values())]
    values = {one.name for one in filled if one in own or one.could_name_text}
    is_counted = len(numbers) > 2 and len(steps) == 1
    values = values - {*numbers} if is_counted else values | {*numbers}
    longest = max(filled, key=lambda one: one.mean_characters, default=None)
    is_long = longest and longest.key not in NAMES["texts"] and 1.5 * len(longest.name) >= longest.mean_characters
    if own and 2 * len(values) >= len(filled) + (not is_long):
        raise build_column_error(path, "no_header", own[:1])


def require_endings(columns: Mapping[str, DataColumn], first: Sequence[Row], path: Path) -> None:
    """Raise a DataError for image names without an extension, which would be mistaken for codes."""
    for one in (one for one in columns.values() if one.is_text and not one.is_prose):
        names = [str(row[one.name]) for row in first if row.get(one.name)]
        for end in (*SUFFIXES, *NAMES["endings"]) if names else ():
            if all(isfile(path.parent / f"{name}{end}") for name in names):
                raise build_column_error(path, "stems", [one], end)
