"""Conversion of data rows to records, each checked separately.

There is no step over a whole file (no shuffling, balancing or duplicate removal), so no record affects another.  Error
messages name file, line and column but never quote a record's text, because messages end up in logs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from fedtune.data.bad_rows import Faults
from fedtune.data.formats import describe_path, iter_raw_rows, require_data_file
from fedtune.data.text_rows import Row, build_missing_column_error, catch_row_error, format_location
from fedtune.data.values import ANSWERS, FEATURE, OPTIONAL_ROLES, is_missing, is_whole, read_value, split_texts
from fedtune.spec import DataError

_CHUNK_ROWS = 256
IN_MEMORY = "in-memory"
"""The folder in a setting that names records which the caller of `fedtune.simulate` has in memory."""
memory_folder: ContextVar[Path | None] = ContextVar("memory_folder", default=None)
"""The private folder that contains `IN_MEMORY` while such a run is in progress."""
Fault: TypeAlias = Callable[["Record"], DataError | None]  # record -> the reason why a task cannot use it; None: it can


@dataclass(frozen=True, slots=True)
class Record:
    """One example, as read from a data file."""

    # role (`text`, `label`, `prompt`, ...) to text; no repr shows it, nor one of what holds records
    fields: Mapping[str, str] = field(repr=False)
    # the file it was read from, for messages and scores by site; not part of the record's identity
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)  # the line on which it starts, counted from 1

    def at(self, role: str) -> str:
        """Format the position of a field for messages: `train.jsonl:12, label`."""
        return f"{format_location(self.file, self.line)}, {role}" if self.file else role

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield the record's texts with their roles; a conversation yields one text per turn."""
        for role, text in self.fields.items():
            yield from ((role, one) for one in split_texts(role, text))

    @property
    def full_text(self) -> str:
        """All texts of the record joined into one, or its features or image if it has no text."""
        found = [text for _, text in self.texts()]
        if not found:  # as JSON: which of two features has no value is told by its place
            found = [json.dumps([text for role, text in self.fields.items() if role.startswith((FEATURE, "image"))])]
        return " ".join(" ".join(found).split())

    @property
    def target_key(self) -> str:
        """The record's targets other than text, as JSON by role; records with different targets are not duplicates."""
        return json.dumps({role: text for role, text in self.fields.items() if role in ANSWERS}, sort_keys=True)


def record_key(record: Record) -> bytes:
    """Return a record's canonical bytes, which are equal for two records if and only if their fields are equal."""
    return json.dumps(dict(record.fields), sort_keys=True, separators=(",", ":")).encode("ascii")


def resolve_file(name: str, roots: Sequence[Path] = (), *, key: str = "data file") -> Path:
    """Find a data file: relative to the working directory, or else below the first of `roots` that contains it.

    A name that starts with `IN_MEMORY` is looked up in `memory_folder` alone.

    Raises:
        DataError: there is no such data file.
    """
    if Path(name).parts[:1] == (IN_MEMORY,):
        if (own := memory_folder.get()) is None or not (own / name).exists():
            bound = "was in memory, and fedtune keeps no copy: pass the same records again (sites=, validation=, test=)"
            raise DataError(key, name, bound)
        return own / name
    folders = list(dict.fromkeys([Path.cwd(), *roots]))
    found = {folder / name: describe_path(folder / name) for folder in folders}
    for path, other in found.items():
        if other is None:
            return path
    for path, other in found.items():
        if other != "no such file":
            require_data_file(path, key=key, value=name)
    raise DataError(key, name, f"no such file, looked in {', '.join(map(str, folders))}")


