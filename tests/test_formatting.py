"""Number formats that every layer uses."""

import math

import pytest

from fedtune.formatting import (
    convert_infinite_to_none,
    convert_none_to_infinite,
    convert_to_jsonable,
    format_score_name,
    format_size,
    pluralize,
)
from fedtune.show.lines import duration


@pytest.mark.parametrize(
    ("formatted", "text"),
    [
        *((pluralize(1, "record"), "1 record"), (pluralize(0, "record"), "0 records")),
        *((pluralize(1200, "record"), "1,200 records"), (format_score_name("macro_f1"), "macro F1")),
        *(
            (format_score_name("auroc"), "AUROC"),
            (format_score_name("accuracy"), "accuracy"),
            (format_size(312), "312 bytes"),
        ),
        *(
            (format_size(1023.9), "1024 bytes"),
            (format_size(1.5 * 2**20), "1.5 MiB"),
            (format_size(3 * 2**40), "3072.0 GiB"),
        ),
        *((duration(0.0), "0.1 s"), (duration(11.2), "12 s"), (duration(150), "3 min"), (duration(18000), "5.0 h")),
    ],
)
def test_numbers_are_formatted_consistently(formatted: str, text: str) -> None:
    assert formatted == text
    assert [convert_infinite_to_none(value) for value in (1.5, 0, None, math.inf, -math.inf, math.nan)] == [
        1.5,
        0.0,
        *[None] * 4,
    ]
    assert [convert_none_to_infinite(value) for value in (1.5, None)] == [1.5, math.inf], (
        "a missing bound must be read back as infinity"
    )
    assert convert_to_jsonable({"a": [math.inf, (1, "x", None)]}) == {"a": [None, [1, "x", None]]}
