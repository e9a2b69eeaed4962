import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data import Record, text_rows
from fedtune.data.load import SiteRecords
from fedtune.data.records import iter_records, iter_usable_records, record_key, resolve_file
from fedtune.runs.model_comparison import SideBySide
from fedtune.spec import DataError

COLUMNS = {"text": "question", "label": "intent"}
GOOD = b'{"question": "where is my card", "intent": "arrival"}\n'


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return path


def list_fields(path: Path) -> list[tuple[str, str, int]]:
    return [(r.fields["text"], r.fields["label"], r.line) for r in iter_records(path, COLUMNS)]


CSV = b'\xef\xbb\xbfid, question ,intent\r\n1,"two\r\nlines, ""quoted""",a\r\n\r\n,,\r\n2,plain, b \r\n'
JSONL = b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n  \n"
JSONL += b'{"id": [1], "intent": 7, "question": "lost\\nit \\u2028 \xc3\xa9"}'


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSONL", "a.csv", "a.csv.gz"])
def test_jsonl_and_csv_files_of_other_programs_are_read(tmp_path: Path, name: str) -> None:
    read = list_fields(write(tmp_path, name, CSV if "csv" in name else JSONL))
    rows = [('two\r\nlines, "quoted"', "a", 2), ("plain", "b", 6)]
    assert read == (rows if "csv" in name else [("where is my card", "arrival", 1), ("lost\nit \u2028 é", "7", 4)])


def test_open_quote_swallows_rows_up_to_the_next_quote(tmp_path: Path) -> None:
    # No writer that doubles quotes produces such a row, whatever the text of a record.
    rows = [b"a,b", b'"open,b', b"taken,b", b'"with it",b', b"c,d", b'"e",f']
    assert list_usable(tmp_path, "a.csv", *rows) == [("a", "b"), ("c", "d"), ("e", "f")]
    assert list_usable(tmp_path, "a.csv", *rows[:3]) == [("a", "b")]
    stream = iter_records(tmp_path / "a.csv", COLUMNS)
    assert next(stream).line == 2, "complete records before the error must be read"
    with pytest.raises(DataError):
        next(stream)


def test_resolve_file_searches_the_listed_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(tmp_path / "there", "a.jsonl", GOOD)
    assert resolve_file("a.jsonl", [tmp_path / "there"]) == tmp_path / "there" / "a.jsonl"
    write(tmp_path / "here", "a.jsonl", GOOD)
    assert resolve_file("a.jsonl", [tmp_path / "there"]) == tmp_path / "here" / "a.jsonl"
    assert resolve_file(str(tmp_path / "there" / "a.jsonl")) == tmp_path / "there" / "a.jsonl"
    with pytest.raises(DataError, match=r"data\.test_file = 'b\.jsonl': no such file in .*here, .*there"):
        resolve_file("b.jsonl", [tmp_path / "there"], key="data.test_file")


def test_record_key_is_canonical_json() -> None:
    assert record_key(Record({"text": "é", "label": "a"})) == b'{"label":"a","text":"\\u00e9"}'
    assert record_key(Record({"label": "a", "text": "é"}, file="f", line=3)) == b'{"label":"a","text":"\\u00e9"}'


# A site skips unusable records one by one; in the lead's own files they are errors with their position.

LINES = [b'{"question": "first", "intent": "a"}', b'{"question": "last", "intent": "b"}']
ROWS = [b"first,a", b'"la""st,\r\nin two lines",b']
LONG = b"x" * (1 << 24)
DEEP = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "question": "a", "intent": "b"}'
DIGITS = b'{"question": "a", "intent": "b", "x": ' + b"1" * 5000 + b"}"
LATIN, MOST = b'{"question": "caf\xe9", "intent": "b"}', "must have at most 16777216 bytes per record"
NO_UTF_8 = "byte 0xe9 at position 18 of the record': must be UTF-8 text, not UTF-16, Latin-1"
ARRAY, TOO_LARGE = "'array': must be one complete JSON object", "'a value that is too large'"
BEHIND = "text after a closing quote"
UNUSABLE: dict[str, list[tuple[bytes, str]]] = {
    "a.jsonl": [
        (
            b'{"question": "wh',
            "Unterminated string starting at at position 14 of the record': must be one complete JSON",
        ),
        *((LINES[0] + b",", "Extra data at position 37"), (b"[1, 2]", ARRAY), (DEEP, TOO_LARGE), (DIGITS, TOO_LARGE)),
        *((LATIN, NO_UTF_8), (b'{"intent": "b", "question": "' + LONG + b'"}', MOST)),
        (b'{"question": "a"}', "column 'intent' = 'absent'"),
        (b'{"question": " ", "intent": "b"}', "column 'question' = 'blank'"),
    ],
    "a.json": [
        *((b'{"question": wh}', "must be one complete JSON object"), (b"[1, 2]", ARRAY)),
        *((b" 7", "'number': must be one complete JSON object"), (DEEP, TOO_LARGE), (LATIN, NO_UTF_8)),
        (b'{"intent": "b", "question": "' + LONG + b'"}', MOST),
        (b'{"question": "],[{\\"\\\\"}', "column 'intent' = 'absent'"),
        *((b'{"question": "a"]', "must be one complete JSON object"), (b"", "'a comma without an object'")),
    ],
    "a.tsv": [
        (b"a\tb\tc", "'3 cells': must have 2 cells"),
        (b'"he said "hi" to me"\tb', BEHIND),
        (b'"a\n' + LONG + b'"",\n"\tb', MOST),
    ],
    "a.csv": [
        *((b"a", "'1 cell': must have 2 cells"), (b"a,b,c", "'3 cells': must have 2 cells")),
        (b"caf\xe9,b", "byte 0xe9 at position 4 of the record"),
        *((b'"two\nlines, caf\xe9",b', "byte 0xe9 at position 16 of the record"), (LONG + b",b", MOST)),
        *((b'"a\n' + LONG + b'"",\n",b', MOST), (b'"' + (b"a,b " * 256 + b"\n") * (1 << 14) + b'",b', MOST)),
        *((b'"he said "hi" to me",b', BEHIND), (b"one\rtwo,b", "a single carriage return")),
    ],
}
BLANK = {"a.jsonl": b" ", "a.csv": b","}
AROUND = {
    "a.jsonl": (b"", b"\n", b"\n"),
    "a.json": (b"[", b",\n", b"]"),
    "a.csv": (b"question,intent\n", b"\n", b"\n"),
    "a.tsv": (b"question\tintent\n", b"\n", b"\n"),
}
"""Text before, between and after the rows of each format."""
NAMED = [(name, number) for name, cases in UNUSABLE.items() for number in range(len(cases))]


