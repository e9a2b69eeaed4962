"""Columns of a data file: names, value statistics, and a classification by the types of nearly all values."""

from __future__ import annotations

import math
import re
import tomllib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from fedtune.data import values as read
from fedtune.data.formats import OF_RECORDS, list_image_files
from fedtune.data.images import SUFFIXES
from fedtune.data.json_lists import parse_list
from fedtune.data.span_formats import count_entity_types, read_spans, read_words, split_tag
from fedtune.data.text_rows import name_json_type
from fedtune.spec import DataError, format_value

NEARLY = 0.95  # fraction of values that determines a column's type; a run skips rows with other values
_MAX_VALUES = 300  # maximum number of distinct labels; more values are not counted
LONGEST_LABEL = 80
_MAX_LABELS = 200
_RECORDS_A_LABEL = 5  # a column is a label only if each value has this many records on average
_SEPARATORS = ";|,"  # separators in a text of several labels
_SCALES = ((0.0, 1.0), (0.0, 5.0), (1.0, 5.0), (-1.0, 1.0), (0.0, 10.0), (0.0, 100.0))
"""Common rating scales, the most frequent first."""
_MAX_NUMBERS = 1_000_000
_OUTSIDE = 0.005  # fraction of outliers at either end that is ignored for the scale
_CODE = re.compile(r"[!-~]{5,}")
"""A single ASCII word, such as a link, a path or a hash; excludes text in scripts without spaces."""
_WORD = re.compile(rf"[{read.UNSPACED}]{{2}}|\b[^\W\d_{read.UNSPACED}]{{2,}}+(?!\d)")
"""A word that is not part of a code such as FEW021; two letters in scripts without spaces."""
_NUMBERED = re.compile(r"\d\S*")
"""A number or a code; a value with more of these than words is not natural language."""
_LISTS, _BEGIN_NUMBERS = ("[", "(", "{", "array(", "set("), frozenset("+-.0123456789")
"""First characters of lists in text form, and of numbers."""
_BARE = frozenset("OBIESLUM")
"""Prefix letters of BIO-like tagging schemes, which are not entity types."""
_LONGEST_ID, _HEAD, _LONGEST_DATE = 64, 120, 40
_WORDS_OF = {"word": 1, "words": 2, "phrase": 3, "prose": 5}  # minimum number of words
_MIN_ID = 1_000_000  # minimum value of numeric ids of equal length
SHARD = re.compile(r"\d+[-_ ]of[-_ ]0*(\d+)")  # in the file name of a shard
_MIN_COUNTED = 10  # minimum number of rows to recognize row numbers
_ODD_SHOWN = 3
_MANY_PERSONS = 20  # a column with this many person ids identifies people
WORDS: Mapping[str, Mapping[str, str]] = {
    section: dict(part.split(": ", 1) for part in " ".join(text.split()).split(" | "))
    for section, text in tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8")).items()
}
"""Column names and messages by section and key, parsed from `key: words | key: words` in names.toml."""
NAMES: Mapping[str, tuple[str, ...]] = {what: tuple(words.split()) for what, words in WORDS["names"].items()}
"""Common column names by kind of column.  Kinds that need an explanation:

- `answers`: names of labels and targets only; `labels`: answers with few values; `topics` and `general`: answers that
  may also be features of a table; `numbers`: numeric columns that may be answers.
- `inverted`: event columns that are true for censored people; `stayed`, `came`: values for censored people and events.
- `names_of`: suffixes of columns with the label names of a numeric column.
- `endings`: extensions of unsupported image formats.
- `often_labels`: completions that are labels if they have few values.
- `wanted`: whether an answer is desirable, with values in `flags`; `better`: which of two `rivals` is preferred.
- `alike`: names of text pairs without a distinguishing number or letter; `turns`: conversations.
- `people`: names of person ids, in order of priority.
- `things`: suffixes of columns with names instead of texts.
- `splits`, `marked`, `checks`: purpose of a row, with `helpers` in names and values in `parts`, `reviews`, `passed`.
- `ids`, `group_numbered`: ids of records.
"""
_ENDINGS, _LINKED = (*SUFFIXES, *NAMES["endings"]), "linked"
"""Extensions of image paths (the last are of unsupported formats), and the kind of images that are URLs."""
_MONTHS = "jan|feb|m[aä]r|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz]"
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2})?\S{0,20}(?: [ap]m)?"
_DATE = re.compile(
    r"(?i)(?:\d{1,4}([-./])\d{1,2}\1\d{1,4}|\d{4}-\d{2}|(?:\d{1,2}[. -]{0,2})?"
    rf"(?:{_MONTHS})[a-zä]{{0,6}}\.?[ -]?(?:\d{{1,2}},?[ ])?\d{{2,4}})(?:[T ,]+{_CLOCK})?|{_CLOCK}"
)
"""A date, a month or a time of day."""
_MEASURE = re.compile(
    r"[<>\u2264\u2265~]=? ?[+-]?\d[\d.,]*\S{0,9}|[+-]?\d[\d.,]* ?[^\W\d_]{1,6}(?:[/^]\S{1,9})?|[+-]?inf(?:inity)?"
)
"""A number with a unit or with a comparison sign, as in laboratory values."""
_OF_PEOPLE = re.compile(
    "(?:anon(?:ym(?:ous|i[sz]ed))?|pseudo(?:nym(?:ous|i[sz]ed))?|hash(?:ed)?|enc(?:rypted)?|masked|unique|study|id|fk)*"
    rf"(?P<who>{'|'.join(NAMES['people'])})(?:s|r|n|en)?"
    "(?:id|ids|uuid|guid|key|no|nr|num|number|nummer|name|code|hash|handle|email|address|identifier|kennung)*"
)
_COURSE = "(?:os|pfs|dfs|efs|rfs|dss|vital|survival|followup|fu|relapse|recurrence|death|event)?"
_OF_TIMES = re.compile(
    rf"{_COURSE}(?:time|months|days|weeks|years|duration)(?:to[a-z]+)?|t|tte|os|pfs|fu|followup|tenure"
)
_WORDS_OF_TIMES = re.compile(
    r"(?!.*\bage\b).*\b(?:(?:time|fu|follow|survival|\w*zeit)\b|(?:days?|h|hours?|months?|years?|tage)$)"
)
"""Names that contain a word for time, or end in a unit of time."""
_OF_EVENTS = re.compile(
    rf"(?:is)?{_COURSE}(?:status|events?|observed|cens\w*|died|dead|deceased|relapsed|progression|progressed)"
    "|e|relapse|recurrence|death|fustat|verstorben|(?:event|death)(?:observed|status|indicator)|churn(?:ed)?"
)
"""Names of event columns; `_OF_PEOPLE` and `_OF_TIMES` match names of person ids and of times to an event."""
_OF_WEIGHTS = re.compile(rf"(?:{'|'.join(NAMES['weights'])})(?:weight|wg?t)s?|weights")
"""Names of row weights; weights in kilograms (`birth_weight`) do not match."""
_TAKEN_BACK, _OF_MARKS = re.compile("reject|ignore|skip|discard"), re.compile("(?:is)?(?:valid(?!ation)|usable|needs)")
"""Words for withdrawn records, and prefixes of the names of validity flags."""


