"""Rows of data files of every format, each parsed by itself: a row that cannot be used is one fault among whole rows.

Error messages name file, line and column but never quote what a row holds: they end up in logs.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedtune.data.text_rows import (
    MOST_BYTES,
    RawRows,
    Row,
    array_rows,
    at_line,
    check_header,
    cut_rows,
    line_rows,
    table_rows,
)
from fedtune.spec import DataError, check_name
from fedtune.words import counted

SUFFIXES = "must end in .jsonl, .json, .csv, .tsv, .conll, .pubtator or .bioc, plain or with .gz behind, or in .parquet"
_SAVED = "a folder that save_to_disk of Hugging Face datasets wrote"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_PARQUET, _ARROW_TYPES, _NO_TYPES = b"PAR1", b"ARROW:schema", b"-----:schema"
_LARGEST_FOOTER = 1 << 28
_CONLL, _PUBTATOR, _BIOC, _BRAT = (".conll", ".bio", ".iob"), ".pubtator", (".bioc", ".biocjson"), "brat"
_DOCUMENTS = re.compile(rb'"(?:documents|PubTator3)"\s*:\s*\[')
"""Where the documents of a file of BioC as JSON begin; PubTator's own server calls them otherwise."""
_TAG = re.compile(r"O|[BIESLUM][-_].+")
_BEGINS_DOCUMENT, _BLANK = "-DOCSTART-", b" \t\r\n"
_SPAN_OF_BRAT = re.compile(r"T\d+\t(\S+) (\d+) (\d+)((?:;\d+ \d+)*)\t(.*)")
_BATCH_ROWS = 256
"""Of Parquet, in memory at once."""


def raw_rows(path: Path, columns: Mapping[str, str] | None = None, *, lenient: bool = False) -> RawRows:
    """(place, columns and values) of each row of a file, or in their place what is wrong with that row alone.

    Text is UTF-8, with or without a byte order mark.  JSON lines hold one object each, `.json` one array of objects;
    CSV and TSV have a header and double quotes (RFC 4180, so a quoted cell may span lines), and CSV has semicolons if
    the header has them and no other mark.  Blank lines are no rows.
    A label that a Hugging Face set stores as a number is given by its name.

    Args:
        path: `.jsonl`, `.json`, `.csv`, `.tsv`, `.conll`, `.pubtator` or `.bioc`, each also with `.gz` behind;
            `.parquet`; a folder that `save_to_disk` of Hugging Face `datasets` wrote; or one of brat's.
        columns: role to column: what the header of a table must have, and all that is read of one.  None: everything.
        lenient: the end of a JSON array that breaks off is the fault of a row and not of the file, as at a real site.

    Yields:
        The line on which a row starts, or in Parquet and saved sets its number, counted from 1; and the row.

    Raises:
        DataError: for what is a fault of the file and of no row: it cannot be opened, is no whole gzip, Parquet or
            Arrow file, holds no (whole) JSON array where it should, or its header cannot be read or lacks a column.
    """
    require_file(path)
    match format_of(path):
        case ".jsonl":
            return line_rows(path)
        case ".json":
            return array_rows(path, lenient=lenient)
        case ".csv":
            return table_rows(path, columns, comma=",")
        case ".tsv":
            return table_rows(path, columns, comma="\t")
        case ".parquet" if path.suffix.lower() == ".gz":
            raise DataError(str(path), ".parquet.gz", "must end in .parquet: Parquet is packed in itself")
        case ".parquet":
            return _arrow_rows(path, _parquet_batches(path, columns))
        case ".npy":  # in whose order rows would have their vectors: one row more or less would move all others
            raise DataError(str(path), ".npy", "must be a column of lists in a Parquet file (docs/features.md)")
        case "folder":
            return _arrow_rows(path, _saved_batches(path, columns))
        case suffix if suffix in _CONLL:
            return _conll_rows(path)
        case suffix if suffix == _PUBTATOR:
            return _pubtator_rows(path)
        case suffix if suffix in _BIOC:
            return _bioc_rows(path, lenient=lenient)
        case suffix if suffix == _BRAT:
            return _brat_rows(path)
        case suffix:
            raise DataError(str(path), suffix, f"{SUFFIXES}, or be {_SAVED}, or brat's folder")


