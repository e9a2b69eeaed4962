"""Which kind of training a file's columns suit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.preparation.detect import Found, look_at
from fedtune.spec import ConfigError, DataError

TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
SHARED = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]


def seen(folder: Path, rows: list[Any], **chosen: str) -> Found:
    (folder / "rows.json").write_text(json.dumps(rows))
    return look_at(folder / "rows.json", chosen)


def texts(number: int) -> str:
    return f"a text of its own, with number {number} in it"


@pytest.mark.parametrize(
    ("row", "kind", "roles"),
    [
        (lambda n: {"messages": TURNS}, "chat", {"messages": "messages"}),
        (lambda n: {"conversations": SHARED, "id": n}, "chat", {"messages": "conversations"}),
        (lambda n: {"Messages": json.dumps(TURNS)}, "chat", {"messages": "Messages"}),
        (
            lambda n: {"instruction": texts(n), "input": "", "output": "done", "system": "be kind"},
            "instructions",
            {"prompt": "instruction", "input": "input", "system": "system", "completion": "output"},
        ),
        (
            lambda n: {"system": "be kind", "question": texts(n), "chosen": texts(n), "rejected": "no"},
            "preferences",
            {"prompt": "question", "system": "system", "chosen": "chosen", "rejected": "rejected"},
        ),
        (
            lambda n: {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:], "score": n},
            "preferences",
            {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"},
        ),
        (
            lambda n: {"prompt": texts(n), "chosen": json.dumps(TURNS), "rejected": json.dumps(TURNS)},
            "preferences",
            {"chosen": "chosen", "rejected": "rejected"},
        ),
        (
            lambda n: {"prompt": texts(n), "messages": TURNS, "chosen": TURNS, "rejected": TURNS},
            "preferences",
            {"chosen": "chosen", "rejected": "rejected"},
        ),
        (
            lambda n: {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": SHARED[1]},
            "preferences",
            {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        ),
        (
            lambda n: {"instruction": texts(n), "input": "", "output": "done", "chosen": texts(n), "rejected": "no"},
            "preferences",
            {"prompt": "instruction", "input": "input", "chosen": "chosen", "rejected": "rejected"},
        ),
        (
            lambda n: {"prompt": texts(n), "chosen": f" {json.dumps(TURNS)}", "rejected": f"\n{json.dumps(TURNS)}"},
            "preferences",
            {"chosen": "chosen", "rejected": "rejected"},
        ),
        (
            lambda n: {"body": texts(n), "chosen": n % 2, "rejected": 1 - n % 2},
            "labelled",
            {"text": "body", "label": "chosen"},
        ),
        (lambda n: {"prompt": texts(n), "chosen": texts(n)}, "pairs", {"prompt": "prompt", "completion": "chosen"}),
        (lambda n: {"question": texts(n), "answer": texts(n)}, "pairs", {"prompt": "question", "completion": "answer"}),
        (
            lambda n: {"sentence1": texts(n), "sentence2": texts(n + 1), "score": n % 11 / 2, "split": "train"},
            "scored",
            {"text": "sentence1", "other": "sentence2", "target": "score"},
        ),
        (
            lambda n: {"Query": texts(n), "positive": texts(n), "negative": texts(n + 1)},
            "triplets",
            {"anchor": "Query", "positive": "positive", "negative": "negative"},
        ),
        (lambda n: {"body": texts(n), "team": f"t{n % 3}"}, "labelled", {"text": "body", "label": "team"}),
        (lambda n: {"body": texts(n), "stars": n % 5}, "labelled", {"text": "body", "label": "stars"}),
        (lambda n: {"id": f"{n} {texts(n)} {n}", "body": texts(n)}, "text", {"text": "body"}),
        (lambda n: {"user": f"u{n}", "body": texts(n)}, "text", {"text": "body", "user": "user"}),
        (
            lambda n: {"patient": f"p{n % 7}", "body": texts(n), "team": f"t{n % 30}"},
            "text",
            {"text": "body", "user": "patient"},
        ),
        (
            lambda n: {"customer_id": n % 7, "body": texts(n), "team": f"t{n % 8}"},
            "labelled",
            {"text": "body", "label": "team", "user": "customer_id"},
        ),
    ],
)
def test_the_kind_of_a_file(tmp_path: Path, row: Any, kind: str, roles: dict[str, str]) -> None:
    found = seen(tmp_path, [row(number) for number in range(60)])
    assert (found.kind, dict(found.roles)) == (kind, roles)


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        ([0.2, 1.0], (0.0, 1.0)),
        (["0.5", "5"], (0.0, 5.0)),
        ([-1, 0.5], (-1.0, 1.0)),
        ([3, 7.5], (0.0, 10.0)),
        ([-2.5, 300], (-100.0, 300.0)),
    ],
)
def test_a_score_has_the_usual_scale_that_holds_it(
    tmp_path: Path, scores: list[Any], scale: tuple[float, float]
) -> None:
    rows = [{"text1": texts(n), "text2": texts(n), "similarity": scores[n % 2]} for n in range(9)]
    found = seen(tmp_path, rows)
    assert found.kind == "scored"
    assert found.settings == {"target_range": scale}
    constant = [row | {"similarity": 3} for row in rows]
    assert seen(tmp_path, constant).kind != "scored", "what never changes is no score"
    odd = [*rows, rows[0] | {"similarity": "very"}]
    if isinstance(scores[0], str):
        assert seen(tmp_path, odd).kind == "text"
    else:
        with pytest.raises(DataError, match="column similarity = 'number, text': must have 2 to 200 different texts"):
            seen(tmp_path, odd)


def test_what_is_chosen_wins(tmp_path: Path) -> None:
    rows = [{"body": texts(n), "note": texts(n), "team": f"t{n % 3}", "area": f"a{n % 2}"} for n in range(60)]
    pairs = [row | {"rate": n / 9} for n, row in enumerate(rows)]
    chosen = {"text": "note", "other": "body", "score": "rate"}
    assert dict(seen(tmp_path, pairs, **chosen).roles) == {"text": "note", "other": "body", "target": "rate"}
    assert seen(tmp_path, rows, label="team", text="note").roles == {"text": "note", "label": "team"}
    assert seen(tmp_path, rows, text="note").kind == "text"
    assert seen(tmp_path, rows, prompt="note", completion="body").kind == "pairs"
    assert seen(tmp_path, rows, label="team").labels == {"t0": 20, "t1": 20, "t2": 20}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"label": "gone"}, "--label = 'gone': must be one of the columns body, n"),
        (
            {"label": "body"},
            "--label = 'body': must have 2 to 200 different texts or whole numbers of at most 80 characters, on "
            "average in 5 rows or more",
        ),
        ({"score": "n", "prompt": "body"}, "--prompt = 'body': does not go with --score"),
        ({"score": "body", "other": "n"}, "--other = 'n': must hold texts"),
        ({"prompt": "body"}, "--prompt = 'body': goes with --completion, and no column is called so"),
        ({"messages": "body"}, "--messages = 'body': must hold turns of a conversation"),
        ({"user": "x"}, "--user = 'x': must be one of the columns body, n"),
    ],
)
def test_a_choice_that_does_not_fit(tmp_path: Path, chosen: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        seen(tmp_path, [{"body": texts(number), "n": number} for number in range(400)], **chosen)
    assert str(caught.value) == message


def test_rows_that_cannot_be_read_are_counted_and_the_first_kept(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n" * 20 + '{"body": "a text"}\n')
    found = look_at(tmp_path / "rows.jsonl", {})
    assert (found.rows, found.num_faults, len(found.faults)) == (1, 20, 5)


@pytest.mark.parametrize(
    ("rows", "message"), [([], "must hold at least one record"), ([{"n": 1.5}], "a column of text")]
)
def test_a_file_to_learn_nothing_from(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        seen(tmp_path, rows)


def test_a_column_of_places_is_the_label_only_where_nothing_else_is(tmp_path: Path) -> None:
    rows = [{"text": f"word {number}", "team": "abc"[number % 3], "bank_id": "xy"[number % 2]} for number in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert look_at(path, {}).roles == {"text": "text", "label": "team"}
    path.write_text("".join(json.dumps({name: row[name] for name in ("text", "bank_id")}) + "\n" for row in rows))
    assert look_at(path, {}).roles == {"text": "text", "label": "bank_id"}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "Human: where Assistant: there", "rejected": "Human: where Assistant: no"},
        {"prompt": "where", "chosen": TURNS[1:], "rejected": TURNS[1:]},
        {"prompt": TURNS[:1], "chosen": "there", "rejected": "no"},
    ],
)
def test_answers_without_what_they_answer_are_told_so(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text((json.dumps(row) + "\n") * 20)
    with pytest.raises(
        DataError, match=r"columns chosen and rejected = 'answers in .*, and no prompt': must stand beside"
    ):
        look_at(path, {})
    if isinstance(row["chosen"], str):
        assert look_at(path, {"text": "chosen"}).kind == "text"


def answers(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Sixty rows of the given ones in turn, each with a text of its own."""
    return [{"text": texts(number), **rows[number % len(rows)]} for number in range(60)]


