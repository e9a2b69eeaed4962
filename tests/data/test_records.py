from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data import Record, iter_records, record_key, resolve_file, text_rows
from fedtune.data.records import record_of, usable_records
from fedtune.data.values import labels_of, said_of, turns_said
from fedtune.spec import DataError

COLUMNS = {"text": "question", "label": "intent"}
GOOD = b'{"question": "where is my card", "intent": "arrival"}\n'


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return path


def fields(path: Path) -> list[tuple[str, str, int]]:
    return [(r.fields["text"], r.fields["label"], r.line) for r in iter_records(path, COLUMNS)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSONL"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n  \n"
    content += b'{"id": [1], "intent": 7, "question": "lost\\nit \\u2028 \xc3\xa9"}'
    assert fields(write(tmp_path, name, content)) == [("where is my card", "arrival", 1), ("lost\nit \u2028 é", "7", 4)]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv(tmp_path: Path, name: str) -> None:
    content = b'\xef\xbb\xbfid, question ,intent\r\n1,"two\r\nlines, ""quoted""",a\r\n\r\n,,\r\n2,plain, b \r\n'
    assert fields(write(tmp_path, name, content)) == [('two\r\nlines, "quoted"', "a", 2), ("plain", "b", 6)]


def test_a_fault_comes_behind_the_whole_records_before_it(tmp_path: Path) -> None:
    stream = iter_records(write(tmp_path, "a.jsonl", GOOD + b"not json"), COLUMNS)
    assert next(stream).line == 1
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


# A site's lenient reading: what cannot be used is left out by itself.

LINES = [b'{"question": "first", "intent": "a"}', b'{"question": "last", "intent": "b"}']
ROWS = [b"first,a", b'"la""st,\r\nin two lines",b']
LONG = b"x" * (1 << 24)
LEFT_OUT = {
    "a.jsonl": {
        "no JSON": b'{"question": "wh',
        "no object": b"[1, 2]",
        "too deep": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "question": "a", "intent": "b"}',
        "too large a number": b'{"question": "a", "intent": "b", "x": ' + b"1" * 5000 + b"}",
        "latin-1": b'{"question": "caf\xe9", "intent": "b"}',
        "too long": b'{"intent": "b", "question": "' + LONG + b'"}',
        "blank": b" ",
        "a value short": b'{"question": "a"}',
    },
    "a.json": {
        "no JSON": b'{"question": wh}',
        "no object": b"[1, 2]",
        "too deep": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "question": "a", "intent": "b"}',
        "latin-1": b'{"question": "caf\xe9", "intent": "b"}',
        "too long": b'{"intent": "b", "question": "' + LONG + b'"}',
        "a value short": b'{"question": "],[{\\"\\\\"}',
        "another bracket": b'{"question": "a"]',
        "nothing": b"",
    },
    "a.tsv": {
        "many cells": b"a\tb\tc",
        "a quote within quotes": b'"he said "hi" to me"\tb',
        "too long in quotes": b'"a\n' + LONG + b'"",\n"\tb',
    },
    "a.csv": {
        "few cells": b"a",
        "many cells": b"a,b,c",
        "latin-1": b"caf\xe9,b",
        "latin-1 in a quoted cell of several lines": b'"two\nlines, caf\xe9",b',
        "too long": LONG + b",b",
        "too long in quotes": b'"a\n' + LONG + b'"",\n",b',
        "too long over many lines": b'"' + (b"a,b " * 256 + b"\n") * (1 << 14) + b'",b',
        "a quote within quotes": b'"he said "hi" to me",b',
        "a carriage return outside quotes": b"one\rtwo,b",
        "blank": b",",
    },
}
AROUND = {
    "a.jsonl": (b"", b"\n", b"\n"),
    "a.json": (b"[", b",\n", b"]"),
    "a.csv": (b"question,intent\n", b"\n", b"\n"),
    "a.tsv": (b"question\tintent\n", b"\n", b"\n"),
}
"""What stands before, between and behind the rows of each format."""
NAMED = [(name, case) for name, cases in LEFT_OUT.items() for case in cases]


def usable(folder: Path, name: str, *lines: bytes) -> list[tuple[str, str]]:
    begin, between, end = AROUND[name.removesuffix(".gz")]
    path = write(folder, name, begin + between.join(lines) + end)
    return [(record.fields["text"], record.fields["label"]) for record in usable_records(path, COLUMNS)]


@pytest.mark.parametrize(("name", "case"), NAMED)
@pytest.mark.parametrize("place", [0, *(pytest.param(place, marks=pytest.mark.nightly) for place in (1, 2))])
def test_a_record_that_cannot_be_used_is_left_out_by_itself(tmp_path: Path, name: str, case: str, place: int) -> None:
    lines = {"a.csv": ROWS, "a.tsv": [row.replace(b",", b"\t") for row in ROWS]}.get(name, LINES)
    expected = usable(tmp_path, name, *lines)
    assert len(expected) == 2
    bad = LEFT_OUT[name][case]
    assert usable(tmp_path, f"{name}.gz", *lines[:place], bad, *lines[place:]) == expected
    assert usable(tmp_path, name, *lines[:place], bad, *lines[place:]) == expected
    path = tmp_path / name
    if case != "blank":
        with pytest.raises(DataError):  # the lead's own files are read strictly
            list(iter_records(path, COLUMNS))


