"""Activations that round a row by itself, wherever it stands in a batch.

On a CPU torch computes most elements of a tensor in vectors, and the last few of each thread's share by a scalar
function that rounds some values otherwise (3 in 100 for sigmoid, 35 in 100 for GELU).  So the place of a record would
decide its bits, and a model's weights can enlarge a last bit as they like.
"""

from __future__ import annotations

import math

import torch
from torch import nn

_LANES = 64
"""A multiple of the elements that a vectorised loop takes at once, on every CPU and for every number format."""
_HOMES = ("torch.nn.modules.activation", "transformers.activations")


class RowByRow(nn.Module):
    """An activation whose value for a row is the same, bit for bit, in every row of every batch of that length.

    Where vectors end with the rows it works on all at once, else on one after the other.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (rows, ...), and what is returned has their shape."""
        if values.device.type != "cpu" or _vectors_end_with_rows(values):
            return self.activation(values)  # type: ignore[no-any-return]
        return torch.stack([self.activation(row.clone()) for row in values])


def compute_by_row(base: nn.Module) -> None:
    """Make every activation in `base` one that rounds by row."""
    for module in list(base.modules()):
        for name, child in module.named_children():
            if type(child).__module__ in _HOMES and not list(child.parameters()):
                setattr(module, name, RowByRow(child))


def _vectors_end_with_rows(values: torch.Tensor) -> bool:
    """Whether every row begins and ends with a vector, however many rows there are and threads that share them."""
    shares = math.lcm(*range(1, torch.get_num_threads() + 1))
    row = values.shape[1:].numel()
    return values.is_contiguous() and values.shape[-1] % _LANES == 0 and row % (_LANES * shares) == 0