@pytest.mark.parametrize(
    ("row", "odd", "kind"),
    [
        (lambda n: {"text": texts(n), "label": "ab"[n % 2]}, {"text": 17}, "labelled"),
        (lambda n: {"text": texts(n), "label": "ab"[n % 2]}, {"label": True}, "labelled"),
        (lambda n: {"text": texts(n), "label": "ab"[n % 2]}, {"label": 3}, "labelled"),
        (lambda n: {"text": texts(n), "label": n % 2}, {"label": "n/a"}, "labelled"),
        (lambda n: {"text": texts(n), "label": float(n % 2)}, {"label": None}, "labelled"),
        (lambda n: {"text": texts(n), "price": n / 7}, {"price": "n/a"}, "rated"),
        (lambda n: {"text": texts(n), "tags": ["a", "b"][: n % 3]}, {"tags": None}, "tagged"),
        (lambda n: {"text": texts(n), "tags": ["a", "b"][: n % 3]}, {"tags": {"a": 1}}, "tagged"),
        (lambda n: {"question": texts(n), "answer": texts(n)}, {"answer": 4}, "pairs"),
        (lambda n: {"messages": TURNS}, {"messages": []}, "chat"),
        (lambda n: {"anchor": texts(n), "positive": texts(n), "negative": texts(n)}, {"positive": 0}, "triplets"),
        (lambda n: {"prompt": texts(n), "chosen": texts(n), "rejected": texts(n)}, {"rejected": None}, "preferences"),
    ],
)
def test_one_odd_value_changes_nothing(tmp_path: Path, row: Any, odd: dict[str, Any], kind: str) -> None:
    rows = [row(number) for number in range(60)]
    before = seen(tmp_path, rows)
    after = seen(tmp_path, [{**rows[0], **odd}, *rows[1:]])
    assert (after.kind, after.roles) == (before.kind, before.roles)
    assert (kind, set(after.labels)) == (after.kind, set(before.labels))
    ((column, value),) = odd.items()
    shown = after.columns[column].strange
    assert value in (None, [], 0) or [count for _, count, _ in shown] == [1], "it is shown"