def format_of(path: Path) -> str:
    """The suffix that says the format, without `.gz`; or "folder" of a saved set, or "brat"."""
    if path.is_dir():
        return "folder" if (path / _STATE).is_file() or not _brat_files(path) else _BRAT
    return (Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix).lower()


# What there is under a name.


def what_is(path: Path) -> str | None:
    """Name what lies there in place of a data file; None for a file, or a folder of a saved set or of brat's."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing" if path.is_symlink() else "no such file"
    except OSError as error:
        return "a link that leads to itself" if error.errno == errno.ELOOP else str(error.strerror)
    except ValueError:  # a name with a null byte
        return "no name of a file"
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return None if (path / _STATE).is_file() or _brat_files(path) else "a folder"
    return {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}.get(stat.S_IFMT(mode), "a device")


def require_file(path: Path, *, key: str | None = None, value: str | None = None) -> None:
    """Refuse what is no data file, before it is opened: a pipe would wait for ever.

    Args:
        path: where it should lie.
        key: the setting that named it; None: the file itself.
        value: what the setting says.

    Raises:
        DataError: says what is there, and for a folder of several saved sets which paths to give.
    """
    if (found := what_is(path)) is None:
        return
    bound = f"must be a file, or {_SAVED}"
    splits: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        splits = [str(path / str(name)) for name in json.loads((path / _SPLITS).read_bytes())["splits"][:10]]
    if found == "a folder" and splits:
        bound = f"holds several sets, of which one is needed: {', '.join(splits)}"
    elif found == "a folder" and (parts := sorted(path.glob("*.parquet"))):
        bound = f"holds {counted(len(parts), 'part')} of a table: write them as one file, by one name or with pandas: "
        bound += "pandas.read_parquet(FOLDER).to_parquet('one.parquet')"
    raise DataError(key or str(path), value or found, f"is {found}; {bound}" if value else bound)


def files_of(path: Path) -> list[Path]:
    """The files in which a data set lies: the file itself, or those of the folder of a saved set.

    Raises:
        DataError: a saved set's list of its files cannot be read, or names one outside its folder.
    """
    if not path.is_dir():
        return [path]
    if format_of(path) == _BRAT:
        return _brat_files(path)
    try:
        state = json.loads((path / _STATE).read_bytes())
        names = [one["filename"] for one in state["_data_files"]]
        selected = state.get("_indices_data_files")
        for name in names:
            check_name("filename", name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        bound = f"must name the files of the set, as {_STATE} in {_SAVED} does"
        raise DataError(str(path / _STATE), "damaged", bound) from None
    if selected:
        bound = "must be written with all its rows: call flatten_indices() before save_to_disk"
        raise DataError(str(path), "a selection of rows that are stored beside it", bound)
    return [path / name for name in names]


# Parquet and Arrow.


def _parquet_batches(path: Path, columns: Mapping[str, str] | None) -> Iterator[Any]:
    from pyarrow import parquet

    with _whole(path, "Parquet"):
        # Page by page: a group of rows may be larger than the memory.
        file = parquet.ParquetFile(path, metadata=_plain_footer(path), buffer_size=1 << 20, pre_buffer=False)
        check_header(file.schema_arrow.names, columns or {}, at=str(path))
        wanted = None if columns is None else sorted(set(columns.values()))
        yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False)


def _plain_footer(path: Path) -> Any:
    """A Parquet file's metadata, without the Arrow types that its writer had.

    Into dictionaries its reader takes no text that is not UTF-8: one such record would be a fault of the whole file.
    """
    from pyarrow import parquet

    tail = len(_PARQUET) + 4
    with path.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - tail))
        length = int.from_bytes(stream.read(4), "little")
        if length > min(_LARGEST_FOOTER, size - tail):
            raise ValueError("no footer")
        stream.seek(size - tail - length)
        footer = stream.read()
    return parquet.read_metadata(io.BytesIO(_PARQUET + footer.replace(_ARROW_TYPES, _NO_TYPES)))


def _saved_batches(path: Path, columns: Mapping[str, str] | None) -> Iterator[Any]:
    import pyarrow

    for file in files_of(path):
        with _whole(file, "Arrow"), pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
            check_header(stream.schema.names, columns or {}, at=str(file))
            for batch in stream:
                # A reader of Arrow believes its offsets, and reads beyond its memory where they are damaged.  Text is
                # looked at as bytes: that one is no UTF-8 is a fault of its row.
                wanted = batch if columns is None else batch.select(sorted(set(columns.values())))
                wanted.validate()
                for column in wanted.columns:
                    _as_bytes(column).validate(full=True)
                yield wanted


@contextlib.contextmanager
def _whole(path: Path, kind: str) -> Iterator[None]:
    """Turn Arrow's errors about a damaged file into ours: its own may quote the file."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError):
        raise DataError(str(path), "damaged", f"must be a whole {kind} file") from None


