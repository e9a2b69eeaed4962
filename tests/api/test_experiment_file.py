"""Experiments in users' own files, and overrides of them."""

from pathlib import Path

import pytest
import yaml

from fedtune.api.compose import compose_run
from fedtune.lab.studies.trials import Trials
from fedtune.spec import ConfigError

from ..cli import snapshots

EXPERIMENT = """\
defaults:
  - own_data
  - override /model: random_bert
name: tickets
data:
  train_file: tickets.csv
  columns: {text: body, label: team}
  labels: [0, 1]
  declared_sizes: 100
"""
INVALID = yaml.safe_load(Path(__file__).with_name("invalid_experiments.yaml").read_text())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tickets.yaml"
    file.write_text(EXPERIMENT)
    (tmp_path / "tickets.csv").write_text("body,team\na,0\n")
    return file


def test_experiment_file_composes_like_a_packaged_experiment(path: Path) -> None:
    config = compose_run([f"experiment={path}"])
    assert (config.name, config.model.path, config.training.optimizer) == ("tickets", "random:bert", "adamw")
    assert config.data.columns == {"text": "body", "label": "team"}
    assert config.data.labels == ("0", "1"), "whole numbers become text"
    assert config.data.train_file == str(path.parent / "tickets.csv"), "relative to the experiment file"


def test_escaped_dollar_sign_is_taken_literally(path: Path) -> None:
    path.write_text(EXPERIMENT.replace("[0, 1]", "['\\${seed}', 2026-11-28, 010, 1:30, 0x1F, 1_000, yes, 3.0.0]"))
    config = compose_run(
        [f"experiment={path}", "report.about.curator='\\${name}'", "data.columns.site='${oc.env:HOME}'"]
    )
    assert config.data.labels == ("${seed}", "2026-11-28", "010", "1:30", "0x1F", "1_000", "yes", "3.0.0")
    assert (config.report.about.curator, config.data.columns["site"]) == ("${name}", "${oc.env:HOME}")


def test_command_line_overrides_win_over_the_file(path: Path) -> None:
    overrides = ["data.declared_sizes=50", "data.train_file=other.csv", "lora={rank: 3}", "lora=qv"]
    config = compose_run([f"experiment={path}", *overrides])
    assert (config.data.declared_sizes, config.data.train_file) == (50, "other.csv")
    assert (config.lora.rank, config.lora.target_modules) == (3, ("query", "value"))
    path.write_text(f"{EXPERIMENT}report: {{about: {{curator: Ann}}}}\nseed: 4\n")
    config = compose_run([f"experiment={path}", "report.language=de"])
    assert (config.report.about.curator, config.report.language, config.seed) == ("Ann", "de", 4)


def test_mapping_in_a_file_replaces_the_default_in_sweeps(path: Path) -> None:
    path.write_text(EXPERIMENT.replace("{text: body, label: team}", "{text: body, label: team, site: org}"))
    runs = [trial.config for trial in Trials.from_sweep([f"experiment={path}", "privacy.epsilon=1,3"]).rows.values()]
    assert [run.privacy.epsilon for run in runs] == [1.0, 3.0]
    assert all(run.data.columns == {"text": "body", "label": "team", "site": "org"} for run in runs)


@pytest.mark.parametrize("case", INVALID, ids=str)
def test_invalid_experiment_file_is_named(path: Path, case: dict[str, str]) -> None:
    content = EXPERIMENT.replace(case.get("old", ""), case.get("new", "")) + case.get("added", "")
    path.write_text(case.get("text", content))
    with pytest.raises(ConfigError) as error:
        compose_run([f"experiment={path}"])
    assert str(path) in str(error.value)
    assert case["key"] in error.value.key
    assert case["message"] in error.value.bound


@snapshots.parametrize_mistakes("mistakes-typed")
def test_misspelled_experiment_keys_suggest_the_known_key(path: Path, typed: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_run([f"experiment={path}", "federation.num_sites=2", typed.replace("NINES", "9" * 5000)])
    snapshots.check_message("mistakes-typed", typed, str(error.value))


def test_invalid_override_error_does_not_name_the_experiment_file(path: Path) -> None:
    for override in ("data.labels=[1.5]", "data={max_length: -1}"):
        with pytest.raises(ConfigError) as error:
            compose_run([f"experiment={path}", override])
        assert str(error.value).startswith("data.")
    path.write_text(EXPERIMENT + "  validation_fraction: 0.1")
    data = compose_run([f"experiment={path}", "data.validation_file=own.csv"]).data
    assert (data.validation_file, data.validation_fraction) == ("own.csv", 0.0), "a file replaces the fraction"
    path.write_text(EXPERIMENT + "  validation_file: " + "x" * 300)
    assert compose_run([f"experiment={path}"]).data.validation_file == "x" * 300, "checked when it is read"


def test_experiment_overrides_are_parsed_like_command_line_overrides(path: Path) -> None:
    def compose_data(*overrides: str) -> object:
        return compose_run([f"experiment={path}", *overrides]).data

    writer = ["task=causal_lm", "training.learning_rate=1", "data.labels=[]", "data.columns={prompt: a, completion: b}"]
    assert compose_data(*writer, "data.prompt_template=Q: {prompt}\\nA:").prompt_template == "Q: {prompt}\nA:"  # type: ignore[attr-defined]
    assert compose_data(*writer, "data.prompt_template='Q: {prompt}\\nA:'").prompt_template == "Q: {prompt}\nA:"  # type: ignore[attr-defined]
    assert compose_data("data.labels=[Störung,'a ä']").labels == ("Störung", "a ä")  # type: ignore[attr-defined]
    by_site = ("data.columns.site=org", "data.partition.kind=column", "data.partition.sites={o: 0, p: 1, q: 2, r: 3}")
    columns = compose_data("data.columns={text: a, label: b}", *by_site).columns  # type: ignore[attr-defined]
    assert columns == {"text": "a", "label": "b", "site": "org"}


@snapshots.parametrize_mistakes("mistakes-experiments")
def test_misspelled_experiment_suggests_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mails.yaml").write_text("defaults: [debug]\nname: mails\n")
    for compose in (compose_run, Trials.from_sweep):
        with pytest.raises(ConfigError) as error:
            compose(typed.replace("LONG", "m" * 5000).split())
        snapshots.check_message("mistakes-experiments", typed, str(error.value))
