"""Stand-in until the reader of all formats is merged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from fedtune.data.records import Row, _csv_header, _csv_row, _json_row, _text, at_line, csv_state, cut_rows, line_state
from fedtune.spec import DataError


def raw_rows(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[tuple[int, Row | DataError]]:
    """(place, row, or what is wrong with it) of each row."""
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    if suffix == ".json":
        yield from enumerate(json.loads(path.read_text()), 1)
        return
    if suffix == ".jsonl":
        rows, parse = cut_rows(path, line_state), _json_row
    elif suffix == ".csv":
        rows = cut_rows(path, csv_state)
        parse = partial(_csv_row, header=_csv_header(path, columns or {}, rows))
    else:
        raise DataError(str(path), suffix, "must end in .jsonl, .csv, .jsonl.gz or .csv.gz")
    for line, raw in rows:
        at = at_line(path, line)
        try:
            row = parse(_text(raw, at=at), at=at)
        except DataError as error:
            yield line, error
            continue
        if row is not None:
            yield line, row