def _as_bytes(array: Any) -> Any:
    """The same memory with bytes for text, also within lists and structs; nothing of it is looked at."""
    import pyarrow

    texts = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    kind = _replaced(array.type, texts | {pyarrow.string_view(): pyarrow.binary_view()})
    return array if kind == array.type else array.view(kind)


def _replaced(kind: Any, others: Mapping[Any, Any], *, decode: bool = False) -> Any:
    """A type with others in the place of some, also within lists and structs; `decode`: without dictionaries."""
    import pyarrow
    from pyarrow import types

    def inner(part: Any) -> Any:
        return _replaced(part, others, decode=decode)

    if types.is_dictionary(kind):
        values = inner(kind.value_type)
        return values if decode else pyarrow.dictionary(kind.index_type, values, kind.ordered)
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(inner(field.type)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(inner(kind.key_type), inner(kind.item_type))
    if types.is_list(kind) or types.is_large_list(kind):
        make = pyarrow.list_ if types.is_list(kind) else pyarrow.large_list
        return make(kind.value_field.with_type(inner(kind.value_type)))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(kind.value_field.with_type(inner(kind.value_type)), kind.list_size)
    return others.get(kind, kind)


def _arrow_rows(path: Path, batches: Iterator[Any]) -> RawRows:
    if importlib.util.find_spec("pyarrow") is None:
        bound = "needs a library that reads Parquet and Arrow: pip install 'fedtune[data]'"
        raise DataError(str(path), "cannot be read", bound)
    number, names = 0, None
    for batch in batches:
        names = _label_names(batch.schema) if names is None else names
        for place in range(batch.num_rows):
            number += 1
            row: Row | DataError
            try:
                row = _arrow_row(batch, place, names, at=at_line(path, number))
            except DataError as error:
                row = error
            yield number, row


@lru_cache(maxsize=4)
def _kinds_alone(schema: Any) -> list[Any]:
    """The types that hold the same values in memory of their own, column by column."""
    import pyarrow

    views = {pyarrow.string_view(): pyarrow.large_string(), pyarrow.binary_view(): pyarrow.large_binary()}
    return [_replaced(kind, views, decode=True) for kind in schema.types]


def _arrow_row(batch: Any, place: int, names: Mapping[str, Sequence[str]], *, at: str) -> Row:
    one = batch.slice(place, 1)
    try:
        # A dictionary, or a buffer behind views, has values of other rows: how large this one is must not go by them.
        columns = [
            column if column.type == kind else column.cast(kind)
            for column, kind in zip(one.columns, _kinds_alone(batch.schema), strict=True)
        ]
        num_bytes = sum(column.nbytes for column in columns)
        row = {
            name: _plain(column[0].as_py()) if num_bytes <= MOST_BYTES else None
            for name, column in zip(one.schema.names, columns, strict=True)
        }
    except UnicodeDecodeError:
        raise DataError(at, "bytes of another encoding", "must be UTF-8 text") from None
    except Exception as error:  # a time beyond Python's, for instance: whatever the library cannot give
        raise DataError(at, type(error).__name__, "must have values that Python can hold") from None
    if num_bytes > MOST_BYTES:
        raise DataError(at, f"more than {MOST_BYTES} bytes", f"must have at most {MOST_BYTES} bytes a record")
    return row | {column: _named(row[column], of_label) for column, of_label in names.items() if column in row}


def _plain(value: Any) -> Any:
    """A database's decimals as numbers, and its bytes as the text that they are, if they are one."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return value


def _named(value: Any, names: Sequence[str]) -> Any:
    """The name of a label that is stored as a number, also within lists; -1 stands for null, as nobody labelled it."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    if type(value) is not int or value >= len(names):
        return value
    return names[value] if value >= 0 else None if value == -1 else value


def _label_names(schema: Any) -> dict[str, Sequence[str]]:
    """The names of labels that Hugging Face `datasets` stores as numbers, by column, as it notes them in the schema."""
    try:
        found: dict[str, Sequence[str]] = {}
        for name, feature in json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"].items():
            while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):  # of a list
                feature = (feature or [{}])[0] if isinstance(feature, list) else feature["feature"]
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
                found[name] = list(map(str, feature["names"]))
        return found
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


