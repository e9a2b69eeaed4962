"""Reading of rows from all supported file formats.  Rows are parsed separately, so an unusable row affects no other
row.

Error messages name file, line and column but never quote the content of a row, because messages end up in logs.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fedtune.codec import read_regular_file
from fedtune.data import images, span_formats
from fedtune.data.text_rows import (
    MAX_BYTES,
    RawRows,
    Row,
    catch_row_error,
    check_header,
    format_location,
    parse_pieces,
    read_json_array,
    read_json_lines,
    read_table,
)
from fedtune.extras import require_extra
from fedtune.formatting import pluralize
from fedtune.spec import NOT_GIVEN, DataError, check_name

SUFFIXES = "must end in .jsonl, .json, .csv, .tsv, .conll, .pubtator or .bioc (optionally with .gz), or in .parquet"
_SAVED = "a folder that save_to_disk of Hugging Face datasets wrote"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_SAVED_SET_FILES = (_STATE, _SPLITS, "*.arrow", "*.parquet")
"""Files that identify a saved Hugging Face data set, complete or not; other folders contain brat files or images."""
_PARQUET, _ARROW_TYPES, _NO_TYPES = b"PAR1", b"ARROW:schema", b"-----:schema"
_LARGEST_FOOTER = 1 << 28
_IN_LINES = dict.fromkeys((".conll", ".bio", ".iob"), span_formats.parse_conll_sentence) | {
    ".pubtator": span_formats.parse_pubtator
}
_BIOC, _BRAT, _CLASSES = (".bioc", ".biocjson"), "brat", "classes"
OF_RECORDS = frozenset({".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".json", ".ann"})
"""Suffixes of files with records; images next to such files are not records of their own."""
_BATCH_ROWS = 256  # rows of a Parquet file in memory


def iter_raw_rows(path: Path, columns: Mapping[str, str] | None = None, *, lenient: bool = False) -> RawRows:
    """Yield (position, row) for each row of a file; an unusable row is replaced by a DataError that describes it.

    Text is UTF-8, with or without a byte order mark.  JSON lines contain one object each, and `.json` one array of
    objects.  CSV and TSV have a header and double quotes (RFC 4180, so a quoted cell may span lines).  CSV may use
    semicolons if the header contains no other separator.  Blank lines are skipped.  Labels that a Hugging Face data set
    stores as numbers are replaced by their names.

    Args:
        path: `.jsonl`, `.json`, `.csv`, `.tsv`, `.conll`, `.pubtator` or `.bioc`, each optionally followed by `.gz`;
            `.parquet`; a folder written by `save_to_disk` of Hugging Face `datasets`; a folder in brat's format; or a
            folder with a subfolder of images for each class.
        columns: role to column: the required columns of a table, and the only columns that are read; None reads all
            columns.
        lenient: whether to treat a truncated JSON array as an unusable row, as real sites do, instead of an unusable
            file.

    Yields:
        The position of a row, which is its first line, or its number in Parquet files and saved sets (from 1); and the
        row.

    Raises:
        DataError: the file as a whole is unusable: it cannot be opened, is not a complete gzip, Parquet or Arrow file,
            contains no complete JSON array where one is required, or its header is unreadable or lacks a column.
        ConfigError: the package that reads the format is not installed.
    """
    if detect_format(path) not in (_BRAT, _CLASSES):
        require_data_file(path)
    require_reader(path)
    match detect_format(path):
        case ".jsonl":
            return read_json_lines(path)
        case ".json":
            return read_json_array(path, lenient=lenient)
        case ".csv" | ".tsv" as suffix:
            return read_table(path, columns, comma="," if suffix == ".csv" else "\t")
        case ".parquet" if path.suffix.lower() == ".gz":
            raise DataError(str(path), ".parquet.gz", "must end in .parquet: Parquet is already compressed")
        case ".parquet":
            return _iter_arrow_rows(path, _iter_parquet_batches(path, columns))
        case ".npy":  # vectors matched to rows by order: adding or removing one row would shift all others
            raise DataError(str(path), ".npy", "must be a Parquet file with a column of lists (docs/other_tasks.md)")
        case "folder":
            return _iter_arrow_rows(path, _iter_saved_batches(path, columns))
        case suffix if suffix in _IN_LINES:
            return parse_pieces(path, span_formats.split_at_blank_lines(path), partial(_IN_LINES[suffix], path))
        case suffix if suffix in _BIOC:
            documents = read_json_array(path, lenient=lenient, opens=span_formats.DOCUMENTS)
            return parse_pieces(path, documents, partial(span_formats.parse_bioc, path))
        case suffix if suffix == _CLASSES:
            files = list_image_files(path)
            rows = ({"image": str(file.relative_to(path.parent)), "label": file.parent.name} for file in files)
            return enumerate(rows, 1)
        case suffix if suffix == _BRAT:
            return parse_pieces(path, enumerate(sorted(path.glob("*.ann")), 1), span_formats.read_brat)
        case suffix:
            raise DataError(str(path), suffix, f"{SUFFIXES}, or be {_SAVED}, or a folder in brat's format")


def detect_format(path: Path) -> str:
    """Return a file's suffix without `.gz`, or a folder's kind: "folder" (saved set), "classes" (images) or "brat"."""
    if path.is_dir():  # an empty folder counts as an empty brat folder
        others = _CLASSES if list_image_files(path) else _BRAT
        return "folder" if any(next(path.glob(name), None) for name in _SAVED_SET_FILES) else others
    return (Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix).lower()


def require_reader(path: Path) -> None:
    """Require the optional dependency of a Parquet file or a saved set; other formats need none.

    Sites call this before a round is charged, so the time must not depend on the records: no folder is listed.

    Raises:
        ConfigError: the package is not installed.
    """
    if path.suffix.lower() == ".parquet" or any((path / name).exists() for name in (_STATE, _SPLITS)):
        require_extra(str(path), NOT_GIVEN, "data", "pyarrow")


# Paths.


def describe_path(path: Path) -> str | None:
    """Describe a path that cannot be read as data, such as "a pipe"; None for a data file, a saved set, or a folder of
    brat files or images.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a broken link" if path.is_symlink() else "no such file"
    except OSError as error:
        return "a circular link" if error.errno == errno.ELOOP else str(error.strerror)
    except ValueError:  # a name with a null byte
        return "not a file name"
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        is_one = (path / _STATE).is_file() or span_formats.list_brat_files(path) or list_image_files(path)
        return None if is_one else "a folder"
    return {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}.get(stat.S_IFMT(mode), "a device")


