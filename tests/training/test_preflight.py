"""A model in which examples see each other is refused before anything is charged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedtune.model import LoraSpec
from fedtune.spec import ConfigError
from fedtune.training.preflight import check_examples_alone


class Mixing(nn.Module):
    """A layer whose output depends on the mean over the batch, as batch normalisation's does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(hidden, *args, **kwargs) + hidden.mean(dim=0, keepdim=True)


@pytest.mark.parametrize(("path", "task"), [("random:bert", "classification"), ("random:llama", "causal_lm")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ordinary_models_pass(fresh: Any, path: str, task: str, checkpointing: bool) -> None:
    model = fresh(path, task, lora=LoraSpec(rank=2, alpha=4.0, layers=(-1,)))
    if checkpointing:
        model.enable_gradient_checkpointing()
    check_examples_alone(model, task=task)


def test_a_frozen_layer_that_mixes_examples_is_found(fresh: Any) -> None:
    model = fresh(lora=LoraSpec(rank=2, alpha=4.0, layers=(-1,)))
    layers = model.base.get_base_model().encoder.layer
    layers[0] = Mixing(layers[0])
    with pytest.raises(ConfigError, match=r"model\.path .*mixes the examples"):
        check_examples_alone(model, task="classification")