# Texts whose parts are marked: rows of tokens with tags, or of a text with spans.


def _conll_rows(path: Path) -> RawRows:
    """Sentences, with a token and its tag on each line, first and last of its columns; a blank line ends one.

    Columns are separated by tabs or by spaces.  Lines -DOCSTART- belong to no sentence, nor do those behind # that end
    in no tag.
    """
    for at, lines in _lines_by_blank(path):
        if not isinstance(lines, list):
            yield at, lines
            continue
        cells = [line.split("\t") if "\t" in line else line.split() for line in lines]
        cells = [
            one
            for one in cells
            if one[0] != _BEGINS_DOCUMENT and not (one[0].startswith("#") and not _TAG.fullmatch(one[-1].strip()))
        ]
        if any(len(one) < 2 for one in cells):
            yield at, DataError(at_line(path, at), "a line of one column", "must have a token and its tag on each line")
        elif cells:
            yield at, {"tokens": [one[0] for one in cells], "tags": [one[-1].strip() for one in cells]}


def _pubtator_rows(path: Path) -> RawRows:
    """Documents of a title and an abstract, with a line for each span behind them; a blank line ends one."""
    for at, lines in _lines_by_blank(path):
        yield at, _document(lines, at=at_line(path, at)) if isinstance(lines, list) else lines


def _document(lines: list[str], *, at: str) -> Row | DataError:
    parts, spans = {}, []
    for line in lines:
        _, mark, rest = line.partition("|")
        cells = line.split("\t")
        if mark and rest[:2] in ("t|", "a|") and "\t" not in line.partition("|")[0]:
            parts[rest[0]] = rest[2:]
        elif len(cells) >= 5 and cells[1].isdecimal() and cells[2].isdecimal():
            spans.append((int(cells[1]), int(cells[2]), cells[4], cells[3]))
        elif len(cells) < 4:  # else a relation between two spans
            return DataError(at, "a line of another kind", "must be id|t|, id|a|, or a span in tabs (PubTator)")
    if "t" not in parts:
        return DataError(at, "no title", "must have a line id|t| (PubTator)")
    return _marked(" ".join(parts[key] for key in "ta" if key in parts), spans, at=at)


def _bioc_rows(path: Path, *, lenient: bool) -> RawRows:
    """Documents of BioC as JSON, whose passages, or their sentences, have texts and marks."""
    for line, row in array_rows(path, lenient=lenient, opens=_DOCUMENTS):
        at = at_line(path, line)
        try:
            yield line, row if isinstance(row, DataError) else _of_passages(row["passages"], at=at)
        except (AttributeError, KeyError, TypeError, ValueError):
            bound = "must have passages with offset and text, and annotations of one part with infons.type (BioC)"
            yield line, DataError(at, "a document of another form", bound)


