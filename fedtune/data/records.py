"""Records from JSON-lines and CSV files, plain or gzipped, with a schema check.

A file's bytes are cut into rows before any is read: where a row ends does not go by whether it can be read.  Each
record is then checked by itself.  There is no step over a whole file (no shuffling, balancing or duplicate removal), so
no record changes what becomes of another.  Error messages name file, line and column but never quote a record's text:
they end up in logs.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import cast

from fedtune.spec import DataError

# Roles whose values are names out of a small set: integers are taken as text, spaces around them dropped.
CATEGORY_ROLES = frozenset({"label", "site", "user"})
_BETWEEN_NAMES = ",;|"
"""What lists of names are written with, and so no part of a user's id."""
SEVERAL_USERS = "a list of users"
"""The value in the message about a record of several users."""
Row = Mapping[str, object]
"""Column to value, as a record's file has it."""


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
            absent, blank, or neither text nor (for a label, a site or a user) an integer.
    """
    for read in _unread(path, columns):
        if (record := read()) is not None:
            yield record


def usable_records(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """The same, without the records that cannot be used; so no record ends the reading, whatever it holds.

    Left out is what lacks a value, has more than 16 MiB, is not UTF-8, is no JSON object or has a number or a depth
    that Python does not read, or is a CSV row with broken quotes or another number of cells than the header.

    Each record is judged by itself, so that one more or less changes nothing about the others.  A CSV row is cut out
    before it is judged, and ends at the first line end outside quotes.  Only a quote that is never closed can take
    other rows along, up to the next quote; no text of a record does that in a file whose writer doubles quotes (RFC
    4180), and where the writer does not, rows cannot be told apart at all.

    Raises:
        DataError: for what is a fault of the file and of no record: it cannot be opened, is no whole gzip file, or is a
            CSV file whose header cannot be read or lacks a column.
    """
    for read in _unread(path, columns):
        with contextlib.suppress(DataError):
            if (record := read()) is not None:
                yield record


def _unread(path: Path, columns: Mapping[str, str]) -> Iterator[Callable[[], Record | None]]:
    """What reads each record of a file: it raises DataError for that record alone, and gives None for a blank line."""
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    match suffix.lower():
        case ".jsonl":
            rows, parse = cut_rows(path, line_state), _json_row
        case ".csv":
            rows = cut_rows(path, csv_state)
            parse = partial(_csv_row, header=_csv_header(path, columns, rows))
        case _:
            raise DataError(str(path), suffix, "must end in .jsonl, .csv, .jsonl.gz or .csv.gz")
    for line, raw in rows:
        yield partial(_record, path, line, raw, parse=parse, columns=columns)


def _record(
    path: Path, line: int, raw: bytes | None, *, parse: Callable[..., Row | None], columns: Mapping[str, str]
) -> Record | None:
    at = at_line(path, line)
    row = parse(_text(raw, at=at), at=at)
    if row is None:
        return None
    fields = {role: _field(row, column, role=role, at=at) for role, column in columns.items()}
    return Record(fields, file=str(path), line=line)


def _text(raw: bytes | None, *, at: str) -> str:
    if raw is None:
        raise DataError(at, f"more than {MOST_BYTES} bytes", f"must have at most {MOST_BYTES} bytes a record")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at place {error.start + 1} of the record"
        raise DataError(at, found, "must be UTF-8 text") from None


def _json_row(text: str, *, at: str) -> Row | None:
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        found = f"{error.msg}, column {error.colno}"
        raise DataError(at, found, "must be one whole JSON object on a line") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, nesting without end
        raise DataError(at, "too large a value", "must be one JSON object on a line") from None
    if not isinstance(row, dict):
        raise DataError(at, _json_type(row), "must be one JSON object on a line")
    return row


def _csv_row(text: str, *, at: str, header: Sequence[str]) -> Row | None:
    cells = _csv_cells(text, at=at)
    if not cells:
        return None
    if len(cells) != len(header):
        raise DataError(at, f"{len(cells)} cells", f"must have {len(header)} cells, as the header")
    return dict(zip(header, cells, strict=True))


def _csv_header(path: Path, columns: Mapping[str, str], rows: Iterable[tuple[int, bytes | None]]) -> Sequence[str]:
    """The names in the first row that is not blank; a fault of it is one of the whole file."""
    for line, raw in rows:
        at = at_line(path, line)
        if cells := _csv_cells(_text(raw, at=at), at=at):
            header = [name.strip() for name in cells]
            _check_header(header, columns, at=at)
            return header
    return ()


def _csv_cells(text: str, *, at: str) -> list[str]:
    """The cells of one row; none for a blank line, and for a row of empty cells."""
    # The csv module's own bound on a cell is 131,072 characters, and belongs to the whole process: anybody may have set
    # it.  A record is bounded already, so it is raised out of the way, and never lowered for others.
    csv.field_size_limit(max(csv.field_size_limit(), MOST_BYTES))
    try:
        cells = next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise DataError(at, str(error), "must be CSV with commas and double quotes; is a quote open?") from None
    return cells if any(cell.strip() for cell in cells) else []


def _check_header(header: Sequence[str], columns: Mapping[str, str], *, at: str) -> None:
    for role, column in columns.items():
        if column not in header:
            raise _absent(header, column, role=role, at=at)
        if header.count(column) > 1:
            raise DataError(f"{at}, column {column!r}", f"{header.count(column)} times", "must appear once")


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
        marks = " ".join(_BETWEEN_NAMES)
        bound = f"must name one user (role user): a value with one of {marks} is read as several, and the record of"
        raise DataError(at, SEVERAL_USERS, f"{bound} several has no place in training by user (docs/user_level.md)")


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


MOST_BYTES = 1 << 24
"""Of a record: far above any that a model reads."""
_BLOCK_BYTES = 1 << 20
"""Read at once: a few kilobytes of gzip can hold a line that fills the memory."""
_PIECES = re.compile(rb"[^\n]*\n|[^\n]+")
"""The lines of a block, or what it has of them."""
_BEGINS, _WITHIN, _QUOTED, _CLOSED = b",", b"x", b',"', b',""'
"""Where a row of CSV stands: at a cell's beginning, in one without quotes, in a quoted one, behind a quote in that."""


