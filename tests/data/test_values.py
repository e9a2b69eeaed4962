"""Conversion of single values for their roles, from the formats of other programs."""

import json
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from fedtune.data import Record, group_by_user
from fedtune.data.partition import hash_unit
from fedtune.data.records import iter_records, iter_usable_records, parse_record, read_column_values
from fedtune.data.values import guess_turns, normalize_name, parse_continuation, read_continuation, read_labels
from fedtune.spec import DataError

from .conftest import write_jsonl

QUESTION, TURN_ROLES = {"role": "user", "content": "where?"}, {"role": "assistant", "content": "here"}
CHAT = '[{"role":"user","content":"where?"},{"role":"assistant","content":"here"}]'
NOT_LEARNED = CHAT.replace('"here"', '"here","train":false')
ONE = '[{"role":"assistant","content":"here"}]'
NAN, DEEP = float("nan"), "[" * 100_000
PRINTED = str([QUESTION, TURN_ROLES])
LISTED = '["late","lost"]'
SECRET = "secret"
"""A part of the values, which no message may quote."""


def build_answer(content: Any, **extra: Any) -> list[Any]:
    return [QUESTION, {"role": "assistant", "content": content} | extra]


READ: dict[str, list[tuple[object, str]]] = {
    "text": [(" a ", " a ")],
    "label": [(True, "true"), (False, "false"), (2.0, "2"), (-3.0, "-3"), (7, "7"), (" a ", "a")],
    # One id per person, in one Unicode form and without invisible characters.
    "user": [
        *((name, "Jos\u00e9") for name in ("Jose\u0301", " Jos\u00e9\u200b", "\ufeffJos\u00e9", "Jo\u00adse\u0301")),
        *((name, "Ann Lee") for name in ("Ann\u00a0Lee", "Ann  Lee", "Ann Lee")),
        *((number, "12") for number in (12, 12.0, "12", "12.0", "12.00")),
        *(("-3.0", "-3"), (" Ann ", "Ann"), ("1.10", "1.10"), ("12e45678", "12e45678")),
    ],
    "messages": [
        (CHAT, CHAT),
        (build_answer("here"), CHAT),
        ([{"from": "human", "value": "where?"}, {"from": "gpt", "value": "here"}], CHAT),
        ([{"role": " User", "content": "where?"}, {"role": "Assistant", "content": "here"}], CHAT),
        ([{"role": "user", "content": [{"type": "text", "text": "where?"}]}, TURN_ROLES | {"role": "model"}], CHAT),
        ([{**turn, "name": None, "from": None} for turn in (QUESTION, TURN_ROLES)], CHAT),
        ({"role": ["user", "assistant"], "content": ["where?", "here"]}, CHAT),
        ({"from": ["human", "gpt"], "value": ["where?", "here"]}, CHAT),
        (json.dumps({"role": ["user", "assistant"], "content": ["where?", "here"]}), CHAT),
        (
            [{"role": "developer", "content": "be brief"}, QUESTION],
            '[{"role":"system","content":"be brief"},{"role":"user","content":"where?"}]',
        ),
        # Marks of other programs for answers that are not to be learned.
        *((build_answer("here", **mark), NOT_LEARNED) for mark in ({"weight": 0}, {"weight": 0.0}, {"train": False})),
        *(
            (build_answer("here", **mark), NOT_LEARNED)
            for mark in ({"training": False}, {"loss": False, "train": True})
        ),
        *((build_answer("here", **mark), CHAT) for mark in ({"weight": 1}, {"train": None, "train_detail": None})),
        (NOT_LEARNED, NOT_LEARNED),
        ({"messages": json.loads(CHAT), "tools": [], "parallel_tool_calls": True}, CHAT),
    ],
    "chosen": [
        *(("lost ", "lost "), ([{"from": "gpt", "value": "here"}], ONE)),
        *(('[ {"role": "bot", "content": "here"} ]', ONE), (f"\n {ONE}", ONE), ({"from": "gpt", "value": "here"}, ONE)),
        *((json.loads(ONE) * 2, f"{ONE[:-1]},{ONE[1:]}"), ("[1, 2]", "[1, 2]")),
        ('[{"role": "tool", "content": "late"}]', '[{"role": "tool", "content": "late"}]'),
    ],
    "labels": [
        *(
            (value, '["a"]')
            for value in ({"a": 1.0, "b": 0}, {"a": True, "b": False}, {"choices": ["a"]}, [{"label": "a"}])
        ),
        ([{"result": [{"value": {"choices": ["a"]}}]}, {"result": []}], '["a"]'),
        (["late", " lost "], LISTED),
        (["late", 3], '["late","3"]'),
        ('["late", 2.0]', '["late","2"]'),
        (7, '["7"]'),
        *((empty, "[]") for empty in ([], "", "[]", "()", "{}", "set()")),
        *((text, text.strip()) for text in (" late; lost", "[urgent];late", "(late)", "[late, lost]", "['a\\x41']")),
        *((text, text) for text in ("['late'lost']", "['late']['lost']", "[" * 300 + "late" + "]" * 300)),
        # Lists as printed by Python, numpy and pandas.
        *((text, LISTED) for text in ("['late', 'lost']", "['late' 'lost']", "['late'\n 'lost']", "('late', 'lost')")),
        *((text, LISTED) for text in ("{'late', 'lost'}", "array(['late', 'lost'])")),
        ("array(['late', 'lost'], dtype=object)", LISTED),
        ("""["it's late", 'said \\'no\\'']""", '["it\'s late","said \'no\'"]'),
        *((text, '["1","2"]') for text in ("[1 2]", "[1. 2.]", "array([1, 2], dtype=int64)")),
        ("['" + "a' 'b" * 400_000, "['" + "a' 'b" * 400_000),
    ],
    "target": [(3, "3.0"), (-2.5, "-2.5"), (" 4.25 ", "4.25"), ("1e3", "1000.0"), (".5", "0.5")],
}
NOT_READ: dict[str, list[tuple[object, str]]] = {
    "text": [
        *((value, "must be text (role text)") for value in (3, [], True, {"secret": 1})),
        *((None, "must not be null"), (" ", "must not be blank"), ("secret\ud800", "must be valid Unicode")),
    ],
    "label": [
        *((None, "must not be null (role label)"), (NAN, "must not be null"), (1.5, "text or an integer")),
        (2.0**53, "text"),
    ],
    "user": [
        *((value, "(role user)") for value in ("", " ", "\u200b", "NA", "nan", "None", "null", "n/a", "#N/A", "-")),
        *((value, "(role user)") for value in (None, NAN, True, 1.5, {"id": SECRET}, float("inf"), 2.0**53)),
        *((value, "a number with an exponent") for value in ("1.23457E+11", "1e+05", "1.0e5")),
        *((value, "'a list of users': must name one user") for value in ([SECRET, "bob"], [SECRET], [], "secret,bob")),
        *((value, "(docs/user_level.md)") for value in ("secret; bob", "secret|bob", '["secret", "bob"]')),
    ],
    "messages": [
        *((value, "a list of turns (role messages)") for value in (3, {"role": ["user"], "content": []})),
        *((value, "must be a JSON list of turns") for value in (SECRET, PRINTED, f"array({[QUESTION]})")),
        ([QUESTION, QUESTION], "turn 2 = 'user': must be assistant: user and assistant must alternate"),
        ([TURN_ROLES], "turn 1 = 'assistant': must be user"),
        ([QUESTION, {"role": "system", "content": "a"}], "turn 2 = 'system': must be assistant"),
        ([QUESTION, {"role": "tool", "content": SECRET}], "turn 2, role = 'an unknown speaker'"),
        ([{"who": "user"}], "turn 1 = 'no speaker or no text': must have role and content, or from and value"),
        ([SECRET], "turn 1 = 'string': must be an object"),
        ([QUESTION | {"content": None}], "turn 1, content = 'null': must be text"),
        ([QUESTION | {"content": [{"type": "text", "text": SECRET}] * 2}], "turn 1, content = 'array': must be text"),
        *(
            (build_answer([{"type": "image"}, *more]), "images and other parts are not")
            for more in ([], [{"text": SECRET}])
        ),
        (build_answer(" "), "turn 2, content = 'blank': must not be blank"),
        (build_answer("\ud800"), "must be valid Unicode (role messages)"),
        (build_answer("here", tool_calls=[{"id": "1"}]), "tool turns are not supported"),
        (build_answer(None, function_call={"name": "f"}), "tool turns are not supported"),
        *(
            (build_answer("here", **mark), "must be 0 or 1, false or true")
            for mark in ({"weight": 0.5}, {"train": "false"})
        ),
        (build_answer("here", train_detail=[{"begin_offset": 0}]), "turn 2, train_detail = 'weights of parts'"),
        (DEEP, "text that is not JSON"),
    ],
    "chosen": [
        *(([{"role": "tool", "content": SECRET}], "an unknown speaker"), ([{"role": "user"}], "no speaker or no text")),
        *((value, "must be text, or a list of at least one turn") for value in ([], 7)),
        *(
            (" ", "must not be blank, because it is the text that the model learns"),
            ("\ud800", "must be valid Unicode"),
        ),
        *((PRINTED, "must be a JSON list of turns"), ('[{"role":"assistant","more":' + DEEP, "nested brackets")),
    ],
    "labels": [
        *((None, "must not be null"), (["\ud800"], "must be valid Unicode")),
        *((value, "must be text or a list of texts") for value in ([[SECRET]], [SECRET, ""], [True], {SECRET: 0.5})),
        ("[" * 100_000 + "]" * 100_000, "must be text or a list of texts"),
        *((value, "must list each label once") for value in ([1, 0, 0], [1.0, 1.0], "[0, 0]", [SECRET, "secret "])),
        ("['secret', 'secret']", "must list each label once"),
    ],
    "image": [
        (None, "must not be null"),
        *((value, "must be the path of an image, or its bytes") for value in (7, " ", {"bytes": None, "path": None})),
    ],
    "target": [
        (None, "must not be null"),
        *((value, "must be a finite number") for value in (True, "", "3,5", "1_000", "nan", "1e999", 10**400, SECRET)),
        # The last value must be refused after one look at each character, or this test does not end.
        *((value, "must be a finite number") for value in ("1" + "0" * 400, float("inf"), [1], "1" * 2_000_000 + "x")),
    ],
}


