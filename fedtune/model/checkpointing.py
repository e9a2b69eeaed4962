"""Gradient checkpointing that keeps per-example gradients right.

A checkpointed layer stores its input alone and runs a second time in the backward pass (Chen et al. 2016,
arXiv 1604.06174).  Hooks that collect per-example gradients count how often a module ran with gradients
on.  Re-entrant checkpointing is the kind that suits them: it runs the first pass without gradients,
which hooks ignore, and the second one inside the backward pass as an ordinary forward and backward.  (The
other kind runs both passes with gradients: hooks count two uses for one backward pass and never finish.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedtune.spec import ConfigError


def checkpoint_layers(layers: nn.ModuleList) -> None:
    """Make every layer from the first one with trainable parameters on recompute itself in the backward pass."""
    for layer in layers:
        if "forward" not in vars(layer):
            trains = any(parameter.requires_grad for parameter in layer.parameters())
            layer.forward = partial(_recompute, layer.forward, trains)


def _recompute(forward: Callable[..., Any], trains: bool, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trains):
        return forward(hidden, *args, **kwargs)
    # Re-entrant checkpointing follows gradients through its positional tensors only.
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in kwargs.values()):
        bound = "is not possible for this base: its layers pass gradients to each other on the side"
        raise ConfigError("runtime.gradient_checkpointing", True, bound)
    # None flow into the first adapted layer from the frozen ones before it, so they have to start here.
    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    # No random layer is on in a frozen base, so there is no random state to keep.
    return checkpoint(partial(forward, **kwargs), hidden, *args, use_reentrant=True, preserve_rng_state=False)
