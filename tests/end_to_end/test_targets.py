"""Several labels, labels in an order, and a number: each from its file to a model that is used, private and not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..conftest import command, result_of, tiny

pytestmark = pytest.mark.nightly

LABELS = ("damaged", "late", "lost")
GRADES = ("low", "mid", "high")
ROLES = {"multi_label": "labels", "ordinal": "label", "regression": "target"}
SCORES = {
    "multi_label": ["micro_f1", "macro_f1", "exact", "auroc", "ece", "loss"],
    "ordinal": ["quadratic_kappa", "accuracy", "mae", "auroc", "ece", "loss"],
    "regression": ["spearman", "pearson", "rmse", "mae", "loss"],
}
JUDGED = {"multi_label": "auroc", "ordinal": "quadratic_kappa", "regression": "spearman"}
SPACE = ("card", "bank", "order", "item", "please", "where", "my", "the", "it", "is", "was", "now", "again", "bag")
tasks = pytest.mark.parametrize("task", ROLES)


def answered(task: str, draws: np.random.Generator) -> dict[str, Any]:
    """A record whose answer stands in its text."""
    found = [word for word in LABELS if draws.random() < 0.4]
    text = " ".join([*found, str(draws.choice(SPACE))])
    value = {"multi_label": ";".join(found), "ordinal": GRADES[min(len(found), 2)], "regression": len(found) + 0.5}
    return {"text": text, "answer": value[task]}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    into = tmp_path_factory.mktemp("runs")

    def make(*overrides: str, task: str, name: str) -> list[str]:
        draws = np.random.default_rng(4)
        file = into / f"{task}.jsonl"
        file.write_text("".join(json.dumps(answered(task, draws)) + "\n" for _ in range(240)))
        labels = {"multi_label": LABELS, "ordinal": GRADES, "regression": ()}[task]
        return [
            *tiny(into=into, name=name),
            *(f"task={task}", f"data.train_file='{file}'", "data.validation_file=null", "data.test_file=null"),
            *("data.validation_fraction=0.1", "data.test_fraction=0.3", "data.train_fraction=1.0"),
            *("data.test_rows=null", f"data.columns={{text: text, {ROLES[task]}: answer}}"),
            f"data.labels=[{','.join(labels)}]",
            *(["data.target_range=[0, 4]", "head.scale=1"] if task == "regression" else []),
            *overrides,
        ]

    return make


PLAIN = (
    *("privacy=none", "privacy.noise_multiplier=null", "training.learning_rate=0.01", "training.local_steps=12"),
    # By the draw of its samples a run without privacy may end elsewhere.
    *("training.head_learning_rate=0.05", "runtime.seeded_noise=true"),
)


@tasks
def test_a_private_run_is_scored_charged_and_reported(run: Any, task: str) -> None:
    folder = run("data.heldout_fraction=0.2", "privacy.metrics=noised", task=task)
    result = result_of(folder)
    assert result["task"] == task
    assert list(result["final"]["metrics"]) == SCORES[task]
    assert set(result["rounds"][0]["metrics"]) == set(SCORES[task]) - {"auroc", "ece"}
    assert 0 < result["privacy"]["epsilon"] < 8
    assert command("report", "verify", str(folder / "report.json")).code == 0
    detail = json.loads((folder / "report.json").read_text())["facts"]["detail"]
    page = (folder / "report.html").read_text()
    if task == "regression":
        assert (detail, result["final"]["detail"]) == (None, None)
        assert "chart-reliability" not in page
        return
    assert detail == result["final"]["detail"]
    assert [one["label"] for one in detail["classes"]] == list(LABELS if task == "multi_label" else GRADES)
    answers = sum(one["count"] for one in detail["reliability"])
    assert answers == result["provenance"]["test_rows"] * (3 if task == "multi_label" else 1)
    assert '<figure class="chart" id="chart-reliability">' in page


@tasks
def test_without_privacy_it_is_learnt(run: Any, task: str) -> None:
    final = result_of(run(*PLAIN, task=task))["final"]
    assert final["metrics"][JUDGED[task]] > final["metrics_before"][JUDGED[task]] + 0.2
    assert final["metrics"]["loss"] < final["metrics_before"]["loss"]


@tasks
def test_it_is_evaluated_beside_its_start(run: Any, tmp_path: Path, task: str) -> None:
    draws = np.random.default_rng(9)
    rows = [answered(task, draws) for _ in range(200)]
    (tmp_path / "new.json").write_text(json.dumps(rows))
    asked = ("evaluate", str(run(*PLAIN, task=task)), "--data", str(tmp_path / "new.json"))
    found = json.loads(command(*asked, "--json").printed)
    assert list(found["scores"]) == SCORES[task]
    assert found["beside_base"][JUDGED[task]]["verdict"] == "better"
    assert found["beside_base"]["loss"]["verdict"] == "better", "the lower, the better"
    assert ("detail" in found) == (task != "regression")
    assert ("How sure the tuned model is" in command(*asked).out) == (task != "regression")