def require_data_file(path: Path, *, key: str | None = None, value: str | None = None) -> None:
    """Require a data file before it is opened, because opening a pipe would block forever.

    For a folder with several saved sets, the message lists their paths.

    Args:
        path: the path to check.
        key: the setting that contains the path, for the message.
        value: the value of this setting.

    Raises:
        DataError: the path is not a data file.
    """
    if (kind := describe_path(path)) is None:
        return
    bound, splits = f"must be a file, or {_SAVED}", list[str]()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        splits = [str(path / str(name)) for name in json.loads(read_regular_file(path / _SPLITS))["splits"][:10]]
    if kind == "a folder" and splits:
        bound = f"contains several splits; select one of them: {', '.join(splits)}"
    elif kind == "a folder" and (parts := sorted(path.glob("*.parquet"))):
        bound = f"contains {pluralize(len(parts), 'Parquet file')}: put the parts of one table (train-*) into a"
        bound += " separate folder, and merge them: pandas.read_parquet(FOLDER).to_parquet('one.parquet')"
    raise DataError(key or str(path), value or kind, f"is {kind}; {bound}" if value else bound)


def list_data_files(path: Path) -> list[Path]:
    """List the files of a data set: the file itself, or the files in a saved set's folder, never files outside it."""
    if not path.is_dir():
        return [path]
    if detect_format(path) in (_BRAT, _CLASSES):
        return span_formats.list_brat_files(path) or list_image_files(path)
    try:
        state = json.loads(read_regular_file(path / _STATE))
        names = [entry["filename"] for entry in state["_data_files"]]
        selected = state.get("_indices_data_files")
        for name in names:
            check_name("filename", name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        bound = f"must list the files of the set, as {_STATE} does in {_SAVED}"
        raise DataError(str(path / _STATE), "damaged", bound) from None
    if selected:
        bound = "must be saved without a row selection: call flatten_indices() before save_to_disk"
        raise DataError(str(path), "a stored selection of rows", bound)
    return [path / name for name in names]


def list_image_files(folder: Path) -> list[Path]:
    """List the images of a folder with one subfolder per class, sorted by class and name; empty for a folder with other
    records.
    """
    if any(file.suffix.lower() in OF_RECORDS for file in folder.glob("*")):
        return []
    return sorted(file for file in folder.glob("*/*") if file.suffix.lower() in images.SUFFIXES)


def fingerprint_files(path: Path) -> list[object]:
    """Return the path, inode, size and modification time of each file of a data set; for unreadable files, the path.

    The result changes whenever a file of the data set changes.
    """
    fingerprints: list[object] = []
    for file in list_data_files(path):
        about = catch_row_error("", file.stat)
        status = () if isinstance(about, DataError) else (about.st_ino, about.st_size, about.st_mtime_ns)
        fingerprints.append([str(file), *status])
    return fingerprints


# Parquet and Arrow.


def _iter_parquet_batches(path: Path, columns: Mapping[str, str] | None) -> Iterator[Any]:
    from pyarrow import parquet

    with _translate_arrow_errors(path, "Parquet"):
        # Read page by page: a row group may be larger than the memory.
        file = parquet.ParquetFile(path, metadata=_read_footer(path), buffer_size=1 << 20, pre_buffer=False)
        check_header(file.schema_arrow.names, columns or {}, at=str(path))
        wanted = None if columns is None else sorted(set(columns.values()))
        yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False)


