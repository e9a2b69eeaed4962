import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.cli.finished_run import load_finished_run
from fedtune.config import RunConfig
from fedtune.data.records import NO_VALUE, Record, read_column_values
from fedtune.model.spec import HeadSpec
from fedtune.runs.model_comparison import compare_runs
from fedtune.sites.run_records import assign_sites
from fedtune.spec import ConfigError, DataError

from ..conftest import read_result, simulate

pytestmark = pytest.mark.nightly

Runs = dict[str, tuple[RunConfig, Path]]  # settings and the folder of the adapter

SHORT = ("federation.num_rounds=1", "training.local_steps=1", "data.test_rows=20")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two runs of one model with adapters of different ranks, and a third that reads less of each record."""
    into, comparison = tmp_path_factory.mktemp("runs"), {}
    for name, setting in (("four", "lora.rank=4"), ("two", "lora.rank=2"), ("short", "data.max_length=6")):
        folder = simulate(*SHORT, setting, into=into, name=name)
        comparison[name] = load_finished_run(folder)
    return comparison


def test_runs_on_one_base_share_its_scores(runs: Runs) -> None:
    comparison = compare_runs({name: runs[name] for name in ("four", "two")})
    assert list(comparison.measured) == ["base", "four", "two"]
    assert (comparison.num_units, comparison.unit, comparison.scores[0]) == (20, "record", "accuracy")
    most_frequent = max(Counter(record.fields["label"] for record in comparison.records).values())
    assert comparison.constant == most_frequent / 20
    for name in ("four", "two"):
        final = read_result(runs[name][1].parent)["final"]
        assert comparison.estimate(name, "loss").value == pytest.approx(final["metrics"]["loss"])
        assert comparison.estimate("base", "loss").value == pytest.approx(final["metrics_before"]["loss"])


def test_different_tokenization_gets_a_separate_base(runs: Runs) -> None:
    comparison = compare_runs({name: runs[name] for name in ("four", "short")})
    assert list(comparison.measured) == ["base", "base of short", "four", "short"]
    before = read_result(runs["short"][1].parent)["final"]["metrics_before"]["loss"]
    assert comparison.estimate("base of short", "loss").value == pytest.approx(before)


def test_incomparable_scores_are_refused(runs: Runs) -> None:
    one, adapter = runs["four"]
    reversed_labels = replace(one, data=replace(one.data, labels=tuple(reversed(one.data.labels))))
    with pytest.raises(ConfigError, match=r"must have the first run's data\.labels"):
        compare_runs({"four": runs["four"], "other": (reversed_labels, adapter)})
    no_test_file = replace(one, data=replace(one.data, test_file=None))
    with pytest.raises(ConfigError, match=r"data\.test_file = null: is missing: a comparison needs records"):
        compare_runs({"four": (no_test_file, adapter)})
    data = replace(one.data, labels=(), columns={"text": "text", "target": "n"}, target_range=(0.0, 5.0))
    config = replace(one, task="regression", head=HeadSpec(center=False, init="zero"), data=data)
    wider = replace(config, data=replace(data, target_range=(0.0, 10.0)))  # another scale is not comparable, either
    with pytest.raises(ConfigError, match=r"must have the first run's data\.target_range"):
        compare_runs({"four": (config, adapter), "other": (wider, adapter)})


def test_records_are_assigned_to_the_sites_of_the_partition(runs: Runs, tmp_path: Path) -> None:
    rows = [{"text": f"a {number}", "label": "x", "ward": ("n", "s", "?")[number % 3]} for number in range(9)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = [Record({"text": row["text"], "label": "x"}, str(path), line) for line, row in enumerate(rows, start=1)]
    config, _ = runs["four"]
    assert assign_sites(config, records) is None, "assigned by hash alone, all sites are alike"
    partition = replace(config.data.partition, kind="column", sites={"n": 0, "s": 1})
    data = replace(config.data, partition=partition, columns={**config.data.columns, "site": "ward"})
    assert assign_sites(replace(config, data=data), records) == ["site-1", "site-2", NO_VALUE] * 3


def test_group_column_is_read_for_existing_records(tmp_path: Path) -> None:
    rows = [{"a": "x", "age": 31}, {"a": "y", "age": 4.0}, {"a": "z"}, {"a": "w", "age": [1]}, {"a": "v", "age": " "}]
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), "no JSON"]) + "\n")
    records = [Record({"a": row["a"]}, str(path), line) for line, row in enumerate(rows, start=1)]
    assert read_column_values(records[::-1], "age", key="--by") == [NO_VALUE, NO_VALUE, NO_VALUE, "4", "31"]
    with pytest.raises(DataError, match=r"--by = 'ward': must be a column of .*, which has 'a', 'age'"):
        read_column_values(records, "ward", key="--by")


def test_too_many_groups_are_refused(runs: Runs) -> None:
    comparison = replace(compare_runs({"four": runs["four"]}), records=[Record({})] * 2000)
    groups = [str(number // 10) for number in range(2000)]
    with pytest.raises(ConfigError, match=r"--smallest = 10: leaves 200 groups; raise it until at most 100 are left"):
        comparison.score_by_group(groups, smallest=10, pairs=[])


def test_runs_tested_on_different_records_are_not_compared(tmp_path: Path) -> None:
    """Their settings select other test records, some of which the other run may have trained on."""
    of_file = ("data.test_file=null", "data.test_fraction=0.3", "data.test_rows=null", *SHORT[:2])
    config = load_finished_run(simulate(*of_file, into=tmp_path, name="one"))
    second = load_finished_run(
        simulate(*of_file, "data.columns={text: label, label: label}", into=tmp_path, name="other")
    )
    for runs in ({"one": config, "other": second}, {"other": second, "one": config}):
        with pytest.raises(ConfigError, match="must select the first run's test records"):
            compare_runs(runs)
