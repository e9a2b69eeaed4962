"""Warnings about a run's data before it starts, and what they do not mention."""

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import RunConfig
from fedtune.data import Record, TextDataset
from fedtune.data.bad_rows import NONE_LEFT_OUT, SkippedRows
from fedtune.data.load import Partitioned, SiteRecords
from fedtune.sites.data_warnings import (
    check_decision_scores,
    list_lead_data_warnings,
    list_signal_warnings,
    list_site_data_warnings,
    scores_may_decide,
)
from fedtune.sites.shared_model import LeadData, LoadedModel, RunModel
from fedtune.spec import ConfigError

from ..privacy.builders import change_values
from .conftest import LABELS, make_letters, write_records


def make_records(*labels: str) -> list[Record]:
    return [Record({"text": f"a {number}", "label": label}) for number, label in enumerate(labels)]


def make_lead_data(*labels: str, left_out: SkippedRows = NONE_LEFT_OUT) -> LeadData:
    return LeadData(make_records(*labels), TextDataset((), np.array([])), left_out=left_out)


def make_skipped(count: int, *, rows: int) -> SkippedRows:
    return SkippedRows(rows=rows, reasons={"must not be blank": count})


def make_partition(*sizes: int, **fields: Any) -> Partitioned:
    sites = tuple(SiteRecords(make_records(*"a" * size), []) for size in sizes)
    return Partitioned(sites, [], [], **{"left_out": NONE_LEFT_OUT} | fields)


