"""One value as a role needs it, in the forms in which other programs write values."""

from __future__ import annotations

import json
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from fedtune.data import Record, iter_records, unit_hash, users_of
from fedtune.data.records import column_values, record_of, usable_records
from fedtune.data.values import one_form, turns_like
from fedtune.spec import DataError

ASKED, SAID = {"role": "user", "content": "where?"}, {"role": "assistant", "content": "here"}
CHAT = '[{"role":"user","content":"where?"},{"role":"assistant","content":"here"}]'
NOT_LEARNT = CHAT.replace('"here"', '"here","train":false')


def read(value: object, role: str) -> str:
    return record_of({"c": value}, {role: "c"}, file="a.jsonl", line=3).fields[role]


def refused(value: object, role: str) -> str:
    with pytest.raises(DataError) as caught:
        read(value, role)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "user"),
    [
        (("Jose\u0301", "Jos\u00e9", " Jos\u00e9\u200b", "\ufeffJos\u00e9", "Jo\u00adse\u0301"), "Jos\u00e9"),
        (("Ann\u00a0Lee", "Ann  Lee", "Ann Lee"), "Ann Lee"),
        ((12, 12.0, "12", "12.0", "12.00"), "12"),
        (("-3.0", -3), "-3"),
        (("ann",), "ann"),
        (("1.10",), "1.10"),
    ],
)
def test_one_person_has_one_id(values: tuple[object, ...], user: str) -> None:
    assert {read(value, "user") for value in values} == {user}


@pytest.mark.parametrize(
    "value", ["", " ", "\u200b", "NA", "nan", "None", "null", "n/a", "#N/A", "-", None, float("nan"), True, 1.5]
)
def test_who_has_no_id_is_no_person(value: object) -> None:
    assert "(role user)" in refused(value, "user")


def test_forms_of_an_id_are_one_user_wherever_users_are_told_apart(tmp_path: Path) -> None:
    rows = [{"text": "a", "who": "Jose\u0301"}, {"text": "b", "who": "Jos\u00e9"}, {"text": "c", "who": ""}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = list(usable_records(path, {"text": "text", "user": "who"}))
    assert [len(places) for places in users_of(records)] == [2]
    assert len({unit_hash(record, purpose="test", key=b"k", unit="user") for record in records}) == 1
    others = [Record({}, str(path), line) for line in (1, 2)]
    assert len(set(column_values(others, "who", key="x", role="user"))) == 1


def test_a_name_in_one_form_stays_as_it_is() -> None:
    for text in ("Jose\u0301\u200b", "\u1e9b\u0323", "a\u034f\u0301"):
        assert one_form(one_form(text)) == one_form(text)
        assert unicodedata.is_normalized("NFC", one_form(text))


@pytest.mark.parametrize(
    ("mark", "text"),
    [
        ({"weight": 0}, NOT_LEARNT),
        ({"weight": 0.0}, NOT_LEARNT),
        ({"train": False}, NOT_LEARNT),
        ({"training": False}, NOT_LEARNT),
        ({"loss": False, "train": True}, NOT_LEARNT),
        ({"weight": 1}, CHAT),
        ({"train": None, "train_detail": None}, CHAT),
        ({"weight": 0.5}, None),
        ({"train": "false"}, None),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": True}]}, None),
    ],
)
def test_an_answer_that_others_do_not_learn_is_marked(mark: dict[str, Any], text: str | None) -> None:
    for turns in ([ASKED, SAID | mark], [ASKED, {"from": "gpt", "value": "here"} | mark]):
        if text is None:
            assert "turn 2" in refused(turns, "messages")
        else:
            assert read(turns, "messages") == text
            assert read(text, "messages") == text, "what was read is read the same again"


@pytest.mark.parametrize(
    "value",
    [
        [{"role": " User", "content": "where?"}, {"role": "Assistant", "content": "here"}],
        [{"role": "user", "content": [{"type": "text", "text": "where?"}]}, {"role": "model", "content": "here"}],
        {"role": ["user", "assistant"], "content": ["where?", "here"]},
        {"from": ["human", "gpt"], "value": ["where?", "here"]},
        json.dumps({"role": ["user", "assistant"], "content": ["where?", "here"]}),
    ],
)
def test_a_conversation_in_the_forms_of_others(value: Any) -> None:
    assert len(turns_like(value)) in (2, 0)
    assert read(value, "messages") == CHAT


def test_a_developer_is_the_system() -> None:
    turns = [{"role": "developer", "content": "be brief"}, ASKED, SAID]
    assert json.loads(read(turns, "messages"))[0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([ASKED, {"role": "assistant", "content": [{"type": "image"}]}], "turn 2, content = 'array': must be text"),
        ([ASKED | {"content": [{"type": "text", "text": "a"}] * 2}], "turn 1, content = 'array': must be text"),
        ({"role": ["user"], "content": []}, "must be a list of turns"),
        (str([ASKED, SAID]), "as Python's json.dumps writes it and str and pandas do not"),
    ],
)
def test_a_conversation_that_cannot_be_read_says_why(value: Any, why: str) -> None:
    assert why in refused(value, "messages")


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        ("['late', 'broken']", ["late", "broken"]),
        ("['late' 'broken']", ["late", "broken"]),
        ("['late'\n 'broken']", ["late", "broken"]),
        ("""["it's late", 'said \\'no\\'']""", ["it's late", "said 'no'"]),
        ("[1 2 3]", ["1", "2", "3"]),
        ("[1. 2.]", ["1", "2"]),
        ("[]", []),
        ("['a\\x41']", None),
        ("[late, broken]", None),
        ("['late'broken']", None),
        ("['late']['broken']", None),
    ],
)
def test_a_list_as_python_prints_it(value: str, labels: list[str] | None) -> None:
    assert read(value, "labels") == (value if labels is None else json.dumps(labels, separators=(",", ":")))


