"""Conversion of values in data files to the text format of their role, for runs and for data inspection.

Each value is read separately, and a DataError reports a value that does not match its role.  Error messages name the
position and never quote the value, because messages end up in logs.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime
from typing import Any, TypeGuard, cast

from fedtune.data.images import read_image_field
from fedtune.data.json_lists import convert_columns_to_rows, parse_json_list, parse_list, to_compact_json
from fedtune.data.span_formats import convert_labels, read_spans, read_words
from fedtune.data.text_rows import name_json_type
from fedtune.spec import DataError

# Roles with values from a small set of names: integers become text, and surrounding spaces are removed.
CATEGORY_ROLES = frozenset({"label", "site", "user", "event"})
ANSWERS = frozenset({"label", "labels", "target", "tags", "spans", "time", "event"})
"""Roles with targets that are not texts."""
_NO_TEXT = ANSWERS | CATEGORY_ROLES | {"image", "arrival"}
TURN_ROLES = ("chosen", "rejected")  # roles with texts or turns as values
FEATURE = "feature:"
"""Role prefix of a feature column (`fedtune.data.features`)."""
OPTIONAL_ROLES = frozenset({"input", "system", "arrival"})  # roles that may be missing or blank
_BETWEEN_NAMES, SEVERAL_USERS = ",;|", "a list of users"
"""Separators in lists of names, which cannot be part of a user id, and the description of such a value in messages."""
NO_NAME = frozenset({"", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None", "none", "-", "?"})
"""Words for missing values in tables; as user ids they would merge the rows of unrelated people."""
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Character class of scripts without spaces between words, such as Chinese."""
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
"""Invisible characters (Unicode's Default_Ignorable_Code_Point)."""
_WHOLE_DECIMAL = re.compile(r"\A([+-]?\d+)\.0+\Z", re.ASCII)
_WITH_EXPONENT = re.compile(r"\d+(\.\d+[eE]\+?|[eE]\+)\d+", re.ASCII)
"""Format in which spreadsheets write long ids, without their last digits."""
_SPEAKERS = {"system": "system", "developer": "system", "user": "user", "human": "user"} | dict.fromkeys(
    ("assistant", "gpt", "bot", "model"), "assistant"
)
_TRAINED = ("weight", "train", "training", "loss")
"""Keys of a turn's training weight in other programs' formats; 0 or false excludes an answer from training."""
_PARTS_TRAINED = ("train_detail", "training_detail")
_CALLS = ("tool_calls", "function_call")
TURN_FIELDS = frozenset({"role", "content", "from", "value", *_TRAINED, *_PARTS_TRAINED, *_CALLS})
"""Fields of a turn that fedtune reads."""
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_OTHER_NUMBER = re.compile(r"\(?[$€£¥]? ?[+\u2212-]?\d[\d.,'_ \u00a0\u202f]{0,60} ?([%$€£¥]|[A-Z]{3})?\)?", re.ASCII)
_LONGEST_NUMBER = 400  # maximum characters of a number; every float has a shorter form, and parsing stays cheap
_MONTH = re.compile(r"\d{4}-\d{2}", re.ASCII)
_LONGEST_DATE = 64
_LIKE_TURNS = re.compile(r"\s*\[\s*\{")
"""Start of turns as JSON text; other texts are not parsed, because parsing a long text takes seconds."""
_PRINTED_TURNS = re.compile(r"\s*(?:array\()?\[\s*\{\s*'(?:role|from|content|value)'\s*:")
"""Start of turns as printed by Python and pandas, which cannot be parsed safely."""
_WRITTEN_TURNS = '[{"role":"'  # start of turns as written by this module


def read_value(value: object, role: str, *, at: str) -> str:
    """Check a value, and convert it to the text format of its role; NaN counts as null.

    Raises:
        DataError: the value does not match the role.
    """
    if role.startswith(FEATURE):
        text = read_feature(value, at)
    elif is_null(value):
        raise DataError(at, "null", f"must not be null (role {role})")
    elif role in _READERS:
        text = _READERS[role](value, at)
    elif role in CATEGORY_ROLES:
        text = _read_name(value, role, at=at)
    else:
        text = _read_text_value(value, role, accepted="text", at=at)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may escape half of a surrogate pair, which tokenizers reject
        raise DataError(at, "an unpaired surrogate", f"must be valid Unicode (role {role})") from None
    return text


def is_free_text(role: str) -> bool:
    """Whether a role's values are free text, which may contain names and may be masked."""
    return role not in _NO_TEXT and not role.startswith(FEATURE)


def split_texts(role: str, text: str) -> list[str]:
    """Return the texts in a record's field: one text per turn of a conversation; empty for targets and features."""
    turns = json.loads(text) if role == "messages" else parse_continuation(text) if role in TURN_ROLES else None
    if turns is not None:
        return [turn["content"] for turn in turns]
    return [text] if is_free_text(role) else []


