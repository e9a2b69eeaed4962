"""Records out of the rows of data files, each checked by itself.

There is no step over a whole file (no shuffling, balancing or duplicate removal), so no record changes what becomes of
another.  Error messages name file, line and column but never quote a record's text: they end up in logs.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard, cast

from fedtune.data.faults import Faults
from fedtune.data.formats import raw_rows, require_file, what_is
from fedtune.data.text_rows import GROUP, Row, absent, at_line, json_type
from fedtune.spec import DataError

# Roles whose values are names out of a small set: integers are taken as text, spaces around them dropped.
CATEGORY_ROLES = frozenset({"label", "site", "user"})
NO_TEXT = CATEGORY_ROLES | {"labels", "target", GROUP}
"""Roles whose values are no texts that somebody wrote."""
_SAID = ("chosen", "rejected")
"""Roles whose values are texts or turns."""
OPTIONAL_ROLES = frozenset({"input", "system", GROUP})
"""Roles that a record may lack, or have blank."""
_BETWEEN_NAMES, SEVERAL_USERS = ",;|", "a list of users"
"""What lists of names are written with, and so no part of a user's id; what a message calls a record of several."""
_SPEAKERS = {"system": "system", "user": "user", "human": "user"} | dict.fromkeys(
    ("assistant", "gpt", "bot", "model"), "assistant"
)
_CHUNK_ROWS = 256
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LONGEST_NUMBER = 400
"""Characters of a number: every float has a shorter one, and no text may keep a site busy."""
_LIKE_TURNS = re.compile(r"\s*\[\s*\{")
"""How turns as JSON text begin; other texts are not parsed, which takes seconds for a long one."""
_WRITTEN_TURNS = '[{"role":"'
"""The same as this file writes them."""
Fault: TypeAlias = Callable[["Record"], DataError | None]
"""What of a record its task cannot use; None: nothing."""


@dataclass(frozen=True, slots=True)
class Record:
    """One example as it was read.

    Attributes:
        fields: role (`text`, `label`, `prompt`, ...) to text.
        file: where it was read, for messages only; no part of what the record is.
        line: the line there on which it starts, counted from 1.
    """

    fields: Mapping[str, str]
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)

    def at(self, role: str) -> str:
        """Name one field in a message: `train.jsonl:12, label`."""
        return f"{at_line(self.file, self.line)}, {role}" if self.file else role

    def texts(self) -> Iterator[tuple[str, str]]:
        """The texts in it, each with its role; of a conversation each turn's."""
        for role, text in self.fields.items():
            if role == "messages":
                yield from ((role, turn["content"]) for turn in json.loads(text))
            elif role in _SAID and (turns := turns_said(text)) is not None:
                yield from ((role, turn["content"]) for turn in turns)
            elif role not in NO_TEXT:
                yield role, text

    @property
    def answer(self) -> str:
        """What its text is to be told apart by: a label, labels or a number; nothing where it has none."""
        return next((self.fields[role] for role in ("label", "labels", "target") if role in self.fields), "")


def record_key(record: Record) -> bytes:
    """The canonical bytes of a record alone: equal fields but for its group, equal bytes, and otherwise different ones.

    Whether scores are told by group so decides about no record.
    """
    fields = {role: value for role, value in record.fields.items() if role != GROUP}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def resolve_file(name: str, roots: Sequence[Path] = (), *, key: str = "data file") -> Path:
    """Find a data file: as given from the working directory, else under the first of `roots` that has it.

    Args:
        name: relative or absolute path.
        roots: folders to look in after the working directory.
        key: the setting that named the file, for the message.

    Raises:
        DataError: when there is no such file, or a folder, a pipe or the like in its place.
    """
    folders = list(dict.fromkeys([Path.cwd(), *roots]))
    found = {folder / name: what_is(folder / name) for folder in folders}
    for path, other in found.items():
        if other is None:
            return path
    for path, other in found.items():
        if other != "no such file":
            require_file(path, key=key, value=name)
    raise DataError(key, name, f"no such file, looked in {', '.join(map(str, folders))}")


def read_records(path: Path, columns: Mapping[str, str]) -> list[Record]:
    """Read a file's records, in file order.

    Args:
        path: as `iter_records` takes it.
        columns: role to column name.

    Raises:
        DataError: as `iter_records`; also when there is no record at all.
    """
    records = list(iter_records(path, columns))
    if not records:
        raise without_records(path)
    return records


def chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Some records at a time."""
    iterator = iter(records)
    while chunk := list(islice(iterator, _CHUNK_ROWS)):
        yield chunk


NO_VALUE = "(none)"
"""Of a record that has no value in a column, or a list or an object."""


def column_values(records: Sequence[Record], column: str, *, key: str) -> list[str]:
    """What a column of their files says of records that were read before, as text; `NO_VALUE` where it says nothing.

    Args:
        records: with the file and the line of each.
        column: one that needs no role.
        key: what asked for it, for messages.

    Raises:
        DataError: no row of a file has such a column.
    """
    values: dict[tuple[str, int], str] = {}
    for file in dict.fromkeys(record.file for record in records):
        present: dict[str, None] = {}
        for line, row in raw_rows(Path(file)):
            if isinstance(row, DataError):
                continue
            present |= dict.fromkeys(row)
            value = row.get(column)
            if isinstance(value, str | int | float) and str(value).strip():
                values[file, line] = str(int(value) if _is_whole(value) else value).strip()
        if column not in present:
            names = ", ".join(repr(name) for name in present)
            raise DataError(key, column, f"must be a column of {file}, which has {names}")
    return [values.get((record.file, record.line), NO_VALUE) for record in records]


def without_records(path: Path) -> DataError:
    """The error about a file that holds no record."""
    found = "an empty file" if path.is_file() and not path.stat().st_size else "no records"
    return DataError(str(path), found, "must hold at least one record")


def iter_records(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """Stream the records of a file.

    Args:
        path: as `fedtune.data.formats.raw_rows` takes it; columns that `columns` does not name are skipped.
        columns: role to column name, the columns that every record must have.

    Raises:
        DataError: when the file or a row cannot be read, or when a value is absent, blank, or neither text nor (for a
            label, a site or a user) an integer, nor (for messages) a conversation.  It is about the first such row,
            and counts the rest, since the file is read to its end.
    """
    faults = Faults()
    for line, found in judged(path, columns):
        if isinstance(found, DataError):
            faults.add(found, line)
        elif not faults:
            yield found
    faults.require_none()


def usable_records(
    path: Path,
    columns: Mapping[str, str],
    *,
    fault: Fault = lambda record: None,
    faults: Faults | None = None,
    lenient: bool = True,
) -> Iterator[Record]:
    """The same, without the records that cannot be used; so no record ends the reading, whatever it holds.

    Left out is what lacks a value, has more than 16 MiB, is not UTF-8, is no JSON object or has a number or a depth
    that Python does not read, is a table's row with broken quotes or another number of cells than the header, or a
    conversation whose turns are not as `messages_of` wants them.

    Each record is judged by itself, so that one more or less changes nothing about the others.  A row is cut out before
    it is judged: a table's ends at the first line end outside quotes, an array's element at the comma behind it.  Only
    a quote or bracket that is never closed can take other rows along; no text of a record does that in a file whose
    writer doubles quotes (RFC 4180) or escapes them (JSON), and where the writer does not, rows cannot be told apart.

    Args:
        path: as `iter_records` takes it.
        columns: role to column name.
        fault: what of a record its task cannot use.
        faults: counts the rows that are left out.
        lenient: as `raw_rows` has it.

    Raises:
        DataError: for what is a fault of the file and of no record, as `raw_rows` says.
    """
    for line, found in judged(path, columns, fault=fault, lenient=lenient):
        if isinstance(found, Record):
            yield found
        elif faults is not None:
            faults.add(found, line)


def judged(
    path: Path, columns: Mapping[str, str], *, fault: Fault = lambda record: None, lenient: bool = False
) -> Iterator[tuple[int, Record | DataError]]:
    """(line, record) of each row of a file, or in the record's place what is wrong with it; see `usable_records`."""
    for line, row in raw_rows(path, columns, lenient=lenient):
        if isinstance(row, DataError):
            yield line, row
            continue
        try:
            record = record_of(row, columns, file=str(path), line=line)
        except DataError as error:
            yield line, error
        else:
            yield line, fault(record) or record


def record_of(row: Row, columns: Mapping[str, str], *, file: str, line: int) -> Record:
    """One row as a record.

    Args:
        row: column to value.
        columns: role to column name.
        file: where it was read, for messages.
        line: there.

    Raises:
        DataError: a value is absent, or not what its role needs.
    """
    at = at_line(file, line)
    return Record({role: _field(row, column, role=role, at=at) for role, column in columns.items()}, file, line)