class DataColumn:
    """A column of a data file, which collects statistics of its values and then classifies itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key = re.sub(r"[\W_]+", "", name).lower()  # `Patient ID`, `patient_id` and `PatientID` are one
        self.words = _split_words(name)
        # The name with # for distinguishing numbers and single letters: `answer_a` becomes `answer#`.
        self.stem = "".join("#" if len(word) == 1 or word.isdecimal() else word for word in self.words)
        self.mark = "".join(word for word in self.words if len(word) == 1 or word.isdecimal())
        letters = [word for word in self.words if not word.isdecimal()]
        found = _OF_PEOPLE.fullmatch(self.key) or (len(letters) > 2 and _OF_PEOPLE.fullmatch("".join(letters[-2:])))
        # Priority of the name among names of person ids (`tweet_author_id`); None for other names.
        self.person = NAMES["people"].index(found["who"]) if found else None
        self.filled = self.characters = 0  # number of nonblank rows; total length of all texts
        self.longest = self.furthest = 0  # longest text in characters; largest span end
        self.types = Counter[str]()  # number of values by type
        self.reads = Counter[str]()  # number of values by role or kind, see `add_value`
        # Number of values per label and type; empty if there are too many labels, or too long labels.
        self.values = defaultdict[str, Counter[str]](Counter)
        # The same for multi-label values, by separator ("[": a list).
        self.parts = {mark: Counter[str]() for mark in f"[{_SEPARATORS}"}
        self.several = Counter[str]()  # number of values with more than one label, by separator
        self.numbers = array("d")  # the first `_MAX_NUMBERS` numbers
        self.sizes = Counter[int]()  # lengths of numeric lists, also as JSON text
        # Entities by type in spans or BIO tags, entities by plain tag, and letters of tagging schemes.
        self.marked, self.plain, self.letters = Counter[str](), Counter[str](), set[str]()
        self.fault = ""  # why the last list is neither tags nor spans
        self.keys = Counter[str]()  # keys of the first object of each list
        self.beside = Counter[str]()  # ignored keys of chat turns, such as "name"
        self._first = defaultdict[str, list[tuple[int, str]]](list)  # values of each type, with their rows
        self._open = True
        self._ids = set[int]()  # hashes of person ids

    def add_value(self, value: object, row: int) -> None:
        """Add a row's value to the statistics; `row` counts from 1."""
        if read.is_missing(value):
            return
        if self.key == "data" and isinstance(value, dict):
            value = value.get("text", value)  # Label Studio's format, read as a run reads it
        text = value.strip() if isinstance(value, str) else ""
        self.filled += 1
        self.characters += len(text)
        self.longest = max(self.longest, len(text))
        kind = name_json_type(value)
        kind = {"boolean": "true or false", "string": "text", "array": "list"}.get(kind, kind)
        before = self.reads["target"]
        if not text or text[0] in _BEGIN_NUMBERS:
            with suppress(DataError):
                number = float(read.read_number(value, self.name))
                if len(self.numbers) < _MAX_NUMBERS:
                    self.numbers.append(number)
                self.reads["target"] += 1
                self.reads["whole"] += number.is_integer()
                kind = "number as text" if text else kind
        self.types[kind] += 1
        if len(self._first[kind]) < _ODD_SHOWN:
            self._first[kind].append((row, format_value(value)))
        self.reads["other number"] += kind == "number" and self.reads["target"] == before  # Infinity
        self.reads["image"] += isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value)
        for what in _classify_text(text) if text else ():
            self.reads[what] += 1
        if text.startswith(_LISTS) or isinstance(value, list | dict):
            self._count_objects(value)
        self._count_labels(value, text)
        if self.person is not None and len(self._ids) == self.filled - 1:  # until the first repeated id
            self._ids.add(hash(text or str(value)))
        if self._open:
            with suppress(DataError):
                name = read.read_value(value, "label", at="")
                self.reads["label"] += 1
                self.values[kind][name] += 1
                if len(self.values[kind]) > _MAX_VALUES or len(name) > LONGEST_LABEL:
                    self.values.clear()
                    self._open = False

    def _count_labels(self, value: object, text: str) -> None:
        """Count the candidate labels in a list, or in a text with separators."""
        is_plain = bool(text) and not text.startswith(_LISTS)
        if not self.parts or (is_plain and len(self.parts) == 1) or not isinstance(value, list | str | dict):
            return
        with suppress(DataError):  # else it is odd
            found = text if is_plain else read.read_labels(value, self.name)
            for mark in [one for one in self.parts if (one == "[") == found.startswith("[")]:
                labels, counts = read.split_labels(found, separator=mark), self.parts[mark]
                counts.update(labels)
                self.reads[mark] += 1
                self.several[mark] += len(labels) > 1
                if len(counts) > _MAX_LABELS or any(len(label) > LONGEST_LABEL for label in labels):
                    del self.parts[mark]

    def _count_objects(self, value: object) -> None:
        """Classify a list or object (also as JSON text) as chat turns, numbers, tokens, BIO tags or spans."""
        turns = read.guess_turns(value)
        self.beside.update(key for turn in turns for key in turn if key not in read.TURN_FIELDS and turn[key])
        first = turns[0].get("role") or turns[0].get("from") if turns else "assistant"
        self.reads["messages"] += bool(turns)
        self.reads["whole chat"] += read.parse_speaker_role(first) != "assistant"  # starts with a prompt
        listed = None if turns or isinstance(value, dict) else parse_list(value)
        if listed is None:
            return
        self.reads["vector"] += len(listed) > 1 and all(one in (0, 1, "0", "1") for one in listed)
        first = listed[0] if listed else ()
        self.keys.update([*first] if isinstance(first, dict) else ())
        places = sorted(_list_integers(first))[1:2]
        self.reads["places"] += bool(places) or not listed
        self.furthest = max(self.furthest, *places, 0)
        if not isinstance(first, str) or first[:1] in _BEGIN_NUMBERS:
            with suppress(DataError):
                self.sizes[len(read.parse_numbers(read.read_feature(value, self.name), self.name))] += 1
        found, plain = Counter[str](), Counter[str]()
        try:
            if isinstance(first, str | int | float):
                tags = read_words(value, self.name).split("\n")
                self.reads["tokens"] += 1
                read_words(value, self.name, "tags")
                letters = {split_tag(one)[0] for one in tags}
                if "" not in letters:
                    self.reads["tags"] += 1
                    self.letters |= letters
                    found.update(count_entity_types({"tags": "\n".join(tags)}))
                    plain.update(count_entity_types({"tags": "\n".join(tags)}, tags))
                elif "O" in tags:
                    self.fault = "must be a letter and a type, such as B-name or I-name, or O"
            else:
                found.update(count_entity_types({"spans": read_spans(value, self.name)}))
                self.reads["spans"] += 1
        except DataError as error:
            self.fault = error.bound
        if max(len(self.marked), len(self.plain)) <= _MAX_LABELS:
            self.marked.update(found)
            self.plain.update(plain)

    def is_nearly_all(self, *kinds: str) -> bool:
        """Whether nearly all values have one of these types, or can be parsed as such."""
        count = sum(self.types[kind] or self.reads[kind] for kind in kinds)
        return self.filled > 0 and count >= NEARLY * self.filled

    def is_mostly(self, kind: str) -> bool:
        """Whether most values are of this kind."""
        return 2 * self.reads[kind] > self.filled

    def classify(self, rows: int, *, may_be_label: bool = True) -> None:
        """Classify the column after the values of all rows have been added.

        `may_be_label` is False for columns that cannot be labels, next to other texts.
        """
        most = (1 - NEARLY) * self.filled
        # Types of the column's values, the most frequent first.
        self.holds = ", ".join(kind for kind, count in self.types.most_common() if count >= most)
        # Rare types: (type, number of values, first values with their rows).
        self.strange = [(kind, count, self._first[kind]) for kind, count in self.types.items() if count < most]
        self.mean_characters = self.characters / max(1, self.filled)
        # Number of records per label, without values of rare types; a number in a text column counts as text.
        usual = {kind for kind, count in self.types.items() if count >= most}
        usual |= {"number as text"} if "text" in usual else set()
        self.labels = sum((names for kind, names in self.values.items() if kind in usual), Counter[str]())
        # Without B and I tags, the prefix letters are no tagging scheme (S-phase).
        self.entities = self.marked if not self.letters or self.letters & {"B", "I"} else self.plain
        # Common length of numeric lists; None for other columns.
        size, count = (self.sizes.most_common(1) or [(0, 0)])[0]
        self.size = size if size > 1 and count >= NEARLY * self.filled else None

        said, few = {label.lower() for label in self.labels}, 2 <= len(self.labels) <= _MAX_LABELS
        self.is_nested = self.is_nearly_all("list", "object")
        self.with_keys = f" of objects with {', '.join([*self.keys][:5])}" if self.keys else ""
        # of more than one value
        self.is_number = self.is_nearly_all("target") and min(self.numbers) < max(self.numbers)
        self.is_text, self.is_chat = self.is_nearly_all("text", "number as text"), self.is_nearly_all("messages")
        self.is_image, self.is_date = self.is_nearly_all("image", *SUFFIXES), self.is_nearly_all("date")
        # Number of image paths per unsupported extension, if nearly all values are image paths.
        others = ", ".join(f"{self.reads[end]:,} {end}" for end in (*NAMES["endings"], _LINKED) if self.reads[end])
        self.other_images = others if self.is_nearly_all(*_ENDINGS, _LINKED) and not self.is_image else ""
        self.is_vector = self.is_nearly_all("vector") or (self.size is not None and not self.is_mostly("tokens"))
        self.is_constant, self.is_empty = len(self.labels) == 1, not self.filled
        # Number of distinct values; 0 if they were not counted.
        self.num_values = len(set(self.numbers)) if self.is_nearly_all("target") else len(self.labels)
        self.said = " or ".join(sorted(self.labels, reverse=True)[:5]) or self.holds
        self.least, self.most = min(self.numbers, default=0), max(self.numbers, default=0)
        self.is_said, self.is_context = self.is_text or self.is_chat, self.is_text or self.is_empty
        self.is_tokens, self.is_whole_chat = self.is_nearly_all("tokens"), self.is_nearly_all("whole chat")
        self.is_tags, self.is_spans = (self.is_nearly_all(role) and bool(self.entities) for role in ("tags", "spans"))
        self.are_words = self.is_tokens and not self.is_tags and self.size is None
        self.is_speaker = {"assistant"} < set(map(read.parse_speaker_role, self.labels))
        # Yes or no, or good or bad.
        self.is_flag = self.is_nearly_all("true or false") or (len(said) == 2 and said.issubset(NAMES["flags"]))
        # Few distinct values, each of them frequent.
        often = self.filled >= _RECORDS_A_LABEL * len(self.labels) and self.is_nearly_all("label")
        fraction = self.is_number and self.reads["whole"] < NEARLY * self.filled
        is_label = may_be_label and few and often and not (fraction or self.is_date or self.is_vector)
        # Numbers in a notation that a run cannot read, such as 3,5 or <5.
        is_other = self.is_nearly_all("target", "other number", "measure") and not self.is_nearly_all("target")
        self.is_other_number = is_other and (self.is_mostly("other number") or not is_label)
        self.other_numbers = self.filled - self.reads["target"]
        self.is_label = is_label and not self.is_other_number
        self.is_binary = self.is_label and said <= {"0", "1", "true", "false"}
        # The name's last word may be that of an answer, or all words except helpers (`churned_in_90d`).
        rest, all_parts = [word for word in self.words if word not in NAMES["helpers"]], {*NAMES["parts"]}
        plain = "".join(word for word in rest if len(word) > 1 and word.isalpha())
        self.is_called_answer = self.is_called("answers", "labels") or plain in NAMES["answers"] + NAMES["labels"]
        # Token-per-row format: each row has the tag of a single word.
        is_scheme = all(tag in _BARE or split_tag(tag)[0] for tag in self.labels)
        self.is_tag = self.is_label and is_scheme and "O" in self.labels
        self.separator = self._detect_separator()
        self.is_few = self.is_label or self.separator is not None
        self.has_several = self.separator is not None and self.several[self.separator] > 0
        self.unread = WORDS["never_read"].get("rejected" if self.key in NAMES["rejected"] else self.key, "")
        self.is_rank = self.is_number and len(self.labels) > 2
        self.is_answer = self.is_few or self.is_number
        self.is_event = self.event_values is not None
        is_other = self.is_other_number or not (self.is_text or self.is_nearly_all("target"))
        is_long = not self.is_text or self.mean_characters >= LONGEST_LABEL or self.is_constant
        self.is_called_time = self.is_number and bool(_OF_TIMES.fullmatch(self.key))
        self.may_be_time = self.is_number and bool(self.is_called_time or _WORDS_OF_TIMES.match(" ".join(self.words)))
        is_usual = self.is_event and said.isdisjoint(NAMES["flags"])  # alive or dead, whatever the column is called
        self.may_be_event = self.is_label and (is_usual or bool(_OF_EVENTS.fullmatch(self.key)))
        self.is_unread_answer = self.filled > 0 and not self.is_answer and (is_other or not is_long)
        self.is_lone_answer = self.is_called_answer and not self.is_answer and (self.is_constant or self.is_empty)
        # Largest second number of a value, such as the end of a span; 0 if values have no such number.
        self.furthest *= self.is_nearly_all("places")
        self.is_score = self.is_number and (self.key in NAMES["scores"] or not self.is_label)
        self.is_code = self.is_text and self.is_nearly_all("code") and not self.is_label  # links, paths or other marks
        # Completions, without labels of that name; and prompts, without person ids of that name.
        self.is_completion = self.is_text and not (self.is_label and self.key in NAMES["often_labels"])
        self.is_asked = self.is_text and (self.person is None or self.is_mostly("phrase"))
        # Natural-language texts by their number of words or by name; and short texts, which may be names.
        is_other = self.is_nearly_all("target") or self.is_date or self.is_image or self.is_other_number
        is_words = self.is_text and not (is_other or self.is_code or {*self.words[-1:]} & {*NAMES["things"]})
        is_named = self.key in NAMES["texts"]
        self.is_prose = is_words and (self.is_mostly("prose") or (is_named and self.is_mostly("word")))
        self.is_short = is_words and self.is_mostly("words") and not (self.is_label or self.is_prose)
        # Whether the column's name may be a value of a first row, because the header is missing.
        read_name = {*_classify_text(self.name)} if self.key not in NAMES["texts"] else set()
        is_long = (3 if "prose" in read_name else 2) * len(self.name) >= self.mean_characters
        self.could_name_text = is_words and is_long and "phrase" in read_name
        # Columns with the purpose of a row: split, review result, or weight.
        is_part = said <= all_parts or any(one.startswith("train") for one in said)
        is_part = is_part and all(all_parts.intersection(_split_words(label)) for label in self.labels)
        is_called = bool(rest) and {*rest}.issubset(NAMES["splits"])
        is_called = is_called or (self.is_flag and 0 < len(rest) < len(self.words) and {*rest} <= all_parts)
        self.is_split = self.is_label and (is_part or is_called)
        is_answer = self.is_called_answer and self.key != "answer"
        is_review = said.issubset(NAMES["reviews"]) and any(map(_TAKEN_BACK.match, said)) and not is_answer
        is_review = is_review or (said.issubset(NAMES["passed"]) and not {*self.words}.isdisjoint(NAMES["checks"]))
        is_called = not {*rest[-1:]}.isdisjoint(NAMES["marked"]) or bool(_OF_MARKS.match(self.key))
        self.is_review = self.is_label and (is_review or (self.is_flag and is_called and not is_answer))
        self.is_weight, self.is_mark = bool(_OF_WEIGHTS.fullmatch(self.key)), self.is_split or self.is_review
        # Ids or names of persons, without texts; rows without an id are allowed.  A column in which all ids differ does
        # not group records by person.
        self.is_id = self.filled > 0 and not (self.is_nearly_all("list", "object") or self.is_flag)
        is_name = not self.is_text or (self.mean_characters <= _LONGEST_ID and self.reads["prose"] <= most)
        self.is_once = self.is_id and is_name and len(self._ids) == self.filled == rows > 1
        self.is_of_persons = self.person is not None and self.is_nearly_all("list")
        self.is_person = self.person is not None and self.is_id and is_name and not self.is_once
        self.is_place = not set(self.words).isdisjoint(NAMES["places"])  # names such as `hospital_id`
        # Record ids, such as `message_id`, unnamed columns, and row numbers.
        of_records = self.key in NAMES["ids"] or self.words[-1:] in (["id"], ["uuid"], ["guid"], ["idx"])
        self.is_of_records = of_records or not self.name.strip() or self.is_once or self._is_row_number()
        of_a_row = self.is_mark or self.is_weight or self.is_of_records or self.is_person or self.is_place
        # Few values under a bare name (`author`, `account`) may also be an answer.
        is_bare = self.is_person and self.words[-1:] == [NAMES["people"][self.person or 0]]
        self.may_be_one_of_few = is_bare and self.is_label and len(self.labels) < _MANY_PERSONS
        self.may_be_answer = self.is_answer and self.person is None and not (of_a_row or (self.is_prose and is_named))
        # Features of a table: numbers, lists of equal length, or few names (categories).
        self.is_category = self.size is None and not self.is_nearly_all("target")
        is_value = self.filled > 0 and (not self.is_category or self.is_label or self.is_flag)
        self.is_feature = is_value and not of_a_row and not self.is_date

    def _is_row_number(self) -> bool:
        """Whether the column numbers the rows: nearly all values are distinct integers.

        In addition requires a suitable name, few gaps, or equal lengths as in ids.
        """
        count, distinct = self.reads["whole"], np.unique(self.numbers)
        is_integral = count >= max(_MIN_COUNTED, NEARLY * self.filled) and len(distinct) >= NEARLY * count
        is_named = not {*self.words}.isdisjoint(NAMES["numbered"])
        is_id = is_integral and len(distinct) == self.filled and distinct[0] >= _MIN_ID
        is_id = is_id and len(f"{distinct[0]:.0f}") == len(f"{distinct[-1]:.0f}")
        return is_integral and (is_named or is_id or bool(distinct[-1] - distinct[0] < 2 * count))

    def _detect_separator(self) -> str | None:
        """Detect the separator of a multi-label column: "[" for lists, None for other columns."""
        if self.is_vector or self.is_other_number:
            return None
        for mark, counts in self.parts.items():
            often = self.filled >= _RECORDS_A_LABEL * len(counts) and len(counts) >= 2 and self.is_nearly_all(mark)
            # Names that contain a comma are not lists; labels that occur in several combinations are.
            if often and (mark == "[" or (self.several[mark] and not (self._open and len(self.labels) < len(counts)))):
                return mark
        return None

    @property
    def event_values(self) -> tuple[str, ...] | None:
        """Values for censored people and for people with the event; None if the column does not encode an event."""
        said = sorted(set(map(read.normalize_category, self.labels)))
        words = {one: set(_split_words(one)) for one in said}
        pair = [one for course in ("stayed", "came") for one in said if words[one] & {*NAMES[course]}]
        pair = said if said == ["1", "2"] else pair[::-1] if self.key in NAMES["inverted"] else pair
        return tuple(pair) if len(said) == 2 and sorted(pair) == said else None

    def is_called(self, *sections: str) -> bool:
        """Whether the column's name, or the last word of its name, is in one of these sections of `NAMES`."""
        return any(name in NAMES[some] for some in sections for name in (self.key, *self.words[-1:]))

    def is_preference_between(self, rivals: Iterable[DataColumn]) -> bool:
        """Whether the column contains the preferred one of several numbered columns, by its name or its values."""
        marks = {word for label in self.labels for word in _split_words(label)[-1:]}.difference(NAMES["ties"])
        is_called = not {*self.words}.isdisjoint(NAMES["better"])
        return self.is_label and (is_called or marks == {one.mark for one in rivals})

    @property
    def scale(self) -> tuple[float, float] | None:
        """The first common rating scale that contains nearly all numbers; None if the user must declare a scale."""
        numbers = np.sort(np.array(self.numbers))
        few = math.ceil(_OUTSIDE * len(numbers)) if len(numbers) > 1 / NEARLY * 10 else 0
        low, high = numbers[few], numbers[-1 - few]
        return next((one for one in _SCALES if one[0] <= low and high <= one[1]), None)

    def explain(self, reasons: Literal["unread", "no_answer"]) -> str:
        """Return the first matching reason in names.toml why the column is not used, or cannot be an answer."""
        return next(why for what, why in WORDS[reasons].items() if getattr(self, what)).format(self)