def is_null(value: object) -> bool:
    """Return True if a value is null, or NaN in a column of numbers."""
    return value is None or value != value


def is_missing(value: object) -> bool:
    """Return True if a value is null or blank."""
    return is_null(value) or (isinstance(value, str) and not value.strip())


def is_integral(value: object) -> TypeGuard[float]:
    """Return True if a float is an integer: tables store an integer column as floats if a value is missing.

    Values of 2**53 or more are rejected, because two different ids may have been rounded to the same float.
    """
    return isinstance(value, float) and value.is_integer() and abs(value) < 2**53


def normalize_name(text: str) -> str:
    r"""Normalize a name: composed (NFC), without invisible characters, with single spaces.

    >>> normalize_name("Jose\u0301\u200b ") == "Jos\u00e9"
    True
    """
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).split())


def _read_text_value(value: object, role: str, *, accepted: str, at: str) -> str:
    if role == "text" and isinstance(value, dict) and isinstance(value.get("text"), str):
        value = value["text"]  # Label Studio's format
    if not isinstance(value, str):
        raise DataError(at, name_json_type(value), f"must be {accepted} (role {role})")
    if not value.strip():
        raise DataError(at, "blank", f"must not be blank (role {role})")
    return value


def _read_name(value: object, role: str, *, at: str) -> str:
    """Read a label, a site or a user; user ids are normalized, so that spelling variants count as one user."""
    if role == "user" and (isinstance(value, list) or (isinstance(value, str) and set(_BETWEEN_NAMES) & set(value))):
        # The record would count for one of the users only, and the others would not be protected.
        marks = " ".join(_BETWEEN_NAMES)
        bound = f"must name one user (role user): a value with one of {marks} is a list, and records of several users"
        raise DataError(at, SEVERAL_USERS, f"{bound} are not supported (docs/user_level.md)")
    if type(value) is int or is_integral(value):
        value = str(int(value))
    elif role in ("label", "event") and isinstance(value, bool):
        value = str(value).lower()
    text = _read_text_value(value, role, accepted="text or an integer", at=at).strip()
    if role != "user":
        return text
    name = normalize_name(text)
    if name in NO_NAME:
        raise DataError(at, "no id", "must name a user (role user)")
    if _WITH_EXPONENT.fullmatch(name):
        raise DataError(at, "a number with an exponent", "must be the user's id with all digits, as text (role user)")
    return _WHOLE_DECIMAL.sub(r"\1", name)


# Turns.

_JSON_TURNS = "must be a JSON list of turns (written by json.dumps, not by str or pandas)"