@pytest.mark.parametrize("odd", ["", None, "NA", 1.5, ["a"]])
@pytest.mark.parametrize(
    "name", ["user_id", "PatientID", "Patient ID", "subject_id", "reviewerID", "Customer No.", "e-mail", "author_name"]
)
def test_a_column_of_persons_is_the_unit_whatever_one_row_has(tmp_path: Path, name: str, odd: object) -> None:
    rows = answers({"label": "a"}, {"label": "b"})
    rows = [{**row, name: f"p{number % 9}"} for number, row in enumerate(rows)]
    rows[3][name] = odd
    assert seen(tmp_path, rows).roles == {"text": "text", "label": "label", "user": name}


def test_ids_as_decimals_are_persons(tmp_path: Path) -> None:
    rows = [{**row, "user_id": float(number % 9)} for number, row in enumerate(answers({"label": "a"}, {"label": "b"}))]
    assert seen(tmp_path, rows).roles["user"] == "user_id"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert "user" not in look_at(tmp_path / "rows.json", {}, by_person=False).roles
    assert "--user user_id" in dict(look_at(tmp_path / "rows.json", {}, by_person=False).unread)["user_id"]


def test_of_two_columns_of_persons_the_other_is_named(tmp_path: Path) -> None:
    rows = [{"text": texts(n), "label": "ab"[n % 2], "author": f"d{n % 3}", "patient": f"p{n % 9}"} for n in range(60)]
    assert seen(tmp_path, rows).roles["user"] == "patient"
    assert "--user author" in dict(seen(tmp_path, rows).unread)["author"]
    assert seen(tmp_path, rows, user="author").roles["user"] == "author"


