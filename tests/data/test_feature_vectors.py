"""Feature vectors of table rows, computed row by row from the declared ranges and categories."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedtune.data.features import FeatureSpec, encode_features
from fedtune.data.records import Record, iter_records, iter_usable_records
from fedtune.data.spec import DataSpec
from fedtune.spec import ConfigError, DataError

from .conftest import make_data_spec, write_jsonl

AGE = FeatureSpec(columns=("age",), range=(0.0, 100.0))
LAB = FeatureSpec(columns=("crp", "ldh"), range=(-1.0, 1.0), missing="indicator")
SEX = FeatureSpec(columns=("sex",), categories=("female", "male"), missing="indicator")
STATES = FeatureSpec(columns=("states",), range=(-2.0, 2.0), size=3)
ALL = (AGE, LAB, SEX, STATES)
ROW = {"age": 25, "crp": 0.5, "ldh": None, "sex": "male", "states": [2, 0.5, -9]}


def make_data(*features: FeatureSpec, **changes: Any) -> DataSpec:
    fields = {"columns": {"label": "y"}, "max_length": 1, "input": "features", "features": features}
    return make_data_spec(**fields | changes)


def read_vector(tmp_path: Path, row: dict[str, Any], *features: FeatureSpec) -> list[float]:
    """Return a row's vector without its normalization."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [row])
    (record,) = iter_records(rows, make_data(*features).map_required_columns(()))
    vector = encode_features(record, features)
    assert vector.dtype == np.float32
    return [round(float(value), 5) for value in vector * math.sqrt(sum(feature.num_numbers for feature in features))]


def test_feature_values_follow_declared_order_and_scale(tmp_path: Path) -> None:
    values = [value for feature in ALL for value in feature.iter_value_names()]
    assert values == [
        "age in 0.0 to 100.0",
        *("crp in -1.0 to 1.0", "crp: missing", "ldh in -1.0 to 1.0", "ldh: missing"),
        *("sex = female", "sex = male", "sex: other", "sex: missing"),
        *("states[0] in -2.0 to 2.0", "states[1] in -2.0 to 2.0", "states[2] in -2.0 to 2.0"),
    ]
    assert sum(feature.width for feature in ALL) == len(values) == 12
    assert read_vector(tmp_path, ROW | {"states": "[2, 0.5, -9]"}, *ALL) == read_vector(tmp_path, ROW, *ALL), (
        "a list in text form must be accepted"
    )
    assert read_vector(tmp_path, ROW, *ALL) == [-0.5, 0.5, 0, 0, 1, 0, 1, 0, 0, 1, 0.25, -1]


# Invalid numbers, categories and lists: test_malformed_tables.py.
@pytest.mark.parametrize(("value", "expected"), [(0, -1), (100, 1), ("50", 0), (" 1e2 ", 1), (-5, -1), (1e300, 1)])
def test_numbers_are_clipped_to_their_range(tmp_path: Path, value: Any, expected: float) -> None:
    assert read_vector(tmp_path, {"age": value}, AGE) == [expected]


@pytest.mark.parametrize("value", [None, "", "  ", "NA", "nan", math.nan, "?"])
def test_missing_values_are_errors_or_set_the_indicator(tmp_path: Path, value: Any) -> None:
    assert read_vector(tmp_path, {"crp": value, "ldh": 1}, LAB) == [0, 1, 1, 0]
    assert read_vector(tmp_path, {"sex": value}, SEX) == [0, 0, 0, 1]
    with pytest.raises(DataError, match=r"must have a value \(or set missing = indicator"):
        read_vector(tmp_path, {"age": value}, AGE)


@pytest.mark.parametrize(("value", "vector"), [("female", [1, 0, 0, 0]), (" male ", [0, 1, 0, 0]), ("x", [0, 0, 1, 0])])
def test_undeclared_categories_are_encoded_as_other(tmp_path: Path, value: str, vector: list[float]) -> None:
    assert read_vector(tmp_path, {"sex": value}, SEX) == vector
    declared = FeatureSpec(columns=("sex",), categories=("1", "?"))
    assert read_vector(tmp_path, {"sex": "?"}, declared) == [0, 1, 0], "and no indicator of a missing value"


