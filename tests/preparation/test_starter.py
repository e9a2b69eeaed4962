"""The first experiment for a file: what it says composes, and says what the file has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fedtune.api.compose import compose_run
from fedtune.data import iter_records
from fedtune.data.faults import LeftOut
from fedtune.model import load_tokenizer
from fedtune.preparation import starter
from fedtune.preparation.detect import look_at
from fedtune.tasks import task_named


def plan_for(path: Path, *, model: str = "random_bert") -> tuple[str, starter.Plan]:
    found = look_at(path, {})
    base = starter.base_of(found.kind)
    left_open = ["data.train_file=x", "data.declared_sizes=2", *starter.left_open(base)]
    config = compose_run([f"experiment={base}", f"model={model}", *left_open])
    tokenizer = load_tokenizer(config.model)
    measured = starter.measured(found, tokenizer, config, within=len(tokenizer))
    plan = starter.Plan(base=base, model=model, num_sites=starter.sites_for(measured.usable), measured=measured)
    return starter.experiment(found, plan, file=path.with_name("own.yaml")), plan


def table(folder: Path, rows: int, *, labels: tuple[str, ...] = ("yes", "no")) -> Path:
    path = folder / "rows.csv"
    lines = [f"text number {number} of the file,{labels[number % len(labels)]}" for number in range(rows)]
    path.write_text("\n".join(["body,kind", *lines]) + "\n", encoding="utf-8")
    return path


def test_labels_that_yaml_would_take_for_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ("yes", "1", "null", "a: b", "# c", "ä")
    text, _ = plan_for(table(tmp_path, 60, labels=labels))
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert compose_run(["experiment=./own.yaml"]).data.labels == ("1", "# c", "a: b", "null", "yes", "ä")


@pytest.mark.parametrize(("rows", "sites"), [(100, 2), (999, 2), (1000, 3), (5000, 4)])
def test_a_site_gets_a_few_hundred_records(rows: int, sites: int) -> None:
    assert starter.sites_for(rows) == sites


def test_pairs_with_a_score_get_its_scale_and_compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"sentence1": f"text {n}", "sentence2": "another text", "score": n % 6} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = look_at(tmp_path / "rows.jsonl", {})
    left_open = ["data.train_file=x", "data.declared_sizes=2", *starter.left_open("own_pairs")]
    config = compose_run(["experiment=own_pairs", "model=random_bert", *left_open])
    measured = starter.measured(found, load_tokenizer(config.model), config, within=len(load_tokenizer(config.model)))
    assert (measured.usable, len(measured.lengths)) == (60, 60)
    plan = starter.Plan(base="own_pairs", model="random_bert", num_sites=2, measured=measured)
    (tmp_path / "own.yaml").write_text(starter.experiment(found, plan, file=tmp_path / "own.yaml"))
    monkeypatch.chdir(tmp_path)
    data = compose_run(["experiment=./own.yaml"]).data
    assert data.target_range == (0.0, 5.0)
    assert data.columns == {"text": "sentence1", "other": "sentence2", "target": "score"}


def test_preferences_get_turns_and_leave_out_what_is_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(asked: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": whole(f"where {n}", "there"), "rejected": whole(f"where {n}", "no")} for n in range(60)]
    rows[7]["rejected"] = whole("what else", "no")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = look_at(tmp_path / "rows.jsonl", {})
    left_open = ["data.train_file=x", "data.declared_sizes=2", *starter.left_open("own_preferences")]
    config = compose_run(["experiment=own_preferences", "model=random_llama", *left_open])
    measured = starter.measured(found, load_tokenizer(config.model), config, within=len(load_tokenizer(config.model)))
    assert (measured.usable, measured.left_out.count, measured.turns) == (59, 1, "plain")
    plan = starter.Plan(base=starter.base_of(found.kind), model="random_llama", num_sites=2, measured=measured)
    (tmp_path / "own.yaml").write_text(starter.experiment(found, plan, file=tmp_path / "own.yaml"))
    monkeypatch.chdir(tmp_path)
    data = compose_run(["experiment=./own.yaml"]).data
    assert (data.columns, data.unusable) == ({"chosen": "chosen", "rejected": "rejected"}, "leave_out")


def test_declared_sizes_are_near_a_site_s_share(tmp_path: Path) -> None:
    text, plan = plan_for(table(tmp_path, 400))
    share = 400 * 0.7 / 2
    assert 0.8 * share <= starter.declared_size(plan) <= share
    assert yaml.safe_load(text)["data"]["declared_sizes"] == starter.declared_size(plan)


@pytest.mark.parametrize(("rows", "delta"), [(60, 1e-5), (600_000, 1e-7)])
def test_delta_stays_below_one_over_a_site_s_records(tmp_path: Path, rows: int, delta: float) -> None:
    path = table(tmp_path, 60)
    _, plan = plan_for(path)
    large = replace(plan, measured=replace(plan.measured, usable=rows))
    privacy = yaml.safe_load(starter.experiment(look_at(path, {}), large, file=tmp_path / "own.yaml"))["privacy"]
    assert privacy["delta"] == pytest.approx(delta)
    assert privacy["delta"] < 1 / starter.declared_size(large)


def test_each_setting_has_its_comment(tmp_path: Path) -> None:
    text, _ = plan_for(table(tmp_path, 60))
    settings = [line for line in text.splitlines() if ": " in line and not line.lstrip().startswith("#")]
    assert [line for line in settings if " # " not in line] == []


def test_long_records_are_counted_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": "word " * length}) + "\n" for length in (5, 50, 5000)))
    text, plan = plan_for(path, model="random_llama")
    assert plan.max_length == 256
    assert f"{1 + int(plan.measured.lengths[1] > 256)} of 3 records are longer and are cut" in text


def test_rows_that_cannot_be_used_are_said_and_left_out(tmp_path: Path) -> None:
    path = table(tmp_path, 60)
    path.write_text(path.read_text() + " ,yes\na,b,c\n")
    text, plan = plan_for(path)
    left_out = {"must not be blank (role text)": 1, "must have 2 cells, as the header": 1}
    assert (plan.measured.usable, plan.measured.left_out) == (60, LeftOut(rows=62, reasons=left_out))
    assert yaml.safe_load(text)["data"]["unusable"] == "leave_out"


@pytest.mark.parametrize(("name", "run"), [("a b(1).yaml", "a-b-1"), ("...yaml", "own"), ("Ärger.yaml", "rger")])
def test_a_run_s_name_from_that_of_a_file(name: str, run: str) -> None:
    assert starter.run_name(Path(name)) == run


@pytest.mark.parametrize(
    ("file", "line"),
    [("a.yaml", "experiment=./a.yaml"), ("in/a.yaml", "experiment=in/a.yaml"), ("a b.yaml", "'experiment=./a b.yaml'")],
)
def test_the_next_line_can_be_typed(file: str, line: str) -> None:
    assert starter.next_line(Path(file)) == f"fedtune simulate {line}"


def test_lengths_are_those_of_a_run_s_examples(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "who is there?"}, {"role": "assistant", "content": "nobody at all"}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': asked})}\n" * 30)
    text, plan = plan_for(tmp_path / "chats.jsonl", model="random_llama")
    settings = yaml.safe_load(text)["data"]
    assert (plan.measured.turns, settings["chat_template"]) == ("plain", "plain"), "this model has no template"
    overrides = ["experiment=own_text", "model=random_llama", "data.train_file=x", "data.declared_sizes=2"]
    overrides += ["lora.layers=null", "lora.target_modules=all-linear", "data.columns={messages: messages}"]
    config = compose_run([*overrides, "data.chat_template=plain", "data.max_length=200"])
    records = list(iter_records(tmp_path / "chats.jsonl", config.data.columns))
    made = task_named(config.task).tokenise(records, load_tokenizer(config.model), data=config.data)
    assert plan.measured.lengths.tolist() == made.lengths.tolist()


def test_a_file_s_name_is_no_setting(tmp_path: Path) -> None:
    written, _ = plan_for(table(tmp_path, 100).rename(tmp_path / "a\nprivacy: {epsilon: 900}\n#.csv"))
    assert "privacy: {epsilon: 900}" not in written.splitlines()


OPEN = tuple(f"  # {key}:" for key in ("columns", "declared_sizes", "partition", "num_sites"))


def test_a_column_of_places_is_proposed_in_comments_that_compose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"text {number},{'ab'[number % 2]},{'NSS'[number % 3]}" for number in range(120)]
    path = tmp_path / "visits.csv"
    path.write_text("\n".join(["body,team,Hospital_ID", *rows]) + "\n")
    text, plan = plan_for(path)
    assert "Column Hospital_ID may say at which site" in " ".join(starter.notes(look_at(path, {}), plan))
    lines = text.splitlines()
    kept = [line for line in lines if line.strip().partition(":")[0] not in ("columns", "declared_sizes", "num_sites")]
    chosen = [line.replace("  # ", "  ", 1) if line.startswith(OPEN) else line for line in kept]
    (tmp_path / "visits.yaml").write_text("\n".join(chosen) + "\n")
    monkeypatch.chdir(tmp_path)
    config = compose_run(["experiment=./visits.yaml"])
    assert dict(config.data.partition.sites) == {"N": 0, "S": 1}
    assert (config.data.columns["site"], config.federation.num_sites) == ("Hospital_ID", 2)
    assert config.data.declared_sizes == (28, 56)


def test_labels_that_differ_in_case_and_many_rows_left_out_are_said(tmp_path: Path) -> None:
    path = table(tmp_path, 60)
    path.write_text(path.read_text() + "a text,YES\n" * 6 + ",yes\n" * 30)
    _, plan = plan_for(path)
    told = starter.notes(look_at(path, {}), plan)
    assert any("The labels 'YES', 'yes' look alike" in note for note in told)
    assert any(note.startswith("A LARGE PART, 30 of 96 rows (31.2 %), cannot be used: 30 must not be") for note in told)


def test_labels_stand_in_the_order_of_numbers_and_those_without_a_record_are_left(tmp_path: Path) -> None:
    path = table(tmp_path, 200, labels=tuple(map(str, range(1, 11))))
    path.write_text(path.read_text() + ",never with a text\n" * 30)
    text, plan = plan_for(path)
    assert yaml.safe_load(text)["data"]["labels"] == list(map(str, range(1, 11)))
    assert "No class, since one row alone or none that can be used has it: 1 label." in starter.notes(
        look_at(path, {}), plan
    )
    assert starter.in_order(["10 stars", "-1", "2 stars", "b", "1.5"]) == ["-1", "1.5", "2 stars", "10 stars", "b"]


@pytest.mark.parametrize("labels", [("Re\u0301clamation", "R\u00e9clamation"), ("Question", "Que\u200bstion")])
def test_labels_that_look_alike_are_said(labels: tuple[str, str]) -> None:
    (said,) = starter.about_spellings([*labels, "other"])
    assert said.startswith(f"The labels {labels[0]!a}, {labels[1]!a} look alike")


def test_one_long_record_does_not_decide_what_becomes_public(tmp_path: Path) -> None:
    path = table(tmp_path, 120)
    _, before = plan_for(path)
    path.write_text(path.read_text() + f"{'word ' * 200},yes\n")
    text, plan = plan_for(path)
    assert plan.max_length == before.max_length
    assert "; 1 of 121 records are longer and are cut" in text
    assert any(
        "max_length were proposed from nearly all records" in one for one in starter.notes(look_at(path, {}), plan)
    )


@pytest.mark.parametrize("separator", ["", ";b"])
def test_a_label_of_one_row_is_not_made_public(tmp_path: Path, separator: str) -> None:
    labels = [f"{label}{separator}" for label in ("yes", "no")]
    path = table(tmp_path, 60, labels=(*labels, "yes"))
    path.write_text(path.read_text() + f"a text,a rare case{separator}\n")
    text, plan = plan_for(path)
    declared = yaml.safe_load(text)["data"]["labels"]
    assert declared == sorted({"no", "yes", *separator.removeprefix(";")})
    assert any(one.endswith("can be used has it: 1 label.") for one in starter.notes(look_at(path, {}), plan))


def test_a_label_that_may_be_no_value_is_named(tmp_path: Path) -> None:
    path = table(tmp_path, 60, labels=("yes", "nan"))
    _, plan = plan_for(path)
    assert "A label may stand for no value: nan. If so, take it out of labels." in starter.notes(
        look_at(path, {}), plan
    )


def visits(folder: Path, person: Callable[[int], str], *, blank: int = 0) -> Path:
    rows = [
        f"text {number},{'ab'[number % 2]},{'' if number < blank else 'NS'[number // 100]},{person(number)}"
        for number in range(200)
    ]
    (folder / "visits.csv").write_text("\n".join(["body,team,org,PatientID", *rows]) + "\n")
    return folder / "visits.csv"


def test_persons_at_several_places_are_counted_and_get_what_works(tmp_path: Path) -> None:
    text, plan = plan_for(visits(tmp_path, lambda number: f"p{number % 60}"))
    assert plan.measured.torn == 60
    assert "Column org may say at which site each record is, but 60 of 60 persons have records at several." in text
    assert "--unit record" in text
    assert "# partition:" not in text


def test_places_get_the_number_of_their_persons(tmp_path: Path) -> None:
    text, plan = plan_for(visits(tmp_path, lambda number: f"p{number // 4}", blank=2))
    assert (plan.measured.torn, plan.measured.users) == (0, 50)
    assert plan.measured.places == {"": 1, "N": 25, "S": 25}
    (line,) = (line for line in text.splitlines() if line.startswith("  # declared_sizes"))
    assert line == "  # declared_sizes: [17, 17]"
    assert "  # unusable: leave_out" in text.splitlines()


def test_ids_that_differ_in_case_alone_are_counted(tmp_path: Path) -> None:
    path = visits(tmp_path, lambda number: f"{'Pp'[number % 2]}{number // 2 % 50}@example.org")
    _, plan = plan_for(path)
    assert (plan.measured.users, plan.measured.alike) == (100, 50)
    assert any(one.startswith("50 ids of persons are like another") for one in starter.notes(look_at(path, {}), plan))


def test_rows_without_an_id_keep_the_unit(tmp_path: Path) -> None:
    text, plan = plan_for(visits(tmp_path, lambda number: f"p{number}" if number else ""))
    assert (plan.measured.users, plan.measured.usable, plan.measured.left_out.count) == (199, 199, 1)
    assert yaml.safe_load(text)["privacy"]["unit"] == "user"
    assert yaml.safe_load(text)["data"]["unusable"] == "leave_out"
