"""Images from their files to a usable model: `data.input=image`, with and without privacy."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from ..cli import snapshots
from ..conftest import list_tiny_overrides, read_result, run_command
from ..export.conftest import run_elsewhere
from ..pictures import COLORS, encode_image, make_picture, write_pictures, write_vision_folder
from .conftest import find_run_folder

ENDS = "task_settings.intervals=[2,4,6]"
ANSWERS = {
    "classification": ["data.columns={image: image, label: label}"],
    "multi_label": ["data.columns={image: image, labels: several}", "data.labels=[red,green]"],
    "ordinal": ["data.columns={image: image, label: label}"],
    "regression": ["data.columns={image: image, target: number}", "data.labels=[]", "data.target_range=[0,2]"],
    "survival": ["data.columns={image: image, time: months, event: died}", "data.labels=[]", ENDS],
}
PLAIN = (
    *("privacy=none", "privacy.noise_multiplier=null", "federation.num_rounds=3", "training.local_steps=10"),
    *("training.learning_rate=0.05", "runtime.seeded_noise=true"),
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    folder = tmp_path_factory.mktemp("images")
    model = write_vision_folder(folder / "model")
    train, test = (write_pictures(folder, f"{count}.csv", count, seed=count) for count in (80, 60))

    def make(*overrides: str, task: str = "classification", name: str = "run") -> list[str]:
        return [
            *list_tiny_overrides("experiment=own_images", into=folder / "runs", name=name),
            *(f"model.path='{model}'", f"task={task}", f"data.labels=[{','.join(COLORS)}]", "data.max_length=5"),
            *(f"data.train_file='{train}'", f"data.test_file='{test}'", "federation.num_sites=2"),
            *("data.train_fraction=1", "data.declared_sizes=40", "data.test_rows=null", "data.validation_rows=null"),
            *ANSWERS[task],
            *overrides,
        ]

    return make


@pytest.mark.by_day("classification")
@pytest.mark.parametrize("task", ANSWERS)
def test_image_run_without_privacy_learns(run: Any, task: str) -> None:
    final = read_result(run(*PLAIN, task=task))["final"]
    assert final["metrics"]["loss"] < 0.8 * final["metrics_before"]["loss"]
    if task == "classification":
        assert final["metrics"]["accuracy"] > 0.8


def test_private_image_run_is_scored_charged_and_reported(run: Any) -> None:
    folder = run("federation.num_rounds=1", "training.local_steps=2", "training.learning_rate=0.05")
    assert 0 < read_result(folder)["privacy"]["epsilon"] < 8
    assert run_command("report", "verify", str(folder / "report.json")).code == 0
    assert "image" in (folder / "report.json").read_text()


@snapshots.parametrize_mistakes("mistakes-images")
def test_invalid_image_settings_raise_a_one_line_error(settings: Any, typed: str) -> None:
    words = settings(*shlex.split(typed), name="wrong")
    snapshots.check_message("mistakes-images", typed, run_command("simulate", *words).failed())
    assert not find_run_folder(words).exists()


@pytest.mark.nightly
@pytest.mark.parametrize("format", ["peft", "safetensors"])
def test_exported_image_model_works_without_fedtune(run: Any, tmp_path: Path, format: str) -> None:
    folder = run(*PLAIN)
    assert run_command("export", str(folder), "--to", str(tmp_path / "folder"), "--format", format).code == 0
    assert (tmp_path / "folder" / "preprocessor_config.json").is_file()
    assert (tmp_path / "folder" / "model.safetensors").is_file() == (format == "safetensors")
    image = make_picture(seed=3, size=(14, 9), tint=1)
    (tmp_path / "image.png").write_bytes(encode_image(image))
    outcome = run_command("generate", str(folder), "--prompt", str(tmp_path / "image.png"), "--json")
    answers = {item["label"]: item["probability"] for item in next(iter(json.loads(outcome.out)["answers"].values()))}
    (lines,) = re.findall(r"```python\n(.*?)```", (tmp_path / "folder" / "README.md").read_text(), re.DOTALL)
    blocked = "import sys; sys.modules['fedtune'] = None"
    printed = run_elsewhere("-c", f"{blocked}\n{lines}print(torch.softmax(scores, 0).tolist())", cwd=tmp_path)
    best, chances = printed.splitlines()
    assert COLORS[1] in best
    probs = dict(zip(COLORS, json.loads(chances), strict=True))
    assert {name: round(p, 3) for name, p in probs.items()} == {name: round(answers[name], 3) for name in COLORS}


def test_data_init_detects_images_in_parquet_and_requires_a_model(tmp_path: Path) -> None:
    model = write_vision_folder(tmp_path / "model")
    rows = {
        "scan": [{"bytes": encode_image(make_picture(seed=n)), "path": None} for n in range(30)],
        "label": ["a", "b", "b"] * 10,
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "scans.parquet")
    words = ("data", "init", str(tmp_path / "scans.parquet"), "--out", str(tmp_path / "scans.yaml"))
    message = "must be a folder with a vision transformer (see docs/other_tasks.md)"
    assert run_command(*words).message == f"--model = '': {message}"
    assert run_command(*words, "--model", str(model)).code == 0
    settings = yaml.safe_load((tmp_path / "scans.yaml").read_text())
    assert settings["data"]["columns"] == {"image": "scan", "label": "label"}
    assert (settings["data"]["max_length"], settings["data"]["labels"]) == (5, ["a", "b"])
    assert "lora" not in settings, "the recipe must leave all layers except the last unchanged"
    assert run_command("data", "check", str(tmp_path / "scans.yaml")).code == 0


@pytest.mark.nightly
def test_image_record_changes_a_step_by_at_most_the_clipping_norm(settings: Any) -> None:
    outcome = run_command(
        "audit", *settings("tracking=quiet", "audit.kind=sensitivity", "audit.tries=20", name="s"), "--json"
    )
    result = json.loads(outcome.printed)["result"]
    assert (result["tries"], result["exceeded"], result["others_moved"]) == (20, 0, 0)
    assert 0.9 < result["moved"] <= 1.0
