"""A column of a data file: what it is called, and what nearly all of its values say, by the reader of runs."""

from __future__ import annotations

import math
import re
import tomllib
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedtune.data import values as read
from fedtune.data.images import SUFFIXES
from fedtune.data.marked import entity_types, read_tag, spans_of, words_of
from fedtune.data.text_rows import json_type
from fedtune.spec import DataError, shown

NEARLY = 0.95  # of a column's values: what so many are, it is; the others are odd, and a run leaves their rows out
_MOST_VALUES = 300  # different values of a column that are counted; a column with more is no label
LONGEST_LABEL = 80
MOST_LABELS = 200
RECORDS_A_LABEL = 5  # a column is a label only if each value has this many records on average
LABEL_BOUND = (
    f"must have 2 to {MOST_LABELS} different texts or whole numbers of at most {LONGEST_LABEL} characters, on average "
    f"in {RECORDS_A_LABEL} rows or more"
)
_SEPARATORS = ";|,"  # separators in a text of several labels
_SCALES = ((0.0, 1.0), (0.0, 5.0), (1.0, 5.0), (-1.0, 1.0), (0.0, 10.0), (0.0, 100.0))
"""On which people score, the usual first."""
_MOST_NUMBERS = 1_000_000
_OUTSIDE = 0.005  # of the numbers at either end: so few do not decide a scale, which becomes public
_CODE = re.compile(r"[!-~]{5,}")
"""A text of one word of ASCII: a link, a path, a hash; no word of a language that has no spaces."""
_WORDS_OF_A_NAME = 4
_ODD_SHOWN = 3
WORDS = tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))
NAMES: Mapping[str, tuple[str, ...]] = {what: tuple(words.split()) for what, words in WORDS["names"].items()}
"""By what a column is: how it may be called."""
ALIKE = [one.split("/") for one in NAMES["alike"]]
_BEFORE = (
    "anon(?:ym(?:ous|i[sz]ed))?|pseudo(?:nym(?:ous|i[sz]ed))?|hash(?:ed)?|enc(?:rypted)?|masked|unique|study|id|fk"
)
_BEHIND = "id|ids|uuid|guid|key|no|nr|num|number|nummer|name|code|hash|handle|email|address|identifier|kennung"
_OF_PEOPLE = re.compile(rf"(?:{_BEFORE})*(?P<who>{'|'.join(NAMES['people'])})(?:s|r|n|en)?(?:{_BEHIND})*")
NEVER_READ: Mapping[str, str] = WORDS["never_read"]
_LONGEST_ID = 64