def read(value: object, role: str) -> Record:
    return parse_record({"c": value}, {role: "c"}, file="a.jsonl", line=3)


@pytest.mark.parametrize("role", READ)
def test_values_in_alternative_formats_are_normalized(role: str) -> None:
    for value, text in READ[role]:
        assert read(value, role).fields == {role: text}, f"{value!r:.200}"
        if role != "target":
            assert read(text, role).fields == {role: text}, "reading must be idempotent"


@pytest.mark.parametrize("role", NOT_READ)
def test_unreadable_value_error_explains_without_quoting(role: str) -> None:
    for value, reason in NOT_READ[role]:
        with pytest.raises(DataError) as caught:
            read(value, role)
        message = str(caught.value)
        assert reason in message, f"{value!r:.200}"
        assert message.startswith("a.jsonl:3, column 'c'")
        assert SECRET not in message, "a record's content must not be quoted"


def test_texts_and_answers_are_separated_by_role() -> None:
    assert [list(read(value, role).texts()) for value, role in ((3, "target"), ("a", "label"))] == [[], []]
    assert [read(3, "target").target_key, read("a", "label").target_key] == ['{"target": "3.0"}', '{"label": "a"}']
    assert [text for _, text in read(build_answer("here"), "messages").texts()] == ["where?", "here"]
    assert [text for _, text in read(json.loads(ONE) * 2, "rejected").texts()] == ["here", "here"]
    assert [text for _, text in read("lost ", "rejected").texts()] == ["lost "]
    assert len(guess_turns(build_answer("here"))) == 2


