"""A column of a data file: what it is called, and what nearly all of its values say, by the reader of runs."""

from __future__ import annotations

import math
import re
import tomllib
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
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
_MOST_LABELS = 200
_RECORDS_A_LABEL = 5  # a column is a label only if each value has this many records on average
_SEPARATORS = ";|,"  # separators in a text of several labels
_SCALES = ((0.0, 1.0), (0.0, 5.0), (1.0, 5.0), (-1.0, 1.0), (0.0, 10.0), (0.0, 100.0))
"""On which people score, the usual first."""
_MOST_NUMBERS = 1_000_000
_OUTSIDE = 0.005  # of the numbers at either end: so few do not decide a scale, which becomes public
_CODE = re.compile(r"[!-~]{5,}")
"""A text of one word of ASCII: a link, a path, a hash; no word of a language that has no spaces."""
_WORDS_OF_A_NAME, _LONGEST_ID = 4, 64
_ODD_SHOWN = 3
WORDS = tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))
NAMES: Mapping[str, tuple[str, ...]] = {what: tuple(words.split()) for what, words in WORDS["names"].items()}
"""By what a column is: how it may be called."""
_BEFORE = (
    "anon(?:ym(?:ous|i[sz]ed))?|pseudo(?:nym(?:ous|i[sz]ed))?|hash(?:ed)?|enc(?:rypted)?|masked|unique|study|id|fk"
)
_BEHIND = "id|ids|uuid|guid|key|no|nr|num|number|nummer|name|code|hash|handle|email|address|identifier|kennung"
_OF_PEOPLE = re.compile(rf"(?:{_BEFORE})*(?P<who>{'|'.join(NAMES['people'])})(?:s|r|n|en)?(?:{_BEHIND})*")
_OTHER_NUMBERS = "numbers in another form: write 3.5 and 1200, with a point before decimals and no other marks"


