"""A column of a data file: what its values are, as rows are read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from fedtune.data.values import labels_of, number_of, split_labels
from fedtune.spec import DataError

_MOST_VALUES = 300
"""Different values of a column that are counted; a column with more is no label."""
LONGEST_LABEL = 80
MOST_LABELS = 200
_RECORDS_A_LABEL = 5
"""A column is a label only if each value has this many records on average."""
_SEPARATORS = ";|,"
"""What a text of several labels has between them."""
_SCALES = ((0.0, 1.0), (0.0, 5.0), (1.0, 5.0), (-1.0, 1.0), (0.0, 10.0), (0.0, 100.0))
"""On which people score, the usual first."""


@dataclass(slots=True)
class Column:
    """What a file has under one name.

    Attributes:
        name: of the column.
        filled: rows with a value that is not blank.
        types: how often each type of value came.
        values: how often each value came; empty where there are too many, or they are too long for a label.
        characters: of all its texts together.
        parts: how often each label came where values are lists, by what separates them ("[": a JSON list); empty where
            there are too many.
        several: by the same, how many values have more than one label.
        numbers: values that are numbers, of which `decimals` are not whole, from `low` to `high`.
    """

    name: str
    filled: int = 0
    types: Counter[str] = field(default_factory=Counter)
    values: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    parts: dict[str, Counter[str]] = field(default_factory=lambda: {mark: Counter() for mark in f"[{_SEPARATORS}"})
    several: Counter[str] = field(default_factory=Counter)
    numbers: int = 0
    decimals: int = 0
    low: float = math.inf
    high: float = -math.inf
    _open: bool = True

    def note(self, value: object) -> None:
        """Take one row's value into account."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return
        self.filled += 1
        self.types[_type_of(value)] += 1
        self._note_number(value)
        self._note_parts(value)
        if not isinstance(value, str) and type(value) is not int:
            return
        text = str(value).strip()
        self.characters += len(text)
        if not self._open:
            return
        self.values[text] += 1
        if len(self.values) > _MOST_VALUES or len(text) > LONGEST_LABEL:
            self.values.clear()
            self._open = False

    def _note_number(self, value: object) -> None:
        try:
            number = float(number_of(value, self.name))
        except DataError:
            return
        self.numbers += 1
        self.decimals += not number.is_integer()
        self.low, self.high = min(self.low, number), max(self.high, number)

    def _note_parts(self, value: object) -> None:
        try:
            text = labels_of(value, self.name) if self.parts and isinstance(value, str | list) else ""
        except DataError:
            text = ""
        is_list = text.startswith("[")
        for mark, counts in list(self.parts.items()):
            labels = split_labels(text, separator=mark) if is_list == (mark == "[") else ()
            counts.update(labels)
            self.several[mark] += len(labels) > 1
            if len(counts) > MOST_LABELS or any(len(label) > LONGEST_LABEL for label in labels) or not text:
                del self.parts[mark]

    @property
    def separator(self) -> str | None:
        """What stands between the labels of a column of several; "[": they are lists; None: it is no such column."""
        for mark, counts in self.parts.items():
            often = self.filled >= _RECORDS_A_LABEL * len(counts) and len(counts) >= 2
            # Names with a comma in each are no lists: labels that come in several combinations are.
            if often and self.several[mark] and (mark == "[" or self._combines(counts)):
                return mark
        return None

    def _combines(self, counts: Counter[str]) -> bool:
        return (not self._open or len(self.values) >= len(counts)) and set(self.types) == {"text"}

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers alone, of more than one value."""
        return self.filled == self.numbers > 0 and self.low < self.high

    @property
    def is_text(self) -> bool:
        """Whether all its values are texts."""
        return self.filled > 0 and set(self.types) == {"text"}

    @property
    def is_label(self) -> bool:
        """Whether it has few values, each of which comes often."""
        few = 2 <= len(self.values) <= MOST_LABELS and self.filled >= _RECORDS_A_LABEL * len(self.values)
        return few and set(self.types) <= {"text", "whole number"} and not (self.is_number and self.decimals)

    @property
    def scale(self) -> tuple[float, float]:
        """The first usual scale that its numbers fit, else round numbers around them."""
        usual = (one for one in _SCALES if one[0] <= self.low and self.high <= one[1])
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        return next(usual, (math.floor(self.low / step) * step, math.ceil(self.high / step) * step))

    @property
    def is_id(self) -> bool:
        """Whether its values can tell persons apart."""
        return self.filled > 0 and set(self.types) <= {"text", "whole number"}

    @property
    def mean_characters(self) -> float:
        """Of a text."""
        return self.characters / max(1, self.filled)


def _type_of(value: object) -> str:
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", list: "list"}
    return names.get(type(value), "object")