_DEFAULT_STEMS = ("#", "col#", "column#", "field#", "var#", "unnamed#")


def group_numbered(every: Iterable[DataColumn]) -> Iterator[list[DataColumn]]:
    """Group columns with texts or chat turns whose names differ only by a number or a letter.

    Columns in a group are sorted by this number or letter.  Default names, such as col_1 and 2, say nothing.
    """
    groups = defaultdict[str, list[DataColumn]](list)
    for one in sorted(every, key=lambda one: [word.zfill(9) for word in one.words]):
        if "#" in one.stem and one.stem not in _DEFAULT_STEMS and (one.is_text or one.is_chat):
            groups[one.stem].append(one)
    for some in groups.values():
        is_texts = (one.is_chat or one.is_mostly("words" if not one.is_label else "prose") for one in some)
        if len(some) > 1 and any(is_texts):
            yield some


def build_no_records_error(path: Path) -> DataError:
    """Build the error for a file or folder without records, with a list of the data files below it."""
    tables = defaultdict[Path, list[Path]](list)  # groups shards such as train-00000-of-00002
    for one in sorted(path.rglob("*")):
        if one.suffix in OF_RECORDS or (one.is_dir() and list_image_files(one)):
            tables[one.parent / one.name.partition("-0")[0]].append(one)
    below = []
    for one, parts in tables.items():
        shard = SHARD.search(parts[-1].name)
        here = f" ({len(parts)} of {shard[1]} are there)" if shard and int(shard[1]) != len(parts) else ""
        below.append(f"all parts of {one} as one file{here}" if len(parts) > 1 else f"{parts[0]}{here}")
    if tables:
        found, bound = "a folder of several files", "must be a single file"
        if any(parts[0].is_dir() for parts in tables.values()):
            found, bound = "images two folders deep", "must be one folder of class folders, or a table of paths"
        return DataError(str(path), found, f"{bound}: name {', '.join(below[:10])}")
    if images := count_unsupported_images(path):
        return DataError(str(path), f"{images} images", "must be PNG, JPEG or WebP images: convert them")
    return DataError(str(path), "no rows", "must contain at least one record")


