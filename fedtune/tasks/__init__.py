"""What a run can learn: one file a task, and their list.

Settings and the list of tasks import at once.  Models are looked up on first use, since torch, transformers and PEFT
take seconds to import and most commands never need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fedtune.spec import check_one_of
from fedtune.tasks.base import Task
from fedtune.tasks.causal_lm import CausalLM
from fedtune.tasks.classification import Classification

if TYPE_CHECKING:
    from fedtune.tasks.model import TaskModel, assemble, build_task_model
    from fedtune.tasks.saved import load_task_model, save_task_model

__all__ = [
    "TASKS",
    "Task",
    "TaskModel",
    "assemble",
    "build_task_model",
    "load_task_model",
    "save_task_model",
    "task_named",
]

TASKS: dict[str, Task] = {task.name: task for task in (Classification(), CausalLM())}

_HOMES = {"model": ("TaskModel", "assemble", "build_task_model"), "saved": ("load_task_model", "save_task_model")}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def task_named(name: str) -> Task:
    """The task that settings call `name`.

    Raises:
        ConfigError: for `task`, when there is no such task.
    """
    check_one_of("task", name, TASKS)
    return TASKS[name]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
