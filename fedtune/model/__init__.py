"""The model layer: a frozen base, LoRA adapters by PEFT, and the adapter that travels.

Settings are plain data and import at once; everything else is looked up on first use, for torch, transformers
and PEFT take seconds to import and most commands never need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec

if TYPE_CHECKING:
    from fedtune.model.adapter import Adapter, AdapterError
    from fedtune.model.base_model import load_base, load_tokenizer, model_sha256
    from fedtune.model.layers import attach_adapters

__all__ = [
    "Adapter",
    "AdapterError",
    "HeadSpec",
    "LoraSpec",
    "ModelSpec",
    "TaskModelSpec",
    "attach_adapters",
    "load_base",
    "load_tokenizer",
    "model_sha256",
]

_HOMES = {
    "adapter": ("Adapter", "AdapterError"),
    "base_model": ("load_base", "load_tokenizer", "model_sha256"),
    "layers": ("attach_adapters",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
