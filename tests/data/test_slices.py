"""The simulations' data files are complete, readable, disjoint, and reproducible by `make_slices.py`."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedtune.data.records import iter_records

from ..conftest import REPOSITORY

FOLDER = REPOSITORY / "simulations" / "data"
SLICES = {
    "banking77": ((9275, 728, 3080), {"text": "text", "label": "label"}),
    "medical_abstracts": ((2044, 272, 572), {"text": "text", "label": "label"}),
    "e2e_nlg": ((4251, 421, 4693), {"prompt": "mr", "completion": "ref"}),
    "users_ubuntu_irc": ((7301, 605, 1319), {"completion": "text", "user": "user"}),
    "users_shakespeare": ((5020, 1275, 800), {"completion": "text", "user": "user"}),
}
"""For each data set: the number of rows for training, validation and test, and the columns."""


@pytest.fixture(scope="module")
def make_slices() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_slices", FOLDER / "make_slices.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.mark.parametrize("name", SLICES)
def test_every_data_slice_can_be_read(name: str) -> None:
    sides = [FOLDER / name / f"{side}.jsonl.gz" for side in ("train", "validation", "test")]
    counts, columns = SLICES[name]
    records = [list(iter_records(path, columns)) for path in sides]
    assert tuple(map(len, records)) == counts
    if "label" in columns:
        declared, *others = [{record.fields["label"] for record in side} for side in records]
        assert all(labels == declared for labels in others)


@pytest.mark.parametrize("name", SLICES)
def test_slice_split_follows_its_hash_and_keeps_users_apart(name: str, make_slices: ModuleType) -> None:
    slices = make_slices.SLICES[name]
    train, validation, test = (
        read_rows(FOLDER / name / f"{side}.jsonl.gz") for side in ("train", "validation", "test")
    )
    assert not any(make_slices.is_validation(row, slices) for row in train)
    assert all(make_slices.is_validation(row, slices) for row in validation)
    if "user" in SLICES[name][1]:
        users = [{row["user"] for row in side} for side in (train, validation, test)]
        assert sum(map(len, users)) == len(set().union(*users))
        assert all(make_slices.is_test(row, slices) for row in test)
        assert not any(make_slices.is_test(row, slices) for row in train)


def test_slices_are_reproducible_byte_for_byte(tmp_path: Path, make_slices: ModuleType) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train.jsonl.gz", "test.jsonl.gz"):
        (source / name).write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n'))
    slices = make_slices.Slices(fraction=0.5)
    counts = make_slices.make(source, tmp_path / "one", slices)
    assert counts["train"] + counts["validation"] == counts["test"] == 3
    make_slices.make(source, tmp_path / "two", slices)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
