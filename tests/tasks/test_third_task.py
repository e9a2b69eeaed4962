"""A custom task, defined here with public names only, works in all commands."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune import tasks
from fedtune.config import read_saved_config
from fedtune.sites.shared_settings import read_settings, select_settings_for_sites, serialize_for_sites
from fedtune.tasks.registry import TASKS

from ..conftest import list_tiny_overrides, read_result, run_command, simulate

HEADS = ("length", "room")


@tasks.spec
class LengthSettings:
    longest: int = 16

    def __post_init__(self) -> None:
        tasks.check_at_least("longest", self.longest, 1)


class TextLength(tasks.Task):
    name = "text_length"
    roles = ("text",)
    settings = LengthSettings
    own: LengthSettings
    has_head = True

    def tokenize(
        self, records: Sequence[tasks.Record], tokenizer: Any, *, data: tasks.DataSpec, lenient_within: Any = None
    ) -> tasks.TextDataset:
        texts = [record.fields["text"][: tasks.compute_max_characters(data.max_length)] for record in records]
        encoded = tasks.encode(texts, tokenizer, special_tokens=True, max_length=data.max_length, within=lenient_within)
        input_ids = tuple(np.array(ids or [0], dtype=np.int32) for ids in encoded)
        return tasks.TextDataset(input_ids, self.list_targets(input_ids))

    def add_head(self, model: tasks.Model) -> None:
        size = model.base.config.get_text_config().hidden_size
        heads = {name: torch.nn.Linear(size, 1, bias=False, device=model.device) for name in HEADS}
        for head in heads.values():
            torch.nn.init.zeros_(head.weight)
        model.head = torch.nn.ModuleDict(heads)

    def logits(self, model: tasks.Model, batch: tasks.Batch) -> torch.Tensor:
        hidden = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        pooled = tasks.mean_pool(hidden, batch.attention_mask)
        # As in classification, because a product with few rows rounds differently.
        rows = torch.nn.functional.pad(pooled, (0, 0, 0, -len(pooled) % 32))
        assert isinstance(model.head, torch.nn.ModuleDict)
        return torch.cat([model.head[name](rows)[: len(pooled)] for name in HEADS], dim=1)

    def losses(self, model: tasks.Model, batch: tasks.Batch) -> torch.Tensor:
        return (self.logits(model, batch) - batch.targets).square().sum(dim=1)

    def scores(self, figures: Mapping[str, np.ndarray], *, spec: tasks.TaskModelSpec) -> dict[str, float]:
        return super().scores(figures, spec=spec) | {"worst": float(figures["loss"].max())}

    def score_unit(self, model: tasks.Model, batch: tasks.Batch) -> float:
        return float(np.exp(-float(model.losses(batch)[0])))

    def dummy_targets(self, input_ids: tasks.Ids, **options: Any) -> tasks.Targets:
        return self.list_targets(input_ids)

    def list_targets(self, input_ids: Sequence[np.ndarray]) -> np.ndarray:
        lengths = np.array([len(ids) for ids in input_ids], dtype=np.float32) / self.own.longest
        return np.stack([lengths, 1 - lengths], axis=1)


@pytest.fixture(scope="module", autouse=True)
def listed_task() -> Iterator[None]:
    tasks.register(TextLength)
    yield
    del TASKS[TextLength.name]


@pytest.fixture(scope="module")
def folder(listed_task: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(
        f"task={TextLength.name}",
        *(
            "task_settings.longest=20",
            "data.labels=[]",
            "data.heldout_fraction=0.2",
            "privacy.metrics=noised",
            "training.learning_rate=0.05",
        ),
        into=tmp_path_factory.mktemp("runs"),
    )


def test_third_party_task_is_simulated_and_reported(folder: Path) -> None:
    result = read_result(folder)
    assert result["task"] == "text_length"
    assert set(result["final"]["metrics"]) == {"loss", "worst"}
    assert 0 < result["privacy"]["epsilon"] < 8
    assert {path.name for path in (folder / "adapter").iterdir()} >= {"head.safetensors", "fedtune.json"}
    assert run_command("report", str(folder)).printed
    assert json.loads((folder / "report.json").read_text())["facts"]["provenance"]["task"] == "text_length"
    assert run_command("report", "verify", str(folder / "report.json")).code == 0
    assert "text_length" in (folder / "report.html").read_text()


def test_custom_task_setting_is_sent_to_sites_and_validated(folder: Path) -> None:
    sent = select_settings_for_sites(read_saved_config(folder))
    assert read_settings(serialize_for_sites(sent), plan=sent.plan(), task=sent.task).bound_task.own == LengthSettings(
        longest=20
    )
    assert json.loads((folder / "adapter" / "fedtune.json").read_text())["task_settings"] == {"longest": 20}
    recipe = folder.parent / "lengths.yaml"
    for value, message in (
        ("longest: 0", "longest = 0: must be a finite number of at least 1"),
        ("longest: long", "longest = 'long': must be a whole number"),
        ("shortest: 3", "shortest = 3: is not a setting of task text_length; its own settings: longest"),
    ):
        recipe.write_text(f"task: {TextLength.name}\ntask_settings: {{{value}}}\ndata: {{labels: []}}\n")
        typed = (f"task={TextLength.name}", f"task_settings.{value.replace(': ', '=')}", "data.labels=[]")
        outcomes = [run_command("plan", *words) for words in (typed, (f"experiment={recipe}",))]
        assert [one.code for one in outcomes] == [2, 2]
        assert [one.message for one in outcomes] == [f"task_settings.{message}", f"{recipe}: task_settings.{message}"]


def test_third_party_task_is_evaluated_planned_and_exported(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.csv"
    data.write_text("text\nwhere is my card\nlost\n")
    assert "worst" in run_command("evaluate", str(folder), "--data", str(data)).printed
    assert run_command("plan", *list_tiny_overrides(f"task={TextLength.name}", "data.labels=[]", into=tmp_path)).printed
    assert run_command("export", str(folder), "--to", str(tmp_path / "exported")).printed
    assert (tmp_path / "exported" / "head.safetensors").is_file()
    refused = run_command("export", str(folder), "--to", str(tmp_path / "whole"), "--merge").failed()
    assert refused == "--merge: is not available for task text_length, which has only adapters"
    refused = run_command("simulate", *list_tiny_overrides("task=riddles", into=tmp_path)).failed()
    assert refused.startswith(f"task = 'riddles': must be one of {', '.join(TASKS)}, or an installed custom task")
