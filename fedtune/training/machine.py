"""What this machine trains on, and how a task model is made ready for it."""

from __future__ import annotations

import os

import torch

from fedtune.model import TaskModel, build_task_model
from fedtune.model.fits import usable_positions
from fedtune.model.spec import TaskModelSpec
from fedtune.spec import ConfigError
from fedtune.training.spec import RuntimeSpec


def device_for(wanted: str, *, must_exist: bool = True) -> torch.device:
    """The device that a run's `runtime.device` means here.

    Args:
        wanted: "auto", "cpu" or "cuda".
        must_exist: False takes the CPU where a GPU is wanted and there is none, to plan for another machine.

    Raises:
        ConfigError: a GPU is wanted, and this torch cannot use one.
    """
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu and must_exist:
        bound = "needs a GPU and a torch build with CUDA; neither 'auto' nor 'cpu' does"
        raise ConfigError("runtime.device", wanted, bound)
    return torch.device("cuda" if wanted != "cpu" and has_gpu else "cpu")


def ready_model(spec: TaskModelSpec, runtime: RuntimeSpec, *, max_length: int, device: torch.device | str) -> TaskModel:
    """The task model on `device`, as sites train it; also sets torch's number of threads.

    Raises:
        ConfigError: the model cannot be loaded, or takes no example of `max_length` tokens.
    """
    torch.set_num_threads(runtime.num_threads or os.cpu_count() or 1)
    model = build_task_model(spec, device=device)
    if runtime.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    positions = usable_positions(model.base.get_base_model())
    if positions is not None and max_length > positions:
        raise ConfigError("data.max_length", max_length, f"must be at most the model's {positions}")
    return model


def keeps_frozen_states(model: TaskModel, runtime: RuntimeSpec, *, num_tokens: int) -> bool:
    """Whether what the frozen layers make of so many tokens fits the memory set aside for it."""
    width = model.base.config.get_text_config().hidden_size * model.base.dtype.itemsize
    return bool(num_tokens * width <= runtime.kept_states_mib * 2**20)
