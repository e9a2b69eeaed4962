"""Registries of inputs and tasks: built-in tasks, and custom tasks from `register` or an installed package.

`fedtune/tasks/base.py` and `inputs.py` explain how to add one.  The import is fast: models are built in other modules,
because importing torch and its dependencies takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from fedtune.data.records import Record
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import TextDataset, Tokenizer
from fedtune.extras import load_entry_point
from fedtune.spec import ConfigError, check_name
from fedtune.tasks.base import Task
from fedtune.tasks.causal_lm import CausalLM
from fedtune.tasks.classification import Classification
from fedtune.tasks.embedding import Embedding
from fedtune.tasks.image_input import Image
from fedtune.tasks.inputs import INPUTS
from fedtune.tasks.multi_label import MultiLabel
from fedtune.tasks.ordinal import Ordinal
from fedtune.tasks.preference import Preference
from fedtune.tasks.regression import Regression
from fedtune.tasks.survival import Survival
from fedtune.tasks.token_classification import TokenClassification
from fedtune.tasks.votes import Votes

_WITH_HEADS = (Classification, MultiLabel, Ordinal, Regression, Survival, TokenClassification)
_OTHERS = (CausalLM, Preference, Embedding, Votes)
TASKS: dict[str, Task] = {task.name: task() for task in (*_WITH_HEADS, *_OTHERS)}
INPUTS["image"] = Image()


ENTRY_POINTS = "fedtune.tasks"
"""Entry point group in which an installed package declares its tasks: `name = "module:Class"`."""
_OwnTask = TypeVar("_OwnTask", bound=type[Task])


def register(task: _OwnTask) -> _OwnTask:
    """Register a custom task under its `name`, for settings and policies in this process.

    Usable as a decorator.  A notebook may register a changed class of the same name again.

    Raises:
        ConfigError: for `task`, if the name is invalid, or another task already has it.
    """
    check_name("task", task.name)
    known = type(TASKS.get(task.name, task))
    if task.name in TASKS and (known.__module__, known.__qualname__) != (task.__module__, task.__qualname__):
        taken = f"is already the name of {known.__module__}.{known.__qualname__}; choose another `name`"
        raise ConfigError("task", task.name, taken)
    TASKS[task.name] = task()
    return task


def find_task(name: str) -> Task | None:
    """Return the built-in, registered or installed task with this name, or None if the name is unknown.

    A package's module is imported only here, through the entry point that declares the task. fedtune's own names take
    precedence.

    Raises:
        ConfigError: for `task`, if the package cannot be used.
    """
    if name not in TASKS and (declared := load_entry_point(ENTRY_POINTS, name, key="task")) is not None:
        if not (isinstance(declared, type) and issubclass(declared, Task) and declared.name == name):
            bound = "is declared by an installed package, but not as a subclass of fedtune.tasks.Task with this `name`"
            raise ConfigError("task", name, bound)
        register(declared)
    return TASKS.get(name)


def get_task(name: str, given: object = None) -> Task:
    """Return the task with this name and these settings; None selects its default settings.

    Raises:
        ConfigError: for `task`, if the name is unknown, or for one of `task_settings`.
    """
    if name == "cox":
        bound = "couples records: each partial likelihood depends on all records still at risk, so clipping "
        raise ConfigError("task", name, f"{bound}would not bound one record's influence; use task=survival")
    if (task := find_task(name)) is None:
        bound = f"must be one of {', '.join(TASKS)}, or an installed custom task (docs/own_task.md)"
        raise ConfigError("task", name, bound)
    return task if given is None else task.with_settings(given)


def tokenize_separately(
    task: Task, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec, lenient_within: int | None = None
) -> TextDataset:
    """Tokenize records as `Task.tokenize` does; a custom task gets one record at a time.

    Guarantee: a record becomes exactly one example, which depends on that record alone.  Code in the task that keeps
    records from one call to the next would break the guarantee.

    Raises:
        ConfigError: for `task`, if a record became several examples, or none.
    """
    if not records or type(task).__module__.startswith("fedtune."):
        return task.tokenize(records, tokenizer, data=data, lenient_within=lenient_within)
    datasets = [task.tokenize([record], tokenizer, data=data, lenient_within=lenient_within) for record in records]
    if any(len(single) != 1 for single in datasets):
        raise ConfigError("task", task.name, "must return exactly one example per record: see `Task.tokenize`")
    texts = tuple(ids for single in datasets for ids in single.input_ids)
    if isinstance(datasets[0].targets, tuple):
        return TextDataset(texts, tuple(target for single in datasets for target in single.targets), datasets[0].texts)
    return TextDataset(texts, np.concatenate([single.targets for single in datasets]), datasets[0].texts)
