"""Tables: `data init` detects types and leaves public values to the user; `data check` counts unusual values."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from .conftest import make_own_text, make_rows

SICK = ("sick", "well")
TABLE: dict[str, Any] = {
    "patient_id": lambda number: f"p{number}",
    "age": lambda number: 20 + number % 60 + 0.5,
    "crp": lambda number: None if number % 7 == 0 else 900.25 + number,
    "sex": ("zqf", "zqm"),
    "states": lambda number: [number / 7, -0.5, 2],
    "diagnosis": SICK,
}


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def labs_file(tmp_path: Path) -> Path:
    random.seed(3)
    rows = make_rows(TABLE, 120)
    random.shuffle(rows)
    (tmp_path / "labs.json").write_text(json.dumps(rows))
    return tmp_path / "labs.yaml"


def test_observed_values_are_shown_only_on_the_terminal(labs_file: Path, command: Any) -> None:
    printed = command("data", "init", "labs.json", "--label", "diagnosis").printed
    for value in ("20.5 to 79.5", "901.25 to 1018.25", "zqf", "zqm", "a list of 3 numbers", "become PUBLIC"):
        assert value in printed
    page = labs_file.read_text()
    assert '{columns: ["age"], range: "???", missing: indicator}' in page
    assert '{columns: ["crp"], range: "???", missing: indicator}' in page
    assert '{columns: ["sex"], categories: "???", missing: indicator}' in page
    assert '{columns: ["states"], range: "???", size: 3, missing: indicator}' in page
    for own_value in ("79.5", "20.5", "1018", "zqf", "zqm", "patient_id"):
        assert own_value not in page, "the experiment file travels"


def test_row_with_missing_values_does_not_change_the_experiment(tmp_path: Path, labs_file: Path, command: Any) -> None:
    assert command("data", "init", "labs.json", "--label", "diagnosis").code == 0
    rows = json.loads((tmp_path / "labs.json").read_text())
    rows[5] |= {"age": None, "sex": "", "states": None}
    (tmp_path / "labs.json").write_text(json.dumps(rows))
    assert command("data", "init", "labs.json", "--label", "diagnosis", "--out", "more.yaml").code == 0
    assert (tmp_path / "more.yaml").read_text().replace("more", "labs") == labs_file.read_text()


@pytest.mark.nightly
def test_ranges_are_declared_globally_or_per_column(tmp_path: Path, labs_file: Path, command: Any) -> None:
    command_line = ("data", "init", "labs.json", "--label", "diagnosis", "--force")
    assert command(*command_line, "--ranges=-5,5").code == 0
    assert labs_file.read_text().count("range: [-5.0, 5.0], ") == 3
    assert labs_file.read_text().count("???") == 2, "categories, and what the comment says of them"
    (tmp_path / "units.csv").write_text("column,low,high,unit\nage,0,110,years\nsex,0,1,\ncrp,0,500,mg/l\n")
    assert command(*command_line, "--ranges", "units.csv").code == 0
    for line in ('["age"], range: [0.0, 110.0], ', '["crp"], range: [0.0, 500.0], ', '["states"], range: "???", '):
        assert line in labs_file.read_text()
    for invalid in ("none.csv", "a,b", "5,-5", "1,2,3"):
        assert command(*command_line, f"--ranges={invalid}").failed().startswith("--ranges = ")


def test_undeclared_ranges_are_requested_before_the_run(labs_file: Path, command: Any) -> None:
    assert command("data", "init", "labs.json", "--label", "diagnosis").code == 0
    others = ", ".join(f"data.features[{one}" for one in ("crp].range", "sex].categories", "states].range"))
    said = f"data.features[age].range = '': is required (also missing: {others}): set data.features in the experiment"
    assert command("simulate", "experiment=./labs.yaml").failed().startswith(said)
    page = labs_file.read_text().replace('"age"], range: "???"', '"age"], range: [0, 60]')
    page = page.replace('"crp"], range: "???"', '"crp"], range: [0, 2000]')
    page = page.replace('categories: "???"', "categories: [zqf]").replace('range: "???"', "range: [-20, 20]")
    labs_file.write_text(page)
    told = command("data", "check", "labs.yaml", "--json").printed
    (file,) = json.loads(told)["checked"]["files"]
    assert file["lengths"] is None
    found = {(one["what"], one["column"]): one["count"] for one in file["findings"] if one["kind"] == "declared"}
    assert found == {("beyond its range", "age"): 40, ("missing", "crp"): 18, ("not declared", "sex"): 60}
    told = command("data", "check", "labs.yaml")
    assert "undeclared categories become `other`" in " ".join(told.out.split())
    assert command("plan", "experiment=./labs.yaml", "--json").printed


@pytest.mark.nightly
@pytest.mark.parametrize("events", [("1", "0"), ("1.0", "0.0"), ("True", "False"), (True, False), (1, 0)])
def test_time_and_event_columns_become_a_survival_task(tmp_path: Path, command: Any, events: tuple[Any, ...]) -> None:
    table = {"age": TABLE["age"], "os_months": lambda number: number % 50 + 0.25, "died": events}
    (tmp_path / "trial.json").write_text(json.dumps(make_rows(table, 60)))
    printed = command("data", "init", "trial.json").printed
    assert "0.25 to 49.25" in printed, "on the terminal alone"
    page = (tmp_path / "trial.yaml").read_text()
    assert "task: survival " in page
    assert "columns: {time: os_months, event: died} " in page
    assert 'intervals: "???"' in page
    assert "49.25" not in page
    page = page.replace('range: "???"', "range: [0, 110]")
    (tmp_path / "trial.yaml").write_text(page)
    message = "trial.yaml: task_settings.intervals = '': is required: add task_settings.intervals=VALUE"
    assert command("plan", "experiment=./trial.yaml").message == message
    (tmp_path / "trial.yaml").write_text(page.replace('intervals: "???"', "intervals: [12, 24]"))
    printed = command("data", "check", "trial.yaml", "--json").printed
    (file,) = json.loads(printed)["checked"]["files"]
    assert (file["rows"], file["errors"]) == (60, [])


def test_spreadsheet_booleans_are_categories(tmp_path: Path, command: Any) -> None:
    rows = "".join(f"{n / 7:.2f},{('TRUE', 'FALSE')[n % 2]},{('clay', 'sand')[n % 3 == 0]}\n" for n in range(40))
    (tmp_path / "soil.csv").write_text(f"moisture,irrigated,soil\n{rows}")
    assert command("data", "init", "soil.csv", "--table", "--label", "soil").code == 0
    assert "irrigated" in (tmp_path / "soil.yaml").read_text()


def test_texts_with_time_and_event_become_a_survival_task(tmp_path: Path, command: Any) -> None:
    rows = {"text": make_own_text, "months": lambda number: number % 50 + 0.25, "died": (1, 0)}
    (tmp_path / "notes.json").write_text(json.dumps(make_rows(rows, 60)))
    assert command("data", "init", "notes.json", "--model", "random_bert").printed
    page = (tmp_path / "notes.yaml").read_text().replace('intervals: "???"', "intervals: [12, 24]")
    (tmp_path / "notes.yaml").write_text(page)
    assert command("plan", "experiment=./notes.yaml").printed
