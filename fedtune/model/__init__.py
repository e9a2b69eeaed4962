"""The model layer: a frozen base, LoRA adapters by PEFT, a task, and the adapter that travels.

Settings are plain data and import at once; everything else is looked up on first use, for torch, transformers
and PEFT take seconds to import and most commands never need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, Task, TaskModelSpec

if TYPE_CHECKING:
    from fedtune.model.adapter import Adapter, AdapterError
    from fedtune.model.base import load_base, load_tokenizer, model_sha256
    from fedtune.model.folder import load_task_model, save_task_model
    from fedtune.model.lora import attach_lora
    from fedtune.model.task import Batch, CausalLMModel, ClassificationModel, TaskModel, build_task_model

__all__ = [
    "Adapter",
    "AdapterError",
    "Batch",
    "CausalLMModel",
    "ClassificationModel",
    "HeadSpec",
    "LoraSpec",
    "ModelSpec",
    "Task",
    "TaskModel",
    "TaskModelSpec",
    "attach_lora",
    "build_task_model",
    "load_base",
    "load_task_model",
    "load_tokenizer",
    "model_sha256",
    "save_task_model",
]

_HOMES = {
    "adapter": ("Adapter", "AdapterError"),
    "base": ("load_base", "load_tokenizer", "model_sha256"),
    "folder": ("load_task_model", "save_task_model"),
    "lora": ("attach_lora",),
    "task": ("Batch", "CausalLMModel", "ClassificationModel", "TaskModel", "build_task_model"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