def read_messages(value: object, *, at: str) -> str:
    """Convert a conversation to canonical JSON: a list of {"role": "system", "user" or "assistant", "content": text}.

    An answer that is excluded from training also has "train": false.  Accepted forms are turns with `role` and
    `content` (OpenAI) or `from` and `value` (ShareGPT), an object with a list of each (Hugging Face), and JSON text of
    any of these forms.  An optional system turn comes first; then user and assistant turns alternate.

    Raises:
        DataError: the value is not such a conversation.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(at, "text that is not JSON", f"{_JSON_TURNS} (role messages)") from None
    value = convert_columns_to_rows(value)
    if not isinstance(value, list):
        raise DataError(at, name_json_type(value), "must be a list of turns (role messages)")
    turns = _read_turns(value, at=at)
    roles = [turn["role"] for turn in turns]
    first = int(roles[:1] == ["system"])
    for place in range(first, len(roles)):
        wanted = ("user", "assistant")[(place - first) % 2]
        if roles[place] != wanted:
            bound = f"must be {wanted}: user and assistant must alternate, after at most one system turn"
            raise DataError(f"{at}, turn {place + 1}", roles[place], bound)
    return to_compact_json(turns)


def read_continuation(value: object, at: str) -> str:
    """Convert the continuation of a prompt or a conversation to text: turns to canonical JSON, and text unchanged."""
    value = convert_columns_to_rows(value)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value:
        return to_compact_json(_read_turns(value, at=at))
    if not isinstance(value, str):
        raise DataError(at, name_json_type(value), "must be text, or a list of at least one turn")
    if not value.strip():
        raise DataError(at, "blank", "must not be blank, because it is the text that the model learns")
    try:
        turns = _parse_turns_text(value)
    except RecursionError:  # read as text, because whether it parses as turns would depend on the stack depth
        raise DataError(at, "nested brackets", "must be text, or a list of turns") from None
    if turns is None and _PRINTED_TURNS.match(value):
        raise DataError(at, "text that is not JSON", _JSON_TURNS)
    return value if turns is None else to_compact_json(turns)


def parse_continuation(text: str) -> list[dict[str, Any]] | None:
    """Parse the turns that `read_continuation` stored in a `chosen` or `rejected` field; None for a plain text."""
    if not text.startswith(_WRITTEN_TURNS):
        return None
    with suppress(RecursionError):  # turns in this form are never deeply nested
        return _parse_turns_text(text)
    return None


def guess_turns(value: object) -> list[dict[str, Any]]:
    """Return the turns, valid or not, in a value or its JSON text; empty if the value does not look like turns."""
    if isinstance(value, str) and _PRINTED_TURNS.match(value):
        return [{"role": "printed"}]  # reading it in a run raises a specific error
    if isinstance(value, str) and _LIKE_TURNS.match(value):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    value = convert_columns_to_rows(value)
    listed = value if isinstance(value, list) else [value]
    turns = [turn for turn in listed if isinstance(turn, dict) and {"role", "from"} & set(turn)]
    return turns if len(turns) == len(listed) else []


def parse_speaker_role(name: object) -> str:
    """Map the name of a speaker to `system`, `user` or `assistant`; an unknown name is returned in lower case."""
    speaker = str(name).strip().lower()
    return _SPEAKERS.get(speaker, speaker)


def _parse_turns_text(text: str) -> list[dict[str, Any]] | None:
    if not _LIKE_TURNS.match(text):
        return None
    with suppress(DataError):
        return _read_turns(parse_json_list(text.lstrip()) or [None], at="")
    return None


def _read_turns(values: Sequence[object], *, at: str) -> list[dict[str, Any]]:
    return [_read_turn(turn, at=f"{at}, turn {number}") for number, turn in enumerate(values, 1)]


def _read_turn(turn: object, *, at: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise DataError(at, name_json_type(turn), "must be an object with role and content, or from and value")
    # In a table with turns of both forms, each turn has nulls in the columns of the other form.
    who, what = ("from", "value") if turn.get("role") is None and "from" in turn else ("role", "content")
    if who not in turn or what not in turn:
        raise DataError(at, "no speaker or no text", "must have role and content, or from and value")
    speaker, content = turn[who], turn[what]
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text", content)  # a list with a single text part
    role = parse_speaker_role(speaker)
    calls = [name for name in _CALLS if turn.get(name)]
    if calls:
        raise DataError(f"{at}, {calls[0]}", "a tool call", "must be absent: tool turns are not supported")
    if role not in _SPEAKERS.values():
        known = ", ".join(_SPEAKERS)
        raise DataError(f"{at}, {who}", "an unknown speaker", f"must be one of {known}: tool turns are not supported")
    if not isinstance(content, str):
        bound = "must be text, or a list with one text part: images and other parts are not supported"
        raise DataError(f"{at}, {what}", name_json_type(content), bound)
    if role != "assistant":
        return {"role": role, "content": content}
    if not content.strip():
        raise DataError(f"{at}, {what}", "blank", "must not be blank, because it is the text that the model learns")
    # Training weights in the formats of other programs.
    for mark in _PARTS_TRAINED:
        if turn.get(mark):
            raise DataError(f"{at}, {mark}", "weights of parts", "is not supported: the model learns whole answers")
    weights = [(mark, turn[mark]) for mark in _TRAINED if not is_null(turn.get(mark))]
    for mark, value in weights:
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"{at}, {mark}", "an unknown weight", "must be 0 or 1, false or true")
    return {"role": role, "content": content} | ({} if all(value for _, value in weights) else {"train": False})


# Labels and numbers.


def read_labels(value: object, at: str) -> str:
    """Convert the labels of a multi-label record to text: a list to JSON, and a text unchanged.

    An empty label set is `[]` or a blank text; null is an error, because it means that the record was not labeled.  A
    list may also be text, as JSON or as printed by Python, or have the form of another program (`convert_labels`).  It
    is rewritten as a flat list: the maximum nesting depth depends on the parser, and `split_labels` must find the same
    labels.
    """
    value = convert_labels(value, at)
    listed = parse_list(value)
    if listed is None:
        return str(value).strip()
    if not all(type(item) is int or is_integral(item) or (isinstance(item, str) and item.strip()) for item in listed):
        raise DataError(at, name_json_type(value), "must be text or a list of texts or whole numbers (role labels)")
    labels = [item.strip() if isinstance(item, str) else str(int(item)) for item in listed]
    if len(set(labels)) < len(labels):
        bound = "must list each label once (role labels); instead of a vector of 0 and 1, use the labels' names"
        raise DataError(at, "a duplicate label", bound)
    return to_compact_json(labels)


def split_labels(text: str, *, separator: str) -> tuple[str, ...]:
    """Split a field of the role `labels` into its labels.

    >>> split_labels("late; damaged", separator=";")
    ('late', 'damaged')
    >>> split_labels('["late","damaged"]', separator=";")
    ('late', 'damaged')
    """
    listed = parse_json_list(text)
    return tuple(name for label in (text.split(separator) if listed is None else listed) if (name := label.strip()))


def read_number(value: object, at: str, *, role: str = "target") -> str:
    """Convert a finite number to text, in the format of Python's repr."""
    number = math.nan
    if type(value) in (int, float) or (isinstance(value, str) and _is_number(value.strip())):
        with suppress(OverflowError):
            number = float(cast(float | str, value))
    if not math.isfinite(number):
        kind = "text that is not a number" if isinstance(value, str) else name_json_type(value)
        raise DataError(at, kind, f"must be a finite number, with a decimal point (role {role})")
    return repr(number)


