"""In-memory records: data frames, Arrow tables, Hugging Face datasets, arrays, and lists of dicts.

Records are written to temporary private files (mode 0600 in a folder of mode 0700), so that they pass the same checks
as data files.  An optional library is imported only for data of its own types.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, time
from decimal import Decimal
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from fedtune.api.compose import Settings
from fedtune.codec import require
from fedtune.data.records import IN_MEMORY, memory_folder
from fedtune.data.spec import SITE, DataSpec
from fedtune.extras import require_extra
from fedtune.formatting import flatten, pluralize
from fedtune.spec import NOT_GIVEN, ConfigError, DataError, check_name

Data: TypeAlias = Any
"""A pandas or polars data frame, an Arrow table, a Hugging Face dataset, a mapping from column to values, an iterable
of row mappings, or scikit-learn's (X, y)."""
_FORMS = "must be a data frame, an Arrow table, a data set, a list of dicts, or (X, y) arrays"
TRAIN_FILE = f"{IN_MEMORY}/sites/{SITE}.jsonl"
"""`data.train_file` of a run on in-memory records."""
DETECTED = ("own.jsonl", "own.yaml")
"""File names of the pooled records and of the settings detected from them, in `write_private_files`'s folder."""
LEAD_FILES = {name: f"{IN_MEMORY}/{name}.jsonl" for name in ("validation", "test")}
"""The lead's data files of a run on in-memory records."""
_BY_SITES = ("data.train_file", "data.partition", "federation.num_sites", "federation.site_names")
_UNNAMED = re.compile(r"x\d+")  # name of a column of an array
_MAX_LEVELS, _MAX_DIGITS = 64, 300  # of a cell
_SHARES = {"validation": 0.1, "test": 0.2}


@contextmanager
def write_private_files(
    sites: Mapping[str, Data], *, validation: Data = None, test: Data = None, widths: set[int]
) -> Iterator[Path]:
    """Write a run's in-memory records to private files for `resolve_file`, and delete the files on exit.

    Error messages name the site, "validation" or "test" instead of the private file.

    Args:
        sites: records by site name.
        validation: the lead's validation records.
        test: the lead's test records.
        widths: as for `iter_rows`.

    Yields:
        The private folder.

    Raises:
        DataError: an object is not a table, two arrays differ in their number of columns, or a value cannot be written
            as JSON.
    """
    if not isinstance(sites, Mapping) or not sites:
        bound = 'must map each site to its records: {"north": frame, "south": frame}'
        raise ConfigError("sites", type(sites).__name__, bound)
    for site in (names := [str(site) for site in sites]):
        check_name("sites", site)
    require("sites", ", ".join(names), len({*names}) == len(names), "must be distinct names")
    tables = {TRAIN_FILE.replace(SITE, str(site)): (str(site), data) for site, data in sites.items()}
    others = {"validation": validation, "test": test}
    tables |= {LEAD_FILES[name]: (name, data) for name, data in others.items() if data is not None}
    shown = {file: name for file, (name, _) in tables.items()}
    shown |= dict(zip(DETECTED, ("sites", "detected settings"), strict=True))
    with make_private_folder() as folder, _rename_files_in_errors(folder, shown):
        (folder / IN_MEMORY / "sites").mkdir(parents=True, mode=0o700)
        for file, (name, data) in tables.items():
            write_rows(folder / file, data, at=name, widths=widths)
        token = memory_folder.set(folder)
        try:
            yield folder
        finally:
            memory_folder.reset(token)


@contextmanager
def make_private_folder() -> Iterator[Path]:
    """Create a temporary folder of mode 0700, and delete it on exit."""
    with TemporaryDirectory(prefix="fedtune-") as folder:
        yield Path(folder).resolve()


@contextmanager
def write_data_file(data: Data, spec: DataSpec) -> Iterator[str]:
    """Write a trained model's input to a private file that is deleted on exit.  If `data` is a path already, nothing
    is written.

    Args:
        data: the records.
        spec: the data settings of the model's run, whose columns an array must have.

    Yields:
        The path of the file.

    Raises:
        DataError: the object is not a table, or an array has the wrong number of columns.
    """
    if isinstance(data, str | os.PathLike):
        yield os.fspath(data)
        return
    with make_private_folder() as folder, _rename_files_in_errors(folder, {"data.jsonl": "data"}):
        write_rows(folder / "data.jsonl", data, at="data", widths=list_array_widths(spec))
        yield str(folder / "data.jsonl")