def test_an_open_quote_takes_along_what_stands_before_the_next_quote(tmp_path: Path) -> None:
    # No writer that doubles quotes makes such a row, whatever a record's text.
    rows = [b"a,b", b'"open,b', b"taken,b", b'"with it",b', b"c,d", b'"e",f']
    assert usable(tmp_path, "a.csv", *rows) == [("a", "b"), ("c", "d"), ("e", "f")]
    assert usable(tmp_path, "a.csv", *rows[:3]) == [("a", "b")]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_text_of_many_characters_is_a_record(tmp_path: Path, name: str) -> None:
    before, text = csv.field_size_limit(131_072), "word " * 300_000
    try:
        lines = {"a.csv": [f'"{text}",b', f"{text},b"], "a.jsonl": [json.dumps({"question": text, "intent": "b"})]}
        found = usable(tmp_path, name, *[line.encode() for line in lines[name]])
        assert found == [(text, "b")] * len(lines[name])
        csv.field_size_limit(1 << 30)
        usable(tmp_path, name)
        assert csv.field_size_limit() == 1 << 30, "nobody else's bound is lowered"
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    "content",
    [
        b"body,kind\na,b\n",
        b"caf\xe9,question,intent\n1,a,b\n",
        b'"question,intent\na,b\n',
        b"x" * (1 << 24) + b"\nquestion,intent\na,b\n",
    ],
    ids=["no column", "latin-1", "open quote", "too long"],
)
def test_a_header_that_cannot_be_read_ends_the_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.csv:1"):
        list(usable_records(write(tmp_path, "a.csv", content), COLUMNS))


CELL = st.text('",\r\nab ', max_size=6)


@given(
    rows=st.lists(st.tuples(CELL, CELL), max_size=4),
    more=st.tuples(CELL, CELL),
    place=st.integers(0, 4),
    piece=st.integers(1, 7),
)
def test_a_row_that_is_written_as_csv_changes_no_other(
    rows: list[tuple[str, str]], more: tuple[str, str], place: int, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def read(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
        buffer = io.StringIO(newline="")
        csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("question", "intent"), *rows])
        path = write(tmp_path_factory.mktemp("rows"), "a.csv", buffer.getvalue().encode())
        return [(record.fields["text"], record.fields["label"]) for record in usable_records(path, COLUMNS)]

    def kept(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(text, label.strip()) for text, label in rows if text.strip() and label.strip()]

    with pytest.MonkeyPatch.context() as patch:
        # A line is cut anywhere: within a doubled quote, for instance.
        patch.setattr(text_rows, "_BLOCK_BYTES", piece)
        assert read(rows) == kept(rows)
        assert read([*rows[:place], more, *rows[place:]]) == kept([*rows[:place], more, *rows[place:]])


@given(content=st.text('",\nab', max_size=30), piece=st.integers(1, 7))
def test_whole_csv_files_are_cut_into_the_rows_that_the_csv_module_finds(
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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["late", " lost ", 3], '["late","lost","3"]'),
        ([], "[]"),
        ("", "[]"),
        ('["late", 2.0]', '["late","2"]'),
        (" late; lost", "late; lost"),
        ("[urgent];late", "[urgent];late"),
        (7, '["7"]'),
        (None, None),
        ([["late"]], None),
        (["late", ""], None),
        ([True], None),
        ({"late": True}, None),
        (["\ud800"], None),
        ("[" * 300 + "late" + "]" * 300, "[" * 300 + "late" + "]" * 300),
        ("[" * 100_000 + "]" * 100_000, None),
    ],
)
def test_labels_of_a_record(value: object, text: str | None) -> None:
    if text is None:
        with pytest.raises(DataError) as caught:
            record_of({"l": value}, {"labels": "l"}, file="a.jsonl", line=3)
        assert "late" not in str(caught.value)
    else:
        assert record_of({"l": value}, {"labels": "l"}, file="a.jsonl", line=3).fields == {"labels": text}


TURN = '[{"role":"assistant","content":"lost"}]'


