"""Rules of detection: independence from the order of columns and rows, and from meaningless names.

Each case is a small file of one kind with what it is taken for, or the end of the message that refuses it.
"""

import csv
import json
import math
import random
import re
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.data.formats import iter_raw_rows
from fedtune.lab.preparation.detect import detect_columns
from fedtune.spec import DataError

from .conftest import AB, ASK, SAY, detect_in_file, make_own_text, make_rows, repeat_texts, summarize_found
from .test_experiment_writer import write_experiment

AGE: Callable[[int], float] = lambda n: 20 + n * 0.75  # noqa: E731
BELONG: dict[str, Any] = {"anchor": make_own_text, "positive": make_own_text}
SURVIVED: dict[str, Any] = {"os_months": AGE, "os_status": (0, 1)}
FREE = ("0:DiseaseFree", "1:Recurred/Progressed")
WARD, SHAPE, YES = ("north", "south"), ("x", "y", "z"), (True, False)
TABLE: dict[str, Any] = {"age": AGE, "dx": WARD}
MIXED: dict[str, Any] = {"age": AGE, "kappa": WARD}
FEW = ("all of it was seen before", "none of it was ever seen")
METAR = "METAR EDDF 0{0}20Z 2{0}KT CAVOK FEW0{0} 17/02 Q10{0}".format
SEVERAL = tuple("|".join(some) for size in (1, 2) for some in permutations("wxyz", size))
ENDLESS: Callable[[int], float] = lambda n: n / 4 if n % 9 else math.inf  # noqa: E731
PNG, TASK = "scans/s{}.png".format, {"data": {"text": "a note of six words or more"}}


def make_spans(keys: str) -> list[dict[str, Any]]:
    return [dict(zip(keys.split(), (0, 1, "x"), strict=True))]


def make_choices(*names: str) -> list[dict[str, Any]]:
    return [{"result": [{"type": "choices", "value": {"choices": [*names]}}]}]