def _field(row: Row, column: str, *, role: str, at: str) -> str:
    """The checked text of one field."""
    if role in OPTIONAL_ROLES and row.get(column) is None:
        return ""
    if column not in row:
        raise absent(row, column, role=role, at=at)
    value, at = row[column], f"{at}, column {column!r}"
    if value is None:
        raise DataError(at, "null", f"must not be null (role {role})")
    if role in _READ_ALONE:
        text = _READ_ALONE[role](value, at)
        _require_unicode(text, at=at, role=role)
        return text
    if role == "user":
        _require_one_user(value, at=at)
    if role in CATEGORY_ROLES and (type(value) is int or _is_whole(value)):
        value = str(int(value))
    if not isinstance(value, str):
        accepted = "text or an integer" if role in CATEGORY_ROLES else "text"
        raise DataError(at, json_type(value), f"must be {accepted} (role {role})")
    if not value.strip():
        if role in OPTIONAL_ROLES:
            return ""
        raise DataError(at, "blank", f"must not be blank (role {role})")
    _require_unicode(value, at=at, role=role)
    return value.strip() if role in CATEGORY_ROLES else value


def _group(value: object, at: str) -> str:
    """The group that a value names, in one form of its letters; "" for what names none, and leaves no record out."""
    if isinstance(value, int) or _is_whole(value):
        value = str(value).lower() if isinstance(value, bool) else str(int(value))
    return unicodedata.normalize("NFC", value.strip()) if isinstance(value, str) and value.isprintable() else ""


def _is_whole(value: object) -> TypeGuard[float]:
    """Whether a decimal is a whole number: tables turn all of a column's into decimals where one record has none.

    Those beyond 2**53 are not taken: two names may have become one there.
    """
    return isinstance(value, float) and value.is_integer() and abs(value) < 2**53


def messages_of(value: object, *, at: str) -> str:
    """A conversation as canonical JSON: a list of {"role": "system", "user" or "assistant", "content": text}.

    Args:
        value: turns with `role` and `content` (as OpenAI writes them) or with `from` and `value` (ShareGPT), or the
            same as JSON text.  A first turn of the system may lead; then user and assistant take turns.
        at: where it was read, for messages.

    Raises:
        DataError: it is no such conversation.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(at, "text that is no JSON", "must be a JSON list of turns (role messages)") from None
    if not isinstance(value, list):
        raise DataError(at, json_type(value), "must be a list of turns (role messages)")
    turns = _turns(value, at=at)
    _require_alternation([turn["role"] for turn in turns], at=at)
    return _as_json(turns)


def said_of(value: object, at: str) -> str:
    """What is said after a prompt or a conversation: a text as it is, or turns as canonical JSON, in any order.

    A turn alone is one of a list.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value:
        return _as_json(_turns(value, at=at))
    if not isinstance(value, str):
        raise DataError(at, json_type(value), "must be text, or a list of at least one turn")
    if not value.strip():
        raise DataError(at, "blank", "must not be blank: it is what the model learns to write, or not to")
    try:
        turns = _turns_in(value)
    except RecursionError:  # taken as text here, it might be turns where the stack is less deep
        raise DataError(at, "brackets in brackets", "must be text, or a list of turns") from None
    return value if turns is None else _as_json(turns)


def turns_said(text: str) -> list[dict[str, str]] | None:
    """The turns in a field of the roles `chosen` and `rejected`, as `said_of` wrote it; None: it is a text."""
    if not text.startswith(_WRITTEN_TURNS):
        return None
    with suppress(RecursionError):  # turns that were written once are not deep
        return _turns_in(text)
    return None


def _turns_in(text: str) -> list[dict[str, str]] | None:
    if not _LIKE_TURNS.match(text):
        return None
    with suppress(DataError):
        return _turns(_json_list(text.lstrip()) or [None], at="")
    return None


def _turns(values: Sequence[object], *, at: str) -> list[dict[str, str]]:
    return [_turn(turn, at=f"{at}, turn {number}") for number, turn in enumerate(values, 1)]


def _as_json(values: Sequence[object]) -> str:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False)


