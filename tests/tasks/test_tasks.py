"""Settings that each task accepts, and reading them without importing model libraries."""

import ast
import random
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.data.features import FeatureSpec
from fedtune.data.records import parse_record
from fedtune.data.spec import DataSpec
from fedtune.data.text_rows import catch_row_error
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.base import Task
from fedtune.tasks.registry import TASKS, get_task

from ..cases import read_cases
from ..data.conftest import make_data_spec

LABELED, PROMPT, TURNS = ("text", "label"), ("prompt", "completion"), {"chat_template": "plain"}
SCORED, PAIR = ("text", "other", "target"), ("anchor", "positive")
WHOLE = ("chosen", "rejected")
TWO: dict[str, Any] = {"labels": ("a", "b")}
IN_RANGE: dict[str, Any] = {"target_range": (0.0, 5.0)}


def make_negatives(*texts: str) -> dict[str, Any]:
    return {"own": {"negatives": texts}}


def check_task(task: str, roles: tuple[str, ...], *, own: Any = None, **data_settings: Any) -> tuple[Task, DataSpec]:
    learner, data = get_task(task, own), make_data_spec(*roles, **data_settings)
    learner.check_own(data)
    learner.check_data(data)
    return learner, data


WRONG = read_cases(__file__, "invalid_settings")
CASES = [(task, *case) for task, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize(("task", "roles", "data_settings", "message"), CASES)
def test_incompatible_data_settings_are_refused(
    task: str, roles: tuple[str, ...], data_settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_task(task, roles, **data_settings)
    assert str(error.value).startswith(message)


FEATURE = {"input": "features", "max_length": 1, "features": (FeatureSpec(columns=("age",), range=(0.0, 110.0)),)}
FAULTY: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    *(("classification", (*LABELED, "user"), TWO), ("multi_label", ("text", "labels"), TWO)),
    *(("ordinal", ("label",), TWO | FEATURE), ("regression", ("text", "target"), IN_RANGE)),
    *(("survival", ("time", "event"), {"own": {"intervals": (1.0, 2.0)}} | FEATURE), ("votes", ("text",), TWO)),
    *(("token_classification", ("tokens", "tags"), TWO), ("token_classification", ("text", "spans"), TWO)),
    *(("causal_lm", PROMPT, {}), ("causal_lm", ("messages",), {"chat_template": "model"})),
    *(("causal_lm", ("text", "user"), {}), ("causal_lm", ("messages",), TURNS)),
    *(("preference", ("prompt", *WHOLE), {}), ("preference", WHOLE, TURNS)),
    *(("embedding", SCORED, IN_RANGE), ("embedding", PAIR, make_negatives("a text"))),
]


def draw_value(draws: random.Random) -> object:
    """Draw a value of any kind, with mostly distinct numbers and names."""
    number, name = draws.randrange(-5, 10_000), f"{draws.choice('abx')}{draws.randrange(10_000)}"
    turn = {"role": draws.choice(["user", "assistant", "system", name]), "content": draws.choice([name, "", number])}
    span = [draws.randrange(-1, 9), draws.randrange(5000), draws.choice(["a", name])]
    names = [draws.choice(["a", "O", "B-b", "I-x", "", name]) for _ in range(draws.randrange(9))]
    studio = {"start": span[0], "end": span[1], "labels": [span[2]]}
    spans = [[span], [span, [0, 1, "a"]], [[0, 1, "a"]], [studio]]
    texts = [name, name * 9, f"{name},{name}", str(names), str(number), "", "a", "b"]
    return draws.choice([*spans, *texts, number, number / 7, 1, 0, True, None, names, [turn, turn], turn, {name: 1}])


def list_faults(task: str, roles: tuple[str, ...], given: dict[str, Any], *, seed: int) -> set[tuple[object, str]]:
    learner, settings = check_task(task, roles, **given)
    columns = learner.columns(settings, unit="user" if "user" in roles else "record")
    fault, draws, found = learner.record_validator(settings), random.Random(seed), set()
    for _ in range(4000):
        row = {column: draw_value(draws) for column in columns.values()}
        error = catch_row_error("", parse_record, row, columns, file="a.jsonl", line=1)
        error = error if isinstance(error, DataError) else fault(error)
        found |= {(error.value, error.bound.partition("; ")[0])} if error else set()
    return found


@pytest.mark.parametrize(("task", "roles", "data_settings"), FAULTY, ids=lambda value: str(value)[:30])
def test_fault_messages_quote_no_record_text(task: str, roles: tuple[str, ...], data_settings: dict[str, Any]) -> None:
    first, second = (list_faults(task, roles, data_settings, seed=seed) for seed in (0, 1))
    assert first
    assert second - first == set()
    assert {task for task, *_ in FAULTY} == set(TASKS), "every task must be covered"


def test_language_model_columns_follow_from_the_layout() -> None:
    task = get_task("causal_lm")

    def list_roles(*roles: str, **data_settings: Any) -> set[str]:
        return set(task.columns(make_data_spec(*roles, **data_settings)))

    assert list_roles("messages", "label", chat_template="plain") == {"messages"}
    assert list_roles("text", "label") == {"text"}
    assert list_roles("prompt", "completion", "input", "system") == {"prompt", "completion"}
    templated = {"prompt_template": "{prompt}\n\n{input}"}
    assert list_roles("prompt", "completion", "input", "system", **templated) == {"prompt", "completion", "input"}
    assert "system" in list_roles("prompt", "completion", "system", chat_template="plain")


def check_labels(task: str, *labels: str, texts: tuple[str, ...] = ()) -> None:
    settings: Any = {"task": task, "labels": labels, "head": HeadSpec(label_texts=texts)}
    get_task(task).check_spec(TaskModelSpec(model=ModelSpec(path="m"), lora=LoraSpec(), **settings))


def test_too_few_or_duplicate_labels_are_refused() -> None:
    for task in ("classification", "ordinal", "multi_label", "votes"):
        for labels in ((), ("a",), ("a", "a")):
            with pytest.raises(ConfigError, match=r"^data\.labels = .*: must declare at least 2 labels for task"):
                check_labels(task, *labels)
        check_labels(task, "a", "b")
    for labels in ((), ("a", "a")):
        with pytest.raises(ConfigError, match=r"^data\.labels = .*: must declare at least 1 label for task"):
            check_labels("token_classification", *labels)
    check_labels("token_classification", "a")


def test_label_texts_must_match_the_number_of_labels() -> None:
    with pytest.raises(ConfigError, match=r"^head\.label_texts = "):
        check_labels("classification", "a", "b", texts=("one",))


def test_task_names_appear_only_in_the_tasks_package() -> None:
    """Adding a task therefore needs only its own module, the registry and an experiment's settings."""
    package = Path(fedtune.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent != package / "tasks":
            texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            # "preference" is also a column of users' files, and "votes" an argument.
            other = {"columns.py": {"preference"}, "synthetic.py": {"votes"}}.get(path.name, set())
            assert not texts & set(TASKS) - other, path
