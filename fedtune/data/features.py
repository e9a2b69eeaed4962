"""Columns of numbers and categories as one vector for each record, scaled by what was declared and by nothing else.

A vector's norm is at most 1: each number lies in [-1, 1] by its declared range, each category is a 1 among zeros, and
all is divided by the root of how many numbers and categories there are.  No value of a record changes another's.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.data.records import Record
from fedtune.data.values import FEATURE, NO_NAME, category_of, number_of, numbers_of
from fedtune.spec import ConfigError, DataError, check_at_least, check_at_most, spec
from fedtune.words import counted

MOST_VALUES = 65_536  # of a vector: a record keeps four bytes for each, and a step as many for each trained on it
_MOST_NAMES = 10_000  # worked through for each record, or at each site, before it has answered
_LARGEST, _LEAST_WIDTH, _LEAST_SHARE = 1e12, 1e-6, 2.5e-4
"""Of a range; the width is also a share of its largest number, so that a number in float32, which has seven digits, and
as which an exported graph takes it, is scaled to within 0.001."""


@spec
class FeatureSpec:
    """Columns of the files that become values of a record's vector, all in one way.

    Ranges and categories are public.  They must come from knowledge of what is measured, never from the records.

    Attributes:
        columns: the names of the columns, in their order in the vector.  A file that calls one otherwise says so in
            `data.columns`, or a site in its `columns`, under the role "feature:NAME".
        range: the least and the largest number: a value beyond them counts as the nearer one; null: categories.
        categories: the declared values of a column of names; any other one counts as "other".
        size: how many numbers the list in each row holds, where the column is one of lists; null: one number.
        missing: what a row without a value does: "unusable" (the record cannot be used), or "indicator" (the middle of
            the range, or no category, and a 1 in a value that says so).
    """

    columns: tuple[str, ...]
    range: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()
    size: int | None = None
    missing: Literal["unusable", "indicator"] = "unusable"

    def __post_init__(self) -> None:
        check_names("columns", self.columns)
        check_names("categories", self.categories)
        for name in self.categories:
            if name != category_of(name):  # no value would be it
                raise ConfigError("categories", name, f"must be written as {category_of(name)}")
        if not self.columns:
            raise ConfigError("columns", self.columns, "must name at least one column")
        if (self.range is None) == (not self.categories):
            bound = "must be the least and the largest number, or null beside declared categories"
            raise ConfigError("range", self.range, bound)
        if self.range is not None:
            check_range("range", self.range)
        if self.size is not None:
            if self.categories:
                raise ConfigError("size", self.size, "must be null for a column of categories")
            check_at_least("size", self.size, 1)
            check_at_most("size", self.size, MOST_VALUES)

    @property
    def numbers(self) -> int:
        """How many numbers or categories a row has: what each column can add to the square of a vector's norm."""
        return len(self.columns) * (self.size or 1)

    @property
    def width(self) -> int:
        of_each = len(self.categories) + 1 if self.categories else self.size or 1
        return len(self.columns) * (of_each + (self.missing == "indicator"))

    def values(self) -> Iterator[str]:
        """A name for each value of the vector."""
        low, high = self.range or (0.0, 0.0)
        for column in self.columns:
            if self.categories:
                yield from (f"{column} = {name}" for name in self.categories)
                yield f"{column}: other"
            elif self.size is None:
                yield f"{column} in {low!r} to {high!r}"
            else:
                yield from (f"{column}[{place}] in {low!r} to {high!r}" for place in range(self.size))
            if self.missing == "indicator":
                yield f"{column}: missing"

    def raw(self, text: str, *, at: str) -> list[float]:
        """The values of one column, by its field in a record: a name by its place, NaN for nothing; or a DataError."""
        if not text or (text in NO_NAME and text not in self.categories):
            if self.missing == "unusable":
                raise DataError(at, "nothing", "must have a value, or missing = indicator in data.features")
            return [math.nan] * (self.size or 1)
        if self.categories:
            return [float(self.categories.index(text) if text in self.categories else len(self.categories))]
        numbers = [float(number_of(text, at, role="feature"))] if self.size is None else numbers_of(text, at)
        if len(numbers) != (self.size or 1):
            raise DataError(at, counted(len(numbers), "number"), f"must be {self.size or 1}, as data.features says")
        return numbers

    def read(self, text: str, *, at: str) -> NDArray[np.float64]:
        """The values of a vector for one column, from the same; DataError likewise."""
        found, raw = np.zeros(self.width // len(self.columns)), self.raw(text, at=at)
        if math.isnan(raw[0]):
            found[-1] = 1.0
        elif self.range is None:
            found[int(raw[0])] = 1.0
        else:
            low, high = self.range
            found[: len(raw)] = (np.clip(raw, low, high) - (low + high) / 2) / ((high - low) / 2)
        return found

    def odd(self, text: str) -> str | None:
        """The oddity of a field that can be used: "missing", "not declared", "beyond its range"; None: as usual."""
        raw = self.raw(text, at="")
        if math.isnan(raw[0]):
            return "missing"
        if self.range is None:
            return "not declared" if raw[0] == len(self.categories) else None
        return "beyond its range" if any(not self.range[0] <= one <= self.range[1] for one in raw) else None

    def made_up(self, draw: Callable[[int], int]) -> str:
        """An invented field; `draw(n)` takes one of n."""
        if self.categories:
            return self.categories[draw(len(self.categories))]
        assert self.range is not None, "as in the settings"
        low, high = self.range
        numbers = [low + (high - low) * int(draw(1001)) / 1000 for _ in range(self.size or 1)]
        return repr(numbers[0]) if self.size is None else json.dumps(numbers)


def vector_of(record: Record, features: Sequence[FeatureSpec]) -> NDArray[np.float32]:
    """Return a record's vector, of the features' widths together; raise DataError if a column is not as declared."""
    found = [
        one.read(record.fields[FEATURE + column], at=record.at(FEATURE + column))
        for one in features
        for column in one.columns
    ]
    return (np.concatenate(found) / math.sqrt(sum(one.numbers for one in features))).astype(np.float32)


def check_range(key: str, bounds: tuple[float, float]) -> None:
    """Require two numbers, the lower one first, with a width: to divide by one of 0 would fail for records in it."""
    low, high = bounds
    largest = max(abs(low), abs(high))
    if not (largest <= _LARGEST and high - low >= max(_LEAST_WIDTH, _LEAST_SHARE * largest)):
        bound = (
            f"must be two numbers of at most {_LARGEST:g}, the lower one first, apart by {_LEAST_WIDTH:g} and by a "
            f"{1 / _LEAST_SHARE:.0f}th of the larger one at least: give it from a nearer zero, as seconds since a day"
        )
        raise ConfigError(key, list(bounds), bound)


def check_names(key: str, names: Sequence[str]) -> None:
    """Require names of something, each once; none is fine."""
    if len(names) > _MOST_NAMES:
        raise ConfigError(key, f"{len(names)} {key}", f"must be at most {_MOST_NAMES}")
    for name, times in Counter(names).items():
        if not name or name != name.strip():
            raise ConfigError(key, name, "must not be blank, nor have spaces around it")
        if times > 1:
            raise ConfigError(key, name, "must be declared once")


def columns_of(features: Sequence[FeatureSpec], named: Mapping[str, str]) -> dict[str, str]:
    """Role to column of every feature; `named` are those that the files call otherwise."""
    roles = (FEATURE + column for one in features for column in one.columns)
    return {role: named.get(role, role.removeprefix(FEATURE)) for role in roles}
