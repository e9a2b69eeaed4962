from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data import Record, iter_records, read_records, record_key, resolve_file
from fedtune.spec import DataError

COLUMNS = {"text": "question", "label": "intent"}
GOOD = b'{"question": "where is my card", "intent": "arrival"}\n'


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return path


def fields(path: Path) -> list[tuple[str, str, int]]:
    return [(r.fields["text"], r.fields["label"], r.line) for r in read_records(path, COLUMNS)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSONL"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n  \n"
    content += b'{"id": [1], "intent": 7, "question": "lost\\nit \\u2028 \xc3\xa9"}'
    assert fields(write(tmp_path, name, content)) == [
        ("where is my card", "arrival", 1),
        ("lost\nit \u2028 é", "7", 4),
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv(tmp_path: Path, name: str) -> None:
    content = b'\xef\xbb\xbfid, question ,intent\r\n1,"two\r\nlines, ""quoted""",a\r\n\r\n,,\r\n2,plain, b \r\n'
    assert fields(write(tmp_path, name, content)) == [
        ('two\r\nlines, "quoted"', "a", 2),
        ("plain", "b", 6),
    ]


MALFORMED = {
    "truncated json": ("a.jsonl", GOOD + b'{"question": "wh', "a.jsonl:2", "one whole JSON object"),
    "array": ("a.jsonl", b"[1, 2]\n", "a.jsonl:1", "array"),
    "pretty-printed": ("a.jsonl", b"{\n", "a.jsonl:1", "one whole JSON object on a line"),
    "deep": ("a.jsonl", b"[" * 100_000, "a.jsonl:1", "too large a value"),
    "huge integer": ("a.jsonl", b'{"question": "a", "intent": ' + b"1" * 5000 + b"}", "a.jsonl:1", "too large"),
    "absent": ("a.jsonl", GOOD + b'{"question": "a"}', "a.jsonl:2, column 'intent'", "data.columns.label"),
    "null": ("a.jsonl", b'{"question": null, "intent": "b"}', "a.jsonl:1, column 'question'", "null"),
    "number as text": ("a.jsonl", b'{"question": 3, "intent": "b"}', "a.jsonl:1, column 'question'", "must be text"),
    "float label": ("a.jsonl", b'{"question": "a", "intent": 1.0}', "a.jsonl:1, column 'intent'", "an integer"),
    "boolean label": ("a.jsonl", b'{"question": "a", "intent": true}', "a.jsonl:1, column 'intent'", "boolean"),
    "blank": ("a.jsonl", b'{"question": " ", "intent": "b"}', "a.jsonl:1, column 'question'", "not be blank"),
    "surrogate": ("a.jsonl", b'{"question": "\\ud800", "intent": "b"}', "a.jsonl:1, column 'question'", "Unicode"),
    "latin-1": ("a.jsonl", GOOD + b'{"question": "caf\xe9", "intent": "b"}', "a.jsonl:2", "byte 0xe9 at place 18"),
    "utf-16": ("a.csv", "question,intent\n".encode("utf-16"), "a.csv:1", "must be UTF-8"),
    "not gzip": ("b.jsonl", GOOD, "b.jsonl.gz:1", "must be a whole gzip file"),
    "empty": ("a.jsonl", b"\n\n", "a.jsonl", "at least one record"),
    "empty gzip": ("a.jsonl.gz", b"", "a.jsonl.gz", "at least one record"),
    "header only": ("a.csv", b"question,intent\n", "a.csv", "at least one record"),
    "no column": ("a.csv", b"body;intent\n", "a.csv:1, column 'question'", "one of 'body;intent'"),
    "column twice": ("a.csv", b"question,intent,intent\na,b,c\n", "a.csv:1, column 'intent'", "must appear once"),
    "few cells": ("a.csv", b"question,intent\na,b\nc\n", "a.csv:3", "must have 2 cells"),
    "many cells": ("a.csv", b"question,intent\na,b,c\n", "a.csv:2", "3 cells"),
    "open quote": ("a.csv", b'question,intent\na,b\n"c,d\ne,f\n', "a.csv:3", "is a quote open?"),
    "old Mac": ("a.csv", b"question,intent\ra,b\r", "a.csv:1", "must be CSV"),
    "other format": ("a.parquet", b"PAR1", "a.parquet", "must end in .jsonl, .csv"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_named_with_line_and_column(tmp_path: Path, case: str) -> None:
    name, content, where, why = MALFORMED[case]
    path = write(tmp_path, name, content)
    if case == "not gzip":
        path = path.rename(tmp_path / "b.jsonl.gz")
    with pytest.raises(DataError) as error:
        read_records(path, COLUMNS)
    message = str(error.value)
    assert where in message
    assert why in message
    assert "\n" not in message
    assert "caf" not in message


@pytest.mark.parametrize("kept", [5, 40, -10])
def test_truncated_gzip(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 50)[:kept])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+ = .*must be a whole gzip file"):
        read_records(path, COLUMNS)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_records(tmp_path / "a.jsonl", COLUMNS)
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        read_records(tmp_path / "b.jsonl", COLUMNS)


def test_reading_stops_after_the_rows_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", GOOD + b"not json")
    assert len(read_records(path, COLUMNS, rows=1)) == 1
    stream = iter_records(path, COLUMNS)
    assert next(stream).at("label") == f"{path}:1, label"
    with pytest.raises(DataError):
        next(stream)


def test_resolve_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(tmp_path / "there", "a.jsonl", GOOD)
    assert resolve_file("a.jsonl", [tmp_path / "there"]) == tmp_path / "there" / "a.jsonl"
    write(tmp_path / "here", "a.jsonl", GOOD)
    assert resolve_file("a.jsonl", [tmp_path / "there"]) == tmp_path / "here" / "a.jsonl"
    assert resolve_file(str(tmp_path / "there" / "a.jsonl")) == tmp_path / "there" / "a.jsonl"
    with pytest.raises(DataError, match=r"data\.test_file = 'b\.jsonl': no such file, looked in .*here, .*there"):
        resolve_file("b.jsonl", [tmp_path / "there"], key="data.test_file")


def test_record_key_is_canonical() -> None:
    assert record_key(Record({"text": "é", "label": "a"})) == b'{"label":"a","text":"\\u00e9"}'
    assert record_key(Record({"label": "a", "text": "é"}, file="f", line=3)) == b'{"label":"a","text":"\\u00e9"}'


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
LABEL = TEXT.map(str.strip)


@given(rows=st.lists(st.tuples(TEXT, LABEL), min_size=1, max_size=5), suffix=st.sampled_from(["jsonl", "csv"]))
def test_what_is_written_is_read_back(
    rows: list[tuple[str, str]], suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if suffix == "csv":
        buffer = io.StringIO(newline="")
        csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("question", "intent"), *rows])
        content = buffer.getvalue()
    else:
        content = "".join(json.dumps({"question": a, "intent": b}, ensure_ascii=False) + "\n" for a, b in rows)
    path = write(tmp_path_factory.mktemp("rows"), f"a.{suffix}", content.encode())
    assert [(text, label) for text, label, _ in fields(path)] == rows