@dataclass(slots=True)
class Column:
    """The values of a file under one name."""

    name: str
    filled: int = 0  # rows with a value that is not blank
    types: Counter[str] = field(default_factory=Counter)  # how often each type of value came
    # how many values a run can read in a role (label, user, target), or are of a kind: a conversation
    # (messages), one that begins with what is answered (whole chat), a text without spaces (code), or of few
    # words, a number as people write it and runs do not (other number), a whole number (whole), a vector of 0
    # and 1 (vector)
    reads: Counter[str] = field(default_factory=Counter)
    # how often each label came, by the type of its values; empty where there are too many, or too long ones
    values: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    characters: int = 0  # of all its texts together
    # how often each label came where values are lists, by what separates them ("[": a list); empty where there
    # are too many
    parts: dict[str, Counter[str]] = field(default_factory=lambda: {mark: Counter() for mark in f"[{_SEPARATORS}"})
    several: Counter[str] = field(default_factory=Counter)  # by the same, how many values have more than one label
    numbers: array[float] = field(default_factory=lambda: array("d"))  # of them the first `_MOST_NUMBERS`
    # by type, the first values with the numbers of their rows
    odd: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    # how often each type of entities came, in spans or in tags of a scheme
    marked: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)  # the same where each tag is a type
    letters: set[str] = field(default_factory=set)  # of the schemes that tags may have
    # what turns have beside what a run reads of them, such as "name", and how often
    beside: Counter[str] = field(default_factory=Counter)
    # how many numbers lists hold that hold nothing else, and how often; a list may be JSON text
    sizes: Counter[int] = field(default_factory=Counter)
    _open: bool = True

    def note(self, value: object, row: int) -> None:
        """Take the value of one row into account, whose number counts from 1."""
        if read.is_missing(value):
            return
        if key_of(self.name) == "data" and isinstance(value, dict):
            value = value.get("text", value)  # Label Studio's, and as a run reads it
        self.filled += 1
        json_kind = json_type(value)
        kind = {"boolean": "true or false", "string": "text", "array": "list"}.get(json_kind, json_kind)
        with suppress(DataError):
            number = float(read.number_of(value, self.name))
            if len(self.numbers) < _MOST_NUMBERS:
                self.numbers.append(number)
            self.reads["target"] += 1
            self.reads["whole"] += number.is_integer()
            kind = "number as text" if kind == "text" else kind
        self.types[kind] += 1
        if len(self.odd[kind]) < _ODD_SHOWN:
            self.odd[kind].append((row, shown(value)))
        self._note_entities(value)
        self.reads["other number"] += read.is_number_in_another_form(value)
        turns = read.turns_like(value)
        self.reads["messages"] += bool(turns)
        first = turns[0].get("role") or turns[0].get("from") if turns else "assistant"
        self.reads["whole chat"] += read.speaker_of(first) != "assistant"
        self.beside.update(key for turn in turns for key in turn if key not in read.READ_OF_TURNS and turn[key])
        if isinstance(value, str):
            self.characters += len(value.strip())
            self.reads["code"] += _CODE.fullmatch(value.strip()) is not None
            self.reads["few words"] += len(value.split()) <= _WORDS_OF_A_NAME
        within = isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value)
        self.reads["image"] += within or (isinstance(value, str) and value.lower().endswith(SUFFIXES))
        self._note_parts(value)
        with suppress(DataError):
            self.sizes[len(read.numbers_of(read.feature_of(value, self.name), self.name))] += 1
        for role in ("user", "label"):
            name = ""
            with suppress(DataError):
                name = read.read_value(value, role, at="")
                self.reads[role] += 1
        if self._open and name:
            self.values[kind][name] += 1
            if len(self.values[kind]) > _MOST_VALUES or len(name) > LONGEST_LABEL:
                self.values.clear()
                self._open = False

    def _note_entities(self, value: object) -> None:
        """Of lists, and of lists as text, whether they are tokens, tags of a scheme, or spans of a text."""
        if not isinstance(value, list) and not (isinstance(value, str) and value.lstrip()[:1] == "["):
            return
        found, plain = Counter[str](), Counter[str]()
        with suppress(DataError):
            tags = words_of(value, self.name)
            self.reads["tokens"] += 1
            letters = {read_tag(one)[0] for one in tags.split("\n")}
            if "" not in letters:
                self.reads["tags"] += 1
                self.letters |= letters
                found.update(entity_types({"tags": tags}))
                plain.update(entity_types({"tags": tags}, tags.split("\n")))
        with suppress(DataError):
            found.update(entity_types({"spans": spans_of(value, self.name)}))
            self.reads["spans"] += 1
        if max(len(self.marked), len(self.plain)) <= MOST_LABELS:
            self.marked.update(found)
            self.plain.update(plain)

    @property
    def entities(self) -> Counter[str]:
        """How often each type of entities came.  Without B and I among its tags a column has no scheme (S-phase)."""
        return self.marked if not self.letters or self.letters & {"B", "I"} else self.plain

    def _note_parts(self, value: object) -> None:
        if isinstance(value, list):
            self.reads["vector"] += len(value) > 1 and all(one in (0, 1) for one in value)
        with suppress(DataError):  # else it is odd
            text = read.labels_of(value, self.name) if self.parts and isinstance(value, str | list) else ""
            for mark in [one for one in self.parts if (one == "[") == text.startswith("[")]:
                labels, counts = read.split_labels(text, separator=mark), self.parts[mark]
                counts.update(labels)
                self.reads[mark] += 1
                self.several[mark] += len(labels) > 1
                if len(counts) > MOST_LABELS or any(len(label) > LONGEST_LABEL for label in labels):
                    del self.parts[mark]

    def nearly(self, *kinds: str) -> bool:
        """Nearly all values are of one of these types, or can be read so."""
        count = sum(self.types[kind] or self.reads[kind] for kind in kinds)
        return self.filled > 0 and count >= NEARLY * self.filled

    @property
    def holds(self) -> str:
        """The type of nearly all values, in words; where none is, the types in the order of their numbers."""
        return ", ".join(kind for kind, count in self.types.most_common() if count >= (1 - NEARLY) * self.filled)

    @property
    def strange(self) -> list[tuple[str, int, list[tuple[int, str]]]]:
        """Values of types that are odd in this column: type, how many, the first with their rows."""
        most = (1 - NEARLY) * self.filled
        return [(kind, count, self.odd[kind]) for kind, count in self.types.items() if count < most]

    @property
    def size(self) -> int | None:
        """How many numbers nearly every value is a list of; None: it is no such column."""
        size, count = (self.sizes.most_common(1) or [(0, 0)])[0]
        return size if size > 1 and count >= NEARLY * self.filled else None

    @property
    def is_feature(self) -> bool:
        """Can be a value of a table's vector: numbers, lists of as many, or few names."""
        return self.filled > 0 and (self.size is not None or self.nearly("target") or self.is_label or self.is_flag)

    @property
    def separator(self) -> str | None:
        """The separator of a column of several labels; "[": they are lists; None: it is no such column."""
        if self.nearly("vector") or self.nearly("other number"):
            return None
        for mark, counts in self.parts.items():
            often = self.filled >= RECORDS_A_LABEL * len(counts) and len(counts) >= 2 and self.nearly(mark)
            # Names with a comma in each are no lists: labels that come in several combinations are.
            if often and (mark == "[" or (self.several[mark] and not (self._open and len(self.labels) < len(counts)))):
                return mark
        return None

    @property
    def labels(self) -> Counter[str]:
        """How often each label came in the values that the column nearly always has."""
        types = [kind for kind in self.values if self.types[kind] >= (1 - NEARLY) * self.filled]
        if "text" in types and "number as text" in self.values:  # a text is a text, also where it could be a number
            types = [*dict.fromkeys((*types, "number as text"))]
        return sum((self.values[kind] for kind in types), Counter())

    @property
    def is_number(self) -> bool:
        """Holds numbers, of more than one value."""
        return self.nearly("target") and min(self.numbers) < max(self.numbers)

    @property
    def is_text(self) -> bool:
        return self.nearly("text", "number as text")

    @property
    def is_code(self) -> bool:
        """Its texts are links, paths or other marks without a space."""
        return self.is_text and self.nearly("code") and not self.is_label

    @property
    def is_answer(self) -> bool:
        return self.separator is not None or self.is_label or self.is_number

    @property
    def is_completion(self) -> bool:
        """Holds texts written behind a prompt, and no label that is called so."""
        return self.is_text and not (self.is_label and key_of(self.name) in NAMES["often_labels"])

    @property
    def is_event(self) -> bool:
        """Says of each record that something came, or that it did not."""
        return {read.category_of(name) for name in self.labels} in ({"0", "1"}, {"false", "true"})

    @property
    def is_flag(self) -> bool:
        """Says yes or no, or good or bad."""
        said = {label.lower() for label in self.labels}
        return self.nearly("true or false") or (len(said) == 2 and said.issubset(NAMES["flags"]))

    @property
    def is_label(self) -> bool:
        """Has few values, each of which comes often."""
        labels = self.labels
        few = 2 <= len(labels) <= MOST_LABELS and self.filled >= RECORDS_A_LABEL * len(labels)
        return few and self.nearly("label") and not (self.is_number and self.reads["whole"] < NEARLY * self.filled)

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
        """May tell persons apart: rows without an id are no matter, nor how a run reads them."""
        return self.filled > 0 and not (self.nearly("list", "object") or self.is_flag)

    @property
    def says(self) -> bool:
        """Its values are answers: texts, or turns of a conversation."""
        return self.is_text or self.nearly("messages")

    @property
    def mean_characters(self) -> float:
        return self.characters / max(1, self.filled)


