"""docs/tutorial.md and docs/other_tasks.md, line by line, from files that no other test reads."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, command

pytestmark = pytest.mark.nightly

EXAMPLES = REPOSITORY / "simulations" / "data" / "examples"
LABELS = {"card_arrival", "exchange_rate", "lost_or_stolen_card", "pending_cash_withdrawal", "request_refund"}


def lines_of(file: str) -> list[list[str]]:
    """The commands of the pages that are about one of the files, without the word fedtune."""
    page = "".join((REPOSITORY / "docs" / name).read_text() for name in ("tutorial.md", "other_tasks.md"))
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


ALL = {"data init", "data check", "simulate", "generate", "evaluate", "export"}
# Of each file, scores that its run has and how what its model says begins.
FILES: dict[str, tuple[set[str], str]] = {
    "tickets.csv": ({"accuracy", "macro_f1"}, r"card_arrival [01]\.\d{3} \("),  # MiniLM knows the label by its name
    "places.json": ({"loss"}, r"\s*\S"),
    "chats.jsonl": ({"loss"}, r"\s*\S"),
    "speeches.parquet": ({"loss"}, r"\s*\S"),
    "features.csv": ({"micro_f1", "macro_f1", "auroc"}, r"none|coffee shop|cheap|families|riverside"),
    "stars.csv": ({"quadratic_kappa", "accuracy", "mae"}, r"[135] [01]\.\d{3} \("),
    "shares.csv": ({"spearman", "pearson", "rmse", "mae"}, r"[01]"),
    "same_facts.jsonl": ({"ndcg_at_10", "recall_at_1", "nearer"}, ""),
    "answers.jsonl": ({"accuracy", "margin"}, r"\s*\S"),
}


@pytest.mark.parametrize("file", [file.name for file in EXAMPLES.iterdir() if file.name != "README.md"])
def test_every_line_as_it_stands(folder: Path, file: str) -> None:
    told = {}
    for words in lines_of(file):
        outcome = command(*words)
        assert outcome.code == 0, (words, outcome.err)
        told[" ".join(words[:2]) if words[0] == "data" else words[0]] = outcome
    assert {"data init", "simulate", "evaluate"} <= set(told) <= ALL
    name, (scores, answer) = file.partition(".")[0], FILES[file]
    result = json.loads((folder / "runs" / name / "run.json").read_text())
    assert scores <= set(result["final"]["metrics"])
    assert ("generate" in told) == (answer != "")
    assert not answer or re.match(answer, told["generate"].out), told["generate"].out
    assert ("unit: user" in (folder / f"{name}.yaml").read_text()) == (name == "speeches")
    if file == "tickets.csv":
        assert "trained on records of this file" in " ".join(told["evaluate"].out.split())
        assert set((folder / "tickets-model" / "labels.txt").read_text().split()) == LABELS
