"""Loading of a simulation's records: the lead's fraction, a file per site, and unusable records."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.data import Record
from fedtune.data.bad_rows import SkippedRows
from fedtune.data.load import Partitioned, partition_training_files, read_lead_records, read_own_records, sample_rows
from fedtune.data.partition import PartitionSpec
from fedtune.data.records import Fault
from fedtune.data.spec import DataSpec
from fedtune.spec import DataError

from .conftest import make_data_spec, write_jsonl

COLUMNS = {"text": "text", "label": "kind"}
TEXTS = [f"text {number}" for number in range(1000)]


def make_spec(path: Path, **settings: Any) -> DataSpec:
    return make_data_spec(**{"train_file": str(path), "columns": COLUMNS, "labels": ("a", "b")} | settings)


def partition_spec(
    given: DataSpec, *, unit: Any = "record", seed: int = 1, fault: Fault = lambda record: None
) -> Partitioned:
    roles = ("text", "label")
    columns = given.map_required_columns(roles, partition=True, unit=unit)
    return partition_training_files(given, columns, ("north", "south"), seed=seed, unit=unit, fault=fault)


def find_undeclared_label(record: Record) -> DataError | None:
    return None if record.fields["label"] == "a" else DataError(record.at("label"), "not declared", "must be a")


def list_texts(records: list[Record]) -> list[str]:
    return [record.fields["text"] for record in records]


def list_sides(found: Partitioned) -> list[list[str]]:
    of_sites = [list_texts([*site.training, *site.heldout]) for site in found.sites]
    return [list_texts(found.validation), list_texts(found.test), *of_sites]


@pytest.fixture
def whole_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "all.jsonl", [{"text": text, "kind": "ab"[len(text) % 2]} for text in TEXTS])


def test_lead_split_depends_only_on_each_record_and_the_seed(whole_file: Path, tmp_path: Path) -> None:
    spec = make_spec(whole_file, validation_fraction=0.1, test_fraction=0.3)
    found = list_sides(partition_spec(spec))
    validation, test, *sites = found
    assert sorted([*validation, *test, *sites[0], *sites[1]]) == sorted(TEXTS)
    assert 60 < len(validation) < 140
    assert 250 < len(test) < 350
    everything = list_sides(partition_spec(make_spec(whole_file)))
    assert everything[:2] == [[], []]
    lead = {*validation, *test}
    assert [[text for text in site if text not in lead] for site in everything[2:]] == sites, "no other record may move"
    smaller = list_sides(partition_spec(replace(spec, train_fraction=0.5)))
    assert smaller[:2] == [validation, test], "a smaller run must be scored on the same records"
    gone, *rows = [json.loads(line) for line in whole_file.read_text().splitlines()]
    without = replace(spec, train_file=str(write_jsonl(tmp_path / "less.jsonl", rows)))
    assert list_sides(partition_spec(without)) == [[text for text in side if text != gone["text"]] for side in found]
    assert list_sides(partition_spec(spec, seed=2)) != found, "the split must depend on the run's seed"


def test_users_are_assigned_to_the_lead_as_a_whole(tmp_path: Path) -> None:
    rows = [{"text": text, "kind": "a", "who": f"u{number % 60}"} for number, text in enumerate(TEXTS)]
    path = write_jsonl(tmp_path / "all.jsonl", rows)
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2, "heldout_fraction": 0.2}
    found = partition_spec(make_spec(path, columns=COLUMNS | {"user": "who"}, **shares), unit="user")
    of_sites = [part for site in found.sites for part in (site.training, site.heldout)]
    parts = [found.validation, found.test, *of_sites]
    users = [{record.fields["user"] for record in part} for part in parts]
    assert all(users)
    assert sum(map(len, users)) == len(set().union(*users)) == 60


def test_site_files_keep_equal_ids_as_separate_users(tmp_path: Path) -> None:
    names = {"north": "ann bob ann", "south": "bob eve ann"}
    for name, users in names.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": user, "kind": "a", "who": user} for user in users.split()])
    columns = COLUMNS | {"user": "who"}
    spec = make_spec(tmp_path / "{site}.jsonl", columns=columns, partition=PartitionSpec(kind="file"))
    by_user = partition_spec(spec, unit="user")
    assert (
        list_sides(partition_spec(spec))
        == list_sides(by_user)
        == [[], [], *(users.split() for users in names.values())]
    )
    assert by_user.shared_users == 2
    (tmp_path / "south.jsonl").unlink()
    with pytest.raises(DataError, match=r"data\.train_file = .*south\.jsonl': no such file"):
        partition_spec(spec)
    (tmp_path / "south.jsonl").write_text("")
    with pytest.raises(DataError, match=r"south\.jsonl = 'an empty file': must contain at least one record"):
        partition_spec(spec)


def test_unusable_records_stop_loading_or_are_skipped(tmp_path: Path) -> None:
    rows = [{"text": text, "kind": "a"} for text in TEXTS[:40]]
    path = write_jsonl(tmp_path / "all.jsonl", [*rows, {"text": " ", "kind": "a"}, {"text": "c", "kind": "c"}])
    with pytest.raises(DataError, match=r"all\.jsonl:41, column 'text' = 'blank'"):
        partition_spec(make_spec(path))

    left_out = SkippedRows(rows=42, reasons={"must not be blank (role text)": 1, "must be a": 1})
    found = partition_spec(make_spec(path, on_bad_record="skip"), fault=find_undeclared_label)
    assert sorted(text for side in list_sides(found) for text in side) == sorted(TEXTS[:40])
    assert found.left_out == left_out
    options: Any = {"columns": COLUMNS, "key": "data.test_file", "fault": find_undeclared_label}
    records, of_lead = read_lead_records(str(path), **options, leave_out=True)
    assert (len(records), of_lead) == (40, left_out)
    with pytest.raises(DataError, match="'blank'"):
        read_lead_records(str(path), **options)


def test_faults_are_counted_over_the_whole_file(tmp_path: Path) -> None:
    rows = [{"text": text, "kind": "a" if number % 4 else "c"} for number, text in enumerate(TEXTS[:40])]
    path = write_jsonl(tmp_path / "all.jsonl", rows)
    message = r"all\.jsonl:1, label = 'not declared': must be a \(10 rows cannot be used, in lines 1, 5, 9, 13, 17, \."
    with pytest.raises(DataError, match=message):
        partition_spec(make_spec(path, validation_fraction=0.2), fault=find_undeclared_label)
    with pytest.raises(DataError, match=message):
        read_lead_records(str(path), columns=COLUMNS, key="data.test_file", fault=find_undeclared_label)
    write_jsonl(path, [{"subject": "a", "kind": "a"}] * 3)
    with pytest.raises(DataError, match=r"column 'text' = 'absent': is missing.* \(3 rows cannot be used"):
        partition_spec(make_spec(path, on_bad_record="skip"))


def test_truncated_json_array_is_refused_except_at_real_sites(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps([{"text": text, "kind": "a"} for text in TEXTS[:5]])[:-4])
    for on_bad_record in ("error", "skip"):
        with pytest.raises(DataError, match=r"json:1 = 'the end of the file'.*lacks the rest of this record, and \]"):
            partition_spec(make_spec(path, on_bad_record=on_bad_record))
    records = read_own_records(make_spec(path), columns=COLUMNS, fault=find_undeclared_label, key=b"k")
    assert list_texts(records.training) == TEXTS[:4]
    assert (records.left_out.rows, records.left_out.count, records.left_out.exceeds_threshold) == (5, 1, True)


def test_lead_rows_are_selected_by_their_hash() -> None:
    records = [Record({"text": text}) for text in TEXTS]
    sample = sample_rows(records, 30)
    assert sample == [record for record in records if record in sample], "the order must be kept"
    assert len(sample) == 30
    assert sample != records[:30]
    assert sample_rows(records[500:] + records[:500], 30) != sample
    assert {record.fields["text"] for record in sample_rows(records[::-1], 30)} == {*list_texts(sample)}
    assert set(list_texts(sample_rows(records, 10))) < set(list_texts(sample))
    assert sample_rows(records, None) == sample_rows(records, 5000) == records
