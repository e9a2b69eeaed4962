"""A try before anything is charged: whether per-example clipping works on this model."""

from __future__ import annotations

import torch

from fedtune.data import Batch
from fedtune.model import TaskModel
from fedtune.spec import ConfigError
from fedtune.training.per_example import PerExampleGradients, attached

_TOKEN_IDS = ((1, 2, 3, 2), (3, 1, 1, 2))
"""Two made-up examples, which every vocabulary has."""


def check_examples_alone(model: TaskModel, *, task: str) -> None:
    """Require that an example's gradient is the same alone and beside another one.

    Anything in the base that lets examples see each other (batch statistics, routing with a capacity) makes one
    record move another's gradient, and clipping then bounds nothing.

    Raises:
        ConfigError: for `model.path`, or whatever setting keeps the training pass from running.
    """
    together = _batch(task, (0, 1), model.device)
    with attached(model) as gradients:
        both = gradients.of(together)
        for row in (0, 1):
            _compare(gradients, both, row, _batch(task, (row,), model.device), path=model.spec.model.path)


def _compare(
    gradients: PerExampleGradients, both: dict[str, torch.Tensor], row: int, alone: Batch, *, path: str
) -> None:
    for name, gradient in gradients.of(alone).items():
        scale = float(both[name][row].abs().max()) + 1e-6
        if float((gradient[0] - both[name][row]).abs().max()) > 0.05 * scale:
            raise ConfigError("model.path", path, "mixes the examples of a batch, so none can be clipped by itself")


def _batch(task: str, rows: tuple[int, ...], device: torch.device) -> Batch:
    token_ids = torch.tensor([_TOKEN_IDS[row] for row in rows])
    targets = torch.tensor(rows) if task == "classification" else token_ids
    return Batch(token_ids, torch.ones_like(token_ids), targets).to(device)