def cut_rows(path: Path, state_after: Callable[[bytes, bytes], bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(first line, bytes) of each record; None for the bytes of one that is too long, of which no more is kept.

    Args:
        path: the file.
        state_after: `line_state` or `csv_state`: the state before a piece of the file to the one behind it.

    Raises:
        DataError: the file cannot be opened, or is no whole gzip file.
    """
    first, line, size, state = 1, 1, 0, _BEGINS
    kept = bytearray()
    for block in _blocks(path):
        # A block without a quote, within a quoted cell, is one piece: a cell may have millions of lines.
        for piece in [block] if state == _QUOTED and b'"' not in block else _PIECES.findall(block):
            state, size = state_after(piece, state), size + len(piece)
            if size <= MOST_BYTES:
                kept += piece
            else:
                kept.clear()
            line += piece.count(b"\n")
            if piece.endswith(b"\n") and state != _QUOTED:
                yield first, bytes(kept) if size <= MOST_BYTES else None
                first, size, state = line, 0, _BEGINS
                kept.clear()
    if size:
        yield first, bytes(kept) if size <= MOST_BYTES else None


def line_state(piece: bytes, before: bytes) -> bytes:
    """The state of a file whose rows are its lines."""
    return _BEGINS


def csv_state(piece: bytes, before: bytes) -> bytes:
    """Where in a row of CSV `piece` ends: each state is the shortest text that leads there from a row's beginning.

    A quote opens a cell only at its beginning, and a doubled one does not close it, as the csv module reads them.
    """
    text, place = before + piece, 0
    while (place := text.find(b',"', place) + 2) > 1:
        closed = False
        while not closed:
            place = text.find(b'"', place) + 1
            if not place:
                return _QUOTED
            if place == len(text):
                return _CLOSED
            closed = text[place : place + 1] != b'"'
            place += not closed
    return _BEGINS if text.endswith(b",") else _WITHIN


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, some at a time; without a byte order mark."""
    line = 1
    try:
        with _open(path) as stream:
            block = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8) or stream.read1(_BLOCK_BYTES)
            while block:
                yield block
                line += block.count(b"\n")
                block = stream.read1(_BLOCK_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(at_line(path, line), str(error), "must be a whole gzip file") from None
    except OSError as error:
        raise DataError(str(path), error.strerror, "must be a file that can be read") from None


def _open(path: Path) -> BufferedReader:
    return cast(BufferedReader, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def at_line(file: Path | str, line: int) -> str:
    """A place in a file, as messages name it."""
    return f"{file}:{line}"
