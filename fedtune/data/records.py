"""Conversion of data rows to records, with separate checks for each row.

No step covers a whole file (no shuffling, balancing or duplicate removal), so no record affects another.  Error
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
from fedtune.data.values import ANSWERS, FEATURE, OPTIONAL_ROLES, is_integral, is_missing, read_value, split_texts
from fedtune.spec import DataError

_CHUNK_ROWS = 256
IN_MEMORY = "in-memory"
"""Name of the virtual folder, in settings, of records that the caller of `fedtune.simulate` passes in memory."""
memory_folder: ContextVar[Path | None] = ContextVar("memory_folder", default=None)
"""Private folder that contains the `IN_MEMORY` folder during a run on in-memory records."""
Fault: TypeAlias = Callable[["Record"], DataError | None]  # record -> the reason why a task cannot use it, or None


@dataclass(frozen=True, slots=True)
class Record:
    """One example from a data file."""

    # role (`text`, `label`, `prompt`, ...) to text; excluded from every repr
    fields: Mapping[str, str] = field(repr=False)
    # the source file, for messages and scores by site; not part of the record's identity
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)  # first line in the file, from 1

    def at(self, role: str) -> str:
        """Format the position of a field for messages: `train.jsonl:12, label`."""
        return f"{format_location(self.file, self.line)}, {role}" if self.file else role

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield the record's texts with their roles; a conversation yields one text per turn."""
        for role, text in self.fields.items():
            yield from ((role, part) for part in split_texts(role, text))

    @property
    def full_text(self) -> str:
        """All texts of the record joined into one text; for a record without text, its features or image as JSON."""
        texts = [text for _, text in self.texts()]
        if not texts:  # as JSON, which shows which of two features has no value
            texts = [json.dumps([text for role, text in self.fields.items() if role.startswith((FEATURE, "image"))])]
        return " ".join(" ".join(texts).split())

    @property
    def target_key(self) -> str:
        """Non-text targets by role, as JSON; records with different targets are not duplicates."""
        return json.dumps({role: text for role, text in self.fields.items() if role in ANSWERS}, sort_keys=True)


def record_key(record: Record) -> bytes:
    """Serialize a record's fields to canonical JSON bytes; two results are equal exactly if the fields are equal."""
    return json.dumps(dict(record.fields), sort_keys=True, separators=(",", ":")).encode("ascii")


def resolve_file(name: str, roots: Sequence[Path] = (), *, key: str = "data file") -> Path:
    """Resolve the name of a data file relative to the working directory, or else to the first of `roots` that has it.

    A name that starts with `IN_MEMORY` is looked up in `memory_folder` only.

    Raises:
        DataError: the data file does not exist.
    """
    if Path(name).parts[:1] == (IN_MEMORY,):
        if (folder := memory_folder.get()) is None or not (folder / name).exists():
            bound = "is no longer in memory: pass it again (sites= of simulate, data= of compare), or use files"
            raise DataError(key, name, bound)
        return folder / name
    folders = list(dict.fromkeys([Path.cwd(), *roots]))
    problems = {folder / name: describe_path(folder / name) for folder in folders}
    for path, problem in problems.items():
        if problem is None:
            return path
    for path, problem in problems.items():
        if problem != "no such file":
            require_data_file(path, key=key, value=name)
    raise DataError(key, name, f"no such file in {', '.join(map(str, folders))}")