RULES: dict[str, tuple[dict[str, Any], str]] = {
    # What reads like no text makes no file one of texts; it is named, and the numbers are a table.
    "dates": (TABLE | {"sigma": "2024-03-{:02}".format}, "table: label=dx; not sigma"),
    "days and months": (TABLE | {"sigma": lambda n: f"{1 + n % 28}.{1 + n % 12}.90"}, "table: label=dx; not sigma"),
    "names of months": (TABLE | {"sigma": lambda n: f"{1 + n % 28} March 20{n:02}"}, "table: label=dx; not sigma"),
    "times": (TABLE | {"sigma": lambda n: f"{n % 24}:{n:02}"}, "table: label=dx; not sigma"),
    "codes": (TABLE | {"sigma": "I10.{}".format}, "table: label=dx; not sigma"),
    "decimal commas": (TABLE | {"sigma": "17,{}".format}, "table: label=dx; not sigma"),
    "units": (TABLE | {"sigma": "17.{} mg/dl".format}, "table: label=dx; not sigma"),
    "limits": (TABLE | {"sigma": ("<0.5", "0.75", ">90", 12.5)}, "table: label=dx; not sigma"),
    "categories": (TABLE | {"sigma": ("left knee", "right knee")} | {"dx": AB}, "table: label=dx"),
    "printed vectors": ({"sigma": "[0.{} -1.5\n 2e-3]".format, "kappa": WARD}, "table: label=kappa"),
    "codes of several words": (TABLE | {"sigma": METAR}, "table: label=dx; not sigma"),
    "names": (MIXED | {"sigma": "Anna Lind {}".format}, "'short texts': may be texts, or names in a table of age"),
    "names by name": (TABLE | {"full_name": "Anna Lind {}".format}, "table: label=dx; not full_name"),
    "remarks of a few": (
        TABLE | {"sigma": lambda n: make_own_text(n) if n % 3 == 0 else ""},
        "table: label=dx; not sigma",
    ),
    "texts": (TABLE | {"sigma": make_own_text}, "labeled: text=sigma label=dx; not age"),
    "codes alone": ({"sigma": "I10.{}".format, "kappa": WARD}, "links or codes without spaces"),
    # Of two answers without a usual name a person is asked.
    "two answers": (MIXED | {"lambda_": SHAPE}, "must be one: choose with --label COLUMN"),
    "one among numbers": (MIXED, "or --score COLUMN"),
    "an answer by a time": (MIXED | {"churned_in_30d": AB}, "table: label=churned_in_30d"),
    "a topic of a table": (MIXED | {"category": SHAPE}, "must be one: choose with --label COLUMN"),
    "a topic of texts": (
        {"text": make_own_text, "kappa": WARD, "category": SHAPE},
        "labeled: text label=category; not kappa",
    ),
    "a last word": (
        {"text": make_own_text, "kappa": WARD, "mu_sentiment": AB},
        "labeled: text label=mu_sentiment; not kappa",
    ),
    "a general name": ({"age": AGE, "class": SHAPE, "kappa": AB}, "columns class, kappa, age = 'several possible"),
    "a general name alone": ({"age": AGE, "class": WARD}, "table: label=class"),
    "a general name of texts": (
        {"text": make_own_text, "class": WARD, "kappa": AB},
        "labeled: text label=class; not kappa",
    ),
    "labels behind marks": ({"text": make_own_text, "sigma": SEVERAL}, "tagged: text labels=sigma"),
    "scores": ({"text": make_own_text, "sigma_score": AGE}, "rated: text target=sigma_score"),
    "scores without an end": (
        {"text": make_own_text, "sigma_score": ENDLESS},
        "7 of 60 values are numbers in another notation",
    ),
    "two texts alone": (
        {"sigma": make_own_text, "rho": lambda n: make_own_text(n) * 2},
        "one (--text), or a prompt and its completion",
    ),
    "two texts with an answer": (
        {"sigma": make_own_text, "rho": make_own_text, "kappa": WARD},
        "(--text, --text-pair, --label)",
    ),
    "a usual name of two": (
        {"text": make_own_text, "rho": make_own_text, "kappa": WARD},
        "labeled: text label=kappa; not rho",
    ),
    "captions": ({"sigma": make_own_text, "rho": PNG}, "several texts or images"),
    "lists of texts": (
        {"query": make_own_text, "pos": [make_own_text(1)], "neg": [make_own_text(2)]},
        "must be a label, a number, or a list",
    ),
    "lists of numbers": ({"text": make_own_text, "label": [0.25, 0.75]}, "numeric vectors do not name"),
    "a usual name": (MIXED | {"lambda_": SHAPE, "species": AB}, "table: label=species"),
    "marks of labels": (
        {"sigma": make_own_text, "kappa": (0, 1), "rho": (1, 0, 0)},
        "or write one column with lists of",
    ),
    "and a usual one": (
        {"sigma": make_own_text, "spam": (0, 1), "rho": (1, 0, 0)},
        "or write one column with lists of",
    ),
    "a lone answer": ({"text": make_own_text, "label": "one"}, "at least two values, but has only 'one'"),
    "a lone last word": ({"text": make_own_text, "final_decision": "one"}, "must have at least two values"),
    "an empty answer": ({"text": make_own_text, "sentiment": ""}, "must have at least two values"),
    # A time beside its event, in usual codes.
    "alive or dead": (MIXED | {"months": AGE, "status": ("Alive", "dead")}, "table: time=months event=status"),
    "codes of R": ({"age": AGE, "days": AGE, "status": (1, 2)}, "table: time=days event=status"),
    "of cBioPortal": ({"age": AGE, "os": AGE, "died": ("0:LIVING", "1:DECEASED")}, "table: time=os event=died"),
    "of a study": ({"age": AGE, "dfs_months": AGE, "dfs_status": FREE}, "time=dfs_months event=dfs_status"),
    "three courses": ({"age": AGE, "time": AGE, "status": (0, 1, 2)}, "may encode whether an event occurred by time"),
    "two events": (SURVIVED | {"pfs_months": lambda n: n / 3, "pfs_status": (1, 0, 0)}, "may encode whether an event"),
    "another event": (
        {"age": AGE, "days": AGE, "status": ("open", "shut")},
        "may encode whether an event occurred by days",
    ),
    "event or label": (
        {"age": AGE, "tenure": AGE, "churn": ("No", "Yes")},
        "may encode whether an event occurred by tenure",
    ),
    "another unit": (MIXED | {"run_h": AGE, "pump": ("functioning", "failed")}, "whether an event occurred by run_h"),
    "no event": (MIXED | {"run_h": AGE, "pump": ("left", "right")}, "kappa, pump, age, run_h = 'several possible"),
    "an age": (MIXED | {"age_years": AGE, "died": (0, 1)}, "= 'several possible"),
    # What a row is for.
    "a split": (TABLE | {"sigma": ("train", "train", "test")}, "table: label=dx; not sigma"),
    "a split in words": (TABLE | {"sigma": ("Training", "PublicTest", "PrivateTest")}, "table: label=dx; not sigma"),
    "a flag of a split": (TABLE | {"in_train": (0, 1)}, "table: label=dx; not in_train"),
    "flags of rows": (TABLE | {"is_excluded": (0, 1)}, "rows in which a"),
    "thumbs": (
        {"prompt": make_own_text, "response": make_own_text, "thumbs_up": (0, 1)},
        "rows in which response is unwanted",
    ),
    "folds": (TABLE | {"fold": (0, 1, 2)}, "table: label=dx; not fold"),
    "reviews": (
        {"text": make_own_text, "spans": make_spans("start end label"), "sigma": ("accept", "reject")},
        "rows in which a",
    ),
    "reviews of chats": ({"messages": [ASK, SAY], "sigma": ("accept", "ignore")}, "rows in which a"),
    "checks": (TABLE | {"sample_quality": ("pass", "fail", "pass")}, "rows in which a record is unwanted"),
    "what is valid": (TABLE | {"valid_sample": (0, 1)}, "rows in which a record is unwanted"),
    "what is all right": (TABLE | {"probe_ok": ("TRUE", "FALSE")}, "rows in which a record is unwanted"),
    "a need": (TABLE | {"needs_repair": YES}, "rows in which a record is unwanted"),
    "a split abroad": (TABLE | {"sigma": ("treino", "Validierung", "teste")}, "table: label=dx; not sigma"),
    "weights of rows": (TABLE | {"survey_wt": AGE, "birth_weight": AGE}, "table: label=dx; not survey_wt"),
    # Answers in forms of other programs, and with a usual name in a form that is not read.
    "types": ({"text": make_own_text, "sigma": make_spans("start end type")}, "entities: text spans=sigma"),
    "groups": (
        {"text": make_own_text, "ents": make_spans("start_char end_char entity_group")},
        "entities: text spans=ents",
    ),
    "numbers of types": (
        {"text": make_own_text, "ents": [{"start": 0, "end": 1, "label": 4}]},
        "entities: text spans=ents",
    ),
    "cats": ({"text": make_own_text, "cats": ({"a": 1, "b": 0}, {"a": 0.0, "b": 1.0})}, "tagged: text labels=cats"),
    "choices": (TASK | {"annotations": (make_choices("a"), make_choices("b"))}, "tagged: text=data labels=annotations"),
    "ids of doccano": ({"text": make_own_text, "annotations": ([{"label": 1}], [{"label": 2}])}, "labels=annotations"),
    "another name": (
        {"sigma": make_own_text, "rho": make_spans("startOffset endOffset displayName")},
        "text=sigma spans=rho",
    ),
    "other keys": (
        {"text": make_own_text, "sigma": make_spans("von bis typ"), "kappa": WARD},
        "must have whole numbers start",
    ),
    "lengths": (
        {"text": make_own_text, "sigma": [{"of": {"at": 0, "length": 1}}]},
        "must have whole numbers start and end",
    ),
    "beyond the text": ({"text": make_own_text, "sigma": [{"width": 640, "height": 480}]}, "text: text; not sigma"),
    "tags of any name": ({"sigma": [*"abc"], "kappa": ["B-x", "O", "O"]}, "entities: tokens=sigma tags=kappa"),
    "two of tags": ({"sigma": [*"abc"], "kappa": ["B-x", "O", "O"], "rho": ["B-y", "O", "O"]}, "must be a label, a"),
    "no type": (
        {"text": make_own_text, "entities": [{"start": 0, "stop": 1}]},
        "must have whole numbers start and end",
    ),
    "numbers for tags": ({"tokens": [*"abc"], "ner_tags": [0, 3, 0]}, "must be tag names, such as B-PER"),
    "tags without types": ({"tokens": [*"abc"], "ner_tags": ["B", "O", "O"]}, "must be a letter and"),
    "a tag a row": ({"sigma": repeat_texts(20), "kappa": ("B-x", "I-x", "O")}, "belongs to a part of a record"),
    "many labels": (
        {"text": make_own_text, "intent": repeat_texts(50)},
        "column intent = 'text': must have 2 to 200 distinct texts",
    ),
    "marks as text": ({"text": make_own_text, "labels": ("[1, 0]", "[0, 1]")}, "numeric vectors do not name"),
    # Columns that a number tells apart, and roles in turn names.
    "two texts": (
        {"clause_a": make_own_text, "clause_b": make_own_text, "kappa": WARD},
        "text=clause_a text_pair=clause_b label=ka",
    ),
    "with a score": (
        {"clause 1": make_own_text, "clause 2": make_own_text, "score": AGE},
        "text=clause 1 other=clause 2 target=score",
    ),
    "one of few texts": (
        {"clause1": make_own_text, "clause2": FEW, "dx": WARD},
        "text=clause1 text_pair=clause2 label=dx",
    ),
    "few texts of two": ({"clause1": FEW, "clause2": FEW, "judge": AB}, "must be one answer, chosen"),
    "without an answer": ({"clause1": make_own_text, "clause2": make_own_text}, "several texts or images"),
    "three texts": ({"clause1": make_own_text, "clause2": make_own_text, "clause3": make_own_text}, "several texts"),
    "questions": (
        {"question": make_own_text, "sentence": make_own_text, "label": (0, 1)},
        "text=question text_pair=sentence label",
    ),
    "answers": (
        {"prompt": make_own_text, "answer_0": make_own_text, "answer_1": make_own_text, "better_id": (0, 1)},
        "must be one answer, chosen",
    ),
    "answers by marks": (
        {"clause_a": make_own_text, "clause_b": make_own_text, "kappa": ("B", "A", "tie")},
        "must be one answer, chosen",
    ),
    "a tournament": (
        {"prompt": make_own_text, "reply_1": make_own_text, "reply_2": make_own_text, "reply_3": make_own_text},
        "several texts",
    ),
    "negatives": (
        BELONG | {"negative_1": make_own_text, "negative_2": make_own_text},
        "positive negative=negative_1; not negative_2",
    ),
    "no negative": (BELONG, "must be next to a column negative"),
    "turns": ({"user": make_own_text, "response": make_own_text}, "pairs: prompt=user completion=response"),
    "turns in columns": (
        {"user_1": make_own_text, "bot_1": make_own_text, "user_2": make_own_text, "bot_2": make_own_text},
        "several texts",
    ),
    "of OpenAI": (
        {"input": {"messages": [ASK], "tools": []}, "preferred_output": [SAY], "non_preferred_output": [SAY]},
        "preferences: messages=input chosen=preferred_output rejected=non_preferred_output",
    ),
    # Images are known by what they end in; rows by numbers that each have once.
    "paths": ({"sigma": PNG, "kappa": WARD}, "images: image=sigma label=kappa"),
    "paths beside texts": (
        {"sigma": PNG, "text": make_own_text, "kappa": WARD},
        "labeled: text label=kappa; not sigma",
    ),
    "another ending": ({"sigma": "s{}.nii.gz".format, "kappa": WARD}, "sigma = 'paths of 60 .nii.gz files': must be"),
    "several endings": ({"sigma": lambda n: f"{n}.{'jp2' if n % 3 else 'png'}", "dx": AB}, "paths of 40 .jp2 f"),
    "an ending alone": ({"sigma": "s{}.jp2".format}, "sigma = 'paths of 60 .jp2 files'"),
    "links": ({"sigma": "https://a.org/{}.jpg?w=9".format, "kappa": WARD}, "sigma = 'paths of 60 linked files'"),
    "row numbers": (TABLE | {"sigma": lambda n: 1000 + n}, "table: label=dx; not sigma"),
    "numbers with gaps": (TABLE | {"order_nr": lambda n: 1000 + n * n}, "table: label=dx; not order_nr"),
    "ids of rows": ({"text": make_own_text, "uid": "r{}".format, "kappa": WARD}, "labeled: text label=kappa; not uid"),
    "ids of persons": (
        {"text": make_own_text, "uid": repeat_texts(30), "kappa": WARD},
        "labeled: text label=kappa user=uid",
    ),
    "few persons": (
        {"text": make_own_text, "author": repeat_texts(4), "kappa": WARD},
        "columns kappa, author = 'several possible answers'",
    ),
    "ids of one length": (TABLE | {"sigma": lambda n: 4_000_000 + n * n * 999}, "table: label=dx; not sigma"),
    "numbers of another": (TABLE | {"sigma": lambda n: 400_000 + n * n * 999}, "table: label=dx"),
    "codes of goods": (TABLE | {"ean": lambda n: 400 + n * n}, "table: label=dx; not ean"),
    "names that are one": (
        {"Text": make_own_text, "text": make_own_text, "kappa": WARD},
        "must differ in more than case and punctuation",
    ),
}
RENAMED = {"sigma": "tau", "kappa": "omega", "rho": "mu", "lambda_": "eta", "clause": "thesis"}
"""Meaningless names and their replacements, which change the alphabetical order."""