def list_usable(folder: Path, name: str, *lines: bytes) -> list[tuple[str, str]]:
    begin, between, end = AROUND[name.removesuffix(".gz")]
    path = write(folder, name, begin + between.join(lines) + end)
    return [(record.fields["text"], record.fields["label"]) for record in iter_usable_records(path, COLUMNS)]


@pytest.mark.parametrize(("name", "number"), NAMED)
@pytest.mark.parametrize("place", [0, *(pytest.param(place, marks=pytest.mark.nightly) for place in (1, 2))])
def test_unusable_record_is_skipped_alone(tmp_path: Path, name: str, number: int, place: int) -> None:
    lines = {"a.csv": ROWS, "a.tsv": [row.replace(b",", b"\t") for row in ROWS]}.get(name, LINES)
    expected = list_usable(tmp_path, name, *lines)
    assert len(expected) == 2
    bad, reason = UNUSABLE[name][number]
    blank = (BLANK[name],) if name in BLANK else ()
    content = (*lines[:place], bad, *blank, *lines[place:])
    assert list_usable(tmp_path, f"{name}.gz", *content) == expected
    assert list_usable(tmp_path, name, *content) == expected
    with pytest.raises(DataError) as caught:  # the lead's own files are parsed strictly
        list(iter_records(tmp_path / name, COLUMNS))
    assert reason in str(caught.value)
    prefix = f"{tmp_path / name}:{1 + name.endswith('sv')}"
    assert str(caught.value).startswith(prefix) or place
    assert "caf" not in str(caught.value), "no record text may be quoted"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_very_long_text_is_one_record(tmp_path: Path, name: str) -> None:
    before, text = csv.field_size_limit(131_072), "word " * 300_000
    try:
        lines = {"a.csv": [f'"{text}",b', f"{text},b"], "a.jsonl": [json.dumps({"question": text, "intent": "b"})]}
        texts = list_usable(tmp_path, name, *[line.encode() for line in lines[name]])
        assert texts == [(text, "b")] * len(lines[name])
        csv.field_size_limit(1 << 30)
        list_usable(tmp_path, name)
        assert csv.field_size_limit() == 1 << 30, "the process-wide limit must not be lowered"
    finally:
        csv.field_size_limit(before)


CELL = st.text('",\r\nab \x00\x0b\x1c\x85\u2028\ufeffé', max_size=6)
ROW = st.tuples(CELL, CELL)


@given(st.lists(ROW, max_size=4), ROW, st.integers(0, 4), st.integers(1, 7))
def test_quoted_csv_row_does_not_affect_other_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], new: tuple[str, str], place: int, piece: int
) -> None:
    def read(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
        buffer = io.StringIO(newline="")
        csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("question", "intent"), *rows])
        path = write(tmp_path_factory.mktemp("rows"), "a.csv", buffer.getvalue().encode())
        return [(record.fields["text"], record.fields["label"]) for record in iter_usable_records(path, COLUMNS)]

    def filter_rows(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(text, label.strip()) for text, label in rows if text.strip() and label.strip()]

    with pytest.MonkeyPatch.context() as patch:
        # Blocks may end anywhere, for instance within a doubled quote.
        patch.setattr(text_rows, "_BLOCK_BYTES", piece)
        assert read(rows) == filter_rows(rows)
        assert read([*rows[:place], new, *rows[place:]]) == filter_rows([*rows[:place], new, *rows[place:]])


@given(content=st.text('",\nab', max_size=30), piece=st.integers(1, 7))
def test_csv_rows_are_split_like_the_csv_module(
    content: str, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("rows"), "a.csv", content.encode())
    try:
        expected = list(csv.reader(content.splitlines(keepends=True), strict=True))
    except csv.Error:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "_BLOCK_BYTES", piece)
        texts = [raw.decode() for _, raw in text_rows.cut_rows(path, comma=b",") if raw is not None]
    assert [next(csv.reader([text], strict=True)) for text in texts] == expected


def test_repr_shows_no_record_contents() -> None:
    """A notebook cell or a log line that ends in a comparison would otherwise print every scored record."""
    record = Record({"text": "canary of patient 4711", "label": "canary"}, file="a.csv", line=3)
    comparison = SideBySide(
        records=[record], users=None, primary_metric="loss", measured={}, means={}, score=dict, detailed=lambda _: None
    )
    for holder in (record, [record], SiteRecords([record], [record]), comparison):
        assert "canary" not in f"{holder!r}{holder}"
    assert "a.csv" in repr(record), "the file name must be shown"