def _read_footer(path: Path) -> Any:
    """Read a Parquet file's metadata without the Arrow types that its writer stored.

    With these types, a dictionary column rejects text that is not UTF-8, so one bad record would make the whole file
    unusable.
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


def _iter_saved_batches(path: Path, columns: Mapping[str, str] | None) -> Iterator[Any]:
    import pyarrow

    for file in list_data_files(path):
        with (
            _translate_arrow_errors(file, "Arrow"),
            pyarrow.memory_map(str(file)) as source,
            pyarrow.ipc.open_stream(source) as stream,
        ):
            check_header(stream.schema.names, columns or {}, at=str(file))
            for batch in stream:
                # Arrow trusts offsets and reads out of bounds if they are damaged, so validate them, but not the
                # values: text that is not UTF-8, or a time of 25 hours, is an error of its row only.
                wanted = batch if columns is None else batch.select(sorted(set(columns.values())))
                wanted.validate()
                for column in wanted.columns:
                    _view_as_storage(column).validate(full=True)
                yield wanted


@contextlib.contextmanager
def _translate_arrow_errors(path: Path, kind: str) -> Iterator[None]:
    """Convert Arrow's errors about a damaged file to a DataError, because Arrow's own messages may quote the file."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError):
        raise DataError(str(path), "damaged", f"must be a complete {kind} file") from None


def _view_as_storage(array: Any) -> Any:
    """View an array as its storage types, also within lists and structs, to validate its buffers but not its values."""
    kind = _replace_types(array.type, _get_storage_type)
    return array if kind == array.type else array.view(kind)


