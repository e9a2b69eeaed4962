"""Reading of rows from JSON lines, JSON arrays, CSV and TSV; files are split into rows before any row is parsed.

The end of a row does not depend on whether the row can be parsed, so an unusable row affects no other row.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from functools import partial
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import ParamSpec, TypeAlias, TypeVar, cast

from fedtune.formatting import pluralize
from fedtune.spec import DataError

Row: TypeAlias = Mapping[str, object]  # column to value, as in the file
RawRows: TypeAlias = Iterator[tuple[int, Row | DataError]]
Made = TypeVar("Made")
Piece = TypeVar("Piece")
Given = ParamSpec("Given")
Cut: TypeAlias = Iterator[tuple[int, bytes | None]]
"""First line number and bytes of each row; the bytes of a row that is too long are discarded and replaced by None."""
MAX_BYTES = 1 << 24  # maximum bytes of a row, far above the input of any model
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # has the prefix of UTF-16
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"PK\x03\x04": "the start of a ZIP or Excel file",
    b"\x1f\x8b": "the start of a gzip file, whose name must end in .gz",
}
"""First bytes of files that are not UTF-8 text, and the kind of file."""
_UTF_8 = "must be UTF-8 text, not UTF-16, Latin-1 or Windows-1252"
_BLANK = b" \t\r\n,;"  # characters of a blank line in a table
_BLOCK_BYTES = 1 << 20  # read in blocks, because a few kilobytes of gzip can contain a line that fills the memory


def format_location(file: Path | str, line: int) -> str:
    """Format a position in a file as `file:line`, for error messages."""
    return f"{file}:{line}"


def build_missing_column_error(present: Iterable[str], column: str, *, role: str, at: str) -> DataError:
    """Return the error for a column that is not among the columns `present`."""
    names = ", ".join(repr(name) for name in islice(present, 10)) or "none"
    bound = f"is missing (role {role}); set data.columns.{role} to one of {names}"
    return DataError(f"{at}, column {column!r}", "absent", bound)


def catch_row_error(
    at: str, read: Callable[Given, Made], /, *args: Given.args, **options: Given.kwargs
) -> Made | DataError:
    """Return the result of `read` on one row or record, or a DataError for any exception.

    Any other exception is a bug in fedtune, but must not stop the run either: a site's reply would then reveal
    something about a record.
    """
    try:
        return read(*args, **options)
    except DataError as error:
        return error
    except Exception as error:
        return DataError(at, type(error).__name__, "must be a readable record")


def parse_pieces(path: Path, pieces: Iterable[tuple[int, Piece]], parse: Callable[[int, Piece], Row | None]) -> RawRows:
    """Yield each parsed piece of a file with its line number, as a row or an error; pieces that parse to None are
    skipped.
    """
    for line, piece in pieces:
        row = catch_row_error(format_location(path, line), parse, line, piece)
        if row is not None:
            yield line, row


def decode_text(raw: bytes | None, *, at: str) -> str:
    """Decode the bytes of a row as UTF-8.

    Raises:
        DataError: the row is too long, or not UTF-8.
    """
    if raw is None:
        raise DataError(at, f"more than {MAX_BYTES} bytes", f"must have at most {MAX_BYTES} bytes per record")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        problem = f"byte 0x{raw[error.start]:02x} at position {error.start + 1} of the record"
        problem = next((kind for mark, kind in _MARKS.items() if raw.startswith(mark)), problem)
        raise DataError(at, problem, _UTF_8) from None


def read_json_lines(path: Path) -> RawRows:
    """Yield the rows of a JSON lines file; blank lines are skipped."""

    def parse_line(line: int, raw: bytes | None) -> Row | None:
        text = decode_text(raw, at=format_location(path, line)).rstrip()
        bound = "must be one complete JSON object per line"
        if text[:1] == "[":
            bound += "; for an array of objects, use a file name that ends in .json"
        return _parse_json_object(text, path, line, bound=bound) if text else None

    return parse_pieces(path, cut_rows(path), parse_line)


def _build_unique_object(pairs: list[tuple[str, object]]) -> Row:
    """Build an object from JSON's key-value pairs.

    A duplicate key raises KeyError, because the json module would silently drop the first value.
    """
    if len(row := dict(pairs)) < len(pairs):
        raise KeyError
    return row


def _parse_json_object(text: str, path: Path, line: int, *, bound: str) -> Row:
    try:
        row = json.loads(text, object_pairs_hook=_build_unique_object)
    except KeyError:
        raise DataError(
            format_location(path, line), "a duplicate key in an object", "must have distinct keys"
        ) from None
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at position {error.pos + 1} of the record"
        raise DataError(format_location(path, line + error.lineno - 1), problem, bound) from None
    except (ValueError, RecursionError):  # an integer with thousands of digits, or very deep nesting
        raise DataError(format_location(path, line), "a value that is too large", bound) from None
    if not isinstance(row, dict):
        raise DataError(format_location(path, line), name_json_type(row), bound)
    return row


def name_json_type(value: object) -> str:
    """Return the name of a value's type in JSON, such as "string"."""
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return (names | {bytes: "bytes", datetime: "date", date: "date"}).get(type(value), "object")


