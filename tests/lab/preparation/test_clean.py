"""Cleaned copies of data files: dropped rows and masked identifiers."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedtune.lab.preparation.clean import Cleaned, Cleaning, clean
from fedtune.show.new_files import open_new_streams
from fedtune.spec import ConfigError, DataError

COLUMNS = {"text": "body", "label": "team"}


def clean_file(
    path: Path, *drop: str, mask: bool = False, columns: Mapping[str, str] = COLUMNS, **named: str
) -> tuple[Cleaned, list[Any]]:
    out = path.with_name("kept.jsonl")
    fault = {"other": DataError("label", "not declared", "is already named")}.get
    cleaning = Cleaning(
        columns, lambda record: fault(record.fields.get("label", "")), drop=drop, mask=mask, named=named
    )
    with open_new_streams(("--out", out)) as (stream,):
        report = clean(path, stream, cleaning)
    return report, [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def write_rows(folder: Path, *rows: Mapping[str, object] | str) -> Path:
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def make_row(text: object, team: str = "sales", **others: object) -> dict[str, object]:
    return {"body": text, "team": team, **others}


LONG = "the printer on the third floor has been broken since Monday and nobody came to mend it"


@pytest.mark.parametrize(
    ("rules", "rows", "masked"),
    [
        ("empty", [make_row(" "), make_row(None), make_row("a"), make_row("b", "other")], [2, 3]),
        ("unusable", [make_row(" "), make_row(7), make_row("a"), make_row("b", "other")], [2]),
        ("duplicates", [make_row("a"), make_row(" a "), make_row("a", "billing"), make_row("a b")], [0, 2, 3]),
        ("near-duplicates", [make_row(LONG), make_row(f"{LONG} soon"), make_row(f"{LONG} soon", "billing")], [0, 2]),
        ("personal", [make_row("a@b.de"), make_row("a")], [1]),
        ("damaged", [make_row("\ufffd"), make_row("a")], [1]),
        ("unreadable", [make_row("a"), "{", make_row("b")], [0, 2]),
        # A dropped row is no earlier one.
        ("personal duplicates", [make_row("say a@b.de"), make_row("say a@b.de", "billing"), make_row("c")], [2]),
    ],
)
def test_cleaning_rule_drops_only_matching_rows(tmp_path: Path, rules: str, rows: list[Any], masked: list[int]) -> None:
    first, *_ = rows_in = rules.split()
    report, remaining = clean_file(write_rows(tmp_path, *rows), *rows_in)
    assert remaining == [rows[index] for index in masked]
    assert report == Cleaned(kept=len(masked), dropped=Counter({first: len(rows) - len(masked)}))


def test_masking_keeps_user_ids_and_masks_other_text(tmp_path: Path) -> None:
    columns = {**COLUMNS, "user": "who"}
    path = write_rows(tmp_path, make_row("to a@b.de", who="c@d.de", note={"n": ["e@f.de", 1]}))
    report, remaining = clean_file(path, mask=True, columns=columns)
    assert remaining == [make_row("to [e-mail]", who="c@d.de", note={"n": ["[e-mail]", 1]})]
    assert report.masked == {"e-mail": 2}


def test_numbers_and_user_ids_are_not_masked(tmp_path: Path) -> None:
    columns = {"feature:age": "age", "feature:states": "states", "time": "months", "event": "died", "text": "note"}
    card, mail = "4111111111111111", "a@b.de"
    rows_in = {"age": card, "states": f"[{card}]", "months": card, "died": "1", "who": mail, "note": f"by {mail}"}
    _, remaining = clean_file(write_rows(tmp_path, rows_in), mask=True, columns=columns, user="who")
    assert remaining == [rows_in | {"note": "by [e-mail]"}]


@pytest.mark.parametrize(("words", "marks"), [("text", "spans"), ("tokens", "tags")])
def test_masking_is_refused_for_annotated_text(tmp_path: Path, words: str, marks: str) -> None:
    with pytest.raises(ConfigError, match=f"--mask = 'personal': is not available for annotated texts .role {marks}"):
        clean_file(write_rows(tmp_path, {}), mask=True, columns={words: words, marks: marks})
    assert not (tmp_path / "kept.jsonl").exists()


def test_records_with_different_outcomes_are_not_duplicates(tmp_path: Path) -> None:
    rows = [{"age": 50, "months": months, "died": died} for months, died in [(3, 1), (3, 0), (5, 1), (3.0, 1)]]
    columns = {"feature:age": "age", "time": "months", "event": "died"}
    report, remaining = clean_file(write_rows(tmp_path, *rows), "duplicates", columns=columns)
    assert (remaining, report.dropped) == (rows[:3], {"duplicates": 1})


def test_other_column_values_are_kept_or_become_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import datetime

    from pyarrow import parquet

    day = datetime.date(2026, 1, 2)
    table = {"body": ["ä"], "team": ["sales"], "day": [day], "number": [float("nan")], "count": [3]}
    parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    _, remaining = clean_file(tmp_path / "rows.parquet")
    assert remaining == [{"body": "ä", "team": "sales", "day": "2026-01-02", "number": None, "count": 3}]


def test_existing_output_file_is_never_overwritten(tmp_path: Path) -> None:
    path = write_rows(tmp_path, make_row("a"))
    before = path.read_bytes()
    clean_file(path)
    with pytest.raises(ConfigError, match=r"--out = .* already exists: choose a new file"):
        clean_file(path)
    assert path.read_bytes() == before


def test_cleaning_without_remaining_rows_writes_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row is kept"):
        clean_file(write_rows(tmp_path, make_row(" ")), "empty")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl"]


def test_json_text_is_masked_inside_and_stays_valid(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "write to\na@b.example"}, {"role": "assistant", "content": "done"}]
    about = {"from": {"mail": "c@d.example", "phone": 493012345678, "n": 3}, "odd": "[not json"}
    calm = '{"spaces":1 ,  "kept": [true]}'
    given = {"chosen": json.dumps(turns), "rejected": json.dumps(turns[:1]), "about": json.dumps(about), "calm": calm}
    _, (kept,) = clean_file(
        write_rows(tmp_path, given), mask=True, columns={role: role for role in ("chosen", "rejected")}
    )
    assert json.loads(kept["chosen"])[0] == {"role": "user", "content": "write to\n[e-mail]"}
    assert json.loads(kept["chosen"])[1] == turns[1]
    assert json.loads(kept["rejected"]) == json.loads(kept["chosen"])[:1]
    inner = json.loads(kept["about"])
    assert (inner["from"]["mail"], inner["from"]["n"], inner["odd"]) == ("[e-mail]", 3, "[not json")
    assert kept["calm"] == calm, "as it was, where nothing is masked"