@pytest.mark.parametrize(
    ("row", "roles", "unread"),
    [
        (
            lambda n: {"instruction": texts(n), "context": texts(n), "response": texts(n), "category": "ab"[n % 2]},
            {"prompt": "instruction", "input": "context", "completion": "response"},
            {"category"},
        ),
        (
            lambda n: {"question": texts(n), "context": texts(n), "answer": ["yes", "no", "maybe"][n % 3]},
            {"prompt": "question", "input": "context", "completion": "answer"},
            set(),
        ),
        (
            lambda n: {"question": texts(n), "answer": ["yes", "no", "maybe"][n % 3]},
            {"text": "question", "label": "answer"},
            set(),
        ),
        (
            lambda n: {"system": "be kind", "user": texts(n), "assistant": texts(n)},
            {"prompt": "user", "system": "system", "completion": "assistant"},
            set(),
        ),
        (
            lambda n: {"conversations": SHARED, "system": "be kind", "tools": "[]"},
            {"messages": "conversations", "system": "system"},
            {"tools"},
        ),
        (
            lambda n: {"instruction": texts(n), "input": "", "output": texts(n), "history": [["a", "b"]]},
            {"prompt": "instruction", "input": "input", "completion": "output"},
            {"history"},
        ),
        (
            lambda n: {"sentence1": texts(n), "sentence2": texts(n), "label": n % 26 / 5, "idx": n},
            {"text": "sentence1", "other": "sentence2", "target": "label"},
            {"idx"},
        ),
        (
            lambda n: {"premise": texts(n), "hypothesis": texts(n), "label": n % 3},
            {"text": "premise", "label": "label"},
            {"hypothesis"},
        ),
        (
            lambda n: {
                "text": f"fine {n}",
                "url": f"https://example.org/a/long/path/{n:050}",
                "sentiment": "ab"[n % 2],
            },
            {"text": "text", "label": "sentiment"},
            {"url"},
        ),
        (
            lambda n: {"says": f"it is {n}", "link": f"https://example.org/a/long/path/{n:050}", "team": "ab"[n % 2]},
            {"text": "says", "label": "team"},
            {"link"},
        ),
        (
            lambda n: {"text": texts(n), "label": n % 2, "label_text": "ab"[n % 2]},
            {"text": "text", "label": "label_text"},
            {"label"},
        ),
        (
            lambda n: {"text": texts(n), "label": "ab"[n % 2], "sources": ["web", "app"][: 1 + n % 2]},
            {"text": "text", "label": "label"},
            {"sources"},
        ),
        (
            lambda n: {"text": texts(n), "tags": str(["late", "lost"][: n % 3])},
            {"text": "text", "labels": "tags"},
            set(),
        ),
    ],
)
def test_files_as_others_publish_them(tmp_path: Path, row: Any, roles: dict[str, str], unread: set[str]) -> None:
    found = seen(tmp_path, [row(number) for number in range(60)])
    assert found.roles == roles
    assert set(dict(found.unread)) == unread
    assert all(dict(found.unread).values())
    assert [role for role, *_ in found.options] == list(roles)


