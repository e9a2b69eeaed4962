"""Encoding of number and category columns as feature vectors, scaled only by declared ranges.

A vector's norm is at most 1: each number is scaled to [-1, 1] by its declared range, each category is one-hot, and the
vector is divided by the square root of the number of numbers and categories.  No value of a record changes the vector
of another record.
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
from fedtune.data.values import FEATURE, NO_NAME, normalize_category, parse_numbers, read_number
from fedtune.formatting import pluralize
from fedtune.spec import ConfigError, DataError, check_at_least, check_at_most, spec

MAX_VALUES = 65_536  # maximum vector length; each value takes four bytes per record, and again in a step
_MAX_NAMES = 10_000  # limit on names, which are processed for each record or at each site before its reply
_LARGEST, _MIN_WIDTH, _MIN_SHARE = 1e12, 1e-6, 2.5e-4
"""Limits on a range: the largest number, the minimum width, and the minimum width as a share of the largest number.
With them a number in float32, the format of an exported graph with seven digits, is scaled to within 0.001.
"""


@spec
class FeatureSpec:
    """Encoding of one or more data columns as values of the feature vector.

    Ranges and categories are public.  They must come from domain knowledge, never from the records.

    Attributes:
        columns: the names of the columns, in their order in the vector.  If a file uses another name, `data.columns`,
            or a site's `columns`, maps the role "feature:NAME" to it.
        range: the smallest and the largest number; values outside are clipped; null: categories.
        categories: the declared values of a categorical column; every other value is encoded as "other".
        size: the length of the list in each row, for a column of lists; null: a single number.
        missing: the treatment of a row without a value: "unusable" (the record cannot be used), or "indicator" (the
            middle of the range, or no category, and a 1 in an additional indicator value).
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
            if name != normalize_category(name):  # no value would match it
                raise ConfigError("categories", name, f"must be written as {normalize_category(name)}")
        if not self.columns:
            raise ConfigError("columns", self.columns, "must name at least one column")
        if (self.range is None) == (not self.categories):
            bound = "must be the smallest and the largest number, or null with declared categories"
            raise ConfigError("range", self.range, bound)
        if self.range is not None:
            check_range("range", self.range)
        if self.size is not None:
            if self.categories:
                raise ConfigError("size", self.size, "must be null for a column of categories")
            check_at_least("size", self.size, 1)
            check_at_most("size", self.size, MAX_VALUES)

    @property
    def num_numbers(self) -> int:
        """Count of numbers or categories per row, an upper bound on the vector's squared norm before scaling."""
        return len(self.columns) * (self.size or 1)

    @property
    def width(self) -> int:
        of_each = len(self.categories) + 1 if self.categories else self.size or 1
        return len(self.columns) * (of_each + (self.missing == "indicator"))

    def iter_value_names(self) -> Iterator[str]:
        """Yield a name for each value of the feature vector."""
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

    def parse_field(self, text: str, *, at: str) -> list[float]:
        """Parse the field of one column to numbers, or to the index of a category; NaN if the value is missing.

        Raises:
            DataError: the field does not match its declaration, or is missing although `missing` is "unusable".
        """
        if not text or (text in NO_NAME and text not in self.categories):
            if self.missing == "unusable":
                raise DataError(at, "nothing", "must have a value (or set missing = indicator in data.features)")
            return [math.nan] * (self.size or 1)
        if self.categories:
            return [float(self.categories.index(text) if text in self.categories else len(self.categories))]
        numbers = [float(read_number(text, at, role="feature"))] if self.size is None else parse_numbers(text, at)
        if len(numbers) != (self.size or 1):
            bound = f"must be {self.size or 1}, the size in data.features"
            raise DataError(at, pluralize(len(numbers), "number"), bound)
        return numbers

    def encode_field(self, text: str, *, at: str) -> NDArray[np.float64]:
        """Encode the field of one column as values of the feature vector.

        Raises:
            DataError: as in `parse_field`.
        """
        values, raw = np.zeros(self.width // len(self.columns)), self.parse_field(text, at=at)
        if math.isnan(raw[0]):
            values[-1] = 1.0
        elif self.range is None:
            values[int(raw[0])] = 1.0
        else:
            low, high = self.range
            values[: len(raw)] = (np.clip(raw, low, high) - (low + high) / 2) / ((high - low) / 2)
        return values

    def describe_unusual_value(self, text: str) -> str | None:
        """Describe a usable field that is "missing", "not declared" or "beyond its range"; None for a regular field."""
        raw = self.parse_field(text, at="")
        if math.isnan(raw[0]):
            return "missing"
        if self.range is None:
            return "not declared" if raw[0] == len(self.categories) else None
        return "beyond its range" if any(not self.range[0] <= number <= self.range[1] for number in raw) else None

    def generate_dummies(self, draw: Callable[[int], int]) -> str:
        """Generate a random field; `draw(n)` returns a random integer below n."""
        if self.categories:
            return self.categories[draw(len(self.categories))]
        assert self.range is not None, "checked in the settings"
        low, high = self.range
        numbers = [low + (high - low) * int(draw(1001)) / 1000 for _ in range(self.size or 1)]
        return repr(numbers[0]) if self.size is None else json.dumps(numbers)


def encode_features(record: Record, features: Sequence[FeatureSpec]) -> NDArray[np.float32]:
    """Encode a record's features as one float32 vector.

    Raises:
        DataError: a column does not match its declaration.
    """
    values = [
        feature.encode_field(record.fields[FEATURE + column], at=record.at(FEATURE + column))
        for feature in features
        for column in feature.columns
    ]
    return (np.concatenate(values) / math.sqrt(sum(feature.num_numbers for feature in features))).astype(np.float32)


def check_range(key: str, bounds: tuple[float, float]) -> None:
    """Require a range of two ascending numbers that are not too close, because features are divided by the range's
    width.

    Raises:
        ConfigError: for `key`.
    """
    low, high = bounds
    largest = max(abs(low), abs(high))
    if not (largest <= _LARGEST and high - low >= max(_MIN_WIDTH, _MIN_SHARE * largest)):
        bound = (
            f"must be two ascending numbers of at most {_LARGEST:g} that differ by at least {_MIN_WIDTH:g} and by a "
            f"{1 / _MIN_SHARE:.0f}th of the larger one; use a closer origin, such as seconds since the start of a day"
        )
        raise ConfigError(key, list(bounds), bound)


def check_names(key: str, names: Sequence[str]) -> None:
    """Require distinct names without surrounding spaces; an empty list is allowed.

    Raises:
        ConfigError: for `key`.
    """
    if len(names) > _MAX_NAMES:
        raise ConfigError(key, f"{len(names)} {key}", f"must be at most {_MAX_NAMES}")
    for name, times in Counter(names).items():
        if not name or name != name.strip():
            raise ConfigError(key, name, "must not be blank or have surrounding spaces")
        if times > 1:
            raise ConfigError(key, name, "is declared twice")


def map_feature_columns(features: Sequence[FeatureSpec], named: Mapping[str, str]) -> dict[str, str]:
    """Map each feature's role to its column; `named` overrides column names."""
    roles = (FEATURE + column for feature in features for column in feature.columns)
    return {role: named.get(role, role.removeprefix(FEATURE)) for role in roles}
