from typing import Any

import pytest

from fedtune.data.partition import PartitionSpec
from fedtune.data.spec import DataSpec
from fedtune.spec import ConfigError

VALID: dict[str, Any] = {"dataset": "banking77", "train_file": "train.jsonl", "declared_sizes": 100, "max_length": 32}
VALID |= {"columns": {"text": "text", "label": "label"}, "labels": ("a", "b")}
NAN, INF = float("nan"), float("inf")
NO_RANGES = ((1.0, 1.0), (2.0, 1.0), (NAN, 1.0), (0.0, INF), (-1.7e308, 1.7e308), (0.0, 5e-324), (1e9, 1e9 + 1))
BY_COLUMN, BY_LABEL = PartitionSpec(kind="column", sites={"a": 0}), PartitionSpec(kind="dirichlet")
NO_ROLES = ("{prompt.__class__}", "{prompt!r}", "{}")
GENERATION = {"columns": {"prompt": "mr", "completion": "ref"}, "labels": ()}


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        *(
            ({"dataset": name}, f"dataset = '{name}': must consist of at most")
            for name in ("our patients", "../patients")
        ),
        ({"train_file": " "}, "train_file = ' ': must not be blank"),
        *(({"declared_sizes": sizes}, "declared_sizes = 0: must be") for sizes in (0, (5, 0))),
        ({"max_length": 2}, "max_length = 2: must be"),
        ({"test_rows": 0}, "test_rows = 0: must be"),
        ({"windows": 9}, "windows = 9: must be one of 1, 2"),
        ({"windows": 2, "stride": 16}, "stride = 16: must be at most (data.max_length - 2)"),
        *(({"label_separator": mark}, "label_separator = ") for mark in ("", ", ", "[", '"')),
        *(({"target_range": bounds}, "target_range = ") for bounds in NO_RANGES),
        ({"test_fraction": 1.0}, "test_fraction = 1.0: must be in [0, 1)"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, "test_fraction = 0.5: must be smaller: no records"),
        ({"test_fraction": 0.5, "test_file": "t.csv"}, "test_fraction = 0.5: must be 0 if data.test_file is set"),
        ({"on_bad_record": "stop"}, "on_bad_record = 'stop': must be one of error, skip"),
        (
            {"partition": PartitionSpec(kind="file")},
            "train_file = 'train.jsonl': must contain {site} if data.partition.kind",
        ),
        ({"train_file": "a-{site}.csv"}, "train_file = 'a-{site}.csv': must contain {site} if data.partition.kind"),
        ({"heldout_fraction": 1.0}, "heldout_fraction = 1.0: must be in [0, 1)"),
        ({"train_fraction": 0.0}, "train_fraction = 0.0: must be in (0, 1]"),
        ({"labels": ("a", "b", "a")}, "labels = 'a': is declared twice"),
        ({"labels": ("a", "b ")}, "labels = 'b ': must not be blank"),
        ({"prompt_template": "{prompt"}, "prompt_template = '{prompt': expected '}'"),
        *(({"prompt_template": text}, f"prompt_template = '{text}': must contain only role") for text in NO_ROLES),
        ({"prompt_template": "{prompt} {prompt}"}, "prompt_template = '{prompt} {prompt}': must name each role"),
        ({"partition": BY_COLUMN}, "partition.kind = 'column': requires data.columns.site"),
        (GENERATION | {"partition": BY_LABEL}, "partition.kind = 'dirichlet': requires data.columns.label"),
    ],
)
def test_invalid_data_settings_are_refused(invalid: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        DataSpec(**VALID | invalid)
    assert str(error.value).startswith(message)


def test_declared_sizes_must_match_the_number_of_sites() -> None:
    assert DataSpec(**VALID).list_site_sizes(3) == (100, 100, 100)
    assert DataSpec(**VALID | {"declared_sizes": (5, 6)}).list_site_sizes(2) == (5, 6)
    with pytest.raises(ConfigError, match=r"declared_sizes = \[5, 6\]: must be one number, or one for each of 3 sites"):
        DataSpec(**VALID | {"declared_sizes": (5, 6)}).list_site_sizes(3)
    with pytest.raises(ConfigError, match=r"partition\.proportions = \[1\.0, 2\.0\]: must have one number for each"):
        DataSpec(**VALID | {"partition": PartitionSpec(proportions=(1.0, 2.0))}).list_site_sizes(3)
