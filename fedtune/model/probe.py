"""What a model must do for per-example clipping to bound anything; tried on two made-up examples when it is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fedtune.model.refusals import ENCODERS
from fedtune.spec import ConfigError

_TOKEN_IDS = ((1, 2, 3), (3, 2, 1))
"""Two examples of three tokens, which every vocabulary has."""


def check_examples_apart(base: nn.Module) -> None:
    """Require each trainable module to run, on inputs whose first axis is the example.

    A module that flattens (examples x tokens), as some feed-forward blocks and all routed experts do, hides
    whose token is whose: hooks would clip tokens, not examples, and the guarantee would be void.
    A trainable module that never runs has no gradient to clip.

    Raises:
        ConfigError: for `lora.target_modules`.
    """
    with _input_shapes(base) as shapes, torch.no_grad():
        _run(base, torch.tensor(_TOKEN_IDS))
    for name, seen in shapes.items():
        key, shown = "lora.target_modules", name.replace(".default", "")
        if not seen:
            raise ConfigError(key, shown, "is never used by the base's forward pass; leave it out")
        if any(shape[:2] != (2, 3) for shape in seen):
            raise ConfigError(
                key, shown, "mixes the tokens of several examples, so one example's share cannot be clipped"
            )


def check_causal(base: PreTrainedModel, *, path: str) -> None:
    """Require that a token's logits don't depend on later tokens, which are what it is to predict.

    An encoder that says of itself that it is a decoder is refused as well: its head computes GELU in a function, which
    cannot be made to round by row (`fedtune.model.activations`).

    Raises:
        ConfigError: for `model.path`: an encoder loads as a causal language model without complaint.
    """
    needed = "must be a decoder for causal_lm"
    kind = type(base.config).model_type  # of the class: a config's own attribute could say anything
    if kind in ENCODERS:
        raise ConfigError("model.path", path, f"{needed}: {kind} is an encoder")
    token_ids = torch.tensor(_TOKEN_IDS)
    later_changed = token_ids.clone()
    later_changed[:, -1] = token_ids[:, 0]
    with torch.no_grad():
        logits, changed = (_run(base, ids).logits[:, 0].float() for ids in (token_ids, later_changed))
    if not torch.allclose(logits, changed, rtol=1e-3, atol=1e-3):
        raise ConfigError("model.path", path, f"{needed}: its tokens see later ones")


def _run(base: nn.Module, token_ids: torch.Tensor) -> Any:
    token_ids = token_ids.to(next(base.parameters()).device)
    return base(input_ids=token_ids, attention_mask=torch.ones_like(token_ids))


@contextmanager
def _input_shapes(base: nn.Module) -> Iterator[dict[str, list[torch.Size]]]:
    """Record the shapes that reach each module with trainable parameters of its own."""
    shapes: dict[str, list[torch.Size]] = {}
    handles = []
    for name, module in base.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            seen = shapes[name] = []

            def record(_: nn.Module, inputs: tuple[Any, ...], seen: list[torch.Size] = seen) -> None:
                seen.append(inputs[0].shape)

            handles.append(module.register_forward_pre_hook(record))
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()
