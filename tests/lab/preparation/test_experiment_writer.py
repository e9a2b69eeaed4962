"""Generated experiment files: settings that compose, comments and notes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.data.bad_rows import SkippedRows
from fedtune.data.records import iter_records
from fedtune.lab.preparation import experiment_writer
from fedtune.lab.preparation.detect import detect_columns
from fedtune.lab.preparation.detected_file import KINDS
from fedtune.model.base_model import load_tokenizer
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.registry import get_task

from ...data.conftest import build_chat as turns


@dataclass
class Made:
    """Experiment file and notes by `data init`."""

    path: Path
    plan: experiment_writer.ExperimentPlan
    text: str
    notes: str

    @property
    def settings(self) -> Any:
        return yaml.safe_load(self.text)

    def compose(self, text: str | None = None) -> RunConfig:
        (self.path.parent / "own.yaml").write_text(text or self.text, encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.path.parent)
            return compose_run(["experiment=./own.yaml"])


def write_experiment(path: Path, *, model: str = "random_bert", **chosen: str) -> Made:
    found = detect_columns(path, chosen)
    base = KINDS[found.kind][1]
    left_open = experiment_writer.build_placeholder_overrides(base)
    config = compose_run([f"experiment={base}", f"model={model}", *left_open])
    tokenizer = load_tokenizer(config.model)
    plan = replace(experiment_writer.plan_experiment(found, tokenizer, config), model=model)
    text = experiment_writer.render_experiment(found, plan, file=path.with_name("own.yaml"))
    return Made(path, plan, text, "\n".join(experiment_writer.list_notes(found, plan)))


def write_table(folder: Path, rows: int, *, labels: tuple[str, ...] = ("yes", "no"), more: str = "") -> Path:
    path = folder / "rows.csv"
    lines = [f"text number {number} of the file,{labels[number % len(labels)]}" for number in range(rows)]
    path.write_text("\n".join(["body,kind", *lines]) + f"\n{more}", encoding="utf-8")
    return path


def write_lines(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_resembling_yaml_values_stay_strings(tmp_path: Path) -> None:
    written = write_experiment(write_table(tmp_path, 60, labels=("yes", "1", "null", "a: b", "# c", "ä")))
    assert written.compose().data.labels == ("1", "# c", "a: b", "null", "yes", "ä")


@pytest.mark.parametrize(("rows", "sites"), [(100, 2), (999, 2), (1000, 3), (5000, 4)])
def test_number_of_sites_follows_the_number_of_rows(tmp_path: Path, rows: int, sites: int) -> None:
    assert write_experiment(write_table(tmp_path, rows)).plan.num_sites == sites


def test_prompt_template_suggestion_composes(tmp_path: Path) -> None:
    columns = ("title", "summary", "text")
    rows = [{name: f"{name} of {n} in some words" * 2**power for power, name in enumerate(columns)} for n in range(40)]
    written = write_experiment(write_lines(tmp_path, *({**row, "label": "ab"[n % 2]} for n, row in enumerate(rows))))
    assert written.compose().data.prompt_template == "{prompt}"
    page = written.text.replace("  columns:", "  # was:").replace("  # columns:", "  columns:")
    data = written.compose(page.replace("  # prompt_template", "  prompt_template")).data
    assert data.columns == {"text": "text", "label": "label", "input": "title", "part_2": "summary"}
    assert data.prompt_template == "{input}\n\n{part_2}\n\n{text}"


@pytest.mark.parametrize(("words", "length", "windows"), [(9, 32, 1), (200, 256, 2), (5000, 256, 4)])
def test_span_experiment_has_windows(tmp_path: Path, words: int, length: int, windows: int) -> None:
    text = " ".join(["a"] * words)
    path = write_lines(tmp_path, *[{"text": f"{text} {number}", "spans": [[0, 1, "card"]]} for number in range(40)])
    config = write_experiment(path).compose()
    data = config.data
    assert (config.task, data.labels, data.columns["spans"]) == ("token_classification", ("card",), "spans")
    assert (data.max_length, data.windows) == (length, windows)
    assert data.stride == min(32, (length - 2) // 2)


def test_scored_pairs_experiment_declares_the_scale(tmp_path: Path) -> None:
    rows = [{"sentence1": f"text {n}", "sentence2": "another text", "score": n % 6} for n in range(60)]
    written = write_experiment(write_lines(tmp_path, *rows))
    assert (written.plan.base, written.plan.usable, len(written.plan.lengths)) == ("own_pairs", 60, 60)
    data = written.compose().data
    assert data.target_range == (0.0, 5.0)
    assert data.columns == {"text": "sentence1", "other": "sentence2", "target": "score"}


def test_preference_experiment_declares_chat_turns(tmp_path: Path) -> None:
    rows = [{"chosen": turns(f"where {n}", "there"), "rejected": turns(f"where {n}", "no")} for n in range(60)]
    rows[7]["rejected"] = turns("what else", "no")
    written = write_experiment(write_lines(tmp_path, *rows), model="random_llama")
    plan, data = written.plan, written.compose().data
    assert (plan.usable, plan.left_out.count, plan.turns) == (59, 1, "plain")
    assert (data.columns, data.on_bad_record) == ({"chosen": "chosen", "rejected": "rejected"}, "skip")


@pytest.mark.parametrize(("rows", "delta"), [(400, 1e-5), (600_000, 1e-7)])
def test_delta_and_declared_size_follow_the_site_share(tmp_path: Path, rows: int, delta: float) -> None:
    written = write_experiment(write_table(tmp_path, 400))
    large = replace(written.plan, usable=rows, units=rows)
    settings = yaml.safe_load(
        experiment_writer.render_experiment(detect_columns(written.path, {}), large, file=tmp_path / "own.yaml")
    )
    size = experiment_writer.suggest_declared_size(large)
    assert settings["data"]["declared_sizes"] == size
    assert settings["privacy"]["delta"] == pytest.approx(delta)
    assert delta < 1 / size
    if rows == 400:
        assert 0.8 * 400 * 0.7 / 2 <= size <= 400 * 0.7 / 2


def test_every_written_setting_has_a_comment(tmp_path: Path) -> None:
    text = write_experiment(write_table(tmp_path, 60)).text
    settings = [line for line in text.splitlines() if ": " in line and not line.lstrip().startswith("#")]
    assert [line for line in settings if " # " not in line] == []


def test_long_records_are_counted_and_truncated(tmp_path: Path) -> None:
    written = write_experiment(
        write_lines(tmp_path, *({"body": "word " * size} for size in (5, 50, 5000))), model="random_llama"
    )
    assert written.plan.max_length == 256
    assert f"{1 + int(written.plan.lengths[1] > 256)} of 3 records are longer and are truncated" in written.text


def test_unusable_rows_are_reported_and_skipped(tmp_path: Path) -> None:
    written = write_experiment(write_table(tmp_path, 60, more=" ,yes\na,b,c\n"))
    left_out = {"must not be blank (role text)": 1, "must have 2 cells, like the header": 1}
    assert (written.plan.usable, written.plan.left_out) == (60, SkippedRows(rows=62, reasons=left_out))
    assert written.settings["data"]["on_bad_record"] == "skip"


def test_run_name_and_next_command_follow_the_file_name() -> None:
    names = {"a b(1).yaml": "a-b-1", "...yaml": "own", "Ärger.yaml": "rger"}
    assert {file: experiment_writer.derive_run_name(Path(file)) for file in names} == names
    for file, line in [("a.yaml", "a.yaml"), ("in/a.yaml", "in/a.yaml"), ("a b.yaml", "'a b.yaml'")]:
        assert experiment_writer.format_next_command(Path(file)) == f"fedtune simulate {line}"


def test_estimated_lengths_match_the_training_examples(tmp_path: Path) -> None:
    path = write_lines(tmp_path, *[{"messages": turns("who is there?", "nobody at all")}] * 30)
    written = write_experiment(path, model="random_llama")
    assert (written.plan.turns, written.settings["data"]["chat_template"]) == ("plain", "plain"), "it has no template"
    overrides = ["experiment=own_text", "model=random_llama", "data.train_file=x", "data.declared_sizes=2"]
    overrides += ["lora.layers=null", "lora.target_modules=all-linear", "data.columns={messages: messages}"]
    config = compose_run([*overrides, "data.chat_template=plain", "data.max_length=200"])
    records = list(iter_records(path, config.data.columns))
    tokenized = get_task(config.task).tokenize(records, load_tokenizer(config.model), data=config.data)
    assert written.plan.lengths.tolist() == tokenized.lengths.tolist()


@pytest.mark.parametrize(
    ("labels", "more", "note"),
    [
        (("yes", "no"), "a text,YES\n" * 6, "The labels 'YES', 'yes' look alike"),
        (("yes", "no"), ",yes\n" * 30, "A LARGE PART, 30 of 90 rows (33.3 %), cannot be used: 30 must not be"),
        (("yes", "nan"), "", "These labels may mean a missing value: nan. If so, remove them from labels."),
        (("yes", "no"), "", "max_length were proposed from nearly all records"),
    ],
)
def test_generated_notes_warn_of_data_problems(tmp_path: Path, labels: tuple[str, ...], more: str, note: str) -> None:
    assert note in write_experiment(write_table(tmp_path, 60, labels=labels, more=more)).notes


def test_tokens_unknown_to_the_model_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.unk_token_id", 225, raising=False)  # a space
    assert "% of the tokens are unknown to this model" in write_experiment(write_table(tmp_path, 60)).notes


def test_numeric_labels_are_sorted_and_unused_labels_omitted(tmp_path: Path) -> None:
    numbers = tuple(map(str, range(1, 11)))
    written = write_experiment(write_table(tmp_path, 200, labels=numbers, more=",never with a text\n" * 30))
    assert written.settings["data"]["labels"] == list(numbers)
    assert "Not a class, because at most one usable row has it: 1 label." in written.notes
    assert experiment_writer.sort_labels(["10 stars", "-1", "2 stars", "b", "1.5"]) == [
        "-1",
        "1.5",
        "2 stars",
        "10 stars",
        "b",
    ]


@pytest.mark.parametrize("separator", ["", ";b"])
def test_label_of_a_single_row_is_not_published(tmp_path: Path, separator: str) -> None:
    labels = (f"yes{separator}", f"no{separator}", "yes")
    written = write_experiment(write_table(tmp_path, 60, labels=labels, more=f"a text,a rare case{separator}\n"))
    assert written.settings["data"]["labels"] == sorted({"no", "yes", *separator.removeprefix(";")})
    assert "at most one usable row has it: 1 label." in written.notes


@pytest.mark.parametrize("words", [120, 5000])
def test_max_length_covers_most_texts(tmp_path: Path, words: int) -> None:
    rows = [{"body": "ab " * (words if number % 20 else 3 * words), "kind": "ab"[number % 2]} for number in range(200)]
    written = write_experiment(write_lines(tmp_path, *rows))
    median = int(written.plan.lengths[1])
    assert median > 256, "which a record of such a file has at most otherwise"
    assert written.plan.max_length == min(512, -(-median // 16) * 16)
    truncated = int((written.plan.lengths > written.plan.max_length).sum())
    assert written.notes.splitlines()[-1].startswith(f"{truncated:,} of 200 records are longer than max_length (")


def test_note_warns_about_truncated_contexts(tmp_path: Path) -> None:
    rows = [
        {"question": f"what of {n}?", "context": "a " * (3000 if n % 5 else 3), "answer": f"it is {n}, and so"}
        for n in range(60)
    ]
    written = write_experiment(write_lines(tmp_path, *rows), model="random_llama")
    assert "and lose the middle of their longest text" in written.notes


def test_single_long_record_does_not_change_max_length(tmp_path: Path) -> None:
    before = write_experiment(write_table(tmp_path, 120)).plan.max_length
    written = write_experiment(write_table(tmp_path, 120, more=f"{'word ' * 200},yes\n"))
    assert written.plan.max_length == before
    assert "; 1 of 121 records are longer and are truncated" in written.text


# Sites by a column, and persons.


def write_visits(folder: Path, person: Callable[[int], str], *, blank: int = 0, **chosen: str) -> Made:
    rows = [
        f"text {number},{'ab'[number % 2]},{'' if number < blank else 'NS'[number // 100]},{person(number)}"
        for number in range(200)
    ]
    (folder / "visits.csv").write_text("\n".join(["body,team,org,PatientID", *rows]) + "\n")
    return write_experiment(folder / "visits.csv", **chosen)


def test_site_column_partitions_the_file_by_name_and_size(tmp_path: Path) -> None:
    sites = ("N Coast", "South", "South")
    rows = [f"text {number},{'ab'[number % 2]},{sites[number % 3]}" for number in range(120)]
    (tmp_path / "visits.csv").write_text("\n".join(["body,desk,carrier", *rows]) + "\n")
    with pytest.raises(DataError, match="columns desk, carrier = 'several possible answers'"):
        write_experiment(tmp_path / "visits.csv")
    config = write_experiment(tmp_path / "visits.csv", site="carrier").compose()
    assert dict(config.data.partition.sites) == {"N Coast": 0, "South": 1}
    assert (config.data.columns["site"], config.federation.names) == ("carrier", ("N-Coast", "South"))
    assert (config.data.declared_sizes, config.data.dataset) == ((28, 56), "visits")
    text = (tmp_path / "visits.csv").read_text().replace("N Coast", "Köln").replace("South", "K?ln")
    (tmp_path / "visits.csv").write_text(text)
    config = write_experiment(tmp_path / "visits.csv", site="carrier").compose()
    assert (config.federation.names, len(config.data.partition.sites)) == (("site-1", "site-2"), 2), "alike as names"


def test_site_column_with_split_persons_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--site = 'org': must be the same in all records of a person"):
        write_visits(tmp_path, lambda number: f"p{number % 60}", site="org")
    with pytest.raises(
        ConfigError, match=r"--site = 'org': must have at least 20 records or people at each site; N has 10"
    ):
        write_visits(tmp_path, lambda number: f"p{number // 10}", site="org")


def test_sites_count_persons_and_skip_rows_without_an_id(tmp_path: Path) -> None:
    written = write_visits(tmp_path, lambda number: f"p{number // 4}", blank=2, site="org")
    assert (written.plan.places, written.plan.units, written.plan.left_out.count) == ({"N": 25, "S": 25}, 50, 2)
    assert (written.settings["data"]["declared_sizes"], written.settings["data"]["on_bad_record"]) == ([17, 17], "skip")
    written = write_visits(tmp_path, lambda number: f"p{number}" if number else "")
    assert (written.plan.units, written.plan.usable, written.plan.left_out.count) == (199, 199, 1)
    assert (written.settings["privacy"]["unit"], written.settings["data"]["on_bad_record"]) == ("user", "skip"), (
        "one has no id"
    )


def test_ids_differing_only_in_case_are_counted(tmp_path: Path) -> None:
    written = write_visits(tmp_path, lambda number: f"{'Pp'[number % 2]}{number // 2 % 50}@example.org")
    assert (written.plan.units, written.plan.alike) == (100, 50)
    assert "50 ids of persons are like another" in written.notes