@pytest.mark.parametrize(
    ("kind", "value", "name"),
    [
        *((".csv", text, "1") for text in ("1", "1.0", " 1.00 ")),
        *((".csv", text, "true") for text in ("true", "True", "TRUE")),
        *((kind, value, "1") for kind in (".jsonl", ".parquet") for value in (1, 1.0, "1.0")),
        *((kind, value, "true") for kind in (".jsonl", ".parquet") for value in (True, "True")),
        *((kind, value, "2.5") for kind in (".jsonl", ".parquet") for value in (2.5, "2.5")),
    ],
)
def test_category_names_follow_the_json_form_of_values(tmp_path: Path, kind: str, value: Any, name: str) -> None:
    file = tmp_path / f"rows{kind}"
    if kind == ".parquet":
        parquet.write_table(pa.table({"grade": [value, value]}), file)
    else:
        file.write_text(f"grade\n{value}\n" if kind == ".csv" else f"{json.dumps({'grade': value})}\n")
    grade = FeatureSpec(columns=("grade",), categories=("1", "true", "2.5"))
    for record in iter_usable_records(file, make_data(grade).map_required_columns(())):
        vector = encode_features(record, (grade,))
        assert vector.tolist() == [*(float(name == category) for category in grade.categories), 0.0]


def test_feature_vectors_have_norm_at_most_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        fields = {f"feature:{name}": spec.generate_dummies(rng.integers) for spec in ALL for name in spec.columns}
        assert np.linalg.norm(encode_features(Record(fields), ALL)) <= 1 + 1e-6


INVALID: list[tuple[dict[str, Any], str]] = [
    *(({"columns": ()}, "columns"), ({"columns": ("a", "a")}, "columns"), ({"range": None}, "range")),
    *(({"categories": ("x",)}, "range"), ({"range": (1.0, 1.0)}, "range"), ({"range": (1.0, 0.0)}, "range")),
    *(({"range": (0.0, math.inf)}, "range"), ({"range": (0.0, 1e13)}, "range")),
    *(({"range": (1e9, 1e9 + 2000)}, "range"), ({"range": (-1e11 - 1e5, -1e11)}, "range"), ({"size": 0}, "size")),
    *(({"size": 100_000}, "size"), ({"range": None, "categories": ("x",), "size": 2}, "size")),
    ({"range": None, "categories": ("x", "x")}, "categories"),
    ({"range": None, "categories": ("1", "2.0")}, "categories"),
    *(({"range": None, "categories": ("True",)}, "categories"), ({"missing": "mean"}, "missing")),
]


@pytest.mark.parametrize(("changes", "key"), INVALID)
def test_invalid_feature_declarations_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FeatureSpec(**{"columns": ("a",), "range": (0.0, 1.0)} | changes)
    assert caught.value.key == key


@pytest.mark.parametrize("low", [0.0, 1.0, 1e9, -7e11])
def test_accepted_ranges_are_exact_enough_in_float32(low: float) -> None:
    high = low + max(1e-5, 2.6e-4 * abs(low))
    feature = FeatureSpec(columns=("a",), range=(low, high))
    middle, half = np.float32((low + high) / 2), np.float32((high - low) / 2)
    for value in np.linspace(low, high, 99):
        as_raw = (np.float32(value) - middle) / half
        assert feature.encode_field(repr(float(value)), at="") == pytest.approx([as_raw], abs=1e-3)


def test_columns_are_declared_once_and_vector_size_is_limited() -> None:
    with pytest.raises(ConfigError, match="is declared twice"):
        make_data(AGE, FeatureSpec(columns=("age",), categories=("old",)))
    for columns in ({"label": "age"}, {"label": "y", "feature:age": "crp"}, {"event": "y", "feature:crp": "y"}):
        with pytest.raises(ConfigError, match="is used twice: a column can be one feature, and not also the answer"):
            make_data(AGE, LAB, columns=columns)
    named = {"label": "y", "feature:age": "AGE"}
    assert make_data(AGE, columns=named).map_required_columns({"label"}) == named, (
        "a renamed column must be found by its role"
    )
    wide = FeatureSpec(columns=("a", "b"), range=(0.0, 1.0), size=40_000)
    with pytest.raises(ConfigError, match="features = 80000: must be at most 65536"):
        make_data(wide)
