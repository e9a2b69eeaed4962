"""`fedtune data init`: a file, what it is, and an experiment that composes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.compose import compose_run

TEAMS = ("billing", "sales")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [f"ticket {number} about {TEAMS[number % 2]},{TEAMS[number % 2]}" for number in range(60)]
    (tmp_path / "tickets.csv").write_text("\n".join(["body,team", *rows]) + "\n")
    pairs = [{"instruction": f"say {number}", "input": "", "output": "done"} for number in range(60)]
    (tmp_path / "alpaca.json").write_text(json.dumps(pairs))
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(60)))
    return tmp_path


def test_a_table_becomes_a_classification(here: Path, command: Any) -> None:
    outcome = command("data", "init", "tickets.csv", "--model", "random_bert")
    assert outcome.code == 0, outcome.err
    assert "fedtune simulate experiment=./tickets.yaml" in outcome.out
    config = compose_run(["experiment=./tickets.yaml"])
    assert (config.name, config.task, config.model.path) == ("tickets", "classification", "random:bert")
    assert (config.data.columns, config.data.labels) == ({"text": "body", "label": "team"}, TEAMS)


@pytest.mark.parametrize(("name", "roles"), [
    ("alpaca.json", {"prompt": "instruction", "input": "input", "completion": "output"}),
    ("chats.jsonl", {"messages": "messages"}),
])  # fmt: skip
def test_texts_for_a_language_model(here: Path, command: Any, name: str, roles: dict[str, str]) -> None:
    outcome = command("data", "init", name, "--model", "random_llama")
    assert outcome.code == 0, outcome.err
    config = compose_run([f"experiment=./{Path(name).stem}.yaml"])
    assert (config.task, config.data.columns, config.data.chat_template) == ("causal_lm", roles, "plain")


def test_nothing_is_overwritten(here: Path, command: Any) -> None:
    (here / "tickets.yaml").write_text("mine")
    outcome = command("data", "init", "tickets.csv", "--model", "random_bert")
    assert (outcome.code, (here / "tickets.yaml").read_text()) == (2, "mine")
    assert "exists" in outcome.message


def test_a_column_that_is_not_there(here: Path, command: Any) -> None:
    outcome = command("data", "init", "tickets.csv", "--label", "gone")
    assert (outcome.code, list(here.glob("*.yaml"))) == (2, [])
    assert outcome.message == "--label = 'gone': must be one of the columns body, team"
