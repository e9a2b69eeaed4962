"""Checks that a loaded model's parts fit each other, and that it keeps examples apart, as clipping needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedtune.model.quiet import loading
from fedtune.model.refusals import ENCODERS, VISION, rotary_refusal
from fedtune.spec import ConfigError

_BYTES_FOR_ONE = 8
"""Most bytes of a built float32 model for one byte of weights: 2 for bfloat16, and 2 more for each tied copy."""
_SPARE_BYTES = 256 << 20
_NEEDED = "must be a decoder for causal_lm"
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
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if (reason := rotary_refusal(kind)) is not None:
                raise ConfigError("model.path", path, reason)


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, *, path: str) -> None:
    """Require a row of the embedding for every id that the tokenizer may give.

    Otherwise a record with such a token makes the site fail, and the lead learns that it is there.

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
    with loading("model.path", path, "its tokenizer cannot encode a text: {}"):
        ids: list[int] = tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
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
        if name.rpartition(".")[2] not in _POSITION_TABLES:
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            padding, offset = getattr(module, "padding_idx", None), getattr(module, "offset", 0)
            bounds.append(len(weight) - (padding + 1 if padding is not None else offset))
    return min((bound for bound in bounds if isinstance(bound, int)), default=None)


_TOKEN_IDS = ((1, 2, 3), (3, 2, 1))  # two examples of three tokens, which every vocabulary has


def check_examples_apart(base: nn.Module, run: Callable[[], Any] | None = None, *, places: int = 3) -> None:
    """Require each trainable module to run, on inputs whose first axis is the example.

    A module that flattens (examples x tokens), as some feed-forward blocks and all routed experts do, hides
    whose token is whose: hooks would clip tokens, not examples, and the guarantee would be void.
    A trainable module that never runs has no gradient to clip.

    Args:
        base: with its adapters.
        run: runs it on two examples; None: on two of three tokens.
        places: that each of these has.

    Raises:
        ConfigError: for `lora.target_modules`.
    """
    shapes: dict[str, list[torch.Size]] = {}
    handles = []
    for name, module in base.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            seen = shapes[name] = []

            def record(_: nn.Module, inputs: tuple[Any, ...], seen: list[torch.Size] = seen) -> None:
                seen.append(inputs[0].shape)

            handles.append(module.register_forward_pre_hook(record))
    try:
        with torch.no_grad():
            _run(base, torch.tensor(_TOKEN_IDS)) if run is None else run()
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in shapes.items():
        bound = "" if seen else "is never used by the base's forward pass; leave it out"
        if any(shape[:2] != (2, places) for shape in seen):
            bound = "mixes the tokens of several examples, so one example's share cannot be clipped"
        if bound:
            raise ConfigError("lora.target_modules", name.replace(".default", ""), bound)


def check_causal(base: PreTrainedModel, *, path: str) -> None:
    """Require that a token's logits do not depend on later tokens, which the model learns to predict.

    An encoder that says of itself that it is a decoder is refused as well: its head computes GELU in a function, which
    cannot be made to round by row (`fedtune.model.layers`).

    Raises:
        ConfigError: for `model.path`: an encoder loads as a causal language model without complaint.
    """
    require_decoder(base.config, path=path)
    token_ids = torch.tensor(_TOKEN_IDS)
    later_changed = token_ids.clone()
    later_changed[:, -1] = token_ids[:, 0]
    with torch.no_grad():
        logits, changed = (_run(base, ids).logits[:, 0].float() for ids in (token_ids, later_changed))
    if not torch.allclose(logits, changed, rtol=1e-3, atol=1e-3):
        raise ConfigError("model.path", path, f"{_NEEDED}: its tokens see later ones")


def require_kind(config: PreTrainedConfig, *, images: bool, path: str) -> None:
    """Refuse a model of texts where records are images, and the other way round.

    Raises:
        ConfigError: for `model.path`.
    """
    kind = type(config).model_type
    if images and (kind not in VISION or config.num_channels != 3 or type(config.patch_size) is not int):
        bound = f"must be a model of images in three colours ({', '.join(VISION)}) for data.input = image"
        raise ConfigError("model.path", path, f"{bound}; it is {kind}")
    if kind in VISION and not images:
        raise ConfigError("model.path", path, f"must be a model of texts: {kind} is one of images (data.input = image)")


def require_decoder(config: PreTrainedConfig, *, path: str) -> None:
    """Refuse an encoder where tokens are predicted.

    Raises:
        ConfigError: for `model.path`.
    """
    kind = type(config).model_type  # of the class: a config's own attribute could say anything
    if kind in ENCODERS:
        raise ConfigError("model.path", path, f"{_NEEDED}: {kind} is an encoder")


def _run(base: nn.Module, token_ids: torch.Tensor) -> Any:
    token_ids = token_ids.to(next(base.parameters()).device)
    return base(input_ids=token_ids, attention_mask=torch.ones_like(token_ids))
