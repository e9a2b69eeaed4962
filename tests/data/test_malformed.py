"""Files that are damaged, or of another shape than was asked for: each is named with file, place, field and bound."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from fedtune.data import iter_records, resolve_file
from fedtune.data.load import lead_records
from fedtune.data.records import usable_records
from fedtune.spec import DataError

COLUMNS = {"text": "question", "label": "intent"}
CHAT = {"messages": "messages"}
SAVED = Path(__file__).parent / "fixtures" / "saved_set"
GOOD = b'{"question": "where is my card", "intent": "arrival"}'
SECRET = "caf"
"""Part of a text in these files that no message may quote."""


def parquet_bytes(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def chat(*turns: Any) -> bytes:
    return json.dumps({"messages": list(turns)}).encode()


def turn(role: str, content: Any = "caf\u00e9") -> dict[str, Any]:
    return {"role": role, "content": content}


WHOLE = parquet_bytes(question=["where is my card"] * 9, intent=["arrival"] * 9)
# name of the file, its content, where the message points, and what it says
FILES: dict[str, tuple[str, bytes, str, str]] = {
    # JSON lines
    "cut off within a line": ("a.jsonl", GOOD + b'\n{"question": "caf', "a.jsonl:2", "whole JSON object on a"),
    "an array in a line": ("a.jsonl", b"[1, 2]\n", "a.jsonl:1", "'array'"),
    "an object over lines": ("a.jsonl", b'{\n"question": "a"}', "a.jsonl:1", "JSON object on a line (2 rows"),
    "a trailing comma in a line": ("a.jsonl", GOOD + b",", "a.jsonl:1", "Extra data at place 54"),
    "brackets without end": ("a.jsonl", b"[" * 100_000, "a.jsonl:1", "too large a value"),
    "a number of 5,000 digits": (
        "a.jsonl",
        b'{"question": "a", "intent": ' + b"1" * 5000 + b"}",
        "a.jsonl:1",
        "too large a value",
    ),
    "one line of 17 MB": (
        "a.jsonl",
        GOOD + b'\n{"question": "' + b"x" * (17 << 20) + b'"}',
        "a.jsonl:2",
        "at most 16777216 bytes",
    ),
    "a value that is absent": ("a.jsonl", b'{"question": "a"}', "column 'intent'", "set data.columns.label to"),
    "null": ("a.jsonl", b'{"question": null, "intent": "b"}', "a.jsonl:1, column 'question'", "'null'"),
    "a number for a text": ("a.jsonl", b'{"question": 3, "intent": "b"}', "column 'question'", "must be text"),
    "a list for a text": ("a.jsonl", b'{"question": [], "intent": "b"}', "column 'question'", "'array'"),
    "NaN for a label": ("a.jsonl", b'{"question": "a", "intent": NaN}', "column 'intent'", "not be null"),
    "a fraction for a label": ("a.jsonl", b'{"question": "a", "intent": 1.5}', "column 'intent'", "an integer"),
    "true for a text": ("a.jsonl", b'{"question": true, "intent": "a"}', "column 'question'", "'boolean'"),
    "blank": ("a.jsonl", b'{"question": " ", "intent": "b"}', "column 'question'", "must not be blank"),
    "half a surrogate": ("a.jsonl", b'{"question": "\\ud800", "intent": "b"}', "column 'question'", "Unicode"),
    "latin-1": (
        "a.jsonl",
        GOOD + b'\n{"question": "caf\xe9", "intent": "b"}',
        "a.jsonl:2",
        "byte 0xe9 at place 18 of the record': must be UTF-8 text, not UTF-16, Latin-1",
    ),
    "an empty file": ("a.jsonl", b"", "a.jsonl", "'an empty file': must hold at least one record"),
    "blank lines alone": ("a.jsonl", b"\n\n", "a.jsonl", "'no records': must hold at least one record"),
    # JSON arrays
    "an array that is cut off": (
        "a.json",
        b"[\n" + GOOD + b',\n{"question": "caf',
        "a.json:3",
        "'the end of the file': must be one array of objects; it breaks off, and lacks the rest of this record, and ]",
    ),
    "an array cut off behind a comma": ("a.json", b"[" + GOOD + b",", "a.json:1", "'the end of the file'"),
    "an object for an array": ("a.json", b'{"data": [' + GOOD + b"]}", "a.json:1", "must begin with [, as an"),
    "JSON lines called .json": ("a.json", b"\n" + GOOD, "a.json:2", "one object on each line ends in .jsonl"),
    "text for an array": ("a.json", b"caf", "a.json:1", "'no bracket'"),
    "a trailing comma": ("a.json", b"[" + GOOD + b",\n]", "a.json:2", "'a comma without an object'"),
    "two commas": ("a.json", b"[" + GOOD + b",," + GOOD + b"]", "a.json:1", "'a comma without an object'"),
    "two arrays": ("a.json", b"[" + GOOD + b"]\n[" + GOOD + b"]", "a.json:2", "more behind the array's end"),
    "a number in an array": ("a.json", b"[" + GOOD + b",\n 7]", "a.json:2", "'number': must be one whole JSON"),
    "a broken object in an array": (
        "a.json",
        b"[" + GOOD + b',\n{"question":\n caf}]',
        "a.json:3",
        "must be one whole JSON object",
    ),
    "an empty array": ("a.json", b" [ ] ", "a.json", "'no records'"),
    # Tables
    "UTF-16": ("a.csv", "question,intent\na,b\n".encode("utf-16"), "a.csv:1", "'UTF-16': must be UTF-8"),
    "UTF-32": ("a.csv", "question,intent\na,b\n".encode("utf-32"), "a.csv:1", "'UTF-32': must be UTF-8"),
    "UTF-16 that does not say so": (
        "a.csv",
        "question,intent\na,b\n".encode("utf-16-le"),
        "a.csv:1",
        "'null bytes': must be UTF-8 text, not UTF-16",
    ),
    "an Excel file called .csv": ("a.csv", b"PK\x03\x04\x14\x00\xe6", "a.csv:1", "a ZIP or Excel file"),
    "a gzip file called .csv": ("a.csv", gzip.compress(GOOD), "a.csv:1", "a gzip file, whose name must end"),
    "Excel's note of the separator": (
        "a.csv",
        b"sep=,\nquestion,intent\na,b\n",
        "a.csv:1",
        "'a note for Excel (sep=)': must be the header",
    ),
    "bars": ("a.csv", b"question|intent\na|b\n", "a.csv:1", "looks separated by bars"),
    "semicolons and bars": ("a.csv", b"question;intent|x\na;b|c\n", "a.csv:1", "looks separated by semicolons"),
    "semicolons in a .tsv": ("a.tsv", b"question;intent\na;b\n", "a.tsv:1", "give the file the ending .csv"),
    "tabs in a .csv": ("a.csv", b"question\tintent\na\tb\n", "a.csv:1", "looks separated by tabs"),
    "commas in a .tsv": ("a.tsv", b"question,intent\na,b\n", "a.tsv:1", "tabs between the columns; give the file"),
    "carriage returns alone": (
        "a.csv",
        b"question,intent\ra,b\r",
        "a.csv:1",
        "'a carriage return alone, outside double quotes': must end its lines with a line feed",
    ),
    "a header without the column": (
        "a.csv",
        b"body,intent\na,b\n",
        "a.csv:1, column 'question'",
        "set data.columns.text to one of 'body', 'intent'",
    ),
    "a column twice": ("a.csv", b"question,intent,intent\na,b,c\n", "column 'intent'", "must appear once"),
    "a header alone": ("a.csv", b"question,intent\n", "a.csv", "'no records'"),
    "a cell too few": ("a.csv", b"question,intent\na,b\nc\n", "a.csv:3", "'1 cell': must have 2 cells"),
    "a cell too many": ("a.csv", b"question,intent\na,b,c\n", "a.csv:2", "'3 cells'"),
    "an open quote": (
        "a.csv",
        b'question,intent\na,b\n"c,d\ne,f\n',
        "a.csv:3",
        "'a quote that is not closed, over 2 lines'",
    ),
    "text behind a quote": ("a.tsv", b'question\tintent\n"a"b\tc\n', "a.tsv:2", "text behind a closing quote"),
    # gzip
    "no gzip": ("b.jsonl.gz", GOOD, "b.jsonl.gz:1", "'no gzip, or damaged': must be a whole gzip"),
    "gzip that is cut off": ("b.json.gz", gzip.compress(b"[" + GOOD)[:-9], "b.json.gz:1", "'an early end'"),
    # Parquet
    "a Parquet file cut off": ("a.parquet", WHOLE[:-20], "a.parquet", "'damaged': must be a whole Parquet file"),
    "damaged pages": ("a.parquet", WHOLE[:8] + b"\xff" * 60 + WHOLE[68:], "a.parquet", "'damaged'"),
    "text called .parquet": ("a.parquet", GOOD, "a.parquet", "'damaged'"),
    "another schema": (
        "a.parquet",
        parquet_bytes(body=["caf"], intent=["b"]),
        "a.parquet, column 'question'",
        "set data.columns.text to one of 'body', 'intent'",
    ),
    "a Parquet column of numbers": (
        "a.parquet",
        parquet_bytes(question=["a", "b"], intent=[1.5, 2.5]),
        "a.parquet:1, column 'intent'",
        "must be text or an integer (role label) (2 rows cannot be used",
    ),
    "nulls in Parquet": (
        "a.parquet",
        parquet_bytes(question=["a", None], intent=["b", "b"]),
        "a.parquet:2, column 'question'",
        "'null'",
    ),
    "another format": ("a.xlsx", b"PK", "a.xlsx", "'.xlsx': must end in .jsonl, .json, .csv or .tsv, plain or"),
    "a gzipped Parquet file": ("a.parquet.gz", gzip.compress(WHOLE), "a.parquet.gz", "Parquet is packed"),
    # Conversations
    "the user twice": ("a.jsonl", chat(turn("user"), turn("user")), "turn 2", "'user': must be assistant: user and"),
    "the user twice before an answer": (
        "a.jsonl",
        chat(turn("user"), turn("user"), turn("assistant")),
        "turn 2",
        "'user': must be assistant: user and",
    ),
    "the assistant first": ("a.jsonl", chat(turn("assistant")), "turn 1", "must be user"),
    "the system late": ("a.jsonl", chat(turn("user"), turn("system")), "turn 2", "'system': must be assistant"),
    "a tool": ("a.jsonl", chat(turn("user"), turn("tool")), "turn 2, role", "turns of tools are not supported"),
    "another shape of turn": ("a.jsonl", chat({"who": "user"}), "turn 1", "must have role and content, or from"),
    "a text for a turn": ("a.jsonl", chat("caf"), "turn 1", "'string': must be an object"),
    "null for a turn's text": ("a.jsonl", chat(turn("user", None)), "turn 1, content", "'null': must be text"),
    "a blank answer": ("a.jsonl", chat(turn("user"), turn("gpt", " ")), "turn 2, content", "must not be blank"),
    "half a surrogate in a turn": (
        "a.jsonl",
        chat(turn("user"), turn("gpt", "\ud800")),
        "column 'messages'",
        "valid Unicode",
    ),
    "a text for a conversation": ("a.csv", b"messages\ncaf\n", "a.csv:2, column 'messages'", "text that is no JSON"),
    "a number for a conversation": ("a.jsonl", b'{"messages": 3}', "column 'messages'", "a list of turns"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_malformed_file_is_named_with_place_and_bound(tmp_path: Path, case: str) -> None:
    name, content, where, why = FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        lead_records(str(path), columns=CHAT if b"messages" in content else COLUMNS, key="file")
    message = str(error.value)
    assert where in message
    assert why in message
    assert message.startswith(str(path))
    assert "\n" not in message
    assert SECRET not in message.removeprefix(str(path)), "no text of a record is quoted"


def test_all_faults_are_counted_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [b'{"question": " ", "intent": "b"}'] * 3 + [b"{"] * 2 + [b'{"question": 3, "intent": "b"}']
    path.write_bytes(b"\n".join([GOOD, *bad, GOOD]))
    with pytest.raises(DataError) as error:
        list(iter_records(path, COLUMNS))
    assert str(error.value) == (
        f"{path}:2, column 'question' = 'blank': must not be blank (role text) (6 rows cannot be used, in lines "
        "2, 3, 4, 5, 6, ...: 3 must not be blank (role text); 2 must be one whole JSON object on a line; 1 must be "
        "text (role text))"
    )


# What stands where a file should.


def folder(path: Path) -> None:
    path.mkdir()


def several(path: Path) -> None:
    path.mkdir()
    (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda path: None, "no such file"),
    "a folder": (folder, "is a folder; must be a file, or a folder that save_to_disk of Hugging Face datasets wrote"),
    "several saved sets": (
        several,
        "is a folder; holds several sets, of which one is needed: {path}/train, {path}/test",
    ),
    "a pipe": (lambda path: os.mkfifo(path), "is a pipe; must be a file"),
    "a socket": (listening, "is a socket; must be a file"),
    "a link to itself": (lambda path: path.symlink_to(path), "is a link that leads to itself; must be a file"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "is a link to nothing; must be a file"),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_stands_in_a_files_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    make, why = PLACES[case]
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    path = Path("a.jsonl")
    make(path)
    with pytest.raises(DataError, match=r"^data\.test_file = 'a\.jsonl': ") as error:
        resolve_file("a.jsonl", key="data.test_file")
    assert why.format(path=tmp_path / path) in str(error.value)
    with pytest.raises(DataError, match=r"^a\.jsonl = '"):
        list(iter_records(path, COLUMNS))


@pytest.mark.parametrize("state", ["[", "{}", "../data.arrow", "..", "\ud800"])
def test_a_saved_set_whose_list_of_files_is_damaged(tmp_path: Path, state: str) -> None:
    broken = state in ("[", "{}")
    (tmp_path / "state.json").write_text(state if broken else json.dumps({"_data_files": [{"filename": state}]}))
    with pytest.raises(DataError, match=r"state\.json = 'damaged': must name the files of the set"):
        list(iter_records(tmp_path, COLUMNS))


@pytest.mark.parametrize("kept", [0, 100, 700, -300])
def test_a_saved_set_whose_file_is_cut_off(tmp_path: Path, kept: int) -> None:
    copy = Path(shutil.copytree(SAVED, tmp_path / "set"))
    (arrow,) = copy.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:kept])
    with pytest.raises(DataError, match="must be a whole Arrow file"):
        list(usable_records(copy, {"text": "text"}))


def test_every_byte_of_a_saved_sets_values_may_be_damaged(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(SAVED, tmp_path / "set"))
    (arrow,) = copy.glob("*.arrow")
    whole = arrow.read_bytes()
    for place in range(len(whole) - 600, len(whole)):  # a reader that believes them ends the process
        arrow.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(DataError):
            list(usable_records(copy, {"text": "text", "label": "label", "messages": "messages"}))
