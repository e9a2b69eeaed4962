"""A table as `fedtune data init` shows it: what its columns seem to be, and what only its owner can say of them.

A range or a list of categories that was taken from the records would publish something of them: the largest value is
somebody's.  So the experiment has places for both, to be filled in from what is known of each quantity, and what the
file itself holds is shown on the terminal alone.  Every column may lack values, whether one of the file does or not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fedtune.data.features import FeatureSpec
from fedtune.preparation.columns import Column
from fedtune.preparation.detect import Found

_MOST_NAMES = 12


def filled(found: Found) -> tuple[str, ...]:
    """Overrides in place of what a person has yet to fill in."""
    features = ("data.features=[{columns: [x], range: [0, 1]}]",) if found.features else ()
    return (*features, "data.intervals=[1]") if "time" in found.roles else features


def is_name(column: Column) -> bool:
    """A table's column holds names of categories rather than numbers."""
    return column.size is None and not (column.is_number or column.nearly("target"))


def own_features(found: Found) -> tuple[FeatureSpec, ...]:
    """Columns by the file's own values: to look at its rows with, and for nothing that is written."""

    def spec(column: Column) -> FeatureSpec:
        own: dict[str, Any] = {"range": (-1.0, 1.0)}
        if is_name(column):
            own = {"categories": tuple(column.labels)[:1] or ("x",)}
        return FeatureSpec(columns=(column.name,), size=column.size, missing="indicator", **own)

    return tuple(spec(found.columns[name]) for name in found.features)


def lines(found: Found) -> Iterator[str]:
    """`data.features` as YAML, with ??? where only a person knows."""
    yield "# ??? is yours to say, from what you know and not from the file: it becomes PUBLIC.  docs/features.md"
    yield "features:"
    for name in found.features:
        column = found.columns[name]
        what = ['categories: "???"' if is_name(column) else 'range: "???"']
        what += [f"size: {column.size}"] if column.size else []
        what.append("missing: indicator")  # for all: whether a row lacks a value would be told by the model's shape
        yield f"  - {{columns: [{json.dumps(name, ensure_ascii=False)}], {', '.join(what)}}}"


def rows(found: Found) -> Iterator[tuple[str, str, str, str]]:
    """(column, what it is, what the file holds, rows without a value) of each feature; for the terminal."""
    for name in found.features:
        column = found.columns[name]
        lacking = f"{found.rows - column.filled:,}" if column.filled < found.rows else ""
        if is_name(column):
            names = [label for label, _ in column.labels.most_common()]
            more = f", and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
            yield name, "categories", f"{', '.join(names[:_MOST_NAMES])}{more}", lacking
        elif column.size is not None:
            yield name, f"a list of {column.size} numbers", "", lacking
        else:
            yield name, "a number", f"{min(column.numbers):g} to {max(column.numbers):g}", lacking
