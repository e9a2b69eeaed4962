"""Tabular data from the file to a usable model: `data.input=features`, with and without privacy, plain and secure."""

import csv
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..cli import snapshots
from ..conftest import list_tiny_overrides, read_result, run_command
from ..export.conftest import run_elsewhere
from .conftest import find_run_folder

COLUMNS = {"classification": "label", "multi_label": "labels", "ordinal": "label", "regression": "target"}
FEATURES = (
    "[{columns: [age, crp], range: [0, 100], missing: indicator}, {columns: [ward], categories: [a, b]},"
    " {columns: [states], range: [-1, 1], size: 2}]"
)
METRICS = dict(zip(COLUMNS, ("accuracy", "micro_f1", "quadratic_kappa", "spearman"), strict=True))
SCORES = tomllib.loads(Path(__file__).with_name("feature_task_scores.toml").read_text())


def make_patients(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Create patients whose label depends on age, ward and one of their conditions."""
    draws = np.random.default_rng(seed)
    patients = []
    for _ in range(count):
        age, crp = float(draws.uniform(10, 95)), float(draws.uniform(0, 100))
        ward, state = str(draws.choice(["a", "b", "c"])), float(draws.uniform(-1, 1))
        risk = (age - 50) / 40 + state + (ward == "b")
        patients.append(
            {
                "age": age,
                "crp": "" if draws.random() < 0.2 else crp,
                "ward": ward,
                "states": json.dumps([state, float(draws.uniform(-1, 1))]),
                "classification": "sick" if risk > 0.3 else "well",
                "multi_label": ";".join(name for name, holds in (("old", age > 60), ("b", ward == "b")) if holds),
                "ordinal": ("low", "mid", "high")[int(np.digitize(risk, [-0.2, 0.6]))],
                "regression": round(float(np.clip(risk, -2, 3)), 3),
            }
        )
    return patients


LABELS = {"classification": "[sick,well]", "multi_label": "[old,b]", "ordinal": "[low,mid,high]", "regression": "[]"}


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return file


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    folder = tmp_path_factory.mktemp("runs")
    files = {
        name: write_csv(folder / f"{name}.csv", make_patients(count, seed=count))
        for name, count in (("in", 400), ("out", 200))
    }

    def make(*overrides: str, task: str = "classification", name: str = "run") -> list[str]:
        return [
            *list_tiny_overrides("experiment=own_features", into=folder, name=name),
            *(f"task={task}", f"data.train_file='{files['in']}'", f"data.test_file='{files['out']}'"),
            f"data.columns={{{COLUMNS[task]}: {task}}}",
            *(f"data.features={FEATURES}", f"data.labels={LABELS[task]}", "data.max_length=1"),
            *("data.train_fraction=1", "data.declared_sizes=100", "data.test_rows=null", "data.validation_rows=null"),
            *(("data.target_range=[-2,3]", "head.scale=3") if task == "regression" else ()),
            *overrides,
        ]

    return make


PLAIN = (
    *("privacy=none", "privacy.noise_multiplier=null", "federation.num_rounds=4", "training.local_steps=10"),
    *("training=adamw", "training.learning_rate=0.1", "runtime.seeded_noise=true"),
)


NOISED = (
    *("data.validation_fraction=0.1", "data.heldout_fraction=0.2", "privacy.metrics=noised", "federation.num_rounds=2"),
)


@pytest.mark.by_day("classification", "regression")
@pytest.mark.parametrize("task", COLUMNS)
def test_feature_run_without_privacy_learns(run: Any, task: str) -> None:
    final = read_result(run(*PLAIN, task=task))["final"]
    assert final["metrics"][METRICS[task]] > 0.8
    assert final["metrics"]["loss"] < final["metrics_before"]["loss"]


def test_private_feature_run_is_planned_scored_charged_and_reported(run: Any, settings: Any) -> None:
    outcome = run_command("plan", *settings(), "--time")
    assert "the head 20 trained parameters" in (words := " ".join(outcome.printed.split()))
    assert "with every example of this size" in words
    folder = run(*NOISED)
    result = read_result(folder)
    assert result["provenance"]["base_model"]["path"] == "none"
    page = (folder / "report.html").read_text()
    assert "training of a head without a base model: each site" in page
    assert "LoRA" not in page
    names = {"README.md", "fedtune.json", "head.safetensors", "label.svg"}
    assert {path.name for path in (folder / "adapter").iterdir()} == names


@pytest.mark.by_day("regression")
@pytest.mark.parametrize("task", COLUMNS)
def test_feature_task_scores_appear_in_run_report_and_evaluation(run: Any, tmp_path: Path, task: str) -> None:
    folder = run(*NOISED, task=task)
    result, report = read_result(folder), json.loads((folder / "report.json").read_text())
    assert 0 < result["privacy"]["epsilon"] < 8
    assert list(result["final"]["metrics"]) == SCORES[task]
    assert set(result["rounds"][0]["metrics"]) == set(SCORES[task]) - {"auroc", "ece"}
    assert run_command("report", "verify", str(folder / "report.json")).code == 0
    words = (
        "evaluate",
        str(run(*PLAIN, task=task)),
        "--data",
        str(write_csv(tmp_path / "new.csv", make_patients(120, seed=7))),
    )
    output, shown = json.loads(run_command(*words, "--json").printed), run_command(*words).out
    assert list(output["scores"]) == SCORES[task]
    for score in (METRICS[task], "loss"):
        assert output["beside_base"][score]["verdict"] == "better", "a lower loss is better"
    detail, page = result["final"]["detail"], (folder / "report.html").read_text()
    assert report["facts"].get("detail") == detail
    for present in ("detail" in output, "Calibration of the tuned model" in shown, 'id="chart-reliability">' in page):
        assert present == (task != "regression") == (detail is not None)
    if detail is not None:
        labels = LABELS[task].strip("[]").split(",")
        assert [group["label"] for group in detail["classes"]] == labels
        answers = sum(group["count"] for group in detail["reliability"])
        assert answers == result["provenance"]["test_rows"] * (len(labels) if task == "multi_label" else 1)


def test_feature_run_is_evaluated_compared_and_generates(run: Any, tmp_path: Path) -> None:
    folder, other = run(*PLAIN), run(*PLAIN, "head.hidden=[8]")
    assert read_result(other)["final"]["metrics"]["accuracy"] > 0.8, "a small network must learn it, too"
    shapes = {name: tensor.shape for name, tensor in load_file(other / "adapter" / "head.safetensors").items()}
    assert shapes == {"0.weight": (8, 9), "0.bias": (8,), "2.weight": (2, 8), "2.bias": (2,)}
    texts = run_command("export", str(folder), "--to", str(tmp_path / "folder"), "--format", "peft")
    assert (texts.code, texts.message.split(":")[0]) == (2, "--format = 'peft'")
    assert not (tmp_path / "folder").exists()
    file = write_csv(tmp_path / "new.csv", make_patients(120, seed=7))
    assert run_command("compare", str(folder), str(other), "--data", str(file), "--json").code == 0
    patients = [{key: row[key] for key in ("age", "crp", "ward", "states")} for row in make_patients(120, seed=7)]
    outcome = run_command("generate", str(folder), "--file", str(write_csv(tmp_path / "asked.csv", patients)), "--json")
    labels = [next(iter(json.loads(line)["answers"].values()))[0]["label"] for line in outcome.printed.splitlines()]
    truth = [row["classification"] for row in make_patients(120, seed=7)]
    assert np.mean([label == true for label, true in zip(labels, truth, strict=True)]) > 0.8


@pytest.mark.nightly
def test_feature_run_works_with_secure_aggregation(run: Any) -> None:
    result = read_result(run("federation.aggregation=secure", "federation.num_rounds=3", "training.local_steps=1"))
    assert len(result["rounds"]) == 3


@pytest.mark.nightly
@pytest.mark.parametrize("unit", ["record", "user"])
def test_feature_record_changes_a_step_by_at_most_the_clipping_norm(settings: Any, tmp_path: Path, unit: str) -> None:
    user_settings = ("privacy.unit=user", "+data.columns.user=ward") if unit == "user" else ()
    search = ("tracking=quiet", "audit.kind=sensitivity", "audit.tries=20", "head.hidden=[8]", *user_settings)
    result = json.loads(run_command("audit", *settings(*search, name=f"searched-{unit}"), "--json").printed)["result"]
    assert (result["tries"], result["exceeded"], result["others_moved"]) == (20, 0, 0)
    assert 0.9 < result["moved"] <= 1.0


@snapshots.parametrize_mistakes("mistakes-features")
def test_invalid_feature_settings_raise_a_one_line_error(settings: Any, typed: str) -> None:
    words = settings(*shlex.split(typed), name="wrong")
    snapshots.check_message("mistakes-features", typed, run_command("simulate", *words).failed())
    assert not find_run_folder(words).exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("task", "hidden", "format"), [("classification", "[8]", "safetensors"), ("regression", "[]", "onnx")]
)
def test_exported_feature_model_makes_the_same_predictions(
    run: Any, tmp_path: Path, task: str, hidden: str, format: str
) -> None:
    folder = run(*PLAIN, *(() if hidden == "[]" else (f"head.hidden={hidden}",)), task=task)
    assert run_command("export", str(folder), "--to", str(tmp_path / "folder"), "--format", format).code == 0
    assert (tmp_path / "folder" / "features.json").is_file()
    patients = [{key: row[key] for key in ("age", "crp", "ward", "states")} for row in make_patients(12, seed=9)]
    write_csv(tmp_path / "asked.csv", patients)
    outcome = run_command("generate", str(folder), "--file", str(tmp_path / "asked.csv"), "--json")
    answers = [next(iter(json.loads(line)["answers"].values())) for line in outcome.out.splitlines()]

    card = (tmp_path / "folder" / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    before, row, after = re.fullmatch(r"(.*\n)(row = .*?\n)(.*)", lines, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    assert row.startswith("row = {")
    rows = [p | {"crp": None if p["crp"] == "" else p["crp"], "states": json.loads(p["states"])} for p in patients]
    loop = "".join(f"    {line}\n" for line in after.splitlines())
    before = f"import sys; sys.modules.update(dict.fromkeys(('fedtune', 'torch', 'transformers')))\n{before}"
    printed = run_elsewhere("-W", "error", "-c", f"{before}for row in {rows!r}:\n{loop}", cwd=tmp_path).split()
    if task == "regression":
        numbers = [answer["number"] for answer in answers]
        np.testing.assert_allclose(np.clip([float(number) for number in printed], -2, 3), numbers, atol=1e-4)
    else:
        assert printed == [answer[0]["label"] for answer in answers]