@contextmanager
def _rename_files_in_errors(folder: Path, names: Mapping[str, str]) -> Iterator[None]:
    """Replace paths of private files in error messages by the caller's names for the data."""

    def replace_paths(value: Any) -> Any:
        for file, name in names.items() if isinstance(value, str) else ():
            value = value.replace(str(folder / file), name)
        return value

    try:
        yield
    except ConfigError as error:
        renamed = (replace_paths(one) for one in (error.key, error.value, error.bound))
        raise type(error)(*renamed, remedy=replace_paths(error.remedy)) from None


def build_in_memory_settings(settings: Settings, *, of_recipe: bool, validation: bool, test: bool) -> dict[str, Any]:
    """Build the settings that point a run at in-memory records, in addition to the caller's settings.

    Args:
        settings: the caller's settings, without training records.
        of_recipe: whether the run's recipe was written for other records, so that its files and held-out fractions
            are replaced.
        validation: whether the caller passes validation records.
        test: whether the caller passes test records.

    Raises:
        ConfigError: a setting conflicts with in-memory records.
    """
    said = dict(flatten(settings))
    given = {"validation": validation, "test": test}
    refused = (*_BY_SITES, *(f"data.{name}_{what}" for name in given for what in ("file", "fraction") if given[name]))
    for key, value in said.items():
        if any(f"{key}.".startswith(f"{one}.") for one in refused):
            raise ConfigError(key, value, "cannot be combined with records in memory: remove this setting")
    own: dict[str, Any] = {"data.train_file": TRAIN_FILE, "data.partition.kind": "file"}
    own |= {"data.partition.sites": {}, "data.partition.proportions": []}
    for name, is_given in given.items():
        if is_given:
            own |= {f"data.{name}_file": LEAD_FILES[name], f"data.{name}_fraction": 0.0}
        elif of_recipe and f"data.{name}_file" not in said:
            own |= {f"data.{name}_file": None, f"data.{name}_fraction": _SHARES[name]}
    own |= {"data.train_fraction": 1.0, "data.dataset": "own"} if of_recipe else {}
    return {key: value for key, value in own.items() if key not in said}


def write_rows(path: Path, data: Data, *, at: str, widths: set[int]) -> None:
    """Write records as JSON Lines to a new file of mode 0600.

    Args:
        path: the file to create.
        data: the records.
        at: the caller's name for the data, for error messages.
        widths: as for `iter_rows`.

    Raises:
        DataError: the object is not a table, or a value has no JSON equivalent.
    """
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        for number, row in enumerate(iter_rows(data, at=at, widths=widths), 1):
            _require_mapping(row, f"{at}:{number}")
            named = {str(key): convert_cell(value, f"{at}:{number}, column {str(key)!r}") for key, value in row.items()}
            if len(named) < len(row):
                raise DataError(f"{at}:{number}", "a duplicate column", "must have distinct column names")
            file.write(json.dumps(named) + "\n")


def _require_mapping(row: Any, at: str) -> None:
    if not isinstance(row, Mapping):
        raise DataError(at, type(row).__name__, "must be a mapping from column to value")