def summarize_decision(folder: Path, rows: list[dict[str, Any]]) -> str:
    try:
        return summarize_found(detect_in_file(folder, rows))
    except DataError as error:
        return str(error).removeprefix(str(folder))


@pytest.mark.parametrize("name", RULES)
def test_detection_does_not_depend_on_order_or_arbitrary_names(tmp_path: Path, name: str) -> None:
    columns, expected = RULES[name]
    rows_of, draws = make_rows(columns, 60), random.Random(name)
    before = summarize_decision(tmp_path, rows_of)
    assert expected in before
    order = draws.sample(sorted(columns), len(columns))
    mixed = [{name: row[name] for name in order} for row in draws.sample(rows_of, len(rows_of))]

    def sort_parts(note: str) -> list[str]:
        return sorted(note.replace(",", " ").replace(";", " ").split())

    after = summarize_decision(tmp_path, mixed)
    assert sort_parts(after) == sort_parts(before), "the order of columns and rows"
    text = json.dumps(mixed)
    for old, new in RENAMED.items():
        text, before = text.replace(f'"{old}', f'"{new}'), before.replace(old, new)
    assert sort_parts(summarize_decision(tmp_path, json.loads(text))) == sort_parts(before), "names that mean nothing"


@pytest.mark.parametrize(
    ("columns", "end"),
    [
        (MIXED, "or --score COLUMN"),
        (MIXED | {"run_hours": AGE, "rho": ("yes", "no")}, "occurred by then: --time run_hours --event COLUMN"),
        ({"text": make_own_text, "kappa": WARD, "rho": AB}, "or only --text for plain texts"),
    ],
)
def test_ambiguous_answer_error_lists_only_suitable_options(tmp_path: Path, columns: Any, end: str) -> None:
    with pytest.raises(DataError, match=f"several possible answers': must be one: .*{re.escape(end)}$"):
        detect_in_file(tmp_path, columns)