def build_column_error(path: Path, what: str, columns: Sequence[DataColumn], other: object = "") -> DataError:
    """Build the error for unsuitable columns from the texts in names.toml; `other` is inserted into the text."""
    names = join_columns(one.name for one in columns)
    said = {"names": names, "other": other, "event": WORDS["bounds"]["is_event"]}
    value, bound = (text.format(columns[0], **said) for text in WORDS["refused"][what].split(" = "))
    return DataError(f"{path}, column{'s' * (len(columns) > 1)} {names}", value, bound)


def count_unsupported_images(folder: Path) -> str:
    """Count the images in unsupported formats below a folder, by extension."""
    endings = (next(filter(one.name.lower().endswith, NAMES["endings"]), "") for one in folder.rglob("*"))
    return ", ".join(f"{count:,} {end}" for end, count in Counter(endings).items() if end)


def join_columns(columns: Iterable[str]) -> str:
    """Join column names for a message; many or long names (as in files without a header) are shortened."""
    names = [name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}\u2026" for name in columns]
    return ", ".join([*names[:10], *([f"and {len(names) - 10} more"] if len(names) > 10 else [])])


def _split_words(name: str) -> list[str]:
    """Split a column name into lowercase words and numbers."""
    return re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _list_integers(value: object, *, within: int = 3) -> list[int]:
    """List the integers in an object or a list, or in its first nested container with integers."""
    parts = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    inner = (_list_integers(one, within=within - 1) for one in parts if within)
    return [one for one in parts if type(one) is int] or next(filter(None, inner), [])


def _classify_text(text: str) -> Iterator[str]:
    """Yield the kinds of a text: by number of words, a code, a date, a number in another notation, or a path."""
    words = len(_WORD.findall(text[:_HEAD]))
    words = 0 if words and len(_NUMBERED.findall(text[:_HEAD])) > words else words
    yield from (kind for kind, least in _WORDS_OF.items() if words >= least)
    if _CODE.fullmatch(text):
        yield "code"
    if len(text) <= _LONGEST_DATE and _DATE.fullmatch(text):
        yield "date"
    elif read.is_localized_number(text):
        yield "other number"
    elif len(text) <= _LONGEST_DATE and _MEASURE.fullmatch(text):
        yield "measure"
    is_link = "://" in text
    if (end := (re.split("[?#]", text)[0] if is_link else text)[-9:].lower()).endswith(_ENDINGS):
        yield _LINKED if is_link else next(one for one in _ENDINGS if end.endswith(one))
