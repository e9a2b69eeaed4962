"""Placeholder base for models without a base: passes a record's feature vector to the head."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn


class NoBase(nn.Module):
    """Base without layers, whose hidden state is the feature vector of `width` values at a single position."""

    dtype = torch.float32

    def __init__(self, width: int, *, device: torch.device | str) -> None:
        super().__init__()
        shape = SimpleNamespace(hidden_size=width, num_hidden_layers=0, max_position_embeddings=1)
        self.config = SimpleNamespace(**vars(shape), get_text_config=lambda: shape)
        self.layers = nn.ModuleList()
        self.register_buffer("place", torch.zeros(0, device=device), persistent=False)  # records the device

    def get_base_model(self) -> NoBase:
        """Return the module itself, because it has no adapter wrapper."""
        return self

    def get_output_embeddings(self) -> None:
        """Return None, because there is no output layer."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """Return the feature vectors (n, 1, width) unchanged."""
        return SimpleNamespace(last_hidden_state=input_ids)
