"""A column of a data file: what nearly all of its values say, by the reader that runs have."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from fedtune.data.text_rows import json_type
from fedtune.data.values import (
    is_missing,
    is_number_in_another_form,
    labels_of,
    number_of,
    read_value,
    speakers_of,
    split_labels,
)
from fedtune.spec import DataError, shown

NEARLY = 0.95
"""Of a column's values: what so many are, it is; the others are odd, and a run leaves their rows out."""
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
_MOST_NUMBERS = 1_000_000
_OUTSIDE = 0.005
"""Of the numbers at either end: so few do not decide a scale, which becomes public."""
_CODE = re.compile(r"[!-~]{5,}")
"""A text of one word of ASCII: a link, a path, a hash; no word of a language that has no spaces."""
_ODD_SHOWN = 3


@dataclass(slots=True)
class Column:
    """What a file has under one name.

    Attributes:
        name: of the column.
        filled: rows with a value that is not blank.
        types: how often each type of value came.
        reads: how many values a run can read in a role (label, user, target), or are of a kind: a conversation
            (messages), one that begins with what is answered (whole chat), a text without spaces (code), a number as
            people write it and runs do not (other number), a whole number (whole), a vector of 0 and 1 (vector).
        values: how often each label came, by the type of its values; empty where there are too many, or too long ones.
        characters: of all its texts together.
        parts: how often each label came where values are lists, by what separates them ("[": a list); empty where there
            are too many.
        several: by the same, how many values have more than one label.
        numbers: of them the first `_MOST_NUMBERS`.
        odd: by type, the first values with the numbers of their rows.
    """

    name: str
    filled: int = 0
    types: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    values: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    characters: int = 0
    parts: dict[str, Counter[str]] = field(default_factory=lambda: {mark: Counter() for mark in f"[{_SEPARATORS}"})
    several: Counter[str] = field(default_factory=Counter)
    numbers: array[float] = field(default_factory=lambda: array("d"))
    odd: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    _open: bool = True

    def note(self, value: object, row: int) -> None:
        """Take the value of one row into account, whose number counts from 1."""
        if is_missing(value):
            return
        self.filled += 1
        kind = self._note_number(value)
        self.types[kind] += 1
        if len(self.odd[kind]) < _ODD_SHOWN:
            self.odd[kind].append((row, shown(value)))
        self.reads["other number"] += is_number_in_another_form(value)
        speakers = speakers_of(value)
        self.reads["messages"] += bool(speakers)
        self.reads["whole chat"] += speakers[:1] not in ([], ["assistant"])
        if isinstance(value, str):
            self.characters += len(value.strip())
            self.reads["code"] += _CODE.fullmatch(value.strip()) is not None
        self._note_parts(value)
        for role in ("user", "label"):
            try:
                name = read_value(value, role, at="")
                self.reads[role] += 1
            except DataError:
                name = ""
        if self._open and name:
            self.values[kind][name] += 1
            if len(self.values[kind]) > _MOST_VALUES or len(name) > LONGEST_LABEL:
                self.values.clear()
                self._open = False

    def _note_number(self, value: object) -> str:
        """The type of a value, as people call it."""
        kind = {"boolean": "true or false", "string": "text", "array": "list"}.get(json_type(value), json_type(value))
        try:
            number = float(number_of(value, self.name))
        except DataError:
            return kind
        if len(self.numbers) < _MOST_NUMBERS:
            self.numbers.append(number)
        self.reads["target"] += 1
        self.reads["whole"] += number.is_integer()
        return "number as text" if kind == "text" else kind

    def _note_parts(self, value: object) -> None:
        if isinstance(value, list):
            self.reads["vector"] += len(value) > 1 and all(one in (0, 1) for one in value)
        try:
            text = labels_of(value, self.name) if self.parts and isinstance(value, str | list) else ""
        except DataError:
            return  # odd
        is_list = text.startswith("[")
        for mark, counts in list(self.parts.items()):
            if is_list != (mark == "["):
                continue
            labels = split_labels(text, separator=mark)
            counts.update(labels)
            self.reads[mark] += 1
            self.several[mark] += len(labels) > 1
            if len(counts) > MOST_LABELS or any(len(label) > LONGEST_LABEL for label in labels):
                del self.parts[mark]

    def nearly(self, *kinds: str) -> bool:
        """Whether nearly all values are of one of these types, or can be read so."""
        count = sum(self.types[kind] or self.reads[kind] for kind in kinds)
        return self.filled > 0 and count >= NEARLY * self.filled

    @property
    def holds(self) -> str:
        """What nearly all values are, in words; the types in the order of their numbers where none is."""
        return ", ".join(kind for kind, count in self.types.most_common() if count >= (1 - NEARLY) * self.filled)

    @property
    def strange(self) -> list[tuple[str, int, list[tuple[int, str]]]]:
        """Values of types that are odd in this column: type, how many, the first with their rows."""
        odd = [kind for kind, count in self.types.items() if count < (1 - NEARLY) * self.filled]
        return [(kind, self.types[kind], self.odd[kind]) for kind in odd]

    @property
    def separator(self) -> str | None:
        """What stands between the labels of a column of several; "[": they are lists; None: it is no such column."""
        if self.is_vector:
            return None
        for mark, counts in self.parts.items():
            often = self.filled >= _RECORDS_A_LABEL * len(counts) and len(counts) >= 2 and self.nearly(mark)
            # Names with a comma in each are no lists: labels that come in several combinations are.
            if often and self.several[mark] and (mark == "[" or self._combines(counts)):
                return mark
        return None

    def _combines(self, counts: Counter[str]) -> bool:
        return not self._open or len(self.labels) >= len(counts)

    @property
    def labels(self) -> Counter[str]:
        """How often each label came in the values that the column nearly always has."""
        types = [kind for kind in self.values if self.types[kind] >= (1 - NEARLY) * self.filled]
        if "text" in types and "number as text" in self.values:  # a text is a text, also where it could be a number
            types = [*dict.fromkeys((*types, "number as text"))]
        return sum((self.values[kind] for kind in types), Counter())

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers, of more than one value."""
        return self.nearly("target") and min(self.numbers) < max(self.numbers)

    @property
    def is_text(self) -> bool:
        """Whether its values are texts."""
        return self.nearly("text", "number as text")

    @property
    def is_code(self) -> bool:
        """Whether its texts are links, paths or other marks without a space."""
        return self.is_text and self.nearly("code") and not self.is_label

    @property
    def is_flag(self) -> bool:
        """Whether it says yes or no."""
        return self.nearly("true or false") or {label.lower() for label in self.labels} == {"true", "false"}

    @property
    def is_label(self) -> bool:
        """Whether it has few values, each of which comes often."""
        labels = self.labels
        few = 2 <= len(labels) <= MOST_LABELS and self.filled >= _RECORDS_A_LABEL * len(labels)
        return few and self.nearly("label") and not (self.is_number and self.reads["whole"] < NEARLY * self.filled)

    @property
    def is_vector(self) -> bool:
        """Whether it holds vectors of 0 and 1, which name no labels."""
        return self.nearly("vector")

    @property
    def scale(self) -> tuple[float, float]:
        """The first usual scale that nearly all numbers fit, else round numbers around them."""
        numbers = np.sort(np.array(self.numbers))
        few = math.ceil(_OUTSIDE * len(numbers)) if len(numbers) > 1 / NEARLY * 10 else 0
        low, high = float(numbers[few]), float(numbers[-1 - few])
        if low == high:
            low, high = float(numbers[0]), float(numbers[-1])
        usual = (one for one in _SCALES if one[0] <= low and high <= one[1])
        step = 10.0 ** math.floor(math.log10(high - low))
        return next(usual, (math.floor(low / step) * step, math.ceil(high / step) * step))

    @property
    def is_id(self) -> bool:
        """Whether it tells several persons apart: rows without an id are no matter."""
        return self.reads["user"] > 0 and not self.nearly("list", "object")

    @property
    def says(self) -> bool:
        """Whether its values are answers: texts, or turns of a conversation."""
        return self.is_text or self.nearly("messages")

    @property
    def mean_characters(self) -> float:
        """Of a text."""
        return self.characters / max(1, self.filled)