def key_of(name: str) -> str:
    """A column's name as names are compared: `Patient ID`, `patient_id` and `PatientID` are one."""
    return re.sub(r"[\W_]+", "", name).lower()


def _words_of(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def person_of(name: str) -> int | None:
    """Where in the order of people a column is that is called as people are (`tweet_author_id`); None: it is not."""
    words = _words_of(name)
    found = _OF_PEOPLE.fullmatch(key_of(name)) or (len(words) > 2 and _OF_PEOPLE.fullmatch("".join(words[-2:])))
    return NAMES["people"].index(found["who"]) if found else None


def is_person(one: Column) -> bool:
    """The column looks like it says whose a record is: its values are ids or names, not what somebody wrote."""
    is_name = not one.is_text or (one.mean_characters <= _LONGEST_ID and one.nearly("few words"))
    return person_of(one.name) is not None and one.is_id and is_name


def is_place(name: str) -> bool:
    """The column's name says that it names places, such as `hospital_id`."""
    return not set(_words_of(name)).isdisjoint(NAMES["places"])


def is_of_records(name: str) -> bool:
    """The column's name says that it numbers the records, such as `message_id`, or it has none."""
    last = _words_of(name)[-1:]
    return not name.strip() or key_of(name) in NAMES["ids"] or last in (["id"], ["uuid"], ["guid"], ["idx"])


OTHER_NUMBERS = "numbers in another form: write 3.5 and 1200, with a point before decimals and no other marks"


def no_answer(one: Column) -> str:
    """Why a column that was taken for an answer is none."""
    if one.nearly("vector"):
        return "must be lists of the labels' names: vectors of 0 and 1 name none"
    if one.nearly("messages"):
        return "must be a text: write all turns of a record as one list in a column messages"
    return f"must be a label or a number; it holds {OTHER_NUMBERS}" if one.nearly("other number") else LABEL_BOUND


def why_unread(one: Column, *, teaches: bool) -> str:
    """Why no run reads a column, and what chooses it; `teaches`: the file is one of prompts or conversations."""
    name, of_persons = key_of(one.name), person_of(one.name) is not None and one.nearly("list")
    more = f"--context {one.name}" if teaches else f"join the texts in one column, or --text {one.name}"
    reasons = (
        (not one.filled, "it is empty"),
        (name in NEVER_READ, NEVER_READ.get(name, "")),
        (is_person(one), f"it may say whose a record is: --user {one.name}"),
        (of_persons, "it may say whose a record is, and a record is of one person: write one id in each row"),
        (is_place(one.name), "it may say at which site a record is"),
        (one.nearly("vector"), "vectors of 0 and 1, which name no labels"),
        (one.nearly("other number"), OTHER_NUMBERS),
        (one.is_label or one.separator is not None, f"few values; to learn them: --label {one.name}"),
        (is_of_records(one.name), "numbers or ids of the records"),
        (len(one.labels) == 1, "its value is always the same"),
        (one.is_code, "links, or marks without a space"),
        (one.is_number, f"numbers; to learn them: --score {one.name}"),
        (one.is_text, f"a second text: {more}"),
        (True, f"no role reads it so ({one.holds})"),
    )
    return next(why for holds, why in reasons if holds)