@pytest.mark.parametrize("value", [[1, 0, 0], [1.0, 1.0], "[0, 0]", ["late", "late "], "['late', 'late']"])
def test_a_list_names_each_label_once(value: object) -> None:
    assert "must name each label once" in refused(value, "labels")


def test_a_long_text_is_no_printed_list_after_one_look_at_it() -> None:
    text = "['" + "a' 'b" * 400_000
    assert read(text, "labels") == text


@pytest.mark.parametrize(
    ("value", "label"), [(True, "true"), (False, "false"), (2.0, "2"), (" a ", "a"), (None, None), (float("nan"), None)]
)
def test_a_label_of_other_types(value: object, label: str | None) -> None:
    if label is None:
        assert "must not be null (role label)" in refused(value, "label")
    else:
        assert read(value, "label") == label
    assert isinstance(value, str) or "must be text" in refused(value, "text") or value is None or value != value


def test_values_of_a_database(tmp_path: Path) -> None:
    table = {
        "price": pyarrow.array([Decimal("3.70"), Decimal("4.00")]),
        "body": pyarrow.array(["caf\u00e9".encode(), b"\xff"], pyarrow.binary()),
        "tags": pyarrow.array([[b"late"], []], pyarrow.list_(pyarrow.binary())),
        "id": pyarrow.array([Decimal(7), Decimal(8)], pyarrow.decimal128(20, 0)),
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    columns = {"target": "price", "labels": "tags", "user": "id"}
    found = [dict(one.fields) for one in iter_records(tmp_path / "a.parquet", columns)]
    assert found[0] == {"target": "3.7", "labels": '["late"]', "user": "7"}
    assert [one.fields["text"] for one in usable_records(tmp_path / "a.parquet", {"text": "body"})] == ["caf\u00e9"]
    with pytest.raises(DataError, match="= 'bytes': must be text"):
        list(iter_records(tmp_path / "a.parquet", {"text": "body"}))


CLASSES = {"_type": "ClassLabel", "names": ["joy", "anger"]}


@pytest.mark.parametrize(
    "feature",
    [[CLASSES], {"_type": "List", "feature": CLASSES}, {"_type": "Sequence", "feature": CLASSES, "length": 2}],
)
def test_classes_of_a_list_have_their_names(tmp_path: Path, feature: Any) -> None:
    noted = json.dumps({"info": {"features": {"labels": feature}}})
    rows = pyarrow.Table.from_pylist([{"labels": [0, 1]}, {"labels": []}, {"labels": [-1]}])
    parquet.write_table(rows.replace_schema_metadata({"huggingface": noted}), tmp_path / "a.parquet")
    found = [one.fields["labels"] for one in usable_records(tmp_path / "a.parquet", {"labels": "labels"})]
    assert found == ['["joy","anger"]', "[]"], "-1: nobody said"


def test_minus_one_is_no_class(tmp_path: Path) -> None:
    noted = json.dumps({"info": {"features": {"label": CLASSES}}})
    rows = pyarrow.Table.from_pylist([{"label": place} for place in (0, -1, 1)])
    parquet.write_table(rows.replace_schema_metadata({"huggingface": noted}), tmp_path / "a.parquet")
    found = usable_records(tmp_path / "a.parquet", {"label": "label"})
    assert [one.fields["label"] for one in found] == ["joy", "anger"]


def test_a_folder_of_parts_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "spark.parquet").mkdir()
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "spark.parquet" / "part-0.parquet")
    with pytest.raises(DataError, match=r"holds 1 part of a table: write them as one file"):
        list(iter_records(tmp_path / "spark.parquet", {"text": "text"}))


def test_a_selection_of_a_saved_set_is_refused(tmp_path: Path) -> None:
    state = {"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="call flatten_indices"):
        list(iter_records(tmp_path, {"text": "text"}))
