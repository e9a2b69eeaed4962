"""What this machine trains on, and how a task model is made ready for it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from fedtune.data import Shapes
from fedtune.model.fits import usable_positions
from fedtune.spec import ConfigError
from fedtune.tasks import TaskModel
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


def ready_model(build: Callable[[], TaskModel], runtime: RuntimeSpec, *, max_length: int) -> TaskModel:
    """The task model that `build` makes, as this machine runs it; also sets torch's number of threads.

    Raises:
        ConfigError: the model cannot be loaded, or takes no example of `max_length` tokens.
    """
    torch.set_num_threads(runtime.num_threads or os.cpu_count() or 1)
    model = build()
    if runtime.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    positions = usable_positions(model.base.get_base_model())
    if positions is not None and max_length > positions:
        raise ConfigError("data.max_length", max_length, f"must be at most the model's {positions}")
    return model


def shapes_for(model: TaskModel, runtime: RuntimeSpec, *, max_length: int) -> Shapes:
    """The shapes of a run's micro-batches on this machine, from public settings alone."""
    positions = usable_positions(model.base.get_base_model())
    return Shapes.of(max_length=max_length, max_tokens=runtime.micro_batch_tokens, positions=positions)


def keeps_frozen_states(model: TaskModel, runtime: RuntimeSpec, *, num_tokens: int) -> bool:
    """Whether the frozen layers' outputs for so many tokens fit the memory set aside for them."""
    width = model.base.config.get_text_config().hidden_size * model.base.dtype.itemsize
    return bool(num_tokens * width <= runtime.kept_states_mib * 2**20)
