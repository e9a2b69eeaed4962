"""Malformed table files give one message with file, row and column, exit code 2, and no partial output."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ..conftest import run_command
from .conftest import encode_parquet

FEATURES = (
    "[{columns: [age], range: [0, 110]}, {columns: [ward], categories: [a, b]},"
    " {columns: [states], range: [-1, 1], size: 2}]"
)
GOOD: dict[str, Any] = {"age": 50.5, "ward": "a", "states": [0.5, 1.0], "label": "sick"}
HEADER, ROW = "age,ward,states,label\n", '50.5,a,"[0.5, 1]",sick\n'
NUMBER = "must be a finite number, with a decimal point (role feature)"
LIST = "must be a JSON list of numbers, such as [0.5, 1] (role feature)"
VALUE = "must have a value (or set missing = indicator in data.features)"
KIND = "must be a number, a text or a list of numbers (role feature)"


def make_csv(row: str) -> bytes:
    """Make a CSV file with the given row in line 3, among valid rows."""
    return f"{HEADER}{ROW}{row}\n{ROW}".encode()


def make_jsonl(**other: object) -> bytes:
    """Make a JSON lines file with changed values in line 2, among valid records."""
    return "".join(json.dumps(row) + "\n" for row in (GOOD, GOOD | other, GOOD)).encode()


def make_parquet(**columns: list[Any]) -> bytes:
    """Make a Parquet file with two rows and changed columns."""
    return encode_parquet(pa.table({name: [value, value] for name, value in GOOD.items()} | columns))


ROWS: dict[str, tuple[str, bytes, str, str]] = {
    "text in a number": ("a.csv", make_csv('zq,a,"[0.5, 1]",sick'), "3, feature:age", NUMBER),
    "a comma before decimals": ("a.csv", make_csv('"50,5",a,"[0.5, 1]",sick'), "3, feature:age", NUMBER),
    "beyond every float": ("a.csv", make_csv('1e999,a,"[0.5, 1]",sick'), "3, feature:age", NUMBER),
    "nothing": ("a.csv", make_csv(',a,"[0.5, 1]",sick'), "3, feature:age", VALUE),
    "no category": ("a.csv", make_csv('50,NA,"[0.5, 1]",sick'), "3, feature:ward", VALUE),
    "a list of another form": ("a.csv", make_csv("50,a,0.5 1,sick"), "3, feature:states", LIST),
    "a short list as text": ("a.csv", make_csv("50,a,[0.5],sick"), "3, feature:states", "'1 number': must be 2"),
    "not a number": ("a.jsonl", make_jsonl(age=float("nan")), "2, feature:age", VALUE),
    "infinity": ("a.jsonl", make_jsonl(age=float("inf")), "2, column 'age'", NUMBER),
    "a boolean for a number": ("a.jsonl", make_jsonl(age=True), "2, feature:age", NUMBER),
    "an object": ("a.jsonl", make_jsonl(age={"value": 3}), "2, column 'age'", KIND),
    "a list for a number": ("a.jsonl", make_jsonl(age=[50]), "2, feature:age", NUMBER),
    "a list of names": ("a.jsonl", make_jsonl(ward=["a"]), "2, column 'ward'", NUMBER),
    "a number for a list": ("a.jsonl", make_jsonl(states=0.5), "2, feature:states", LIST),
    "a short list": ("a.jsonl", make_jsonl(states=[0.5]), "2, feature:states", "'1 number': must be 2"),
    "lists in a list": ("a.jsonl", make_jsonl(states=[[0.5, 1]]), "2, column 'states'", NUMBER),
    "a text in a list": ("a.jsonl", make_jsonl(states=[0.5, "zq"]), "2, column 'states'", NUMBER),
    "null in a list": ("a.jsonl", make_jsonl(states=[0.5, None]), "2, column 'states'", NUMBER),
    "a long list in Parquet": (
        "a.parquet",
        make_parquet(states=[[0.5] * 2, [0.5] * 3]),
        "2, feature:states",
        "must be 2",
    ),
    "null in Parquet": ("a.parquet", make_parquet(age=[1.0, None]), "2, feature:age", VALUE),
    "booleans in Parquet": ("a.parquet", make_parquet(age=[True, False]), "1, feature:age", NUMBER),
    "days in Parquet": ("a.parquet", make_parquet(age=[datetime.date(2020, 1, 1)] * 2), "1, column 'age'", KIND),
    "structs in Parquet": ("a.parquet", make_parquet(states=[{"x": 1.0}] * 2), "1, column 'states'", KIND),
}


@pytest.fixture
def read_message(tmp_path: Path) -> Callable[..., Any]:
    """Return the message of `data check` or `simulate` about a file, and require that nothing is written."""

    def run(file: str, content: bytes, *words: str) -> Any:
        (tmp_path / file).write_bytes(content)
        overrides = (f"data.train_file='{tmp_path / file}'", "data.declared_sizes=1", "data.labels=[sick,well]")
        where = () if words[0] == "data" else (f"tracking.output_dir='{tmp_path}'", "runtime.device=cpu", "name=run")
        outcome = run_command(*words, *overrides, f"data.features={FEATURES}", *where)
        assert [one.name for one in tmp_path.iterdir()] == [file]
        assert "Traceback" not in outcome.err
        assert "zq" not in outcome.out + outcome.err
        return outcome

    return run


SIMULATE, CHECK = ("simulate", "experiment=own_features"), ("data", "check", "own_features")


@pytest.mark.parametrize("name", ROWS)
def test_malformed_table_row_error_gives_its_position(read_message: Any, tmp_path: Path, name: str) -> None:
    file, content, place, bound = ROWS[name]
    outcome = read_message(file, content, *SIMULATE)
    assert outcome.failed().startswith(f"{tmp_path / file}:{place} = ")
    assert bound in outcome.message
    checked = read_message(file, content, *CHECK, "--json")  # checks every row
    (about,) = json.loads(checked.printed)["checked"]["files"]
    assert any(f"{file}:{place}" in json.dumps(one, ensure_ascii=False) for one in about["errors"]), about
