"""Files as other programs write them: each kind is read rightly, named, or refused with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.data.text_rows import table_rows
from fedtune.data.values import labels_of, messages_of, read_value
from fedtune.preparation import starter
from fedtune.preparation.detect import Found, look_at
from fedtune.spec import ConfigError, DataError

ASK, SAY = {"role": "user", "content": "where?"}, {"role": "assistant", "content": "here"}
Rows = Callable[[int], dict[str, Any]]


def texts(number: int) -> str:
    return f"a text of its own, with number {number} in it"


def seen(folder: Path, row: Rows, **chosen: str) -> Found:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(60)))
    return look_at(folder / "rows.jsonl", chosen)


def table(folder: Path, *lines: str) -> Path:
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "rows.csv"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lambda n: {"prompt": texts(n), "completion": texts(n), "label": n % 2}, "column label = '1 or 0': may say"),
        (lambda n: {"question": texts(n), "answer": texts(n), "label": ["good", "bad"][n % 2]}, "rows answer is not"),
        (lambda n: {"instruction": texts(n), "input": "", "output": texts(n), "kto_tag": n % 2 > 0}, "rows output is"),
        (lambda n: {"prompt": texts(n), "completion": texts(n), "score": n % 2}, "column score = '1 or 0': may say"),
        (lambda n: {"question": texts(n), "answer": texts(n), "accepted": n % 2 > 0}, "rows answer is not"),
        (
            lambda n: {"prompt": texts(n), "answer_a": "a", "answer_b": texts(n), "winner": "ab"[n % 2]},
            "which of two is",
        ),
        (lambda n: {"text": texts(n), "label": f"c{n % 30}"}, "on average in 5 rows"),
        (lambda n: {"conversations": [ASK, SAY], "kto_tag": n % 2 > 0}, "rows conversations is not wanted"),
        (lambda n: {"role": ["prompter", "assistant"][n % 2], "text": texts(n)}, "column role = 'speakers': says who"),
        (lambda n: {"prompt": [ASK], "completion": [SAY]}, "all turns of a record as one list in a column messages"),
        (lambda n: {"question": texts(n), "answers": {"text": ["a"]}}, "column answers = 'object': must have 2 to"),
        (
            lambda n: {"prompt": texts(n), "response": [SAY]},
            "column response = 'list': must be a text: write all turns",
        ),
        (lambda n: {"text": texts(n), "score": f"{n % 9},5"}, r"column score = 'text': .* write 3\.5"),
        (lambda n: {"text": texts(n), "rating": f"{n} %"}, r"column rating = 'text': .* write 3\.5"),
    ],
)
def test_what_would_be_learnt_wrongly_is_refused(tmp_path: Path, row: Rows, message: str) -> None:
    with pytest.raises(DataError, match=message):
        seen(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "column", "why"),
    [
        (lambda n: {"messages": [ASK, SAY | {"reasoning_content": "hm"}]}, "messages: reasoning_content", "no run"),
        (lambda n: {"messages": [ASK, SAY | {"masked": 1}]}, "messages: masked", "no run"),
        (lambda n: {"text": texts(n), "label": "one"}, "label", "always the same"),
        (lambda n: {"text": texts(n), "label": "ab"[n % 2], "age": str(n)}, "age", "--score age"),
        (lambda n: {"text": texts(n), "parent_id": texts(n)}, "parent_id", "ids of the records"),
        (lambda n: {"text": texts(n), "user_ids": ["a", "b"]}, "user_ids", "a record is of one person"),
        (
            lambda n: {"query": texts(n), "response": texts(n), "rejected_response": texts(n)},
            "rejected_response",
            "not",
        ),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, row: Rows, column: str, why: str) -> None:
    assert why in dict(seen(tmp_path, row).unread)[column]


@pytest.mark.parametrize(
    "name",
    [
        *("patient_nr", "PatientNummer", "Patient-ID", "id_patient", "hashed_patient_id", "pseudo_id", "Kundennummer"),
        *("kunden_nr", "account_id", "screen_name", "pid", "SSN", "nhs_number", "customer email", "anon_user"),
        *("tweet_author_id", "user.screen_name", "cust_id", "PatID", "Patienten-ID", "Email Address"),
    ],
)
def test_a_column_called_as_people_are_is_the_unit(tmp_path: Path, name: str) -> None:
    found = seen(tmp_path, lambda n: {"text": texts(n), "label": "ab"[n % 2], name: f"p{n % 9}"})
    assert found.roles == {"text": "text", "label": "label", "user": name}


def test_answers_by_another_name_are_preferences(tmp_path: Path) -> None:
    found = seen(tmp_path, lambda n: {"prompt": texts(n), "chosen_response": texts(n), "rejected_response": "no"})
    assert found.kind == "preferences"


@pytest.mark.parametrize(
    "name", ["user_rating", "customer_type", "patient_age", "personal", "screening", "new_customer_score"]
)
def test_what_is_said_of_people_is_no_id(tmp_path: Path, name: str) -> None:
    assert "user" not in seen(tmp_path, lambda n: {"text": texts(n), "label": "ab"[n % 2], name: n % 9}).roles


def test_the_subject_of_a_letter_is_nobody(tmp_path: Path) -> None:
    found = seen(
        tmp_path, lambda n: {"subject": f"about your order {n}, again", "body": texts(n), "label": "ab"[n % 2]}
    )
    assert found.roles == {"text": "body", "label": "label"}


@pytest.mark.parametrize("value", ["1.23457E+11", "1e+05", "1.0e5"])
def test_an_id_that_lost_digits_is_no_person(value: str) -> None:
    with pytest.raises(DataError, match=r"a number with an exponent.*by all digits"):
        read_value(value, "user", at="a")
    assert read_value("12e45678", "user", at="a") == "12e45678", "a hash"


def test_persons_whose_ids_no_run_can_read_stay_the_unit(tmp_path: Path) -> None:
    found = seen(tmp_path, lambda n: {"text": texts(n), "label": "ab"[n % 2], "user_id": f"1.23{n % 9}E+11"})
    assert found.roles["user"] == "user_id"


@pytest.mark.parametrize(
    "text",
    [
        *("['late', 'lost']", "['late' 'lost']", "('late', 'lost')", "{'late', 'lost'}"),
        *("array(['late', 'lost'], dtype=object)", "array(['late', 'lost'])"),
    ],
)
def test_a_list_as_python_prints_it(text: str) -> None:
    assert labels_of(text, "a") == '["late","lost"]'
    assert [labels_of(empty, "a") for empty in ("[]", "()", "{}", "set()")] == ["[]"] * 4
    assert labels_of("(late)", "a") == "(late)"
    assert labels_of("array([1, 2], dtype=int64)", "a") == '["1","2"]'


def test_lists_of_one_label_are_lists(tmp_path: Path) -> None:
    found = seen(tmp_path, lambda n: {"text": texts(n), "label": ["ab"[n % 2]]})
    assert (found.kind, found.labels) == ("tagged", {"a": 30, "b": 30})


@pytest.mark.parametrize("printed", [str([ASK, SAY]), str([ASK, SAY]).replace("}, {", "}\n {"), f"array({[ASK]})"])
def test_turns_as_python_prints_them_are_no_text(tmp_path: Path, printed: str) -> None:
    assert seen(tmp_path, lambda n: {"id": n, "messages": printed}).kind == "chat"
    for role in ("messages", "chosen"):
        with pytest.raises(DataError, match="dumps writes it and str and pandas do not"):
            read_value(printed, role, at="a")


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (SAY | {"tool_calls": [{"id": "1"}]}, "turns of tools are not supported"),
        (SAY | {"content": None, "function_call": {"name": "f"}}, "turns of tools are not supported"),
        (SAY | {"content": [{"type": "image"}, {"type": "text", "text": "a"}]}, "pictures and other parts are not"),
    ],
)
def test_a_turn_that_is_more_than_text_is_refused(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        messages_of([ASK, turn], at="a")


@pytest.mark.parametrize("labels", [("1", "1.0"), ("A", "\uff21"), ("very good", "very\u00a0good"), ("Ok", "ok")])
def test_labels_that_are_one_in_another_form_are_named(labels: tuple[str, str]) -> None:
    (said,) = starter.about_spellings([*labels, "other", "2.5"])
    assert said.startswith(f"The labels {labels[0]!a}, {labels[1]!a} look alike")


def test_semicolons_part_cells_whatever_a_name_holds(tmp_path: Path) -> None:
    path = table(tmp_path, '\ufeffText;"Alter, Jahre";Art', "a, b;3,5;x")
    assert [row for _, row in table_rows(path, None, comma=",")] == [
        {"Text": "a, b", "Alter, Jahre": "3,5", "Art": "x"}
    ]
    path.write_text("text;label\n", encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        list(table_rows(path, None, comma=","))
    path = table(tmp_path, '"a;b;c",label', "x;y,1")
    assert [row for _, row in table_rows(path, None, comma=",")] == [{"a;b;c": "x;y", "label": "1"}]


@pytest.mark.parametrize("end", ['d "e",ok', 'd",ok,ok'])
def test_a_row_that_took_others_along_says_how_many(tmp_path: Path, end: str) -> None:
    path = table(tmp_path, "text,label", '"begins a quote,ok', "b,ok", "c,ok", end, "f,ok")
    (fault, last) = [found for _, found in table_rows(path, None, comma=",")]
    assert isinstance(fault, DataError)
    assert str(fault.value).endswith(", over 4 lines")
    assert fault.bound.endswith("takes the lines up to the next quote along")
    assert last == {"text": "f", "label": "ok"}


def test_columns_without_a_name_are_each_named_or_refused(tmp_path: Path) -> None:
    rows = [f"{texts(n).replace(',', '')},{'ab'[n % 2]},,{n}" for n in range(60)]
    assert set(dict(look_at(table(tmp_path, "text,label,,", *rows), {}).unread)) == {"(column 3)", "(column 4)"}
    title = table(tmp_path, "Report of 2024,,,", "text,label,a,b", *rows)
    with pytest.raises(ConfigError, match=r"columns without a name.*remove titles"):
        look_at(title, {})