@pytest.mark.parametrize("end", [".png", ".tif"])
@pytest.mark.parametrize("name", ["scans/s{}", "{}"])
def test_image_paths_without_extension_are_refused(tmp_path: Path, name: str, end: str) -> None:
    rows = random.Random(1).sample(make_rows({"sigma": name.format, "kappa": WARD}), 60)
    (tmp_path / "scans").mkdir()
    assert "without the extension" not in summarize_decision(tmp_path, rows)
    for row in rows:
        (tmp_path / f"{row['sigma']}{end}").touch()
    with pytest.raises(DataError, match=f"sigma = 'paths of {end} files without the extension': .* append {end} to"):
        detect_in_file(tmp_path, rows)


HEADERS: dict[str, tuple[dict[str, Any], bool]] = {
    "a value of a flag": ({"line": ("QX", "RY"), "km": AGE, "late": ("late", "in time")}, True),
    "beside a text": ({"what was told": make_own_text, "urgent": ("urgent", "calm")}, True),
    "pixels": ({str(n): (0, n, 9) for n in range(9)}, True),
    "texts": ({"text": make_own_text, "label": AB}, False),
    "texts with numbers": ({"text": make_own_text, "label": AB, "number": AGE}, False),
    "a table": ({"age": AGE, "stay": lambda n: n % 7, "dx": WARD}, False),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("order", range(3))
def test_missing_header_is_detected_if_most_names_are_values(tmp_path: Path, name: str, order: int) -> None:
    columns, is_written = HEADERS[name]
    rows, names = (
        random.Random(order).sample(make_rows(columns), 60),
        random.Random(order).sample([*columns], len(columns)),
    )
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        lines = csv.DictWriter(file, sorted(names, key=int) if name == "pixels" else names)
        if is_written:
            lines.writeheader()
        lines.writerows(rows)
    try:
        note = str(detect_columns(tmp_path / "rows.csv", {}))
    except DataError as error:
        note = str(error)
    assert ("one of its own values" in note) != is_written


NOTED = {"torn": "records have parts that begin or end within a word", "damaged": "of its values have mojibake"}
NOTED |= {"marked_up": "of its values have HTML"}
KINDS = st.lists(st.sampled_from(["whole", *NOTED]), min_size=12, max_size=20)


@pytest.mark.nightly
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=KINDS, names=st.sampled_from([("text", "spans"), ("content", "entities")]))
def test_damaged_rows_are_counted_in_any_order(tmp_path: Path, kinds: Any, names: Any) -> None:
    """Offsets are compared with word boundaries, and encoding damage is reported."""
    lost, texts = "cards are lost", {"damaged": "f\u00c3\u00bcr are lost", "marked_up": "cards are<br/>lost &amp; gone"}
    made = [[f"{texts.get(kind, lost)} {n}", [[0, 4 if kind == "torn" else 9, "x"]]] for n, kind in enumerate(kinds)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in made))
    told = write_experiment(tmp_path / "rows.jsonl").notes
    for kind, note in NOTED.items():
        counted = [line for line in told.splitlines() if note in line]
        assert bool(counted) == (kind in kinds)
        assert all(f"{kinds.count(kind)} of " in line for line in counted)


IDS = st.lists(st.sampled_from(["nw/a_0", "d7", "0", "wsj"]), max_size=3)
BESIDE = st.tuples(IDS, st.sampled_from(["", "d7\t", "4{0}\t4{0}\t"]))


@given(order=st.permutations(["NOUN", "_", "B-x"]), first=st.integers(0, 1), beside=BESIDE)
def test_numeric_lists_are_not_classified_as_tokens(tmp_path_factory: Any, order: Any, first: int, beside: Any) -> None:
    tags, before, last = "\t".join(order), "".join(f"{cell}\t" for cell in beside[0]), beside[1]
    rows = [f"{before}{first + n}\t{last.format(n)}w{n}\t{tags.replace('B-x', 'B-x' if n else 'O')}" for n in range(3)]
    path = tmp_path_factory.mktemp("marked") / "train.conll"
    path.write_text("\n\n".join(["\n".join(rows)] * 5) + "\n")
    ((_, row), *_) = iter_raw_rows(path)
    assert row["tokens"] == ["w0", "w1", "w2"]
    assert row["tags"] == ["O", "B-x", "B-x"]
