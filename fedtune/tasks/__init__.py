"""The tasks: one file each, and their list.

Settings and the list of tasks import at once.  Models are looked up on first use, since torch, transformers and PEFT
take seconds to import and most commands never need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fedtune.tasks.base import Task
from fedtune.tasks.registry import TASKS, task_named

if TYPE_CHECKING:
    from fedtune.tasks.saved import SavedAdapter, load_task_model, save_task_model
    from fedtune.tasks.task_model import TaskModel, build_task_model

__all__ = [
    "TASKS",
    "SavedAdapter",
    "Task",
    "TaskModel",
    "build_task_model",
    "load_task_model",
    "save_task_model",
    "task_named",
]

_HOMES = {
    "task_model": ("TaskModel", "build_task_model"),
    "saved": ("SavedAdapter", "load_task_model", "save_task_model"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
