"""Records from JSON-lines and CSV files, plain or gzipped, with a schema check.

A file is read line by line and each record is checked by itself.  There is no step over a whole
file (no shuffling, balancing or duplicate removal), so no record changes what becomes of another.
Error messages name file, line and column but never quote a record's text: they end up in logs.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from fedtune.spec import DataError

# Roles whose values are names out of a small set: integers are taken as text, spaces around them dropped.
CATEGORY_ROLES = frozenset({"label", "site", "user"})
_MOST_BYTES = 1 << 24
"""Of a line: far above any record that a model reads."""
_BETWEEN_NAMES = ",;|"
"""What lists of names are written with, and so no part of a user's id."""
SEVERAL_USERS = "a list of users"
"""The value in the message about a record of several users."""


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
        return f"{_at(self.file, self.line)}, {role}" if self.file else role


def record_key(record: Record) -> bytes:
    """The canonical bytes of a record alone: equal fields, equal bytes, and different fields, different bytes."""
    return json.dumps(dict(record.fields), sort_keys=True, separators=(",", ":")).encode("ascii")


def resolve_file(name: str, roots: Sequence[Path] = (), *, key: str = "data file") -> Path:
    """Find a data file: as given from the working directory, else under the first of `roots` that has it.

    Args:
        name: relative or absolute path.
        roots: folders to look in after the working directory.
        key: the setting that named the file, for the message.

    Raises:
        DataError: when there is no such file.
    """
    folders = list(dict.fromkeys([Path.cwd(), *roots]))
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise DataError(key, name, f"no such file, looked in {', '.join(map(str, folders))}")


def read_records(path: Path, columns: Mapping[str, str], *, rows: int | None = None) -> list[Record]:
    """Read a file's records, in file order.

    Args:
        path: as `iter_records` takes it.
        columns: role to column name.
        rows: stop after the first so many.  For the lead's own files: in a site's private file a
            record before the cut would decide whether another is used (see `is_selected`).

    Raises:
        DataError: as `iter_records`; also when there is no record at all.
    """
    records = list(islice(iter_records(path, columns), rows))
    if not records:
        raise DataError(str(path), "no records", "must hold at least one record")
    return records


