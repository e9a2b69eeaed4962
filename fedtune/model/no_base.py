"""A stand-in for a base where there is none: it gives a record's vector to the head as it is."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn


class NoBase(nn.Module):
    """A base without layers: the hidden state of a vector's one place is the vector, of `width` values."""

    dtype = torch.float32

    def __init__(self, width: int, *, device: torch.device | str) -> None:
        super().__init__()
        shape = SimpleNamespace(hidden_size=width, num_hidden_layers=0, max_position_embeddings=1)
        self.config = SimpleNamespace(**vars(shape), get_text_config=lambda: shape)
        self.layers = nn.ModuleList()
        self.register_buffer("place", torch.zeros(0, device=device), persistent=False)  # says where it is

    def get_base_model(self) -> NoBase:
        """Itself, which nothing wraps."""
        return self

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """(n, 1, width) as they came."""
        return SimpleNamespace(last_hidden_state=input_ids)