def iter_rows(data: Data, *, at: str, widths: set[int]) -> Iterator[Any]:
    """Yield the rows of in-memory data of any supported type.

    Args:
        data: the table.
        at: the caller's name for the data, for error messages.
        widths: the numbers of columns that an array, whose columns have no names, may have.  If the set is empty, the
            first row of an array sets the number.

    Raises:
        DataError: the object is not a table, has a duplicate column, or is an array of the wrong width.
    """
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], Mapping):
        yield from _iter_labeled_rows(*data, at=at, widths=widths)
    elif isinstance(data, str | bytes | os.PathLike) or data is None:
        raise DataError(at, type(data).__name__, f"{_FORMS}; for files, set data.train_file")
    elif isinstance(data, Mapping):
        if any(hasattr(one, "column_names") for one in data.values()):  # a DatasetDict
            raise DataError(at, f"the splits {', '.join(map(str, data))}", "must be one data set: choose a split")
        columns = list(data.values())
        if any(isinstance(one, str | Mapping) or not isinstance(one, Iterable) for one in columns):
            raise DataError(
                at, "a mapping without columns", "must map each column to its values, or be a list of dicts"
            )
        names, values = _list_column_names(data, at=at), [_convert_to_list(one, at=at) for one in columns]
        if len({len(one) for one in values}) > 1:
            raise DataError(at, "columns of different lengths", "must have one value for each row in each column")
        for cells in zip(*values, strict=True):
            yield dict(zip(names, cells, strict=True))
    elif hasattr(data, "itertuples"):  # pandas
        names = _list_column_names(data.columns, at=at)
        for cells in data.itertuples(index=False, name=None):
            yield dict(zip(names, cells, strict=True))
    elif callable(getattr(data, "iter_rows", None)):  # polars
        yield from data.iter_rows(named=True)
    elif any(callable(getattr(data, name, None)) for name in ("to_batches", "to_pylist")):  # Arrow
        _list_column_names(getattr(getattr(data, "schema", None), "names", ()), at=at)
        batches = data.to_batches() if hasattr(data, "to_batches") else [data]
        yield from (row for batch in batches for row in batch.to_pylist())
    elif fields := _list_fields(data):
        yield from iter_rows({name: data[name] for name in fields}, at=at, widths=widths)
    elif (dimensions := getattr(data, "ndim", 0)) >= 1:
        yield from _convert_to_list(data, at=at) if dimensions == 1 else _iter_feature_rows(data, at=at, widths=widths)
    elif hasattr(data, "__arrow_c_stream__"):
        require_extra(at, NOT_GIVEN, "data", "pyarrow")
        import pyarrow

        yield from iter_rows(pyarrow.table(data), at=at, widths=widths)
    elif isinstance(data, Iterable) and not hasattr(data, "ndim"):  # a Hugging Face data set, or an iterable of rows
        yield from data
    else:
        raise DataError(at, type(data).__name__, _FORMS)


def _list_column_names(columns: Iterable[Any], *, at: str) -> list[str]:
    names = [str(name) for name in columns]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise DataError(f"{at}, column {twice!r}", "a duplicate column", "must have distinct column names")
    return names


def _list_fields(data: Any) -> tuple[str, ...]:
    """Return the names of a structured array's fields; empty for any other object."""
    names = getattr(getattr(data, "dtype", None), "names", None)
    return tuple(names) if names and data.ndim == 1 else ()


def split_inputs(data: Data, spec: DataSpec) -> tuple[list[Any], bool]:
    """Split data for prediction into a list of inputs.

    A single text is one input.  Rows of numbers become table rows with the columns x0, x1, ...

    Returns:
        The inputs, and whether they are table rows (True) or texts (False).

    Raises:
        DataError: the object contains neither texts nor a table, or is an array with the wrong number of columns.
    """
    if data is None or isinstance(data, str):
        return [data], False
    widths = list_array_widths(spec)
    inputs = list(data) if isinstance(data, tuple) else list(iter_rows(data, at="data", widths=widths))
    if inputs and all(isinstance(one, list | tuple) for one in inputs):
        inputs = list(_iter_feature_rows(inputs, at="data", widths=widths))
    return inputs, bool(inputs) and all(isinstance(one, Mapping) for one in inputs)


def list_array_widths(spec: DataSpec) -> set[int]:
    """Return the numbers of columns that an array may have: the run's x0, x1, ..., without or with the answer.

    The result is empty if the run has no such columns.
    """
    features = {column for one in spec.features for column in one.columns}
    found = ([*filter(_UNNAMED.fullmatch, names)] for names in (features, features | {*spec.columns.values()}))
    return {1 + max(int(name[1:]) for name in names) for names in found if names}


def _iter_labeled_rows(inputs: Any, answers: Any, *, at: str, widths: set[int]) -> Iterator[dict[str, Any]]:
    """Yield the rows of scikit-learn's (X, y): columns x0, x1, ... or `text` for X, and one column for y.

    The column for y is `target` for floats and `label` for all other types, unless y is a named pandas series.  A data
    frame X keeps its column names.
    """
    values, kind = _convert_to_list(answers, at=f"{at}, y"), getattr(getattr(answers, "dtype", None), "kind", None)
    if isinstance(answers, Mapping) or getattr(answers, "ndim", 1) > 1 or any(isinstance(one, list) for one in values):
        raise DataError(f"{at}, y", "a table", "must have one value for each row")
    is_float = kind == "f" if kind else bool(values) and all(type(one) is float for one in values)
    column = str(getattr(answers, "name", None) or ("target" if is_float else "label"))
    is_listed = isinstance(inputs, Sequence) and not (inputs and isinstance(inputs[0], Mapping))
    is_array = is_listed or (hasattr(inputs, "ndim") and not hasattr(inputs, "itertuples") and not _list_fields(inputs))
    rows = list((_iter_feature_rows if is_array else iter_rows)(inputs, at=at, widths=widths))
    if len(rows) != len(values):
        bound = f"must have one value for each of the {len(rows)} rows of X"
        raise DataError(f"{at}, y", f"{len(values)} values", bound)
    for number, (row, value) in enumerate(zip(rows, values, strict=True), 1):
        _require_mapping(row, f"{at}:{number}")
        if column in row:
            raise DataError(f"{at}, y", column, "must have another name than the columns of X")
        yield {**row, column: value}


