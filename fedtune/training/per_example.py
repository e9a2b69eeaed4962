"""Per-example gradients of a batch, by Opacus's hooks on the unwrapped model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleHooks

from fedtune.model import Batch, TaskModel
from fedtune.spec import ConfigError


class PerExampleGradients:
    """Gradients of one example each, while the hooks are attached (see `attached`)."""

    def __init__(self, model: TaskModel) -> None:
        self._model = model
        self._parameters = model.trainable()

    def of(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients of each example's own loss: name -> (n, *parameter shape), float32.

        Losses are summed, never averaged, over the batch: a mean would let one example rescale another.

        Raises:
            ConfigError: a trainable tensor took no part in the forward pass.
        """
        self._clear()
        self._model.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
        gradients = {}
        for name, parameter in self._parameters.items():
            gradient = getattr(parameter, "grad_sample", None)
            if gradient is None:
                raise ConfigError("lora.target_modules", name, "is trainable but takes no part in the forward pass")
            gradients[name] = gradient
        self._clear()
        return gradients

    def _clear(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]


@contextmanager
def attached(model: TaskModel) -> Iterator[PerExampleGradients]:
    """Attach the hooks to `model` and remove them at the end, whatever happens."""
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # The first adapted layer's inputs come from frozen layers; its hooks need only its outputs' gradients.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield PerExampleGradients(model)
    finally:
        hooks.cleanup()
        _forget_unfinished_pass(model)


def _forget_unfinished_pass(model: TaskModel) -> None:
    """Drop what a pass that failed half-way left behind, which Opacus's clean-up keeps.

    Inputs of the records would stay in memory, and the failed batch's size would be taken for the next batch's, so
    that one failure would end every later round of every site that shares the model.
    """
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.requires_grad for parameter in own):
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)
            for parameter in own:
                vars(parameter).pop("_current_grad_sample", None)
                vars(parameter).pop("grad_sample", None)
                parameter.grad = None