def _turn(turn: object, *, at: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise DataError(at, json_type(turn), "must be an object with role and content, or from and value")
    # A table has one set of columns: beside a turn of the other form, a turn has nulls under that form's names.
    who, what = ("from", "value") if turn.get("role") is None and "from" in turn else ("role", "content")
    if who not in turn or what not in turn:
        raise DataError(at, "no speaker or no text", "must have role and content, or from and value")
    speaker, content = turn[who], turn[what]
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(_SPEAKERS)
        raise DataError(f"{at}, {who}", "another speaker", f"must be one of {known}: turns of tools are not supported")
    if not isinstance(content, str):
        raise DataError(f"{at}, {what}", json_type(content), "must be text")
    if role == "assistant" and not content.strip():
        raise DataError(f"{at}, {what}", "blank", "must not be blank: it is what the model learns to write")
    return {"role": role, "content": content}


def _require_alternation(roles: Sequence[str], *, at: str) -> None:
    first = 1 if roles[:1] == ["system"] else 0
    for place in range(first, len(roles)):
        wanted = ("user", "assistant")[(place - first) % 2]
        if roles[place] != wanted:
            bound = f"must be {wanted}: user and assistant take turns, after at most one turn of the system"
            raise DataError(f"{at}, turn {place + 1}", roles[place], bound)


def labels_of(value: object, at: str) -> str:
    """The labels of a record that may have several: a JSON list of texts, or the text as it is.

    No label is `[]` or a blank text; null would be a record of which nobody said.  Lists are written anew, flat: how
    deep one may be depends on who reads it, and `split_labels` must find what was found here.

    Args:
        value: of the cell.
        at: where it was read, for messages.

    Raises:
        DataError: it is no text, number or list of these.
    """
    listed: Any
    try:
        listed = _json_list(value.strip() or "[]") if isinstance(value, str) else value
    except RecursionError:
        listed = [None]
    if isinstance(value, str) and listed is None:
        return value.strip()
    listed = listed if isinstance(listed, list) else [listed]
    if not all(type(one) is int or _is_whole(one) or (isinstance(one, str) and one.strip()) for one in listed):
        raise DataError(at, json_type(value), "must be a text or a list of texts or whole numbers (role labels)")
    return _as_json([one.strip() if isinstance(one, str) else str(int(one)) for one in listed])


def _json_list(text: str) -> list[Any] | None:
    """A text as the JSON list that it is; None: it is none."""
    if not text.startswith("["):
        return None
    try:
        found: list[Any] = json.loads(text)
    except ValueError:
        return None
    return found


def split_labels(text: str, *, separator: str) -> tuple[str, ...]:
    """The labels of a field of the role `labels`, as a record has it.

    >>> split_labels("late; damaged", separator=";")
    ('late', 'damaged')
    >>> split_labels('["late","damaged"]', separator=";")
    ('late', 'damaged')
    """
    listed = _json_list(text)
    return tuple(one for label in (text.split(separator) if listed is None else listed) if (one := label.strip()))


def number_of(value: object, at: str) -> str:
    """The number in the role `target`, as Python writes it.

    Raises:
        DataError: it is none.
    """
    number = math.nan
    if type(value) in (int, float) or (isinstance(value, str) and _is_number(value.strip())):
        with suppress(OverflowError):
            number = float(cast(float | str, value))
    if not math.isfinite(number):
        kind = "text that is no number" if isinstance(value, str) else json_type(value)
        raise DataError(at, kind, "must be a finite number, with a point before decimals (role target)")
    return repr(number)


def _is_number(text: str) -> bool:
    return len(text) <= _LONGEST_NUMBER and _NUMBER.fullmatch(text) is not None


_READ_ALONE: Mapping[str, Callable[[object, str], str]] = {
    "messages": lambda value, at: messages_of(value, at=at),
    "labels": labels_of,
    "target": number_of,
    **dict.fromkeys(_SAID, said_of),
    GROUP: _group,
}
"""Roles whose values need not be texts in a file, and how they become some."""


def _require_one_user(value: object, *, at: str) -> None:
    """Refuse a record of several users: it would count for one of them, and the others would not be protected."""
    several = isinstance(value, list) or (isinstance(value, str) and any(mark in value for mark in _BETWEEN_NAMES))
    if several:
        marks = " ".join(_BETWEEN_NAMES)
        bound = f"must name one user (role user): a value with one of {marks} is read as several, and the record of"
        raise DataError(at, SEVERAL_USERS, f"{bound} several has no place in training by user (docs/user_level.md)")


def _require_unicode(text: str, *, at: str, role: str) -> None:
    """Refuse what cannot be encoded: JSON may escape half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(at, "half a surrogate pair", f"must be valid Unicode (role {role})") from None