@pytest.fixture
def simulated_config(tmp_path: Path) -> RunConfig:
    """A simulation whose two sites declare 40 records each, with a separate test file."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{name},a\n")
    files = {f"{name}_file": str(tmp_path / f"{name}.csv") for name in ("train", "test")}
    return make_letters(runtime={"kind": "simulation"}, data={"declared_sizes": 40, **files})


def test_valid_data_raises_no_warnings(simulated_config: RunConfig) -> None:
    assert list(list_lead_data_warnings(simulated_config, validation=None, test=make_lead_data("a", "b"))) == []
    assert (
        list(list_lead_data_warnings(simulated_config, validation=make_lead_data("a"), test=make_lead_data("a", "b")))
        == []
    )
    assert list(list_site_data_warnings(simulated_config, make_partition(27, 59))) == []
    missing_file = change_values(simulated_config, data={"test_file": "gone.csv"})
    assert list(list_lead_data_warnings(missing_file, validation=None, test=make_lead_data("a", "b"))) == []


@pytest.mark.parametrize(("follows", "declared"), [(True, 40), (False, 40), (False, 6_000)])
def test_lead_is_warned_of_labels_that_small_sites_cannot_learn(tmp_path: Path, follows: bool, declared: int) -> None:
    draws, words = np.random.default_rng(0), ("aaaa", "qqqq", "zzzz")
    labels = [LABELS[index] for index in draws.integers(0, 3, size=90)]
    labels_shown = labels if follows else [LABELS[index] for index in draws.integers(0, 3, size=90)]
    texts = [f"{words[LABELS.index(label)]} {number % 7}" for number, label in enumerate(labels_shown)]
    rows = "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))
    file = tmp_path / "test.csv"
    file.write_text(f"text,label\n{rows}")
    config = make_letters(runtime={"kind": "deployment"}, data={"declared_sizes": declared, "test_file": str(file)})
    notes = [*list_signal_warnings(config, RunModel(LoadedModel(config, trains=False), config))]
    assert len(notes) == (not follows and declared == 40)
    assert all(note.startswith("the run may learn nothing: on the lead's 90 records, a linear") for note in notes)


def test_lead_is_warned_of_missing_tests_and_unusable_rows(simulated_config: RunConfig, tmp_path: Path) -> None:
    (note,) = list_lead_data_warnings(simulated_config, validation=make_lead_data("a"), test=None)
    assert note.startswith("no test records, so the run has no final score: set data.test_file or")
    (note,) = list_lead_data_warnings(simulated_config, validation=None, test=make_lead_data("a", "a"))
    assert note == "all test records have the label 'a': scores on them cannot tell models apart"
    some, many = make_skipped(1, rows=10), make_skipped(1200, rows=9000)
    notes = list_lead_data_warnings(
        simulated_config, validation=make_lead_data("a", left_out=some), test=make_lead_data("a", "b", left_out=many)
    )
    assert list(notes) == [
        "data.validation_file: 1 of 10 rows (10.0 %) cannot be used: 1 must not be blank; the run skips them",
        "data.test_file: A LARGE PART, 1,200 of 9,000 rows (13.3 %), cannot be used: 1,200 must not be blank; the run "
        "skips them",
    ]


@pytest.mark.parametrize("copy", ["the same path", "a link", "the same content", "packed", "a part", "a site's own"])
def test_file_containing_training_data_is_refused(simulated_config: RunConfig, tmp_path: Path, copy: str) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    test.unlink()
    rows = [f"{word},{LABELS[0]}\n" for word in ("one", "two", "three")]
    train.write_text("".join(["text,label\n", *rows]))
    path = str(train)
    if copy == "a link":
        test.symlink_to(train)
    elif copy == "packed":
        test = tmp_path / "test.csv.gz"
        test.write_bytes(gzip.compress(train.read_bytes()))
    elif copy == "a site's own":
        path = str(tmp_path / "{site}.csv")
        (tmp_path / "north.csv").write_text(f"text,label\none,{LABELS[0]}\n")
        train.rename(test := tmp_path / "south.csv")
    else:
        test.write_text("".join(["text,label\n", *(rows[1:] if copy == "a part" else rows)]))
    file = train if copy == "the same path" else test
    kind = replace(simulated_config.data.partition, kind="file" if "{site}" in path else "iid")
    config = change_values(simulated_config, data={"train_file": path, "partition": kind, "test_file": str(file)})
    (note,) = list_lead_data_warnings(config, validation=None, test=make_lead_data("a", "b"))
    assert note == "data.test_file has the same records as data.train_file: its scores do not measure generalization"
    with pytest.raises(ConfigError, match=r"data\.validation_file = .*: has the same records as data\.train_file"):
        check_decision_scores(change_values(config, data={"validation_file": str(file)}))


def test_file_comparison_detects_changes_and_tolerates_chance_overlap(simulated_config: RunConfig) -> None:
    config = change_values(simulated_config, data={"validation_file": simulated_config.data.test_file})

    def is_decisive(trained_on: list[str], validated_on: list[str]) -> bool:
        for file, words in ((config.data.train_file, trained_on), (config.data.test_file, validated_on)):
            write_records(Path(str(file)), [(word, LABELS[0]) for word in words], header=("text", "label"))
        return scores_may_decide(config)

    words = ["one", "two", "three"]
    assert is_decisive(words, ["four"])
    assert not is_decisive(words, ["two"])
    assert is_decisive(["yes", "no"] * 20, ["yes", "no"] * 2)


def test_simulated_sites_are_warned_of_sizes_and_shared_users(simulated_config: RunConfig) -> None:
    (note,) = list_site_data_warnings(simulated_config, make_partition(26, 60))
    assert "north declares 40, but has 26, south declares 40, but has 60." in note
    (note,) = list_site_data_warnings(simulated_config, make_partition(40, 40, left_out=make_skipped(2, rows=82)))
    assert note.startswith("data.train_file: 2 of 82 rows (2.4 %) cannot be used: 2 must not be blank")
    (note,) = list_site_data_warnings(simulated_config, make_partition(40, 40, shared_users=3))
    assert note.startswith("3 user ids occur at several sites")


def test_fractions_must_be_zero_with_real_sites() -> None:
    for side in ("validation", "test"):
        share = {f"{side}_fraction": 0.1, f"{side}_file": None}
        with pytest.raises(ConfigError, match=rf"data\.{side}_fraction = 0\.1: must be 0 with real sites.*{side}_file"):
            make_letters(data=share)
        make_letters(runtime={"kind": "simulation"}, data=share)
