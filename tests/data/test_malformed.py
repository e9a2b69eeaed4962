"""Damaged or unsuitable files are reported with file, position, field and rule."""

import contextlib
import gzip
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from fedtune.data.load import read_lead_records
from fedtune.data.records import iter_records, iter_usable_records, resolve_file
from fedtune.spec import DataError

from .conftest import encode_parquet

COLUMNS = {"text": "question", "label": "intent"}
SAVED = Path(__file__).parent / "fixtures" / "saved_set"
GOOD = b'{"question": "where is my card", "intent": "arrival"}'
SECRET = "caf"
"""A part of the texts in these files, which no message may quote."""


WHOLE = encode_parquet(pyarrow.table({"question": ["where is my card"] * 9, "intent": ["arrival"] * 9}))
HEAD = b"question,intent\n"
OTHERS = "set data.columns.text to one of 'body', 'intent'"
# File contents by file name, with the position and the text of the expected message.
FILES: dict[str, list[tuple[bytes, str, str]]] = {
    "a.jsonl": [
        (b"", "", "'an empty file': must contain at least one record"),
        (b"\n\n", "", "'no records': must contain at least one record"),
        (b'{\n"question": "a"}', ":1", "must be one complete JSON object per line (2 rows"),
        (b'{"question": "a"}', ":1, column 'intent'", "set data.columns.label to"),
        (
            b'{"question": "a", "intent": "b", "intent": "c"}',
            ":1",
            "'a duplicate key in an object': must have distinct keys",
        ),
    ],
    "a.json": [
        (b" [ ] ", "", "'no records'"),
        (b"[\n" + GOOD + b',\n{"question": "caf', ":3", "it is truncated, and lacks the rest of this record"),
        (b"[" + GOOD + b",", ":1", "'the end of the file'"),
        (b'{"data": [' + GOOD + b"]}", ":1", "must start with [, as an"),
        (b"\n" + GOOD, ":2", "for one object per line, use the suffix .jsonl"),
        (b"caf", ":1", "'no opening bracket'"),
        (b"[" + GOOD + b"]\n[" + GOOD + b"]", ":2", "more text after the end of the array"),
    ],
    "a.csv": [
        (HEAD, "", "'no records'"),
        (HEAD.decode().encode("utf-16"), ":1", "'UTF-16': must be UTF-8"),
        (HEAD.decode().encode("utf-32"), ":1", "'UTF-32': must be UTF-8"),
        (HEAD.decode().encode("utf-16-le"), ":1", "'null bytes': must be UTF-8 text, not UTF-16"),
        (b"caf\xe9,question,intent\n1,a,b\n", ":1", "byte 0xe9 at position 4 of the record"),
        (b"PK\x03\x04\x14\x00\xe6", ":1", "a ZIP or Excel file"),
        (gzip.compress(GOOD), ":1", "a gzip file, whose name must end"),
        (b"sep=,\n" + HEAD, ":1", "'an Excel separator line (sep=)': must be the header"),
        (b"question|intent\na|b\n", ":1", "looks separated by bars"),
        (b"question;intent|x\na;b|c\n", ":1", "looks separated by semicolons"),
        (b"question\tintent\na\tb\n", ":1", "looks separated by tabs"),
        (b"question,intent\ra,b\r", ":1", "'a single carriage return outside double quotes': must end its lines"),
        (b"body,intent\na,b\n", ":1, column 'question'", OTHERS),
        (b"question,intent,intent\na,b,c\n", ":1, column 'intent'", "must appear once"),
        (b'"question,intent\na,b\n', ":1", "a quote that is not closed"),
        (HEAD + b'"a", "b, c"\n', ":2", "must have 2 cells, like the header; remove the space between a comma"),
        (b"#question,intent,more\na,b\n", ":1, column 'question'", "is missing"),
        (b"x" * (1 << 24) + b"\n" + HEAD, ":1", "must have at most 16777216 bytes per record"),
    ],
    "a.tsv": [
        (b"question;intent\na;b\n", ":1", "rename the file to end in .csv"),
        (HEAD, ":1", "separated by tabs: rename the file"),
    ],
    "b.jsonl.gz": [(GOOD, ":1", "'not a gzip file, or a damaged one': must be a complete gzip")],
    "b.json.gz": [(gzip.compress(b"[" + GOOD)[:-9], ":1", "'an early end'")],
    "a.parquet": [
        (WHOLE[:-20], "", "'damaged': must be a complete Parquet file"),
        (WHOLE[:8] + b"\xff" * 60 + WHOLE[68:], "", "'damaged'"),
        (GOOD, "", "'damaged'"),
        (encode_parquet(pyarrow.table({"body": ["caf"], "intent": ["b"]})), ", column 'question'", OTHERS),
        (
            encode_parquet(pyarrow.table([["a"]] * 3, ["question", "intent", "intent"])),
            ", column 'intent'",
            "must appear once",
        ),
        (encode_parquet(pyarrow.table({"question": ["a"] * 2, "intent": [1.5] * 2})), ":1, column 'intent'", "(2 rows"),
    ],
    "a.xlsx": [(b"PK", "", "'.xlsx': must end in .jsonl, .json, .csv, .tsv, .conll, .pubtator or .bioc (opt")],
    "a.parquet.gz": [(gzip.compress(WHOLE), "", "Parquet is already")],
}
CASES = [(name, number) for name, cases in FILES.items() for number in range(len(cases))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_malformed_file_error_gives_position_and_rule(tmp_path: Path, name: str, number: int) -> None:
    content, where, reason = FILES[name][number]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_lead_records(str(path), columns=COLUMNS, key="file")
    message = str(error.value)
    assert message.startswith(f"{path}{where}")
    assert reason in message
    assert "\n" not in message
    assert SECRET not in message.removeprefix(str(path)), "no record text may be quoted"


def test_faults_are_counted_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [b'{"question": " ", "intent": "b"}'] * 3 + [b"{"] * 2 + [b'{"question": 3, "intent": "b"}']
    path.write_bytes(b"\n".join([GOOD, *bad, GOOD]))
    with pytest.raises(DataError) as error:
        list(iter_records(path, COLUMNS))
    assert str(error.value) == (
        f"{path}:2, column 'question' = 'blank': must not be blank (role text) (6 rows cannot be used, in lines "
        "2, 3, 4, 5, 6, ...: 3 must not be blank (role text); 2 must be one complete JSON object per line; 1 must be "
        "text (role text))"
    )


def make_folder(name: str, content: bytes) -> Callable[[Path], object]:
    """Make a folder with one file."""
    return lambda path: (path.mkdir(), (path / name).write_bytes(content))


def listen_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


SEVERAL = make_folder("dataset_dict.json", b'{"splits": ["train", "test"]}')
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "no such file"),
    "a folder": (Path.mkdir, "is a folder; must be a file, or a folder that save_to_disk of Hugging Face datasets"),
    "several saved sets": (SEVERAL, "contains several splits; select one of them: {path}/train, {path}/test"),
    "parts of a table": (make_folder("part-0.parquet", WHOLE), "is a folder; contains 1 Parquet file"),
    "a pipe": (lambda path: os.mkfifo(path), "is a pipe; must be a file"),
    "a socket": (listen_at, "is a socket; must be a file"),
    "a link to itself": (lambda path: path.symlink_to(path), "is a circular link; must be a file"),
    "a broken link": (lambda path: path.symlink_to("gone"), "is a broken link; must be a file"),
}