def _iter_feature_rows(inputs: Any, *, at: str, widths: set[int]) -> Iterator[dict[str, Any]]:
    """Yield the rows of an array: features x0, x1, ... for a 2-D array, `text` for a list of strings."""
    for number, one in enumerate(_convert_to_list(inputs, at=at), 1):
        if isinstance(one, str):
            yield {"text": one}
        elif isinstance(one, list | tuple) and not any(isinstance(cell, list | tuple) for cell in one):
            if not widths:
                widths.add(len(one))
            if len(one) not in widths:
                columns = " or ".join(map(str, sorted(widths)))
                bound = f"must have as many columns as every site and the training data: {columns}"
                raise DataError(f"{at}:{number}", pluralize(len(one), "column"), bound)
            yield {f"x{place}": cell for place, cell in enumerate(one)}
        else:
            raise DataError(f"{at}:{number}", type(one).__name__, "must be a text, or a row of numbers")


def _convert_to_list(values: Any, *, at: str) -> list[Any]:
    if callable(dense := getattr(values, "toarray", None)):  # a sparse matrix
        values = dense()
    methods = (getattr(values, name, None) for name in ("to_list", "to_pylist"))
    values = next((convert() for convert in methods if callable(convert)), values)
    values = _convert_from_numpy(values, at)
    try:
        return list(values)
    except TypeError:  # an array without dimensions
        raise DataError(at, type(values).__name__, "must be a list or an array of values") from None


def _convert_from_numpy(value: Any, at: str) -> Any:
    """Convert an array, or a number or date of numpy, to Python values; return any other value unchanged."""
    kind = value.dtype.kind if type(value).__module__ == "numpy" else ""
    if kind == "f":
        value = value.astype("float64")  # tolist returns long doubles unchanged
    if kind == "M":
        value = value.astype("datetime64[us]")  # tolist converts dates in nanoseconds to integers
        if any(isinstance(one, int) for one in value.ravel().tolist()):
            raise DataError(at, "a date", "must be in the years 1 to 9999")
    return convert() if callable(convert := getattr(value, "tolist", None)) else value


def convert_cell(value: Any, at: str, above: tuple[int, ...] = ()) -> Any:
    """Convert a cell of a table to a JSON value, and the missing-value marker of any library to None.

    `above` has the ids of the values that contain this one.

    Raises:
        DataError: the value has no JSON equivalent, contains itself, is nested too deeply, or is an infinite or huge
            number.
    """
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float | Decimal):
        return _convert_number(value, at)
    if isinstance(value, date | time):
        return value.isoformat()
    if id(value) in above or len(above) >= _MAX_LEVELS:
        bound = f"must not contain itself, and must have at most {_MAX_LEVELS} levels"
        raise DataError(at, type(value).__name__, bound)
    inner = partial(convert_cell, at=at, above=(*above, id(value)))
    if isinstance(value, Mapping):
        return {str(key): inner(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [inner(one) for one in value]
    if (converted := _convert_from_numpy(value, at)) is not value:
        return inner(converted)
    bound = "must be text, a number, a date, a list or a mapping; records with bytes or images need a file"
    raise DataError(at, type(value).__name__, bound)


def _convert_number(value: int | float | Decimal, at: str) -> int | float | None:
    if isinstance(value, Decimal):  # compared by its exponent: 1e1000000 has a million digits, and sNaN has no order
        is_missing, is_right = value.is_nan(), value.is_finite() and value.adjusted() < _MAX_DIGITS
    else:
        is_missing, is_right = value != value, abs(value) < 10**_MAX_DIGITS
    if is_missing:
        return None
    if not is_right:
        raise DataError(at, type(value).__name__, f"must be a finite number below 1e{_MAX_DIGITS}")
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value
