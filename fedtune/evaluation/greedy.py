"""Greedy decoding of a padded batch with a key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel


def write_greedily(
    model: PeftModel,
    prompts: Sequence[np.ndarray],
    *,
    end_id: int | None,
    pad_id: int,
    max_new_tokens: int,
    device: torch.device,
) -> list[list[int]]:
    """Append the likeliest token to each prompt until `end_id` or `max_new_tokens`.

    Transformers' own `generate` would mix in the sampling settings and penalties that a checkpoint
    ships, also under an explicit greedy configuration; this loop has none.

    Returns:
        The new token ids of each prompt, without `end_id`.
    """
    token_ids, mask = _pad_left(prompts, pad_id=pad_id, device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    takes_positions = _takes_positions(model)
    cache = None
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    written: list[torch.Tensor] = []
    for _ in range(max_new_tokens):
        placed = {"position_ids": positions} if takes_positions else {}
        # Only the last position's logits are read; all of them would take prompt length x vocabulary.
        output = model(
            input_ids=token_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **placed,
        )
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(dim=-1)  # (n,)
        written.append(chosen)
        if end_id is not None:
            finished |= chosen == end_id
        if bool(finished.all()):
            break
        token_ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [_until(row, end_id) for row in torch.stack(written, dim=1).tolist()]


def _pad_left(prompts: Sequence[np.ndarray], *, pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-aligned token ids and attention mask, both (n, longest), so that every row's last token is real."""
    longest = max(len(prompt) for prompt in prompts)
    token_ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(token_ids)
    for row, prompt in enumerate(prompts):
        token_ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(token_ids).to(device), torch.from_numpy(mask).to(device)


def _takes_positions(model: PeftModel) -> bool:
    """Whether the base takes position ids; families that read distances off the mask (ALiBi) take none."""
    return "position_ids" in inspect.signature(model.get_base_model().forward).parameters


def _until(token_ids: list[int], end_id: int | None) -> list[int]:
    """The tokens before the first `end_id`; what a finished row wrote on is noise."""
    return token_ids[: token_ids.index(end_id)] if end_id in token_ids else token_ids
