"""From hidden states to class scores: pooling, the linear head and its start from the labels' own words."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedtune.model.fits import ids_of
from fedtune.model.spec import HeadSpec

_LABEL_TOKENS = 64
"""A label's text is cut here: a name or a sentence, which bounds the memory for thousands of labels."""


def mean_pooled(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The mean over real tokens, scaled to norm 1.

    Args:
        hidden: (n, t, h), in any float type.
        attention_mask: (n, t), 1 for real tokens.

    Returns:
        (n, h) in float32.  An example without tokens gives zeros.
    """
    mask = attention_mask.unsqueeze(-1).to(torch.float32)
    total = (hidden.to(torch.float32) * mask).sum(dim=1)
    return nn.functional.normalize(total / mask.sum(dim=1).clamp(min=1.0), dim=-1)


def new_head(spec: HeadSpec, *, hidden_size: int, num_labels: int, device: torch.device) -> nn.Linear:
    """A bias-free float32 head (num_labels, hidden_size) of zeros."""
    head = nn.Linear(hidden_size, num_labels, bias=False, device="meta").to_empty(device=device)
    nn.init.zeros_(head.weight)
    head.requires_grad_(spec.train)
    return head


def label_embeddings(
    texts: tuple[str, ...],
    *,
    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> torch.Tensor:
    """Embed each label's text with the frozen base.

    The texts are the declared, public label set, and no record is read: this costs no privacy.

    Args:
        texts: one for each label.
        embed: (n, t) token ids and attention mask to (n, h) embeddings.
        tokenizer: the base's.
        device: where the base lies.

    Returns:
        (labels, h) float32, every row of norm 1.
    """
    rows = []
    with torch.no_grad():
        # One text at a time: no padding, and the same numbers whatever the other labels are.
        for text in texts:
            ids = ids_of(tokenizer, text, path=tokenizer.name_or_path, max_length=_LABEL_TOKENS)
            token_ids = torch.tensor([ids], device=device)
            rows.append(embed(token_ids, torch.ones_like(token_ids)))
    return torch.cat(rows)


def label_texts(spec: HeadSpec, labels: tuple[str, ...]) -> tuple[str, ...]:
    """What stands for each label: its declared description, else its name with spaces for underscores."""
    return spec.label_texts or tuple(label.replace("_", " ") for label in labels)
