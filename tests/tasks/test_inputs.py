"""The documented preprocessing code of inputs, for readers without fedtune."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtune.data.features import FeatureSpec, encode_features
from fedtune.data.records import parse_record
from fedtune.report.loading_code import build_loading_code
from fedtune.spec import DataError
from fedtune.tasks.classification import Classification

from ..data.conftest import make_data_spec

FEATURES = (
    FeatureSpec(columns=("age",), range=(0.0, 100.0)),
    FeatureSpec(columns=("crp",), range=(0.0, 100.0), missing="indicator"),
    FeatureSpec(columns=("ward",), categories=("surgery", "1", "true", "2.5", "none")),
    FeatureSpec(columns=("grade",), categories=("surgery", "1"), missing="indicator"),
    FeatureSpec(columns=("states",), range=(-5.0, 5.0), size=2),
    FeatureSpec(columns=("levels",), range=(-5.0, 5.0), size=2, missing="indicator"),
)
DATA = make_data_spec("label", labels=("a", "b"), input="features", features=FEATURES, max_length=1)
GOOD = {"age": 5, "crp": 5, "ward": "surgery", "grade": "surgery", "states": [1, 2], "levels": [1, 2]}
VALUES: tuple[Any, ...] = (
    *(None, math.nan, math.inf, "", "  ", "NA", "nan", "none", "?", "x", " surgery ", "Surgery"),
    *(0, 1, 1.0, "1", " 1.0 ", "1.00", "+1", 2.5, "2.5", "2.50", -3, 1e300, 1e16, 2.0**53, 10**400, 7e14),
    *(True, False, "True", " TRUE", "false", "1e1", ".5", "5.", "1e999", "1_0", "0x1", "3,5", "\u0663"),
    *([1, 2], "[1, 2]", [1.5, -2.0], ["1", " 2.0"], [1], [1, 2, 3], [1, None], [1, math.nan], [True, 1], [[1, 2]]),
    *([1, math.inf], [], "[]", '"12"', "[1, 2", {"a": 1}, '{"1": 1, "2": 2}', (1, 2), "[1, true]"),
)


@pytest.fixture(scope="module")
def exported_code() -> Callable[[dict[str, Any]], Any]:
    lines = build_loading_code(Classification(), DATA, base="", folder="folder")
    reading, _, remainder = lines.partition("row = ")
    scaling = remainder[remainder.index("vector = []") : remainder.index("settings = ")]
    space: dict[str, Any] = {}
    exec(reading, space)

    def compute_vector(row: dict[str, Any]) -> Any:
        exec(scaling, space | {"row": row}, variables := dict[str, Any]())
        return np.array(variables["vector"]) / np.sqrt(variables["count"])

    return compute_vector


@pytest.mark.parametrize("column", GOOD)
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_exported_preprocessing_matches_training(exported_code: Any, column: str, value: Any) -> None:
    row = GOOD | {column: value}
    try:
        record = parse_record(row, DATA.map_required_columns(()), file="", line=0)
        expected = encode_features(record, FEATURES)
    except DataError:
        with pytest.raises((ValueError, TypeError)):
            exported_code(row)
    else:
        np.testing.assert_allclose(exported_code(row), expected, rtol=1e-6)
    of_numpy = GOOD | {"age": np.float32(5), "grade": np.int64(1), "states": np.array([1.0, 2.0])}
    np.testing.assert_array_equal(exported_code(of_numpy), exported_code(GOOD | {"grade": 1}))