class Column:
    """The values of a file under one name: each is noted, and then it is judged what the column is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key = re.sub(r"[\W_]+", "", name).lower()  # `Patient ID`, `patient_id` and `PatientID` are one
        self.filled = self.characters = 0  # rows with a value that is not blank; of all its texts together
        self.types = Counter[str]()  # how often each type of value came
        self.reads = Counter[str]()  # how many values a run can read in a role, or are of a kind that `note` names
        # How often each label came, by the type of its values; empty where there are too many, or too long ones.
        self.values = defaultdict[str, Counter[str]](Counter)
        # The same where values are lists, by what separates them ("[": a list); not where there are too many.
        self.parts = {mark: Counter[str]() for mark in f"[{_SEPARATORS}"}
        self.several = Counter[str]()  # by the same, how many values have more than one label
        self.numbers = array("d")  # of them the first `_MOST_NUMBERS`
        self.sizes = Counter[int]()  # how many numbers lists hold that hold nothing else, also as JSON text
        # Entities of each type in spans or tags of a scheme, the same where each tag is a type, and schemes' letters.
        self.marked, self.plain, self.letters = Counter[str](), Counter[str](), set[str]()
        self.beside = Counter[str]()  # what turns have beside what a run reads of them, such as "name"
        self._first = defaultdict[str, list[tuple[int, str]]](list)  # values of each type, with their rows
        self._open = True

    def note(self, value: object, row: int) -> None:
        """Take the value of one row into account, whose number counts from 1."""
        if read.is_missing(value):
            return
        if self.key == "data" and isinstance(value, dict):
            value = value.get("text", value)  # Label Studio's, and as a run reads it
        text = value.strip() if isinstance(value, str) else ""
        self.filled += 1
        self.characters += len(text)
        kind = json_type(value)
        kind = {"boolean": "true or false", "string": "text", "array": "list"}.get(kind, kind)
        with suppress(DataError):
            number = float(read.number_of(value, self.name))
            if len(self.numbers) < _MOST_NUMBERS:
                self.numbers.append(number)
            self.reads["target"] += 1
            self.reads["whole"] += number.is_integer()
            kind = "number as text" if text else kind
        self.types[kind] += 1
        if len(self._first[kind]) < _ODD_SHOWN:
            self._first[kind].append((row, shown(value)))
        turns = read.turns_like(value)
        self.beside.update(key for turn in turns for key in turn if key not in read.READ_OF_TURNS and turn[key])
        first = turns[0].get("role") or turns[0].get("from") if turns else "assistant"
        kinds = {
            "messages": bool(turns),
            "whole chat": read.speaker_of(first) != "assistant",  # it begins with what is answered
            "code": _CODE.fullmatch(text) is not None,
            "few words": isinstance(value, str) and len(text.split()) <= _WORDS_OF_A_NAME,
            "other number": read.is_number_in_another_form(value),  # as people write it and runs do not
            "vector": isinstance(value, list) and len(value) > 1 and all(one in (0, 1) for one in value),
            "image": (isinstance(value, str) and value.lower().endswith(SUFFIXES))
            or isinstance(value, bytes)
            or (isinstance(value, dict) and "bytes" in value),
        }
        self.reads.update(what for what, holds in kinds.items() if holds)
        self._note_lists(value)
        if not self._open:
            return
        with suppress(DataError):
            name = read.read_value(value, "label", at="")
            self.reads["label"] += 1
            self.values[kind][name] += 1
            if len(self.values[kind]) > _MOST_VALUES or len(name) > LONGEST_LABEL:
                self.values.clear()
                self._open = False

    def _note_lists(self, value: object) -> None:
        """Of lists, and of lists as text, whether they are numbers, labels, tokens, tags of a scheme, or spans."""
        with suppress(DataError):
            self.sizes[len(read.numbers_of(read.feature_of(value, self.name), self.name))] += 1
        with suppress(DataError):  # else it is odd
            text = read.labels_of(value, self.name) if self.parts and isinstance(value, list | str) else ""
            for mark in [one for one in self.parts if (one == "[") == text.startswith("[")]:
                labels, counts = read.split_labels(text, separator=mark), self.parts[mark]
                counts.update(labels)
                self.reads[mark] += 1
                self.several[mark] += len(labels) > 1
                if len(counts) > _MOST_LABELS or any(len(label) > LONGEST_LABEL for label in labels):
                    del self.parts[mark]
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
        if max(len(self.marked), len(self.plain)) <= _MOST_LABELS:
            self.marked.update(found)
            self.plain.update(plain)

    def nearly(self, *kinds: str) -> bool:
        """Nearly all values are of one of these types, or can be read so."""
        count = sum(self.types[kind] or self.reads[kind] for kind in kinds)
        return self.filled > 0 and count >= NEARLY * self.filled

    def judge(self) -> None:
        """Say what the column is, when all its values are noted."""
        most = (1 - NEARLY) * self.filled
        # The type of nearly all values, in words; where none is, the types in the order of their numbers.
        self.holds = ", ".join(kind for kind, count in self.types.most_common() if count >= most)
        # Values of types that are odd here: type, how many, the first with their rows.
        self.strange = [(kind, count, self._first[kind]) for kind, count in self.types.items() if count < most]
        self.mean_characters = self.characters / max(1, self.filled)
        # How often each label came in the values that it nearly always has; a text is one also where it is a number.
        usual = {kind for kind, count in self.types.items() if count >= most}
        usual |= {"number as text"} if "text" in usual else set()
        self.labels = sum((names for kind, names in self.values.items() if kind in usual), Counter[str]())
        # Without B and I among its tags a column has no scheme (S-phase).
        self.entities = self.marked if not self.letters or self.letters & {"B", "I"} else self.plain
        # How many numbers nearly every value is a list of; None: it is no such column.
        size, count = (self.sizes.most_common(1) or [(0, 0)])[0]
        self.size = size if size > 1 and count >= NEARLY * self.filled else None

        said, few = {label.lower() for label in self.labels}, 2 <= len(self.labels) <= _MOST_LABELS
        self.is_number = self.nearly("target") and min(self.numbers) < max(self.numbers)  # of more than one value
        self.is_text, self.is_chat = self.nearly("text", "number as text"), self.nearly("messages")
        # Yes or no, or good or bad; and of each record that something came, or that it did not.
        self.is_flag = self.nearly("true or false") or (len(said) == 2 and said.issubset(NAMES["flags"]))
        self.is_event = set(map(read.category_of, self.labels)) in ({"0", "1"}, {"false", "true"})
        # Few values, each of which comes often.
        often = self.filled >= _RECORDS_A_LABEL * len(self.labels) and self.nearly("label")
        fraction = self.is_number and self.reads["whole"] < NEARLY * self.filled
        self.is_label = few and often and not fraction
        self.separator = self._separator()
        self.is_answer = self.is_label or self.is_number or self.separator is not None
        self.is_score = self.is_number and (self.key in NAMES["scores"] or not self.is_label)
        self.is_code = self.is_text and self.nearly("code") and not self.is_label  # links, paths or other marks
        # Texts written behind a prompt, and no label that is called so.
        self.is_completion = self.is_text and not (self.is_label and self.key in NAMES["often_labels"])
        # A value of a table's vector: numbers, lists of as many, or few names, which are categories.
        self.is_category = self.size is None and not self.nearly("target")
        self.is_feature = self.filled > 0 and (not self.is_category or self.is_label or self.is_flag)
        words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", self.name).lower())
        found = _OF_PEOPLE.fullmatch(self.key) or (len(words) > 2 and _OF_PEOPLE.fullmatch("".join(words[-2:])))
        # Where in the order of people it is, if it is called as people are (`tweet_author_id`).
        self.person = NAMES["people"].index(found["who"]) if found else None
        # Ids or names of persons, not what somebody wrote; rows without an id are no matter, nor how a run reads them.
        self.is_id = self.filled > 0 and not (self.nearly("list", "object") or self.is_flag)
        is_name = not self.is_text or (self.mean_characters <= _LONGEST_ID and self.nearly("few words"))
        self.is_person = self.person is not None and self.is_id and is_name
        self.is_place = not set(words).isdisjoint(NAMES["places"])  # its name says so, as `hospital_id` does
        # It numbers the records, as `message_id` does, or has no name.
        of_records = self.key in NAMES["ids"] or words[-1:] in (["id"], ["uuid"], ["guid"], ["idx"])
        self.is_of_records = of_records or not self.name.strip()

    def _separator(self) -> str | None:
        """The separator of a column of several labels; "[": they are lists; None: it is no such column."""
        if self.nearly("vector") or self.nearly("other number"):
            return None
        for mark, counts in self.parts.items():
            often = self.filled >= _RECORDS_A_LABEL * len(counts) and len(counts) >= 2 and self.nearly(mark)
            # Names with a comma in each are no lists: labels that come in several combinations are.
            if often and (mark == "[" or (self.several[mark] and not (self._open and len(self.labels) < len(counts)))):
                return mark
        return None

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
    def no_answer(self) -> str:
        """Why a column that was taken for an answer is none."""
        if self.nearly("vector"):
            return "must be lists of the labels' names: vectors of 0 and 1 name none"
        if self.is_chat:
            return "must be a text: write all turns of a record as one list in a column messages"
        if self.nearly("other number"):
            return f"must be a label or a number; it holds {_OTHER_NUMBERS}"
        return (
            f"must have 2 to {_MOST_LABELS} different texts or whole numbers of at most {LONGEST_LABEL} characters, on "
            f"average in {_RECORDS_A_LABEL} rows or more"
        )

    def why_unread(self, *, teaches: bool) -> str:
        """Why no run reads the column, and what chooses it; `teaches`: the file is one of prompts or conversations."""
        name = self.name
        more = f"--context {name}" if teaches else f"join the texts in one column, or --text {name}"
        of_persons = "it may say whose a record is, and a record is of one person: write one id in each row"
        reasons = (
            (not self.filled, "it is empty"),
            (self.key in WORDS["never_read"], WORDS["never_read"].get(self.key, "")),
            (self.is_person, f"it may say whose a record is: --user {name}"),
            (self.person is not None and self.nearly("list"), of_persons),
            (self.is_place, "it may say at which site a record is"),
            (self.nearly("vector"), "vectors of 0 and 1, which name no labels"),
            (self.nearly("other number"), _OTHER_NUMBERS),
            (self.is_label or self.separator is not None, f"few values; to learn them: --label {name}"),
            (self.is_of_records, "numbers or ids of the records"),
            (len(self.labels) == 1, "its value is always the same"),
            (self.is_code, "links, or marks without a space"),
            (self.is_number, f"numbers; to learn them: --score {name}"),
            (self.is_text, f"a second text: {more}"),
            (True, f"no role reads it so ({self.holds})"),
        )
        return next(why for holds, why in reasons if holds)
