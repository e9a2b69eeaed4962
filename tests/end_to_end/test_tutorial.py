"""docs/tutorial.md and docs/other_tasks.md, line by line, from files that no other test reads."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "simulations" / "data" / "examples"
LABELS = {"card_arrival", "exchange_rate", "lost_or_stolen_card", "pending_cash_withdrawal", "request_refund"}
SHORT = (
    *("federation.num_rounds=1", "training.local_steps=1", "runtime.num_threads=1", "runtime.device=cpu"),
    *("runtime.micro_batch_tokens=256", "data.max_length=32"),  # so that less is tried before training
)
# A tiny model in the place of SmolLM2, which takes minutes; it has no template for turns of its own.
TINY = ("model=random_llama", "lora.layers=null", "lora.target_modules=all-linear", "evaluation.generation_rows=2")


def lines_of(file: str) -> list[list[str]]:
    """The commands of the pages that are about one of the files, without the word fedtune."""
    page = "".join((ROOT / "docs" / name).read_text() for name in ("tutorial.md", "other_tasks.md"))
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    commands = [line for kind, block in blocks if not kind for line in block.splitlines()]
    name = file.partition(".")[0]
    about = re.compile(rf"\b{name}\b")
    return [shlex.split(line)[1:] for line in commands if line.startswith("fedtune ") and about.search(line)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page's reader stands."""
    for file in EXAMPLES.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def follow(command: Any, file: str, simulated: tuple[str, ...], generated: tuple[str, ...] = ()) -> dict[str, Any]:
    """What each command of the page came to, by its first word; runs and answers are made short."""
    told = {}
    for words in lines_of(file):
        more = simulated if words[0] == "simulate" else generated if words[0] == "generate" else ()
        outcome = command(*words, *more)
        assert outcome.code == 0, (words, outcome.err)
        told[" ".join(words[:2]) if words[0] == "data" else words[0]] = outcome
    return told


ALL = {"data init", "data check", "simulate", "generate", "evaluate", "export"}


def test_a_csv_file_becomes_a_classifier(command: Any, folder: Path) -> None:
    told = follow(command, "tickets.csv", SHORT)
    assert set(told) == ALL
    assert re.match(r"card_arrival [01]\.\d{3} \(", told["generate"].out), "MiniLM knows the label by its name"
    assert "trained on records of this file" in " ".join(told["evaluate"].out.split())
    assert set((folder / "tickets-model" / "labels.txt").read_text().split()) == LABELS


@pytest.mark.parametrize(
    ("file", "template"),
    [
        ("places.json", ("data.chat_template=plain",)),
        ("chats.jsonl", ("data.chat_template=plain",)),
        ("speeches.parquet", ()),
    ],
)
def test_other_files_become_a_language_model(command: Any, folder: Path, file: str, template: tuple[str, ...]) -> None:
    told = follow(command, file, (*SHORT[:-1], *TINY, *template), ("--max-new-tokens", "5"))
    assert set(told) == ALL
    assert told["generate"].out.endswith("\n"), "of a random model also a blank"
    name = file.partition(".")[0]
    assert (folder / f"{name}-model" / "model.safetensors").is_file()
    settings = (folder / f"{name}.yaml").read_text()
    assert ("unit: user" in settings) == (name == "speeches")


@pytest.mark.parametrize(
    ("file", "scores", "answer"),
    [
        ("features.csv", {"micro_f1", "macro_f1", "auroc"}, r"none|coffee shop|cheap|families|riverside"),
        ("stars.csv", {"quadratic_kappa", "accuracy", "mae"}, r"[135] [01]\.\d{3} \("),
        ("shares.csv", {"spearman", "pearson", "rmse", "mae"}, r"[01]"),
        ("same_facts.jsonl", {"ndcg_at_10", "recall_at_1", "nearer"}, None),
        ("answers.jsonl", {"accuracy", "margin"}, r"(?s).*\n$"),
    ],
)
def test_other_tasks(command: Any, folder: Path, file: str, scores: set[str], answer: str | None) -> None:
    writes = file == "answers.jsonl"
    tiny = ("model=random_bert", "lora.layers=null", "lora.target_modules=[value]", SHORT[-1])
    settings = (*TINY, "data.chat_template=plain") if writes else tiny
    told = follow(command, file, (*SHORT[:-1], *settings), ("--max-new-tokens", "5") if writes else ())
    result = json.loads((folder / "runs" / file.partition(".")[0] / "run.json").read_text())
    assert scores <= set(result["final"]["metrics"])
    assert ("generate" in told) == (answer is not None)
    assert answer is None or re.match(answer, told["generate"].out), told["generate"].out


@pytest.mark.parametrize("file", [file.name for file in EXAMPLES.iterdir() if file.name != "README.md"])
def test_every_line_as_it_stands(command: Any, folder: Path, file: str) -> None:
    told = follow(command, file, ())
    assert "generate" not in told or told["generate"].out.strip()