def _get_storage_type(kind: Any) -> Any:
    """Return the type of the same buffers that accepts any value: binary for text and decimals, integers for times."""
    import pyarrow
    from pyarrow import types

    if types.is_decimal(kind):
        return pyarrow.binary(kind.bit_width // 8)
    if types.is_time(kind) or types.is_date64(kind):
        return pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    texts = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    return (texts | {pyarrow.string_view(): pyarrow.binary_view()}).get(kind, kind)


def _replace_types(kind: Any, replace: Callable[[Any], Any], *, decode: bool = False) -> Any:
    """Replace some types within an Arrow type, including types in lists and structs; `decode` also decodes
    dictionary types.
    """
    import pyarrow
    from pyarrow import types

    def inner(part: Any) -> Any:
        return _replace_types(part, replace, decode=decode)

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
    return replace(kind)


def _iter_arrow_rows(path: Path, batches: Iterator[Any]) -> RawRows:
    number, names = 0, None
    for batch in batches:
        names = _read_label_names(batch.schema) if names is None else names
        for place in range(batch.num_rows):
            number += 1
            at = format_location(path, number)
            yield number, catch_row_error(at, _build_arrow_row, batch, place, names, at=at)


@lru_cache(maxsize=4)
def _list_standalone_types(schema: Any) -> list[Any]:
    """Return each column's type without dictionaries and views, so that a row's values share no memory with other
    rows.
    """
    import pyarrow

    views = {pyarrow.string_view(): pyarrow.large_string(), pyarrow.binary_view(): pyarrow.large_binary()}
    return [_replace_types(kind, lambda one: views.get(one, one), decode=True) for kind in schema.types]


def _build_arrow_row(batch: Any, place: int, names: Mapping[str, Sequence[str]], *, at: str) -> Row:
    sliced = batch.slice(place, 1)
    try:
        # A dictionary or view buffer contains values of other rows, which must not count towards this row's size.
        columns = [
            column if column.type == kind else column.cast(kind)
            for column, kind in zip(sliced.columns, _list_standalone_types(batch.schema), strict=True)
        ]
        num_bytes = sum(column.nbytes for column in columns)
        row = {
            name: _to_plain_value(column[0].as_py()) if num_bytes <= MAX_BYTES else None
            for name, column in zip(sliced.schema.names, columns, strict=True)
        }
    except UnicodeDecodeError:
        raise DataError(at, "bytes that are not UTF-8", "must be UTF-8 text") from None
    except Exception as error:  # values that Python cannot represent, such as times out of range
        raise DataError(at, type(error).__name__, "must have values that Python can represent") from None
    if num_bytes > MAX_BYTES:
        raise DataError(at, f"more than {MAX_BYTES} bytes", f"must have at most {MAX_BYTES} bytes per record")
    return row | {
        column: _replace_label_number(row[column], of_label) for column, of_label in names.items() if column in row
    }


def _to_plain_value(value: Any) -> Any:
    """Convert decimals to int or float, and bytes to text if they are valid UTF-8, also within lists."""
    if isinstance(value, list):
        return [_to_plain_value(item) for item in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return value


def _replace_label_number(value: Any, names: Sequence[str]) -> Any:
    """Replace a label's number by its name, also within lists; -1 becomes null, an example without a label."""
    if isinstance(value, list):
        return [_replace_label_number(item, names) for item in value]
    if type(value) is not int or value >= len(names):
        return value
    return names[value] if value >= 0 else None if value == -1 else value


def _read_label_names(schema: Any) -> dict[str, Sequence[str]]:
    """Read the names of labels that Hugging Face `datasets` stores as numbers, by column, from the schema's
    metadata.
    """
    try:
        names: dict[str, Sequence[str]] = {}
        for name, feature in json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"].items():
            while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):  # of a list
                feature = (feature or [{}])[0] if isinstance(feature, list) else feature["feature"]
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
                names[name] = list(map(str, feature["names"]))
        return names
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