def test_unicode_variants_of_an_id_are_one_user(tmp_path: Path) -> None:
    rows = [{"text": "a", "who": "Jose\u0301"}, {"text": "b", "who": "Jos\u00e9"}, {"text": "c", "who": ""}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    records = list(iter_usable_records(path, {"text": "text", "user": "who"}))
    assert [len(places) for places in group_by_user(records)] == [2]
    assert len({hash_unit(record, purpose="test", key=b"k", unit="user") for record in records}) == 1
    others = [Record({}, str(path), line) for line in (1, 2)]
    assert len(set(read_column_values(others, "who", key="x", role="user"))) == 1
    for text in ("Jose\u0301\u200b", "\u1e9b\u0323", "a\u034f\u0301"):
        assert normalize_name(normalize_name(text)) == normalize_name(text), "normalization must be idempotent"
        assert unicodedata.is_normalized("NFC", normalize_name(text))


def call_deeper(deeper: int, reader: Callable[..., Any], *arguments: str) -> Any:
    """Call the reader on a deeper stack, which must not change its result; None if it refuses the value."""
    try:
        return call_deeper(deeper - 1, reader, *arguments) if deeper else reader(*arguments)
    except DataError:
        return None


def test_nested_answers_are_parsed_equally_at_any_stack_depth() -> None:
    answers = set()
    for depth in range(880, 1050, 3):
        nested = "[" * depth + "]" * depth
        text = '[{"role": "assistant", "content": "here", "more": ' + nested + "}]"
        for deeper in range(0, 60, 7):
            assert call_deeper(deeper, read_labels, nested, "labels") is None, depth
            answers.add(answer := call_deeper(deeper, read_continuation, text, "chosen"))
            if answer is not None:
                assert all(
                    call_deeper(other, parse_continuation, answer) == json.loads(ONE) for other in (0, 30, 60)
                ), depth
    assert answers == {None, ONE}


def test_plain_text_answer_is_not_parsed_as_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    for text in ("[[],[]]", DEEP, "[1, 2]", "lost"):
        assert read_continuation(text, "chosen") == text
        assert parse_continuation(text) is None
    assert parse_continuation(' [{"role": "assistant", "content": "lost"}]') is None, (
        "parsed turns must be serialized again"
    )


def test_database_types_are_converted(tmp_path: Path) -> None:
    table = {
        "price": pyarrow.array([Decimal("3.70"), Decimal("4.00")]),
        "body": pyarrow.array(["caf\u00e9".encode(), b"\xff"], pyarrow.binary()),
        "tags": pyarrow.array([[b"late"], []], pyarrow.list_(pyarrow.binary())),
        "id": pyarrow.array([Decimal(7), Decimal(8)], pyarrow.decimal128(20, 0)),
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    columns = {"target": "price", "labels": "tags", "user": "id"}
    fields = [dict(record.fields) for record in iter_records(tmp_path / "a.parquet", columns)]
    assert fields[0] == {"target": "3.7", "labels": '["late"]', "user": "7"}
    assert [record.fields["text"] for record in iter_usable_records(tmp_path / "a.parquet", {"text": "body"})] == [
        "caf\u00e9"
    ]
    with pytest.raises(DataError, match="= 'bytes': must be text"):
        list(iter_records(tmp_path / "a.parquet", {"text": "body"}))


CLASSES = {"_type": "ClassLabel", "names": ["joy", "anger"]}


@pytest.mark.parametrize(
    ("role", "feature", "values", "expected"),
    [
        ("label", CLASSES, [0, -1, 1], ["joy", "anger"]),
        ("labels", [CLASSES], [[0, 1], [], [-1]], ['["joy","anger"]', "[]"]),
        ("labels", {"_type": "List", "feature": CLASSES}, [[0, 1]], ['["joy","anger"]']),
        ("labels", {"_type": "Sequence", "feature": CLASSES, "length": 2}, [[1, 0]], ['["anger","joy"]']),
        *(("label", CLASSES | names, [0, 1], ["0", "1"]) for names in ({"names": None}, {"names": 3})),
        *(("label", feature, [0, 1], ["0", "1"]) for feature in (1, {"_type": "ClassLabel"})),
        ("label", CLASSES | {"names": ["x"]}, [0, 1], ["x", "1"]),
    ],
)
def test_class_indices_are_replaced_by_class_names(
    tmp_path: Path, role: str, feature: Any, values: Any, expected: list[str]
) -> None:
    """-1 means null, an unlabeled record; a schema's metadata may contain anything."""
    noted = json.dumps({"info": {"features": {"c": feature}}})
    rows = pyarrow.table({"c": values}).replace_schema_metadata({"huggingface": noted})
    parquet.write_table(rows, tmp_path / "a.parquet")
    assert [one.fields[role] for one in iter_usable_records(tmp_path / "a.parquet", {role: "c"})] == expected
