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
    assert seen(tmp_path, [*rows, rows[0] | {"similarity": "very"}]).kind != "scored"


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
            "--label = 'body': must have 2 to 200 different texts or whole numbers of at most 80 characters",
        ),
        ({"score": "n", "text": "body"}, "--score = 'n': goes with --text and --other, and with no other column"),
        ({"prompt": "body"}, "--prompt = 'body': goes with --completion, and with no other column"),
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


@pytest.mark.parametrize(("ending", "comma"), [("tsv", "\t"), ("csv", ",")])
def test_rows_that_a_quote_took_along_are_named(tmp_path: Path, ending: str, comma: str) -> None:
    rows = [[texts(n), "ok" if n % 2 else "bad"] for n in range(40)]
    rows[5][0], rows[15][0] = f'"{rows[5][0]}', f'{rows[15][0]}"'
    path = tmp_path / f"rows.{ending}"
    lines = [comma.join(row) if comma == "\t" else f"{row[0].replace(',', ';')},{row[1]}" for row in rows]
    path.write_text("\n".join([comma.join(("text", "label")), *lines]) + "\n")
    found = look_at(path, {})
    assert found.rows == 30
    assert any("look like whole rows" in note and "(line 7)" in note for note in found.notes)
    quoted = tmp_path / f"quoted.{ending}"
    quoted.write_text(
        "\n".join(["text" + comma + "label", *(f'"one\ntwo\n{n}"{comma}{"ab"[n % 2]}' for n in range(20))])
    )
    (note,) = [note for note in look_at(quoted, {}).notes if "cell" in note]
    assert "20 of its values have line ends" in note


@pytest.mark.parametrize("mark", ["<|im_start|>", "<|eot_id|>", "[INST]", "</s>", "<start_of_turn>", "<<SYS>>"])
def test_texts_that_hold_marks_of_a_template_are_named(tmp_path: Path, mark: str) -> None:
    turns = [{**TURNS[0], "content": f"{mark}hello"}, TURNS[1]]
    for rows in ([{"text": f"{mark} {texts(n)}"} for n in range(30)], [{"messages": turns}] * 30):
        found = seen(tmp_path, rows)
        assert any("30 of its values have marks" in note for note in found.notes)
    assert not any(
        "marks" in note for note in seen(tmp_path, [{"text": f"a <b> [1] {texts(n)}"} for n in range(30)]).notes
    )