def chunk_records(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records into lists of at most 256."""
    iterator = iter(records)
    while chunk := list(islice(iterator, _CHUNK_ROWS)):
        yield chunk


NO_VALUE = "(none)"  # the value of a record without a value in a column, or with a list or an object


def read_column_values(records: Sequence[Record], column: str, *, key: str, role: str = "") -> list[str]:
    """Read an additional column as text for loaded records; missing values become `NO_VALUE`.

    With a `role`, values are normalized as in a run, so that user ids match; without a role, numbers of any kind are
    also accepted.
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
                    values[file, line] = str(int(value) if is_integral(value) else value).strip()
        if column not in present:
            names = ", ".join(repr(name) for name in present)
            raise DataError(key, column, f"must be a column of {file}, which has {names}")
    return [values.get((record.file, record.line), NO_VALUE) for record in records]


def build_empty_file_error(path: Path) -> DataError:
    """Return the error for a file without records."""
    kind = "an empty file" if path.is_file() and not path.stat().st_size else "no records"
    return DataError(str(path), kind, "must contain at least one record")


def iter_records(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """Yield the records of a file in any format of `fedtune.data.formats.iter_raw_rows`, with `columns` (role to
    column).

    Raises:
        DataError: the file or a row cannot be read, or a value is missing, blank, or of the wrong type: neither text
            nor (for a label, a site or a user) an integer, nor (for messages) a conversation.  The error describes the
            first unusable row and counts the others.
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
    """Yield the records of a file like `iter_records`, but skip unusable records, so that no record's content stops the
    run.

    A row is skipped if it lacks a value, has more than 16 MiB, is not UTF-8, is not a JSON object, has a number or a
    nesting depth that Python cannot parse, has broken quotes or another number of cells than its table's header, or has
    an invalid conversation (`values.read_messages`).

    Each record is checked separately, so adding or removing one changes nothing for the others.  Rows are separated
    before they are checked: a table's row ends at the first line end outside quotes, an array's element at the comma
    after it.  Only an unclosed quote or bracket can swallow other rows.  No record's text contains one in a file whose
    writer doubles quotes (RFC 4180) or escapes them (JSON); without such quoting, rows cannot be separated reliably.

    Args:
        path: the file.
        columns: role to column.
        fault: returns the reason why the task cannot use a record, or None.
        faults: counts the skipped rows.
        lenient: as in `iter_raw_rows`.

    Raises:
        DataError: the file as a whole is unusable, as in `iter_raw_rows`.
    """
    for line, outcome in validate_rows(path, columns, fault=fault, lenient=lenient):
        if isinstance(outcome, Record):
            yield outcome
        elif faults is not None:
            faults.add(outcome, line)


def validate_rows(
    path: Path, columns: Mapping[str, str], *, fault: Fault = lambda record: None, lenient: bool = False
) -> Iterator[tuple[int, Record | DataError]]:
    """Yield (line, record) for each usable row of a file, and (line, error) for each unusable row; see
    `iter_usable_records`.
    """
    for line, row in iter_raw_rows(path, columns, lenient=lenient):
        if isinstance(row, DataError):
            yield line, row
            continue
        record = catch_row_error(format_location(path, line), parse_record, row, columns, file=str(path), line=line)
        yield line, record if isinstance(record, DataError) else fault(record) or record


def make_validator(read: Callable[[Record], object]) -> Callable[[Record], DataError | None]:
    """Return a validator: a function that returns the error that `read` raises for a record, or None."""

    def find_error(record: Record) -> DataError | None:
        target = catch_row_error(record.at("record"), read, record)
        return target if isinstance(target, DataError) else None

    return find_error


def parse_record(row: Row, columns: Mapping[str, str], *, file: str, line: int) -> Record:
    """Convert a row to a record, given `columns` (role to column).

    Raises:
        DataError: a value is missing or does not match its role.
    """
    at, fields = format_location(file, line), {}
    for role, column in columns.items():
        if role in OPTIONAL_ROLES and is_missing(row.get(column)):
            fields[role] = ""
        elif column not in row:
            raise build_missing_column_error(row, column, role=role, at=at)
        else:
            # A Label Studio task without annotations is unlabeled, which differs from a text without spans.
            of_studio = role == "spans" and isinstance(row.get(columns.get("text", "")), dict)
            value = None if of_studio and row[column] == [] else row[column]
            fields[role] = read_value(value, role, at=f"{at}, column {column!r}")
    return Record(fields, file, line)
