"""What settings each task takes, and that reading them waits for no model library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.data import DataSpec
from fedtune.model import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.spec import ConfigError
from fedtune.tasks import TASKS, task_named

GIVEN: dict[str, Any] = {
    "dataset": "banking77",
    "train_file": "train.jsonl",
    "columns": {"text": "text", "label": "label"},
    "labels": ("a", "b"),
    "declared_sizes": 100,
    "max_length": 32,
}
GENERATION = {"columns": {"prompt": "mr", "completion": "ref"}, "labels": ()}


def columns(*roles: str, **given: Any) -> dict[str, Any]:
    return {"columns": {role: role for role in roles}, "labels": (), **given}


@pytest.mark.parametrize(
    ("wrong", "task", "message"),
    [
        (
            {},
            "riddles",
            "task = 'riddles': must be one of classification, multi_label, ordinal, regression, causal_lm, pr",
        ),
        ({"labels": ("a",)}, "classification", "labels = ['a']: must declare at least two"),
        (
            {"columns": {"text": "t"}},
            "classification",
            "columns = {'text': 't'}: must name the column for role 'label'",
        ),
        (
            {"columns": {"label": "label"}},
            "causal_lm",
            "columns = {'label': 'label'}: must name the column for role 'pr",
        ),
        (GENERATION | {"labels": ("a", "b")}, "causal_lm", "labels = ['a', 'b']: must be empty for task causal_lm"),
        (GENERATION | {"prompt_template": "{topic}"}, "causal_lm", "columns = "),
        (
            {"columns": {"text": "t", "label": "l", "text_pair": "u"}},
            "classification",
            "columns.text_pair = 'u': is no role of this run: task classification with these settings reads label,",
        ),
        ({"prompt_template": "Text: {text}"}, "classification", "prompt_template = 'Text: {text}': must stay {prompt}"),
        ({"chat_template": "plain"}, "classification", "chat_template = 'plain': must stay none"),
        (columns("messages", "prompt", "completion"), "causal_lm", "columns = "),
        (columns("messages", "text"), "causal_lm", "columns = "),
        (columns("text", "prompt", "completion"), "causal_lm", "columns = "),
        (columns("messages"), "causal_lm", "chat_template = 'none': must be model or plain for a column of messages"),
        (columns("text", chat_template="plain"), "causal_lm", "chat_template = 'plain': must be none for a text"),
        (columns("text", prompt_template="Say {prompt}"), "causal_lm", "prompt_template = 'Say {prompt}': must stay"),
    ],
)
def test_settings_for_another_task(wrong: dict[str, Any], task: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        task_named(task).check_data(DataSpec(**GIVEN | wrong))
    assert str(error.value).startswith(message)


def test_settings_that_fit_their_task() -> None:
    task_named("classification").check_data(DataSpec(**GIVEN))
    beside = {"text": "text", "label": "label", "user": "who", "site": "org"}
    task_named("classification").check_data(DataSpec(**GIVEN | {"columns": beside}))
    task_named("causal_lm").check_data(DataSpec(**GIVEN | GENERATION))
    for given in (columns("messages", chat_template="model"), columns("text"), columns("text", "user")):
        task_named("causal_lm").check_data(DataSpec(**GIVEN | given))


def test_the_roles_of_a_language_model_are_those_of_its_layout() -> None:
    task = task_named("causal_lm")

    def roles(*named: str, **given: Any) -> set[str]:
        return set(task.columns(DataSpec(**GIVEN | columns(*named, **given))))

    assert roles("messages", "label", chat_template="plain") == {"messages"}
    assert roles("text", "label") == {"text"}
    assert roles("prompt", "completion", "input", "system") == {"prompt", "completion"}
    templated = {"prompt_template": "{prompt}\n\n{input}"}
    assert roles("prompt", "completion", "input", "system", **templated) == {"prompt", "completion", "input"}
    assert "system" in roles("prompt", "completion", "system", chat_template="plain")


def checked(**values: Any) -> None:
    spec = TaskModelSpec(model=ModelSpec(path="m"), lora=LoraSpec(), task="classification", **values)
    task_named("classification").check_model(spec)


@pytest.mark.parametrize("labels", [(), ("a",), ("a", "a")])
def test_classification_needs_labels(labels: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"data\.labels"):
        checked(labels=labels)


def test_each_label_needs_its_text() -> None:
    head = HeadSpec(label_texts=("one",))
    with pytest.raises(ConfigError, match=r"head\.label_texts"):
        checked(labels=("a", "b"), head=head)


def test_tasks_import_without_torch() -> None:
    code = "import sys, fedtune.tasks; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_outside_the_room_knows_a_task_by_its_name() -> None:
    """A new task then touches its own file, the list of tasks and an experiment's settings."""
    package = Path(fedtune.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent != package / "tasks":
            texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            # A column of people's files is called so, too.
            columns = {"preference"} if path.name == "columns.py" else set()
            assert not texts & set(TASKS) - columns, path