@pytest.mark.parametrize(
    ("value", "text", "contents"),
    [
        ("lost ", "lost ", ["lost "]),
        ([{"from": "gpt", "value": "lost"}], TURN, ["lost"]),
        ('[ {"role": "bot", "content": "lost"} ]', TURN, ["lost"]),
        (f"\n {TURN}", TURN, ["lost"]),
        ({"from": "gpt", "value": "lost"}, TURN, ["lost"]),
        (json.loads(TURN) * 2, f"{TURN[:-1]},{TURN[1:]}", ["lost", "lost"]),
        ("[1, 2]", "[1, 2]", ["[1, 2]"]),
        ('[{"role": "tool", "content": "late"}]', '[{"role": "tool", "content": "late"}]', None),
        ([{"role": "tool", "content": "late"}], None, None),
        ([{"role": "user"}], None, None),
        ([], None, None),
        (" ", None, None),
        (7, None, None),
        ("\ud800", None, None),
    ],
)
def test_what_is_said_of_two_answers(value: object, text: str | None, contents: list[str] | None) -> None:
    for role in ("chosen", "rejected"):
        if text is None:
            with pytest.raises(DataError) as caught:
                record_of({"l": value}, {role: "l"}, file="a.jsonl", line=3)
            assert "late" not in str(caught.value)
            continue
        record = record_of({"l": value}, {role: "l"}, file="a.jsonl", line=3)
        assert record.fields == {role: text}
        assert [said for _, said in record.texts()] == (contents or [text])


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (-2.5, -2.5),
        (" 4.25 ", 4.25),
        ("1e3", 1000.0),
        (".5", 0.5),
        (True, None),
        (None, None),
        ("", None),
        ("3,5", None),
        ("1_000", None),
        ("nan", None),
        ("1e999", None),
        (10**400, None),
        ("1" + "0" * 400, None),
        (float("inf"), None),
        ("five", None),
        # Judged in no more than a look at each character: else this test does not end.
        ("1" * 2_000_000 + "x", None),
        ([1], None),
    ],
)
def test_the_number_of_a_record(value: object, number: float | None) -> None:
    if number is None:
        with pytest.raises(
            DataError, match="must be a finite number" if value is not None else "must not be null"
        ) as caught:
            record_of({"n": value}, {"target": "n"}, file="a.jsonl", line=3)
        assert "five" not in str(caught.value)
    else:
        record = record_of({"n": value}, {"target": "n"}, file="a.jsonl", line=3)
        assert (float(record.fields["target"]), record.answer) == (number, record.fields["target"])
        assert list(record.texts()) == [], "an answer is no text that somebody wrote"


def test_labels_are_the_same_from_every_depth() -> None:
    """A reader that is called deeper in the stack gives up earlier, and must not take the list for a text then."""

    def read(text: str, deeper: int) -> str | None:
        if deeper:
            return read(text, deeper - 1)
        try:
            return labels_of(text, "labels")
        except DataError:
            return None

    for depth in range(900, 1050, 3):
        text = "[" * depth + "]" * depth
        assert {read(text, deeper) for deeper in range(0, 60, 7)} == {None}, depth


def test_an_answer_stays_what_it_was_read_as_at_every_depth() -> None:
    """Where the stack is deep, a text in brackets cannot be told from turns; elsewhere it must not become them."""

    def at(deeper: int, read: Callable[[str], Any], text: str) -> Any:
        return at(deeper - 1, read, text) if deeper else read(text)

    def read(text: str) -> str | None:
        try:
            return said_of(text, "chosen")
        except DataError:
            return None

    found = set()
    for depth in range(880, 1050, 3):
        text = '[{"role": "assistant", "content": "lost", "more": ' + "[" * depth + "]" * depth + "}]"
        for deeper in range(0, 60, 7):
            answer = at(deeper, read, text)
            found.add(answer)
            if answer is not None:
                assert all(at(other, turns_said, answer) == json.loads(TURN) for other in (0, 30, 60)), depth
    assert found == {None, TURN}
    deep = '[{"role":"assistant","more":' + "[" * 100_000
    assert (read(deep), turns_said(deep)) == (None, None)


def test_an_answer_that_is_no_list_of_turns_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    for text in ("[[],[]]", "[" * 100_000, "[1, 2]", "lost"):
        assert said_of(text, "chosen") == text
        assert turns_said(text) is None
    assert turns_said(' [{"role": "assistant", "content": "lost"}]') is None, "turns that were read are written anew"


@pytest.mark.parametrize(
    ("value", "group"),
    [
        ('"north"', "north"),
        ('" north "', "north"),
        ("7", "7"),
        ("7.0", "7"),
        ("true", "true"),
        ("null", ""),
        ('""', ""),
        ("1.5", ""),
        ('["a"]', ""),
        ('{"a": 1}', ""),
        ("1e300", ""),
        ('"e\\u0301"', "\u00e9"),
        ('"a\\u0000"', ""),
        ('"\\ud800"', ""),
    ],
)
def test_whatever_stands_for_a_group_leaves_no_record_out(tmp_path: Path, value: str, group: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f'{{"body": "a", "ward": {value}}}\n{{"body": "b"}}\n')
    found = list(iter_records(path, {"text": "body", "group": "ward"}))
    assert [dict(record.fields) for record in found] == [{"text": "a", "group": group}, {"text": "b", "group": ""}]


def test_a_table_without_the_group_s_column_has_no_groups(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("body\na\n")
    assert [record.fields["group"] for record in iter_records(path, {"text": "body", "group": "ward"})] == [""]


def test_a_record_s_group_decides_nothing_about_it() -> None:
    keys = {record_key(Record({"text": "a", **more})) for more in ({}, {"group": "north"}, {"group": "south"})}
    assert len(keys) == 1
    assert record_key(Record({"text": "a", "label": "north"})) not in keys