def _of_passages(passages: Any, *, at: str) -> Row | DataError:
    """A row of spans; the offsets of BioC count from the document's beginning, with any number of spaces between."""
    text, spans, begins = "", [], []
    for passage in passages:
        for part in [passage] if passage.get("text") else passage.get("sentences", ()):
            text += " " * bool(text)
            begins.append((part["offset"], len(text)))
            text += part["text"]
    for passage in passages:
        for part in (passage, *passage.get("sentences", ())):
            for mark in part.get("annotations", ()):
                (place,) = mark["locations"]
                offset, begin = max(one for one in begins if one[0] <= place["offset"])
                first = begin + place["offset"] - offset
                spans.append((first, first + place["length"], mark["infons"]["type"], mark["text"]))
    return _marked(text, spans, at=at)


def _marked(text: str, spans: list[tuple[int, int, str, str]], *, at: str) -> Row | DataError:
    """A row of spans, of which each names again what it marks."""
    if wrong := sum(text[start:end] != said for start, end, _, said in spans):
        bound = "must count characters, and name what stands there"
        return DataError(at, f"{counted(wrong, 'span')} beside what they name", bound)
    return {"text": text, "spans": [{"start": start, "end": end, "label": label} for start, end, label, _ in spans]}


def _lines_by_blank(path: Path) -> Iterator[tuple[int, list[str] | DataError]]:
    """(first line, lines) between blank lines, without their ends; an error for those that cannot be read."""
    lines: list[str] = []
    first = size = 0
    fault: DataError | None = None
    number = 0
    for number, raw in cut_rows(path):
        if raw is not None and not raw.strip(_BLANK):
            if size:
                yield first, fault or lines
            lines, size, fault = [], 0, None
            continue
        first = first if size else number
        size += MOST_BYTES + 1 if raw is None else len(raw)
        at = at_line(path, first)
        if size > MOST_BYTES:
            lines.clear()
            bound = f"must have at most {MOST_BYTES} bytes a record; a blank line ends one"
            fault = DataError(at, f"more than {MOST_BYTES} bytes", bound)
            continue
        try:
            lines.append((raw or b"").decode().rstrip("\r\n"))
        except UnicodeDecodeError:
            fault = fault or DataError(at, "bytes of another encoding", "must be UTF-8 text")
    if size:
        yield first, fault or lines


def _brat_files(folder: Path) -> list[Path]:
    """The texts of a folder, each with its spans behind it, in the order of their names; none: it is not brat's."""
    found = sorted(folder.glob("*.ann"))
    return [file for one in found for file in (one.with_suffix(".txt"), one)]


def _brat_rows(folder: Path) -> RawRows:
    """Documents, each of which is one text in a file of its own, with its spans in another beside it."""
    for number, marks in enumerate(sorted(folder.glob("*.ann")), 1):
        at, texts = str(marks), []
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for file in (marks.with_suffix(".txt"), marks):
                if file.is_file() and file.stat().st_size <= MOST_BYTES:
                    texts.append(file.read_bytes().decode("utf-8-sig"))
        if len(texts) < 2:
            bound = f"must be UTF-8 of at most {MOST_BYTES} bytes, with its text beside it in a file .txt"
            yield number, DataError(at, "a file that cannot be read", bound)
            continue
        spans = [line for line in texts[1].splitlines() if line.startswith("T")]
        found = [match for match in map(_SPAN_OF_BRAT.fullmatch, spans) if match]
        if len(found) < len(spans) or any(one[4] for one in found):
            yield number, DataError(at, "a span in several parts, or of another form", "must be one part of the text")
            continue
        # What a span names has spaces where the text has ends of lines.
        flat = re.sub(r"[\r\n]", " ", texts[0])
        row = _marked(flat, [(int(one[2]), int(one[3]), one[1], one[5]) for one in found], at=at)
        yield number, row if isinstance(row, DataError) else {**row, "text": texts[0]}
