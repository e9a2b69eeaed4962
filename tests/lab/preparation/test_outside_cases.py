"""Files from other programs: correct detection, or refusal with a remedy."""

from pathlib import Path
from typing import Any

import pytest

from fedtune.data.text_rows import read_table
from fedtune.lab.preparation import experiment_writer
from fedtune.lab.preparation.detect import detect_columns
from fedtune.spec import ConfigError, DataError

from .conftest import AB, ASK, SAY, detect_in_file, make_own_text

PAIR, QUESTION = (
    {"prompt": make_own_text, "completion": make_own_text},
    {"question": make_own_text, "answer": make_own_text},
)
YES = (True, False)
LABELED = {"text": make_own_text, "label": AB}
NO_PROMPT = "columns chosen, rejected = 'texts that belong together': must be next to a column prompt"


def write_table(folder: Path, *lines: str) -> Path:
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "rows.csv"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (PAIR | {"label": YES}, "column label = 'true or false': may mark rows in which completion is unwanted"),
        (PAIR | {"score": (0, 1)}, "column score = '1 or 0': may mark"),
        (QUESTION | {"label": ("good", "bad")}, "rows in which answer is unwanted"),
        (QUESTION | {"accepted": YES}, "rows in which answer is unwanted"),
        (
            {"instruction": make_own_text, "input": "", "output": make_own_text, "kto_tag": YES},
            "rows in which output is unwanted",
        ),
        ({"conversations": [ASK, SAY], "kto_tag": YES}, "rows in which conversations is unwanted"),
        ({"role": ("prompter", "assistant"), "text": make_own_text}, "column role = \"a word's tag, or a speaker"),
        ({"chosen": "Human: where Assistant: there", "rejected": "Human: where Assistant: no"}, NO_PROMPT),
        ({"prompt": "where", "chosen": [SAY], "rejected": [SAY]}, NO_PROMPT),
        ({"prompt": [ASK], "chosen": "there", "rejected": "no"}, NO_PROMPT),
        ({"prompt": [ASK], "completion": [SAY]}, "all turns of a record as one list in a column messages"),
        ({"prompt": make_own_text, "response": [SAY]}, "column response = 'list': must be a text: write all turns"),
        *(
            ({"text": make_own_text, name: {"a": ["b"]}}, f"column {name} = 'object': must be a")
            for name in ("answers", "label")
        ),
        ({"text": make_own_text, "score": lambda n: f"{n % 9},5"}, r"column score = 'text': .* write them as in 3\.5"),
        ({"n": 1.5}, "a column of text"),
    ],
)
def test_misleading_column_layouts_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        detect_in_file(tmp_path, columns)


@pytest.mark.parametrize(
    ("columns", "name", "why"),
    [
        ({"messages": [ASK, SAY | {"reasoning_content": "hm"}]}, "messages: reasoning_content", "runs ignore it"),
        ({"messages": [ASK, SAY | {"masked": 1}]}, "messages: masked", "runs ignore it"),
        ({"text": make_own_text, "state": "one"}, "state", "the same value in all rows"),
        (LABELED | {"age": lambda n: str(n % 40)}, "age", "--score age"),
        ({"text": make_own_text, "parent_id": make_own_text}, "parent_id", "ids of the records"),
        ({"text": make_own_text, "user_ids": ["a", "b"]}, "user_ids", "a record belongs to one person"),
        (
            {"query": make_own_text, "response": make_own_text, "rejected_response": make_own_text},
            "rejected_response",
            "only next to",
        ),
    ],
)
def test_unused_columns_are_listed_with_a_reason(tmp_path: Path, columns: dict[str, Any], name: str, why: str) -> None:
    assert why in dict(detect_in_file(tmp_path, columns).unread)[name]


@pytest.mark.parametrize(
    "labels",
    [
        *(("1", "1.0"), ("A", "\uff21"), ("very good", "very\u00a0good"), ("Ok", "ok")),
        *(("Re\u0301clamation", "R\u00e9clamation"), ("Question", "Que\u200bstion")),
    ],
)
def test_label_spelling_variants_are_listed(labels: tuple[str, str]) -> None:
    (note,) = experiment_writer.describe_spellings([*labels, "other", "2.5"])
    assert note.startswith(f"The labels {labels[0]!a}, {labels[1]!a} look alike")


@pytest.mark.parametrize("end", ['d "e",ok', 'd",ok,ok'])
def test_unclosed_quote_error_contains_the_swallowed_lines(tmp_path: Path, end: str) -> None:
    path = write_table(tmp_path, "text,label", '"begins a quote,ok', "b,ok", "c,ok", end, "f,ok")
    (fault, last) = [fault_text for _, fault_text in read_table(path, None, comma=",")]
    assert isinstance(fault, DataError)
    assert str(fault.value).endswith(", over 4 lines")
    assert fault.bound.endswith("swallows all lines up to the next quote")
    assert last == {"text": "f", "label": "ok"}


def test_unnamed_columns_are_listed_and_title_rows_refused(tmp_path: Path) -> None:
    lines = [f"a text with number {n},{'ab'[n % 2]},,{n}" for n in range(60)]
    assert set(dict(detect_columns(write_table(tmp_path, "text,label,,", *lines), {}).unread)) == {
        "(column 3)",
        "(column 4)",
    }
    title = write_table(tmp_path, "Report of 2024,,,", "text,label,a,b", *lines)
    with pytest.raises(ConfigError, match=r"a repeated or missing name.*must be a header with one name for each"):
        detect_columns(title, {})