def parse_arrival_month(value: object, at: str) -> str:
    """Return the month of an ISO date, such as "2026-03", or "" for any other value.

    This function never raises, because dates are read after a round is charged, and no record may stop the round.

    >>> [parse_arrival_month(date, "") for date in ("2026-03-14 09:30", "2026-03", "14.3.2026")]
    ['2026-03', '2026-03', '']
    """
    day = value if isinstance(value, date) else None
    if isinstance(value, str):
        text = value.strip()[:_LONGEST_DATE]
        with suppress(ValueError):
            day = datetime.fromisoformat(f"{text}-01" if _MONTH.fullmatch(text) else text)
    return "" if day is None else f"{day.year:04}-{day.month:02}"


def read_feature(value: object, at: str) -> str:
    """Convert a feature to text: a number, a category name, a JSON list of numbers, or "" if the value is missing."""
    if is_missing(value):
        return ""
    if isinstance(value, list):
        return json.dumps([float(read_number(item, at, role="feature")) for item in value])
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(int(value)) if type(value) is int or is_integral(value) else read_number(value, at, role="feature")
    return normalize_category(
        _read_text_value(value, "feature", accepted="a number, a text or a list of numbers", at=at).strip()
    )


def normalize_category(text: str) -> str:
    """Normalize the spelling of a category as in JSON: 1.0 becomes 1, and True or TRUE becomes true."""
    return text.lower() if text.lower() in ("true", "false") else _WHOLE_DECIMAL.sub(r"\1", text)


def parse_numbers(text: str, at: str) -> list[float]:
    """Parse the numbers in a record's field for a column of lists.

    Raises:
        DataError: the field is not a list of numbers.
    """
    listed = parse_list(text)
    if listed is None:
        raise DataError(at, "not a list", "must be a JSON list of numbers, such as [0.5, 1] (role feature)")
    if all(
        type(number) is float and math.isfinite(number) for number in listed
    ):  # fast path for the output of `read_feature`, which may have thousands of numbers
        return listed
    return [float(read_number(number, at, role="feature")) for number in listed]


def _is_number(text: str) -> bool:
    return len(text) <= _LONGEST_NUMBER and NUMBER.fullmatch(text) is not None


def is_localized_number(value: object) -> bool:
    """Whether a text is a number in a format that fedtune does not parse, such as 3,5 or $1,200 or 50%."""
    return isinstance(value, str) and not _is_number(value.strip()) and bool(_OTHER_NUMBER.fullmatch(value.strip()))


_READERS: Mapping[str, Callable[[object, str], str]] = {
    "messages": lambda value, at: read_messages(value, at=at),
    "labels": read_labels,
    "target": read_number,
    "time": lambda value, at: read_number(value, at, role="time"),
    "image": read_image_field,
    "arrival": parse_arrival_month,
    "tokens": read_words,
    "tags": lambda value, at: read_words(value, at, "tags"),
    "spans": read_spans,
    **dict.fromkeys(TURN_ROLES, read_continuation),
}
"""Functions that convert a file's value to text, for roles whose values may have another type."""


def find_misplaced_spans(fields: Mapping[str, str]) -> list[str]:
    """Guess the offset convention of a record whose spans start or end inside words, such as "(ends seem inclusive)".

    The result is empty if no span splits a word; otherwise it has one item, which is blank for an unknown convention.
    """
    places = [place for span in json.loads(fields.get("spans", "[]")) if len(span) == 3 for place in span[:2]]
    text, within_word = fields.get("text", ""), re.compile(rf"(?<=[^\W_{UNSPACED}])(?=[^\W_{UNSPACED}])")

    def splits_word(places: Sequence[int]) -> bool:
        return any(within_word.match(text, place) for place in places)

    ways = {"(ends seem inclusive)": [place + number % 2 for number, place in enumerate(places)]}
    for what, encoding in (("bytes", "utf-8"), ("units of UTF-16", "utf-16-le")):
        raw, size = text.encode(encoding), len("a".encode(encoding))
        ways[f"({what} seem to be counted)"] = [len(raw[: size * place].decode(encoding, "ignore")) for place in places]
    return [next((way for way, some in ways.items() if not splits_word(some)), "")] if splits_word(places) else []