# Tables of text.


def read_table(path: Path, columns: Mapping[str, str] | None, *, comma: str) -> RawRows:
    """Yield the rows of a table with the separator `comma`, whose header must contain the `columns` (role to column).

    Semicolons are accepted instead of commas, because spreadsheets write them in locales with decimal commas.
    """
    if comma == ",":  # or a semicolon, if it splits the first nonblank line into the most cells
        lines = (raw for _, raw in cut_rows(path) if raw is None or raw.strip(_BLANK))
        first = re.sub(rb'"[^"]*"', b"", next(lines, None) or b"")
        comma = ";" if first.count(b";") > max(map(first.count, (b",", b"\t", b"|"))) else ","
    rows = cut_rows(path, comma=comma.encode())
    header = _read_header(path, rows, columns or {}, comma=comma)
    yield from parse_pieces(path, rows, partial(_parse_table_row, path, header=header, comma=comma))


def _parse_table_row(path: Path, line: int, raw: bytes | None, *, header: Sequence[str], comma: str) -> Row | None:
    at, text = format_location(path, line), decode_text(raw, at=format_location(path, line))
    try:
        cells = _split_cells(text, comma=comma, at=at)
        if cells and len(cells) != len(header):
            hint = "; remove the space between a comma and a quote" if f'{comma} "' in text else ""
            hint = "; the header starts with #, like a comment" if header[0].startswith("#") else hint
            bound = f"must have {pluralize(len(header), 'cell')}, like the header{hint}"
            raise DataError(at, pluralize(len(cells), "cell"), bound)
    except DataError as error:
        if not (more := text.rstrip().count("\n")):
            raise
        # In a table without quoting, a stray quote swallows whole rows.
        bound = f"{error.bound}; a quote at the start of a cell swallows all lines up to the next quote"
        raise DataError(at, f"{error.value}, over {more + 1} lines", bound) from None
    return dict(zip(header, cells, strict=True)) if cells else None


def _read_header(path: Path, rows: Cut, columns: Mapping[str, str], *, comma: str) -> Sequence[str]:
    """Return the column names in the first nonblank row; an error in this row makes the whole file unusable."""
    for line, raw in rows:
        at = format_location(path, line)
        if cells := _split_cells(decode_text(raw, at=at), comma=comma, at=at):
            # A table may have several unnamed columns, which need distinct names.
            header = [name.strip() or (f"(column {place})" if place > 1 else "") for place, name in enumerate(cells, 1)]
            _require_separated(header, comma=comma, at=at)
            check_header(header, columns, at=at)
            first = {name: place for place, name in reversed([*enumerate(header, 1)])}
            return [
                name if first[name] == place else f"{name} (column {place})" for place, name in enumerate(header, 1)
            ]
    return ()


def _require_separated(header: Sequence[str], *, comma: str, at: str) -> None:
    """Refuse a header with null bytes or an Excel `sep=` line, and a one-cell header that contains another
    separator.
    """
    if any("\0" in name for name in header):  # UTF-16 without a byte order mark
        raise DataError(at, "null bytes", _UTF_8)
    if header[0].lower().startswith("sep="):
        raise DataError(at, "an Excel separator line (sep=)", "must be the header; remove this line")
    named = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
    for mark in (mark for mark in named if mark != comma and len(header) == 1 and mark in header[0]):
        other = {"\t": ".tsv", "|": ""}.get(mark, ".csv")
        remedy = f"rename the file to end in {other}" if other else "export the table again"
        bound = f"must be separated by {named[comma]}: {remedy}"
        raise DataError(at, f"a header that looks separated by {named[mark]}", bound)


def check_header(header: Sequence[str], columns: Mapping[str, str], *, at: str) -> None:
    """Require that a header contains each of the `columns` (role to column) exactly once.

    Raises:
        DataError: a column is missing or duplicated.
    """
    for role, column in columns.items():
        if column not in header:
            raise build_missing_column_error(header, column, role=role, at=at)
        if header.count(column) > 1:
            raise DataError(f"{at}, column {column!r}", f"{header.count(column)} times", "must appear once")