def chunk_records(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records into lists of at most 256."""
    iterator = iter(records)
    while chunk := list(islice(iterator, _CHUNK_ROWS)):
        yield chunk


NO_VALUE = "(none)"  # the value of a record that has none in a column, or that has a list or an object there


def read_column_values(records: Sequence[Record], column: str, *, key: str, role: str = "") -> list[str]:
    """Read the values of one more column, as text, for records that were already read; `NO_VALUE` if a value is
    missing.

    With a `role`, values are read as in a run, so that a user has the same id; without one, any number is accepted too.
    """
    values: dict[tuple[str, int], str] = {}
    for file in dict.fromkeys(record.file for record in records):
        present: dict[str, None] = {}
        for line, row in iter_raw_rows(Path(file)):
            if isinstance(row, DataError):
                continue
            present |= dict.fromkeys(row)
            value = row.get(column)
            with suppress(DataError):
                if role:
                    values[file, line] = read_value(value, role, at="")
                elif isinstance(value, str | int | float) and not is_missing(value):
                    values[file, line] = str(int(value) if is_whole(value) else value).strip()
        if column not in present:
            names = ", ".join(repr(name) for name in present)
            raise DataError(key, column, f"must be a column of {file}, which has {names}")
    return [values.get((record.file, record.line), NO_VALUE) for record in records]


def build_empty_file_error(path: Path) -> DataError:
    """Return the error for a file without records."""
    found = "an empty file" if path.is_file() and not path.stat().st_size else "no records"
    return DataError(str(path), found, "must contain at least one record")


def iter_records(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """Yield the records of a file that `fedtune.data.formats.iter_raw_rows` can read, with the given `columns` (role to
    column).

    Raises:
        DataError: the file or a row cannot be read, or a value is missing, blank, or of the wrong type: neither text
            nor (for a label, a site or a user) an integer, nor (for messages) a conversation.  The error describes the
            first such row and counts the others.
    """
    faults = Faults()
    for record in iter_usable_records(path, columns, faults=faults, lenient=False):
        if not faults:
            yield record
    faults.raise_if_any()


def iter_usable_records(
    path: Path,
    columns: Mapping[str, str],
    *,
    fault: Fault = lambda record: None,
    faults: Faults | None = None,
    lenient: bool = True,
) -> Iterator[Record]:
    """Yield the records of a file like `iter_records`, but skip unusable records, so that no record's content stops
    reading.

    A row is skipped if it lacks a value, has more than 16 MiB, is not UTF-8, is not a JSON object, has a number or a
    nesting depth that Python cannot parse, has broken quotes or another number of cells than its table's header, or has
    a conversation that `messages_of` rejects.

    Each record is judged separately, so that adding or removing one changes nothing for the others.  Rows are cut
    before they are judged: a table's row ends at the first line end outside quotes, an array's element at the comma
    after it. Only a quote or bracket that is never closed can swallow other rows.  No record's text does that in a file
    whose writer doubles quotes (RFC 4180) or escapes them (JSON); without such quoting, rows cannot be told apart.

    Args:
        path: the file.
        columns: role to column.
        fault: returns why the task cannot use a record, or None.
        faults: counts the skipped rows.
        lenient: as in `iter_raw_rows`.

    Raises:
        DataError: the file as a whole is unusable, as in `iter_raw_rows`.
    """
    for line, found in validate_rows(path, columns, fault=fault, lenient=lenient):
        if isinstance(found, Record):
            yield found
        elif faults is not None:
            faults.add(found, line)


def validate_rows(
    path: Path, columns: Mapping[str, str], *, fault: Fault = lambda record: None, lenient: bool = False
) -> Iterator[tuple[int, Record | DataError]]:
    """Yield (line, record) for each row of a file, or (line, error) if it is unusable; see `iter_usable_records`."""
    for line, row in iter_raw_rows(path, columns, lenient=lenient):
        if isinstance(row, DataError):
            yield line, row
            continue
        record = catch_row_error(format_location(path, line), parse_record, row, columns, file=str(path), line=line)
        yield line, record if isinstance(record, DataError) else fault(record) or record


def make_validator(read: Callable[[Record], object]) -> Callable[[Record], DataError | None]:
    """A function from a record to the error that `read` raises about it; None: nothing."""

    def find_error(record: Record) -> DataError | None:
        target = catch_row_error(record.at("record"), read, record)
        return target if isinstance(target, DataError) else None

    return find_error


def parse_record(row: Row, columns: Mapping[str, str], *, file: str, line: int) -> Record:
    """Convert a row to a record, with the `columns` (role to column).

    Raises:
        DataError: a value is missing or does not suit its role.
    """
    at, fields = format_location(file, line), {}
    for role, column in columns.items():
        if role in OPTIONAL_ROLES and is_missing(row.get(column)):
            fields[role] = ""
        elif column not in row:
            raise build_missing_column_error(row, column, role=role, at=at)
        else:
            # A task of Label Studio that nobody has annotated is no text without spans.
            of_studio = role == "spans" and isinstance(row.get(columns.get("text", "")), dict)
            value = None if of_studio and row[column] == [] else row[column]
            fields[role] = read_value(value, role, at=f"{at}, column {column!r}")
    return Record(fields, file, line)