def iter_records(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """Stream the records of a `.jsonl` or `.csv` file, each optionally with `.gz` behind.

    Text is UTF-8, with or without a byte order mark.  JSON lines hold one object each; CSV has a
    header, commas and double quotes (RFC 4180, so a quoted cell may span lines).  Blank lines and
    columns that `columns` does not name are skipped.

    Args:
        path: the file; its suffix says the format.
        columns: role to column name, the columns that every record must have.

    Raises:
        DataError: when the file cannot be read, decompressed, decoded or parsed, or when a value is
            absent, blank, or neither text nor (for a label or a site) an integer.
    """
    for line, row in _rows(path, columns):
        fields = {role: _field(row, column, role=role, at=_at(path, line)) for role, column in columns.items()}
        yield Record(fields, file=str(path), line=line)


def usable_records(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """The same, without the records that lack a value: which columns are wanted is not the site's own choice alone.

    Each record is judged by itself, so that one more or less changes nothing about the others.
    """
    for line, row in _rows(path, columns):
        with contextlib.suppress(DataError):
            fields = {role: _field(row, column, role=role, at=_at(path, line)) for role, column in columns.items()}
            yield Record(fields, file=str(path), line=line)


def _rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    match suffix.lower():
        case ".jsonl":
            return _json_rows(path)
        case ".csv":
            return _csv_rows(path, columns)
    raise DataError(str(path), suffix, "must end in .jsonl, .csv, .jsonl.gz or .csv.gz")


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(line, object) of each line that is not blank."""
    for line, text in enumerate(_lines(path), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            found = f"{error.msg}, column {error.colno}"
            raise DataError(_at(path, line), found, "must be one whole JSON object on a line") from None
        except (ValueError, RecursionError):  # an integer of thousands of digits, nesting without end
            raise DataError(_at(path, line), "too large a value", "must be one JSON object on a line") from None
        if not isinstance(row, dict):
            raise DataError(_at(path, line), _json_type(row), "must be one JSON object on a line")
        yield line, row


def _csv_rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(first line, cells of the wanted columns) of each row; a row of empty cells is a blank line."""
    header: list[str] | None = None
    for line, cells in _csv_cells(path):
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [name.strip() for name in cells]
            _check_header(header, columns, at=_at(path, line))
        elif len(cells) != len(header):
            raise DataError(_at(path, line), f"{len(cells)} cells", f"must have {len(header)} cells, as the header")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_lines(path), strict=True)
    while True:
        line = reader.line_num + 1  # a row with quoted line breaks ends on a later line than it starts on
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bound = "must be CSV with commas and double quotes; is a quote open?"
            raise DataError(_at(path, line), str(error), bound) from None
        yield line, cells


def _check_header(header: Sequence[str], columns: Mapping[str, str], *, at: str) -> None:
    for role, column in columns.items():
        if column not in header:
            raise _absent(header, column, role=role, at=at)
        if header.count(column) > 1:
            raise DataError(f"{at}, column {column!r}", f"{header.count(column)} times", "must appear once")


def _lines(path: Path) -> Iterator[str]:
    """The decoded lines of a file with their ends kept; only one is in memory at a time."""
    line = 0
    try:
        with _open(path) as stream:
            for line, raw in enumerate(iter(lambda: stream.readline(_MOST_BYTES + 1), b""), start=1):
                if len(raw) > _MOST_BYTES:  # a few kilobytes of gzip can hold a line that fills the memory
                    found, bound = f"more than {_MOST_BYTES} bytes", f"must have at most {_MOST_BYTES} bytes a line"
                    raise DataError(_at(path, line), found, bound)
                yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at place {error.start + 1} of the line"
        raise DataError(_at(path, line), found, "must be UTF-8 text") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(_at(path, line + 1), str(error), "must be a whole gzip file") from None
    except OSError as error:
        raise DataError(str(path), error.strerror, "must be a file that can be read") from None


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _field(row: Mapping[str, object], column: str, *, role: str, at: str) -> str:
    """The checked text of one field."""
    if column not in row:
        raise _absent(row, column, role=role, at=at)
    value, at = row[column], f"{at}, column {column!r}"
    if role == "user":
        _require_one_user(value, at=at)
    if role in CATEGORY_ROLES and type(value) is int:
        value = str(value)
    if not isinstance(value, str):
        accepted = "text or an integer" if role in CATEGORY_ROLES else "text"
        raise DataError(at, _json_type(value), f"must be {accepted} (role {role})")
    if not value.strip():
        raise DataError(at, "blank", f"must not be blank (role {role})")
    if not _is_unicode(value):
        raise DataError(at, "half a surrogate pair", f"must be valid Unicode (role {role})")
    return value.strip() if role in CATEGORY_ROLES else value


def _require_one_user(value: object, *, at: str) -> None:
    """Refuse a record of several users: it would count for one of them, and the others would not be protected."""
    several = isinstance(value, list) or (isinstance(value, str) and any(mark in value for mark in _BETWEEN_NAMES))
    if several:
        bound = "must name one user: a record of several has no place in training by user (docs/user_level.md), and an "
        raise DataError(at, SEVERAL_USERS, f"{bound}id holds no {' '.join(_BETWEEN_NAMES)} (role user)")


def _absent(present: Iterable[str], column: str, *, role: str, at: str) -> DataError:
    names = ", ".join(repr(name) for name in islice(present, 10)) or "none"
    return DataError(f"{at}, column {column!r}", "absent", f"must be there; set data.columns.{role} to one of {names}")


def _is_unicode(text: str) -> bool:
    """Whether `text` can be encoded: JSON may escape half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")


def _at(file: Path | str, line: int) -> str:
    return f"{file}:{line}"
