"""Detection of a file's task and column roles."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.lab.preparation.detect import detect_columns
from fedtune.spec import ConfigError, DataError

from ...cases import read_cases
from .conftest import (
    AB,
    ASK,
    SAY,
    TURNS,
    YES_NO,
    detect_in_file,
    make_own_text,
    make_rows,
    repeat_texts,
    summarize_found,
)

SHARED = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
IN_JSON, LINK = json.dumps(TURNS), "https://example.org/a/long/path/{:050}".format
ALPACA = {"instruction": make_own_text, "input": "", "output": "done"}
BOTH, LABELED = {"chosen": make_own_text, "rejected": "no"}, {"text": make_own_text, "label": AB}
TIMED: dict[str, Any] = {"months": lambda n: n / 7, "died": (0, 1)}
PAIR, SCORE = {"sentence1": make_own_text, "sentence2": make_own_text}, lambda n: n % 11 / 2
PNG, SPAN = "{}.png".format, {"start": 0, "end": 1}
TASK = {"data": {"text": "a b"}, "annotations": [{"result": [{"value": SPAN | {"labels": ["x"]}}]}]}

KINDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": TURNS}, "chat: messages"),
    ({"conversations": SHARED, "id": int}, "chat: messages=conversations; not id"),
    ({"Messages": IN_JSON}, "chat: messages=Messages"),
    (ALPACA | {"system": "x"}, "instructions: prompt=instruction input system completion=output"),
    ({"system": "x", "question": make_own_text} | BOTH, "preferences: prompt=question system chosen rejected"),
    ({"prompt": [ASK], "chosen": [SAY], "rejected": [SAY]}, "preferences: messages=prompt chosen rejected"),
    ({"prompt": make_own_text, "chosen": IN_JSON, "rejected": IN_JSON}, "preferences: chosen rejected; not prompt"),
    ({"messages": TURNS, "chosen": TURNS, "rejected": TURNS}, "preferences: chosen rejected; not messages"),
    ({"chat": SHARED[:1], "chosen": SHARED[1], "rejected": SHARED[1]}, "preferences: messages=chat chosen rejected"),
    (ALPACA | BOTH, "preferences: prompt=instruction input chosen rejected; not output"),
    (
        {"prompt": make_own_text, "chosen": f" {IN_JSON}", "rejected": f"\n{IN_JSON}"},
        "preferences: chosen rejected; not prompt",
    ),
    ({"body": make_own_text, "chosen": (0, 1), "rejected": "no"}, "labeled: text=body label=chosen; not rejected"),
    ({"prompt": make_own_text, "chosen": make_own_text}, "pairs: prompt completion=chosen"),
    ({"question": make_own_text, "answer": make_own_text}, "pairs: prompt=question completion=answer"),
    (PAIR | {"score": SCORE, "split": "train"}, "scored: text=sentence1 other=sentence2 target=score; not split"),
    (
        {"Query": make_own_text, "positive": make_own_text, "negative": make_own_text},
        "triplets: anchor=Query positive negative",
    ),
    ({"body": make_own_text, "stars": lambda n: n % 5}, "labeled: text=body label=stars"),
    ({"id": lambda n: f"{n} {make_own_text(n)} {n}", "body": make_own_text}, "text: text=body; not id"),
    (
        {"patient": repeat_texts(7), "body": make_own_text, "desk": repeat_texts(30)},
        "text: text=body user=patient; not desk",
    ),
    ({"bank_id": ("x", "y"), "text": make_own_text, "team": ("a", "b", "c")}, "labeled: text label=team; not bank_id"),
    ({"bank_id": ("x", "y"), "text": make_own_text}, "labeled: text label=bank_id"),
    ({"tokens": ["a", "b"], "tags": ["B-x", "O"]}, "entities: tokens tags"),
    ({"words": ["a", "b"], "ner_tags": ["O", "U-x"], "id": int}, "entities: tokens=words tags=ner_tags; not id"),
    ({"tokens": '["a", "b"]', "labels": "['O', 'B-x']"}, "entities: tokens tags=labels"),
    (
        {"text": make_own_text, "spans": [SPAN | {"label": "x"}], "tokens": [{"id": 0}]},
        "entities: text spans; not tokens",
    ),
    ({"text": make_own_text, "label": ([[0, 1, "x"]], [])}, "entities: text spans=label"),
    (TASK, "entities: text=data spans=annotations"),
    ({"text": make_own_text, "labels": (["a"], ["b"])}, "tagged: text labels"),
    ({"file": "x/{}.JPG".format, "site": AB, "diagnosis": AB}, "images: image=file label=diagnosis; not site"),
    ({"image": PNG, "tags": (["a"], ["a", "b"])}, "images: image labels=tags"),
    ({"image": PNG, "value": lambda n: n / 7}, "images: image target=value"),
    ({"image": PNG} | TIMED, "images: image time=months event=died"),
    ({"text": make_own_text} | TIMED, "followed: text time=months event=died"),
    ({"age": lambda n: n / 3} | TIMED | {"label": AB}, "table: label"),
    ({"text": make_own_text} | TIMED | {"label": AB}, "labeled: text label; not months died"),
    # As others publish them.
    (
        {"instruction": make_own_text, "context": make_own_text, "response": make_own_text, "category": AB},
        "instructions: prompt=instruction input=context completion=response; not category",
    ),
    (
        {"question": make_own_text, "context": make_own_text, "answer": YES_NO},
        "pairs: prompt=question input=context completion=answer",
    ),
    ({"question": make_own_text, "answer": YES_NO}, "labeled: text=question label=answer"),
    (
        {"system": "x", "user": make_own_text, "assistant": make_own_text},
        "pairs: prompt=user system completion=assistant",
    ),
    ({"conversations": SHARED, "system": "x", "tools": "[]"}, "chat: messages=conversations system; not tools"),
    (ALPACA | {"history": [["a", "b"]]}, "instructions: prompt=instruction input completion=output; not history"),
    (PAIR | {"label": SCORE, "idx": int}, "scored: text=sentence1 other=sentence2 target=label; not idx"),
    (
        {"premise": make_own_text, "hypothesis": make_own_text, "label": (0, 1, 2)},
        "labeled: text=premise text_pair=hypothesis label",
    ),
    ({"text": "fine {}".format, "url": LINK, "sentiment": AB}, "labeled: text label=sentiment; not url"),
    (LABELED | {"label": (0, 1), "label_text": AB}, "labeled: text label=label_text; not label"),
    (LABELED | {"sources": (["web"], ["web", "app"])}, "labeled: text label; not sources"),
    ({"text": make_own_text, "tags": ("[]", "['late']", "['late', 'lost']")}, "tagged: text labels=tags"),
    (
        {"prompt": make_own_text, "chosen_response": make_own_text, "rejected_response": "no"},
        "preferences: prompt chosen=chosen_response rejected=rejected_response",
    ),
    ({"subject": "about your order {}, again".format} | LABELED, "labeled: text label; not subject"),
    # Turns as Python and pandas print them, ids that no run can read, and what is said of people but is no id.
    *(
        ({"id": int, "messages": turns}, "chat: messages; not id")
        for turns in (str(TURNS), str(TURNS).replace("}, {", "}\n {"), f"array({[ASK]})")
    ),
    (LABELED | {"user_id": lambda n: f"1.23{n % 9}E+11"}, "labeled: text label user=user_id"),
    *(
        (LABELED | {name: lambda n: n % 9}, f"labeled: text label; not {name}")
        for name in ("user_rating", "customer_type", "patient_age", "personal", "screening", "new_customer_score")
    ),
]


@pytest.mark.parametrize(("columns", "expected"), KINDS, ids=range(len(KINDS)))
def test_file_kind_and_unread_columns_are_detected(tmp_path: Path, columns: dict[str, Any], expected: str) -> None:
    detected = detect_in_file(tmp_path, columns)
    assert summarize_found(detected) == expected
    assert [role for role, *_ in detected.options] == list(detected.roles)


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        *(((0.2, 1.0), (0.0, 1.0)), (("0.5", "5"), (0.0, 5.0)), ((-1, 0.5), (-1.0, 1.0))),
        *(((3, 7.5), (0.0, 10.0)), ((-2.5, 300), "???")),
    ],
)
def test_scores_get_the_smallest_common_scale(tmp_path: Path, scores: Any, scale: object) -> None:
    rows = make_rows({"text1": make_own_text, "text2": make_own_text, "similarity": scores}, 9)
    detected = detect_in_file(tmp_path, rows)
    assert (detected.kind, detected.settings) == ("scored", {"target_range": scale})
    with pytest.raises(DataError, match="columns text1, text2 = 'several texts or images'"):
        detect_in_file(tmp_path, [row | {"similarity": 3} for row in rows])  # what never changes is no score
    with pytest.raises(DataError, match=r"column similarity = '.*text': must have 2 to 200 distinct texts"):
        detect_in_file(tmp_path, [*rows, rows[0] | {"similarity": "very"}])


def test_single_outlier_does_not_change_the_scale(tmp_path: Path) -> None:
    rows = make_rows({"text": make_own_text, "rating": lambda n: 1 + n % 17 / 2})
    rows[7]["rating"] = 87.31
    assert detect_in_file(tmp_path, rows).settings == {"target_range": (0.0, 10.0)}


TWO_TEXTS = {
    "body": make_own_text,
    "note": make_own_text,
    "team": ("t0", "t1", "t2"),
    "area": AB,
    "rate": lambda n: n / 9,
}
DONE = {"prompt": make_own_text, "completion": make_own_text}
SEVERAL = {
    "question": make_own_text,
    "answer": make_own_text,
    "doc": make_own_text,
    "tone": make_own_text,
    "n": lambda n: n / 7,
    "who": lambda n: n % 9,
}


@pytest.mark.parametrize(
    ("columns", "chosen", "expected"),
    [
        (TWO_TEXTS, "text=note other=body score=rate", "scored: text=note other=body target=rate"),
        (TWO_TEXTS, "label=team text=note", "labeled: text=note label=team"),
        (TWO_TEXTS, "prompt=note completion=body", "pairs: prompt=note completion=body"),
        (SEVERAL, "context=doc", "pairs: prompt=question input=doc completion=answer"),
        (SEVERAL, "system=tone", "pairs: prompt=question system=tone completion=answer"),
        (SEVERAL, "prompt=tone completion=doc", "pairs: prompt=tone completion=doc"),
        (SEVERAL, "text=doc score=n", "rated: text=doc target=n"),
        (SEVERAL, "anchor=doc positive=tone negative=answer", "triplets: anchor=doc positive=tone negative=answer"),
        (SEVERAL, "prompt=doc chosen=tone rejected=answer", "preferences: prompt=doc chosen=tone rejected=answer"),
        (SEVERAL, "user=who", "pairs: prompt=question completion=answer user=who"),
        (DONE | {"label": (True, False)}, "prompt=prompt completion=completion", "pairs: prompt completion"),
        ({"sex": AB, "label": AB}, "text=sex", "text: text=sex"),
        ({"age": lambda n: n + 0.5, "dose": lambda n: n * 1.5}, "score=dose", "table: target=dose"),
        ({"age": lambda n: n / 3, "week": int, "went": (1, 0)}, "time=week event=went", "table: time=week event=went"),
    ],
)
def test_column_roles_can_be_chosen_explicitly(
    tmp_path: Path, columns: dict[str, Any], chosen: str, expected: str
) -> None:
    options = dict(choice.split("=") for choice in chosen.split())
    assert summarize_found(detect_in_file(tmp_path, columns, **options)).partition(";")[0] == expected


@pytest.mark.parametrize(("chosen", "message"), read_cases(__file__, "invalid_choices"))
def test_unsuitable_column_choice_is_refused(tmp_path: Path, chosen: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        detect_in_file(tmp_path, make_rows({"body": make_own_text, "n": int}, 400), **chosen)
    assert str(caught.value) == message


def test_unreadable_rows_are_counted_and_the_first_five_are_listed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n" * 20 + '{"body": "a text"}\n')
    detected = detect_columns(tmp_path / "rows.jsonl", {})
    assert (detected.rows, detected.num_faults, len(detected.faults)) == (1, 20, 5)


@pytest.mark.parametrize(
    ("columns", "odd"),
    [
        *((LABELED, odd) for odd in ({"text": 17}, {"label": True}, {"label": 3})),
        *((LABELED | {"label": (0, 1)}, {"label": "n/a"}), (LABELED | {"label": (0.0, 1.0)}, {"label": None})),
        ({"text": make_own_text, "price": lambda n: n / 7}, {"price": "n/a"}),
        *(({"text": make_own_text, "tags": ([], ["a"], ["a", "b"])}, {"tags": odd}) for odd in (None, {"a": 1})),
        *(
            ({"question": make_own_text, "answer": make_own_text}, {"answer": 4}),
            ({"messages": TURNS}, {"messages": []}),
        ),
        ({"anchor": make_own_text, "positive": make_own_text, "negative": make_own_text}, {"positive": 0}),
    ],
)
def test_single_outlier_does_not_change_detected_columns(
    tmp_path: Path, columns: dict[str, Any], odd: dict[str, Any]
) -> None:
    rows = make_rows(columns)
    before, after = detect_in_file(tmp_path, rows), detect_in_file(tmp_path, [rows[0] | odd, *rows[1:]])
    assert (summarize_found(after), set(after.labels)) == (summarize_found(before), set(before.labels))
    ((column, value),) = odd.items()
    assert value in (None, [], 0) or [count for _, count, _ in after.columns[column].strange] == [1], "it is shown"


@pytest.mark.parametrize("names", [("col_1", "col_2"), ("0", "1"), ("a", "b"), ("note_1", "note_2")])
def test_columns_with_default_names_or_named_by_the_user_may_be_labels(names: tuple[str, str], tmp_path: Path) -> None:
    text, label = names
    rows = make_rows({text: make_own_text, label: ("billing", "technical")})
    chosen = detect_in_file(tmp_path, rows, text=text, label=label)
    assert (chosen.roles["label"], set(chosen.labels)) == (label, {"billing", "technical"})
    if names != ("note_1", "note_2"):  # without options, these are two notes of one record
        assert summarize_found(detect_in_file(tmp_path, rows)) == summarize_found(chosen)


# Whose a record is.


PERSONS = (
    *("user_id", "PatientID", "Patient ID", "subject_id", "reviewerID", "Customer No.", "e-mail", "author_name"),
    *("patient_nr", "PatientNummer", "Patient-ID", "id_patient", "hashed_patient_id", "pseudo_id", "Kundennummer"),
    *("kunden_nr", "account_id", "screen_name", "pid", "SSN", "nhs_number", "customer email", "anon_user"),
    *("tweet_author_id", "user.screen_name", "cust_id", "PatID", "Patienten-ID", "Email Address"),
)


@pytest.mark.parametrize(
    ("name", "odd"), [*((name, None) for name in PERSONS), *(("user_id", odd) for odd in ("", "NA", 1.5, ["a"]))]
)
def test_person_column_defines_the_privacy_unit_despite_odd_rows(tmp_path: Path, name: str, odd: object) -> None:
    rows = make_rows(LABELED | {name: repeat_texts(9)})
    rows[3][name] = odd
    assert summarize_found(detect_in_file(tmp_path, rows)) == f"labeled: text label user={name}"


def test_decimal_ids_are_recognized_as_persons(tmp_path: Path) -> None:
    assert detect_in_file(tmp_path, LABELED | {"user_id": lambda n: float(n % 9)}).roles["user"] == "user_id"
    by_record = detect_columns(tmp_path / "rows.json", {}, by_person=False)
    assert "user" not in by_record.roles
    assert "--user user_id" in dict(by_record.unread)["user_id"]


def test_second_person_column_is_suggested(tmp_path: Path) -> None:
    columns = LABELED | {"author": repeat_texts(3), "patient": repeat_texts(9)}
    detected = detect_in_file(tmp_path, columns)
    assert detected.roles["user"] == "patient"
    assert "--user author" in dict(detected.unread)["author"]
    assert detect_in_file(tmp_path, columns, user="author").roles["user"] == "author"


# What is said, and what is refused.


@pytest.mark.parametrize("number", ["{},5", "${}", "{} %", "1.{},00", "({}.5)", "\u2212{}"])
def test_foreign_number_formats_are_refused_with_a_hint(tmp_path: Path, number: str) -> None:
    columns = {"text": make_own_text, "cost": lambda n: number.format(100 + n)}
    assert "write them as in 3.5" in dict(detect_in_file(tmp_path, columns).unread)["cost"]
    with pytest.raises(
        ConfigError, match=r"--score = 'cost': must be a label or a number, but .* write them as in 3\.5"
    ):
        detect_in_file(tmp_path, columns, score="cost", text="text")


@pytest.mark.parametrize("names", ["says,spam", "text,spam"])
def test_label_equal_to_its_column_name_is_accepted(tmp_path: Path, names: str) -> None:
    lines = [f"a text with number {number},{('spam', 'ham')[number % 2]}" for number in range(60)]
    (tmp_path / "a.csv").write_text("\n".join([names, *lines]) + "\n")
    assert detect_columns(tmp_path / "a.csv", {}).labels == {"spam": 30, "ham": 30}


@pytest.mark.parametrize(
    ("tags", "labels"),
    [
        ((["S-protein", "O"], ["M_protein", "L-dopa"]), {"S-protein": 1, "M_protein": 1, "L-dopa": 1}),
        ((["S-protein", "O"], ["B-protein", "I-protein"]), {"protein": 2}),
        ((["I-drug", "I-drug"], ["O", "I-dose"]), {"drug": 1, "dose": 1}),
    ],
)
def test_tag_scheme_is_detected_per_column(tmp_path: Path, tags: Any, labels: dict[str, int]) -> None:
    assert detect_in_file(tmp_path, make_rows({"tokens": ["a", "b"], "tags": tags}, 2)).labels == labels


def test_binary_label_next_to_a_time_suggests_survival(tmp_path: Path) -> None:
    detected = detect_in_file(tmp_path, {"run_hours": lambda n: n / 7, "censored": (0, 1)}, label="censored")
    assert "censored may be an event: --time run_hours --event censored." in detected.notes


def test_unsupported_image_formats_are_counted(tmp_path: Path) -> None:
    (tmp_path / "scan.bmp").touch()
    with pytest.raises(DataError, match=r"1 \.bmp images.: must be PNG"):
        detect_columns(tmp_path, {})


def test_error_about_a_constant_column_counts_unreadable_rows(tmp_path: Path) -> None:
    kinds = ("tea,home", "café,ward")
    rows = [f"patient {number} with {kinds[number % 2]}" for number in range(48)]
    path = tmp_path / "latin.csv"
    path.write_bytes("\n".join(["text,label", *rows]).encode("latin-1"))
    with pytest.raises(DataError) as caught:
        detect_columns(path, {})
    assert "24 of 48 rows cannot be read, the first one because it must be UTF-8 text" in str(caught.value)
