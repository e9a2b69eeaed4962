"""Whether a loaded model's parts fit each other: its config and weights, its tokenizer and embedding, its positions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedtune.model.quiet import first_line
from fedtune.model.refusals import rotary_refusal
from fedtune.spec import ConfigError, panics_as_errors

_BYTES_FOR_ONE = 8
"""Most bytes of a built float32 model for one byte of weights: 2 for bfloat16, and 2 more for each tied copy."""
_SPARE_BYTES = 256 << 20
_POSITION_TABLES = frozenset({"position_embeddings", "position_embedding", "embed_positions", "wpe", "pos_embed"})


def check_size(config: PreTrainedConfig, auto: Any, *, folder: Path, path: str) -> None:
    """Require the model that `config` describes to be about as large as its weights; it is built without memory.

    Transformers makes tensors that a checkpoint lacks, or has in other shapes, before it says so.

    Raises:
        ConfigError: for `model.path`.
    """
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32)
    needed = sum(one.numel() * one.itemsize for one in itertools.chain(model.parameters(), model.buffers()))
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if needed > _BYTES_FOR_ONE * held + _SPARE_BYTES:
        bound = f"its config.json describes a model of {needed >> 20} MiB, and it holds {held >> 20} MiB of weights"
        raise ConfigError("model.path", path, bound)


def check_ignores_batch_length(base: nn.Module, *, path: str) -> None:
    """Require that nothing in the built model looks at a batch's length, whatever the config called it.

    Training pads to fixed lengths, but such a model may keep what the longest batch so far led to, and scoring pads to
    the longest example: one record would change what the model makes of the others.

    Raises:
        ConfigError: for `model.path`.
    """
    for module in base.modules():
        if getattr(module, "attention_type", None) == "block_sparse":
            bound = "has attention that is sparse in long batches and full in short ones (attention_type block_sparse)"
            raise ConfigError("model.path", path, bound)
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            reason = rotary_refusal(kind)
            if reason is not None:
                raise ConfigError("model.path", path, reason)


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, *, path: str) -> None:
    """Require a row of the embedding for every id that the tokenizer may give.

    Otherwise a record with such a token makes the site fail, and whoever asks learns that it is there.

    Raises:
        ConfigError: for `model.path`.
    """
    if tokenizer.pad_token_id is None:
        raise ConfigError("model.path", path, "its tokenizer must have a padding token or an end-of-text token")
    # What a template adds to a text stands in no vocabulary; it is the same for every text.
    added = ids_of(tokenizer, "a", path=path) + ids_of(tokenizer, "", path=path)
    known = itertools.chain(tokenizer.get_vocab().values(), tokenizer.added_tokens_decoder, tokenizer.all_special_ids)
    rows, largest = base.get_input_embeddings().weight.shape[0], max(itertools.chain(known, added))
    if largest >= rows:
        bound = f"its tokenizer gives ids up to {largest}, and its embedding has {rows} rows: such a record would fail"
        raise ConfigError("model.path", path, bound)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, path: str, max_length: int | None = None) -> list[int]:
    """Token ids of a public text; a tokenizer that cannot encode it is refused.

    Raises:
        ConfigError: for `model.path`.
    """
    try:
        with panics_as_errors():
            ids: list[int] = tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
    except Exception as error:  # whatever the tokenizer's library raises
        raise ConfigError("model.path", path, f"its tokenizer cannot encode a text: {first_line(error)}") from error
    return ids


def usable_positions(base: nn.Module) -> int | None:
    """How many tokens an example may have; None where nothing bounds it.

    A table of positions that has a padding row counts from behind it (RoBERTa: 514 rows, 512 positions), as does one
    with an offset (OPT).
    """
    config = getattr(base, "config", None)
    text = config.get_text_config() if config is not None else None
    bounds = [getattr(text, "max_position_embeddings", None)]
    for name, module in base.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] in _POSITION_TABLES and isinstance(weight, torch.Tensor) and weight.ndim == 2:
            padding, offset = getattr(module, "padding_idx", None), getattr(module, "offset", 0)
            bounds.append(len(weight) - (padding + 1 if padding is not None else offset))
    return min((bound for bound in bounds if isinstance(bound, int)), default=None)