@pytest.mark.parametrize("case", PLACES)
def test_unsuitable_path_errors_describe_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    make, reason = PLACES[case]
    monkeypatch.chdir(tmp_path)  # so that the socket's name is short
    path = Path("a.jsonl")
    make(path)
    with pytest.raises(DataError, match=r"^data\.test_file = 'a\.jsonl': ") as error:
        resolve_file("a.jsonl", key="data.test_file")
    assert reason.format(path=tmp_path / path) in str(error.value)
    if case == "a folder":
        assert list(iter_records(path, COLUMNS)) == [], "a site must not reveal whether a folder has texts"
        return
    with pytest.raises(DataError, match=r"^a\.jsonl = '"):
        list(iter_records(path, COLUMNS))


@pytest.mark.parametrize("state", ["[", "{}", "../data.arrow", "..", "\ud800", "a selection"])
def test_damaged_data_set_index_is_refused(tmp_path: Path, state: str) -> None:
    index: dict[str, Any] = {"_data_files": [{"filename": "a.arrow" if state == "a selection" else state}]}
    if state == "a selection":
        index["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "state.json").write_text(state if state in ("[", "{}") else json.dumps(index))
    message = (
        "call flatten_indices" if state == "a selection" else r"state\.json = 'damaged': must list the files of the set"
    )
    with pytest.raises(DataError, match=message):
        list(iter_records(tmp_path, COLUMNS))


def test_truncated_or_corrupted_arrow_file_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(SAVED, tmp_path / "set"))
    (arrow,) = copy.glob("*.arrow")
    whole = arrow.read_bytes()
    for end in (0, 100, 700, -300):
        arrow.write_bytes(whole[:end])
        with pytest.raises(DataError, match="must be a complete Arrow file"):
            list(iter_usable_records(copy, {"text": "text"}))
    for position in range(len(whole) - 600, len(whole)):  # a reader that trusts these bytes crashes
        arrow.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with contextlib.suppress(DataError):
            list(iter_usable_records(copy, {"text": "text", "label": "label", "messages": "messages"}))
