"""Every file format gives the same rows, and an unusable row is one error among valid rows."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fedtune.data import Record, text_rows
from fedtune.data.formats import iter_raw_rows, list_data_files
from fedtune.data.records import iter_records, iter_usable_records
from fedtune.spec import ConfigError, DataError

from ..cases import read_cases
from .conftest import encode_parquet

SAVED = Path(__file__).parent / "fixtures" / "saved_set"  # written by save_to_disk of datasets 5.2
ROWS = [
    {"text": 'two\nlines, "quoted"\t', "label": "b", "id": 1},
    {"text": "] } [ { \\ \x00\x0b\x1c\x85\u2028\ufeff é", "label": "a", "id": 2},
    {"text": "plain", "label": "7", "id": 3},
]
TURNS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": 'Here, "there"\né'}]
CANONICAL = '[{"role":"user","content":"Where?"},{"role":"assistant","content":"Here, \\"there\\"\\né"}]'


def write_csv_table(rows: list[dict[str, Any]], comma: str) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=comma)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
    "a.json": lambda rows: json.dumps(rows).encode(),
    "b.json": lambda rows: b"\xef\xbb\xbf\n" + json.dumps(rows, indent=1, ensure_ascii=False).encode() + b"\n",
    "a.csv": lambda rows: write_csv_table(rows, ","),
    "a.tsv": lambda rows: write_csv_table(rows, "\t"),
    "a.parquet": lambda rows: encode_parquet(pyarrow.Table.from_pylist(rows), row_group_size=2),
}


def save_dataset(folder: Path, table: Any) -> Path:
    """Write a folder like save_to_disk of Hugging Face datasets, in two files."""
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table[:1], table[1:]), strict=True):
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


@pytest.mark.parametrize("name", [*WRITERS, "folder"])
def test_all_formats_are_parsed_to_the_same_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        save_dataset(path, pyarrow.Table.from_pylist(ROWS))
    else:
        path.write_bytes(WRITERS[name](ROWS))
    records = list(iter_records(path, {"text": "text", "label": "label"}))
    assert [record.fields for record in records] == [{"text": row["text"], "label": row["label"]} for row in ROWS]
    lines = {"a.csv": [2, 4, 5], "a.tsv": [2, 4, 5], "a.json": [1, 1, 1], "b.json": [3, 8, 13]}.get(name, [1, 2, 3])
    assert [record.line for record in records] == lines
    everything = [dict(row) for _, row in iter_raw_rows(path) if not isinstance(row, DataError)]
    assert [{**row, "id": int(row["id"])} for row in everything] == ROWS  # type: ignore[call-overload]


def test_hugging_face_data_set_is_read() -> None:
    # Labels are integers in this data set, which also stores their names.
    columns = {"text": "text", "label": "label", "messages": "messages"}
    records = list(iter_records(SAVED, columns))
    assert [record.fields["label"] for record in records] == ["billing", "travel", "billing"]
    assert records[1].fields["messages"] == ('[{"role":"user","content":"é?"},{"role":"assistant","content":"ü!"}]')
    assert records[1].at("text") == f"{SAVED}:2, text"
    assert [file.name for file in list_data_files(SAVED)] == ["data-00000-of-00001.arrow"]


BAD_TEXTS = pyarrow.Array.from_buffers(
    pyarrow.string(),
    4,
    [None, pyarrow.array([0, 2, 4, 4, 6], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"ab\xff\xfecd")],
)


def make_chat_table(*turns: Any) -> Any:
    kind = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    return pyarrow.array(list(turns), kind)


CODE = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
CODED = pyarrow.list_(pyarrow.struct([(name, CODE) for name in TURNS[0]]))
PLACES = pyarrow.array([0, 1, 2, 3])
LARGE = [TURNS[0], {"role": "assistant", "content": "x" * (17 << 20)}]
COLUMNS_WITH_FAULTS = {
    "no UTF-8 and blank": ("text", BAD_TEXTS, [1, 4]),
    "no UTF-8 in a dictionary": ("text", pyarrow.DictionaryArray.from_arrays(PLACES, BAD_TEXTS, safe=False), [1, 4]),
    "no UTF-8 in a map": ("text", pyarrow.MapArray.from_arrays([0, 1, 2, 3, 4], ["a", "b", "c", "d"], BAD_TEXTS), []),
    "17 MB": ("text", pyarrow.array(["a", "x" * (17 << 20), "b", "c"]), [1, 3, 4]),
    "17 MB in a dictionary": ("text", pyarrow.array(["a", "x" * (17 << 20), "b", "c"]).dictionary_encode(), [1, 3, 4]),
    "17 MB behind a view": ("text", pyarrow.array(["a", "x" * (17 << 20), "b", "c"], pyarrow.string_view()), [1, 3, 4]),
    "17 MB in a chat's dictionary": ("messages", make_chat_table(TURNS, LARGE, TURNS).cast(CODED), [1, 3]),
    "null": ("text", pyarrow.array(["a", None, "b", None]), [1, 3]),
    "wrong conversations": ("messages", make_chat_table(TURNS, TURNS[1:], None, TURNS * 2), [1, 4]),
    "a time beyond Python's": ("text", pyarrow.array([0, 1 << 62, 0, 0], pyarrow.timestamp("us")), []),
}


@pytest.mark.parametrize("case", COLUMNS_WITH_FAULTS)
@pytest.mark.parametrize("name", ["a.parquet", "folder"])
def test_invalid_arrow_row_is_skipped_alone(tmp_path: Path, name: str, case: str) -> None:
    role, column, valid = COLUMNS_WITH_FAULTS[case]
    rows = pyarrow.table({role: column})
    if name == "folder":
        save_dataset(tmp_path / name, rows)
    else:
        parquet.write_table(rows, tmp_path / name)
    records = list(iter_usable_records(tmp_path / name, {role: role}))
    assert [record.line for record in records] == valid
    with pytest.raises(DataError, match=rf"{name}:{min({1, 2, 3, 4} - set(valid))}"):
        list(iter_records(tmp_path / name, {role: role}))


def view_as(kind: Any, *numbers: int, of: Any) -> Any:
    return pyarrow.Array.from_buffers(kind, len(numbers), pyarrow.array(numbers, of).buffers())


ODD_VALUES = {
    "25 hours": view_as(pyarrow.time32("s"), 3600, 90_000, of=pyarrow.int32()),
    "25 hours in microseconds": view_as(pyarrow.time64("us"), 0, 90_000_000_000, of=pyarrow.int64()),
    "a date within a day": view_as(pyarrow.date64(), 0, 5, of=pyarrow.int64()),
    "more digits than declared": view_as(pyarrow.decimal128(3, 2), 100, 10**9, of=pyarrow.decimal128(38, 0)),
}


@pytest.mark.parametrize("case", ODD_VALUES)
def test_out_of_range_arrow_value_does_not_damage_the_file(tmp_path: Path, case: str) -> None:
    """Otherwise one record would decide whether a round succeeds."""
    save_dataset(tmp_path / "set", pyarrow.table({"text": ["a", "b"], "odd": ODD_VALUES[case]}))
    (_, first), _ = iter_raw_rows(tmp_path / "set")
    assert isinstance(first, dict)
    assert first["text"] == "a"


def test_unread_columns_and_empty_rows_do_not_hide_records(tmp_path: Path) -> None:
    pairs = pyarrow.FixedSizeListArray.from_arrays(BAD_TEXTS, 2)
    save_dataset(tmp_path / "set", pyarrow.table({"text": ["a", "b"], "other": pairs, "number": [1, 2]}))
    assert len(list(iter_records(tmp_path / "set", {"text": "text"}))) == 2
    assert len([row for _, row in iter_raw_rows(tmp_path / "set") if isinstance(row, dict)]) == 1
    (tmp_path / "a.json").write_text('[{"x": "a"}, {}, {"x": "b"}]')
    assert [row for _, row in iter_raw_rows(tmp_path / "a.json")] == [{"x": "a"}, {}, {"x": "b"}]


VALUE = st.recursive(
    st.none() | st.integers(-9, 9) | st.text('"\\[]{},a\n ', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\[]{},a', max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(VALUE, max_size=4), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 7))
def test_json_arrays_are_split_correctly_at_any_block_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, whole: bool, piece: int
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    text = json.dumps(values, indent=indent)
    path.write_text(text if whole else text.rstrip("]\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "_BLOCK_BYTES", piece)
        cut = [raw for _, raw, mark in text_rows.cut_elements(path) if raw is not None and mark]
    parsed = [json.loads(raw) for raw in cut if raw.strip()]
    assert parsed == (values if whole else values[: len(parsed)])


@pytest.mark.parametrize("name", ["a.parquet", "set"])
def test_missing_pyarrow_is_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "a.parquet").write_bytes(WRITERS["a.parquet"](ROWS))
    save_dataset(tmp_path / "set", pyarrow.Table.from_pylist(ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"requires pyarrow: pip install "):
        list(iter_records(tmp_path / name, {"text": "text"}))


@pytest.mark.parametrize("name", list(WRITERS))
def test_conversation_has_one_text_form_in_every_format(tmp_path: Path, name: str) -> None:
    chats: list[Any] = [json.dumps(TURNS) if name.endswith("sv") else TURNS]
    if name == "a.parquet":  # a struct has the fields of both forms; those of the other form are null
        turns = [{"from": who, "value": turn["content"]} for who, turn in zip(("human", "gpt"), TURNS, strict=True)]
        chats.append(turns)
    (tmp_path / name).write_bytes(WRITERS[name]([{"chat": chat} for chat in chats]))
    records = list(iter_records(tmp_path / name, {"messages": "chat"}))
    assert records == [Record({"messages": CANONICAL})] * len(chats)


@pytest.mark.parametrize("row", [{}, {"in": None}, {"in": ""}, {"in": " \n"}])
def test_input_and_system_columns_may_be_absent_or_blank(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"instruction": "a", "output": "b"} | row))
    columns = {"prompt": "instruction", "completion": "output", "input": "in", "system": "in"}
    (record,) = list(iter_records(path, columns))
    assert record.fields == {"prompt": "a", "completion": "b", "input": "", "system": ""}
    path.write_text(json.dumps({"instruction": "a", "output": "b", "in": 3}))
    with pytest.raises(DataError, match=r"column 'in' = 'number': must be text \(role input\)"):
        list(iter_records(path, columns))
    (tmp_path / "a.csv").write_text("instruction,output\na,b\n")
    with pytest.raises(DataError, match=r"column 'in' = 'absent'"):  # in a table, a mistake in the settings
        list(iter_records(tmp_path / "a.csv", columns))


@pytest.mark.parametrize(("text", "rows"), read_cases(__file__, "headers"))
def test_semicolon_separator_is_detected_from_the_header(tmp_path: Path, text: str, rows: Any) -> None:
    path = tmp_path / "german.csv"
    path.write_bytes(text.encode())
    assert [row for _, row in iter_raw_rows(path)] == rows