def _split_cells(text: str, *, comma: str, at: str) -> list[str]:
    """Split a row into cells; the result is empty for a blank line or a row of empty cells."""
    # The csv module's limit of 131,072 characters per cell is global to the process, and other code may have set it.
    # Records are limited already, so the limit is raised, but never lowered for other code.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_BYTES))
    try:
        cells = next(csv.reader([text], delimiter=comma, strict=True))
    except csv.Error as error:
        if "new-line" in str(error):
            bound = "must end its lines with a line feed"
            raise DataError(at, "a single carriage return outside double quotes", bound) from None
        problem = "text after a closing quote" if "expected after" in str(error) else "a quote that is not closed"
        bound = "must have double quotes around the whole cell, and doubled quotes inside it"
        raise DataError(at, problem, bound) from None
    return cells if any(cell.strip() for cell in cells) else []


# Splitting into rows.


class _RowBuffer:
    """Buffer for the row that is being read: its first line number, and its bytes up to the size limit."""

    def __init__(self) -> None:
        self.first = self.line = 1
        self.size = 0
        self.kept = bytearray()

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self.line += piece.count(b"\n")
        if self.size <= MAX_BYTES:
            self.kept += piece
        else:
            self.kept.clear()

    def take_row(self) -> tuple[int, bytes | None]:
        """Return the buffered row, and clear the buffer for the next row."""
        row = self.first, bytes(self.kept) if self.size <= MAX_BYTES else None
        self.first, self.size = self.line, 0
        self.kept.clear()
        return row


_LINES = re.compile(rb"[^\n]*\n|[^\n]+")  # complete and partial lines of a block


def cut_rows(path: Path, *, comma: bytes | None = None) -> Cut:
    """Split a text file into rows, including blank rows.

    With `comma`, a table's separator, quoted cells may span lines.
    """
    row, begins = _RowBuffer(), comma or b""
    quoted, state = begins + b'"', begins
    for block in _read_blocks(path):
        # Inside a quoted cell, a block without a quote is one piece, because a cell may have millions of lines.
        for piece in [block] if comma and state == quoted and b'"' not in block else _LINES.findall(block):
            state = compute_quote_state(piece, state, comma=comma) if comma else begins
            row.add(piece)
            if piece.endswith(b"\n") and not (comma and state == quoted):
                yield row.take_row()
                state = begins
    if row.size:
        yield row.take_row()


def compute_quote_state(piece: bytes, before: bytes, *, comma: bytes) -> bytes:
    """Return the parser state after `piece`: the shortest text that leads to the same state from the start of a row.

    The states are: start of a cell (a comma), in an unquoted cell (x), in a quoted cell (comma, quote), and after a
    quote in a quoted cell (comma, two quotes).  A quote opens a cell only at its start, and a doubled quote does not
    close it, as in the csv module.
    """
    text, place, quoted = before + piece, 0, comma + b'"'
    while (place := text.find(quoted, place) + 2) > 1:
        closed = False
        while not closed:
            place = text.find(b'"', place) + 1
            if not place:
                return quoted
            if place == len(text):
                return quoted + b'"'
            closed = text[place : place + 1] != b'"'
            place += not closed
    return comma if text.endswith(comma) else b"x"


_OUTSIDE = {True: re.compile(rb'["\[\]{},]'), False: re.compile(rb'["\[\]{}]')}
"""Characters outside strings that determine the end of an array's element: directly in the array, and in nested
values.
"""
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
"""Rest of a string, up to its quote, to the end of the block, or to a backslash at the end of the block."""


def cut_elements(path: Path, opens: re.Pattern[bytes] | None = None) -> Iterator[tuple[int, bytes | None, bytes]]:
    """Yield (first line, bytes, terminator) for each element of a JSON array.

    The terminator is `,` or `]`, or empty for the rest of the file.  The array is the whole file, or starts after the
    match of `opens`.

    Only strings and brackets are parsed.  Only an unclosed string or bracket can therefore swallow other elements, and
    no JSON writer produces such a string or bracket from a record's text.
    """
    row, depth, in_string, escaped = _RowBuffer(), 1, False, False
    for block in _iter_array_blocks(path, row) if opens is None else _iter_object_blocks(path, row, opens):
        begin = place = 0
        while place < len(block) and depth:
            if escaped:
                escaped, place = False, place + 1
            elif in_string:
                place = cast(re.Match[bytes], _STRING.match(block, place)).end() + 1
                in_string, escaped = block[place - 1 : place] != b'"', block[place - 1 : place] == b"\\"
            elif (match := _OUTSIDE[depth == 1].search(block, place)) is None:
                break
            else:
                mark, place = match[0], match.end()
                in_string = mark == b'"'
                if depth == 1 and mark in b",]":
                    row.add(block[begin : place - 1])
                    yield *row.take_row(), mark
                    begin, depth = place, int(mark == b",")
                elif not in_string:
                    depth = depth + 1 if mark in b"[{" else max(1, depth - 1)
        row.add(block[begin:])
    yield *row.take_row(), b""


