"""Compatibility checks for a loaded model: its parts match, and it processes each example of a batch independently."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedtune.model.hf_logging import translate_library_errors
from fedtune.model.unsupported_models import ENCODERS, VISION, explain_rotary_refusal
from fedtune.spec import ConfigError

_BYTES_FOR_ONE = 8
"""Maximum bytes of a float32 model per byte of its weights files: files in bfloat16 are half as large, and files store
tied weights only once."""
_SPARE_BYTES = 256 << 20
_NEEDED = "must be a decoder for causal_lm"
_POSITION_TABLES = frozenset({"position_embeddings", "position_embedding", "embed_positions", "wpe", "pos_embed"})


def check_size(config: PreTrainedConfig, auto: Any, *, folder: Path, path: str) -> None:
    """Require that the weights files are large enough for the model that `config` describes.

    The model is built on the meta device, without allocating memory.  Transformers would allocate missing or mismatched
    tensors before it reports them.

    Raises:
        ConfigError: for `model.path`.
    """
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32)
    needed = sum(tensor.numel() * tensor.itemsize for tensor in itertools.chain(model.parameters(), model.buffers()))
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if needed > _BYTES_FOR_ONE * held + _SPARE_BYTES:
        bound = f"its config.json describes a model of {needed >> 20} MiB, but its weights have only {held >> 20} MiB"
        raise ConfigError("model.path", path, bound)


def check_ignores_batch_length(base: nn.Module, *, path: str) -> None:
    """Require that no rotary embedding of the model depends on the length of a batch.

    Training pads to fixed lengths, but such a model may store state from the longest batch so far, and scoring pads to
    the longest example.  One record would then change the model's output for the others.  The check inspects the
    model's modules, because a config may use another name for the type.

    Raises:
        ConfigError: for `model.path`.
    """
    for module in base.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if (reason := explain_rotary_refusal(kind)) is not None:
                raise ConfigError("model.path", path, reason)


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, *, path: str) -> None:
    """Require an embedding row for every id that the tokenizer can produce.

    Without this check, a record with a larger id would make the site fail, and reveal to the lead that the record
    exists.

    Raises:
        ConfigError: for `model.path`.
    """
    if tokenizer.pad_token_id is None:
        raise ConfigError("model.path", path, "its tokenizer must have a padding token or an end-of-sequence token")
    # Tokens that a template adds may be missing from the vocabulary; they are the same for every text.
    added = tokenize_public_text(tokenizer, "a", path=path) + tokenize_public_text(tokenizer, "", path=path)
    known = itertools.chain(tokenizer.get_vocab().values(), tokenizer.added_tokens_decoder, tokenizer.all_special_ids)
    rows, largest = base.get_input_embeddings().weight.shape[0], max(itertools.chain(known, added))
    if largest >= rows:
        bound = f"its tokenizer has ids up to {largest}, but its embedding has only {rows} rows"
        raise ConfigError("model.path", path, bound)


def tokenize_public_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, path: str, max_length: int | None = None
) -> list[int]:
    """Tokenize a public text, truncated to `max_length` tokens if it is given.

    Raises:
        ConfigError: for `model.path`, if the tokenizer cannot encode the text.
    """
    with translate_library_errors("model.path", path, "its tokenizer cannot encode a text: {}"):
        ids: list[int] = tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
    return ids


def get_max_positions(base: nn.Module) -> int | None:
    """Return the maximum number of tokens of an example, or None for a base without a limit.

    A position table with a padding row starts after that row (RoBERTa: 514 rows, 512 positions), and a table with an
    offset starts after the offset (OPT).
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


def check_examples_independent(base: nn.Module, run: Callable[[], Any] | None = None, *, places: int = 3) -> None:
    """Require that every trainable module runs, and that the first axis of its inputs is the example.

    A module that flattens (examples x tokens), as some feed-forward blocks and all routed experts do, loses the
    assignment of tokens to examples: hooks would clip tokens instead of examples, and the guarantee would be void.  A
    trainable module that never runs has no gradient to clip.

    Args:
        base: the model with its adapters.
        run: runs the model on two examples; None uses two examples of three tokens.
        places: the number of positions of each of these examples.

    Raises:
        ConfigError: for `lora.target_modules`.
    """
    shapes: dict[str, list[torch.Size]] = {}
    handles = []
    for name, module in base.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            seen = shapes[name] = []

            def record_shape(_: nn.Module, inputs: tuple[Any, ...], seen: list[torch.Size] = seen) -> None:
                seen.append(inputs[0].shape)

            handles.append(module.register_forward_pre_hook(record_shape))
    try:
        with torch.no_grad():
            _run_base(base, torch.tensor(_TOKEN_IDS)) if run is None else run()
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in shapes.items():
        bound = "" if seen else "is not used in the base's forward pass; remove it"
        if any(shape[:2] != (2, places) for shape in seen):
            bound = "mixes tokens of several examples, so per-example clipping is impossible; remove it"
        if bound:
            raise ConfigError("lora.target_modules", name.replace(".default", ""), bound)


def check_causal(base: PreTrainedModel, *, path: str) -> None:
    """Require causal attention: a position's logits must not depend on later tokens, which are its training targets.

    An encoder that is configured as a decoder is refused as well: its head calls GELU as a function, which cannot be
    replaced by a row-wise activation (`fedtune.model.layers`).

    Raises:
        ConfigError: for `model.path`; transformers loads an encoder as a causal language model without complaint.
    """
    require_decoder(base.config, path=path)
    token_ids = torch.tensor(_TOKEN_IDS)
    later_changed = token_ids.clone()
    later_changed[:, -1] = token_ids[:, 0]
    with torch.no_grad():
        logits, changed = (_run_base(base, ids).logits[:, 0].float() for ids in (token_ids, later_changed))
    if not torch.allclose(logits, changed, rtol=1e-3, atol=1e-3):
        raise ConfigError("model.path", path, f"{_NEEDED}: its attention is not causal")


def require_modality(config: PreTrainedConfig, *, images: bool, path: str) -> None:
    """Require an image model for image records, and a text model for all other records.

    Raises:
        ConfigError: for `model.path`.
    """
    kind = type(config).model_type
    if images and (kind not in VISION or config.num_channels != 3 or type(config.patch_size) is not int):
        bound = f"must be a model of three-channel images ({', '.join(VISION)}) for data.input = image"
        raise ConfigError("model.path", path, f"{bound}; it is {kind}")
    if kind in VISION and not images:
        raise ConfigError("model.path", path, f"must be a text model: {kind} is an image model; set data.input = image")


def require_decoder(config: PreTrainedConfig, *, path: str) -> None:
    """Require that a model for token prediction is not an encoder.

    Raises:
        ConfigError: for `model.path`.
    """
    kind = type(config).model_type  # of the class: a config's own attribute could say anything
    if kind in ENCODERS:
        raise ConfigError("model.path", path, f"{_NEEDED}: {kind} is an encoder")


def _run_base(base: nn.Module, token_ids: torch.Tensor) -> Any:
    token_ids = token_ids.to(next(base.parameters()).device)
    return base(input_ids=token_ids, attention_mask=torch.ones_like(token_ids))