def test_two_texts_beside_a_label_are_said(tmp_path: Path) -> None:
    rows = [{"premise": texts(n), "hypothesis": texts(n), "label": n % 3} for n in range(60)]
    assert "premise and hypothesis, and a classifier reads one text" in " ".join(seen(tmp_path, rows).notes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            lambda n: {"prompt": texts(n), "completion": texts(n), "label": n % 2 == 0},
            "column label = 'true or false': may say in which rows completion is not wanted",
        ),
        (lambda n: {"text": texts(n), "labels": [n % 2, 1, 0]}, "vectors of 0 and 1 name none"),
        (lambda n: {"text": texts(n), "labels": [float(n % 2), 0.0]}, "vectors of 0 and 1 name none"),
        (lambda n: {"text": texts(n), "label": {"id": n % 2}}, "column label = 'object': must have 2 to 200 different"),
    ],
)
def test_what_would_be_learnt_wrongly_is_refused(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        seen(tmp_path, [row(number) for number in range(60)])


def test_what_is_not_wanted_can_be_chosen(tmp_path: Path) -> None:
    rows = [{"prompt": texts(n), "completion": texts(n), "label": n % 2 == 0} for n in range(60)]
    found = seen(tmp_path, rows, prompt="prompt", completion="completion")
    assert (found.kind, set(dict(found.unread))) == ("pairs", {"label"})


@pytest.mark.parametrize("number", ["{},5", "${}", "{} %", "1.{},00", "({}.5)", "\u2212{}"])
def test_numbers_in_another_form_are_refused_with_what_to_write(tmp_path: Path, number: str) -> None:
    rows = [{"text": texts(n), "cost": number.format(100 + n)} for n in range(60)]
    assert "write 3.5" in dict(seen(tmp_path, rows).unread)["cost"]
    with pytest.raises(ConfigError, match=r"--score = 'cost': must be a label or a number; .* write 3\.5"):
        seen(tmp_path, rows, score="cost", text="text")


@pytest.mark.parametrize("names", [("says", "spam"), ("text", "spam"), ("body", "spam")])
def test_a_class_may_be_called_as_its_column(tmp_path: Path, names: tuple[str, str]) -> None:
    rows = [f"{texts(number)},{('spam', 'ham')[number % 2]}" for number in range(60)]
    lines = [row.replace(", with", " with") for row in rows]
    (tmp_path / "a.csv").write_text("\n".join([",".join(names), *lines]) + "\n")
    assert look_at(tmp_path / "a.csv", {}).labels == {"spam": 30, "ham": 30}


def test_one_number_far_off_does_not_decide_a_scale(tmp_path: Path) -> None:
    rows = [{"text": texts(n), "rating": 1 + n % 17 / 2} for n in range(60)]
    rows[7]["rating"] = 87.31
    assert seen(tmp_path, rows).settings == {"target_range": (0.0, 10.0)}


@pytest.mark.parametrize(
    ("chosen", "roles"),
    [
        ({"context": "doc"}, {"prompt": "question", "input": "doc", "completion": "answer"}),
        ({"system": "tone"}, {"prompt": "question", "system": "tone", "completion": "answer"}),
        ({"prompt": "doc"}, {"prompt": "doc", "completion": "answer"}),
        ({"prompt": "tone", "completion": "doc"}, {"prompt": "tone", "completion": "doc"}),
        ({"text": "doc", "score": "n"}, {"text": "doc", "target": "n"}),
        ({"anchor": "doc", "positive": "tone", "negative": "answer"}, None),
        ({"prompt": "doc", "chosen": "tone", "rejected": "answer"}, None),
        ({"user": "who"}, {"prompt": "question", "completion": "answer", "user": "who"}),
    ],
)
def test_each_role_can_be_chosen(tmp_path: Path, chosen: dict[str, str], roles: dict[str, str] | None) -> None:
    rows = [
        {"question": texts(n), "answer": texts(n), "doc": texts(n), "tone": texts(n), "n": n / 7, "who": n % 9}
        for n in range(60)
    ]
    assert seen(tmp_path, rows, **chosen).roles == (chosen if roles is None else roles)