def _iter_array_blocks(path: Path, row: _RowBuffer) -> Iterator[bytes]:
    """Yield the blocks of a file after its array's opening bracket; an empty file yields nothing."""
    opened = False
    for block in _read_blocks(path):
        text = block if opened else block.lstrip()
        if not opened:
            row.first = row.line = row.line + block[: len(block) - len(text)].count(b"\n")
            if text and not text.startswith(b"["):
                kind = "an object" if text.startswith(b"{") else "no opening bracket"
                bound = "must start with [, as an array of objects (for one object per line, use the suffix .jsonl)"
                raise DataError(format_location(path, row.line), kind, bound)
        yield text if opened else text[1:]
        opened = opened or bool(text)


def _iter_object_blocks(path: Path, row: _RowBuffer, opens: re.Pattern[bytes]) -> Iterator[bytes]:
    """Yield the blocks of a file after the match of `opens`, near its start; an empty file yields nothing."""
    before, match = b"", None
    for block in _read_blocks(path):
        if match is None:
            before += block
            if (match := opens.search(before)) is None:
                if len(before) > _BLOCK_BYTES:
                    break
                continue
            row.first = row.line = 1 + before.count(b"\n", 0, match.end())
            block = before[match.end() :]
        yield block
    if match is None and before.strip():
        raise DataError(
            format_location(path, 1),
            "an unsupported format",
            "must be an object with an array of documents (BioC JSON)",
        )


def read_json_array(path: Path, *, lenient: bool, opens: re.Pattern[bytes] | None = None) -> RawRows:
    """Yield the elements of a JSON array; `lenient` accepts a truncated array and yields its complete elements.

    If the array is part of an object (`opens`), the rest of the object is ignored.
    """
    before = b""
    for line, raw, mark in cut_elements(path, opens):
        if opens is not None and before == b"]":
            if raw is None or opens.search(raw):
                yield line, DataError(format_location(path, line), "a second array", "must be one array of objects")
            return
        text = (raw or b"").lstrip()
        line += (raw or b"")[: len(raw or b"") - len(text)].count(b"\n")
        row = catch_row_error(
            format_location(path, line),
            _parse_element,
            path,
            line,
            None if raw is None else text,
            between=(before, mark),
        )
        if isinstance(row, DataError) and not mark and not lenient:
            raise row  # any number of records may be missing
        if row is not None:
            yield line, row
        before = before if before == b"]" else mark


def _parse_element(path: Path, line: int, raw: bytes | None, *, between: tuple[bytes, bytes]) -> Row | None:
    """Parse an array element; return None for the blank text in an empty array or after the end of an array."""
    (before, after), at, bound = between, format_location(path, line), "must be one array of objects"
    if raw == b"" and (before == b"]" or (before == b"" and after != b",")):
        return None
    if before == b"]":
        raise DataError(at, "more text after the end of the array", bound)
    if not after:
        whole = catch_row_error(at, lambda: _parse_json_object(decode_text(raw, at=""), path, line, bound=""))
        rest = "the rest of this record, and " if isinstance(whole, DataError) else ""
        missing = "a record after the last comma, and " if raw == b"" else rest
        raise DataError(at, "the end of the file", f"{bound}; it is truncated, and lacks {missing}] at its end")
    if raw == b"":
        raise DataError(at, "a comma without an object", f"{bound}, separated by commas")
    return _parse_json_object(decode_text(raw, at=at), path, line, bound="must be one complete JSON object")


def _read_blocks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks, decompressed and without a byte order mark."""
    line = 1
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as opened:
            stream = cast(BufferedReader, opened)
            block = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8) or stream.read1(_BLOCK_BYTES)
            while block:
                yield block
                line += block.count(b"\n")
                block = stream.read1(_BLOCK_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        # the library's messages quote the file
        problem = "an early end" if isinstance(error, EOFError) else "not a gzip file, or a damaged one"
        raise DataError(format_location(path, line), problem, "must be a complete gzip file") from None
    except OSError as error:
        raise DataError(str(path), error.strerror, "must be a readable file") from None
