"""The frozen base model and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedtune.model.activations import compute_by_row
from fedtune.model.fits import check_ignores_batch_length, check_size
from fedtune.model.gguf import expanded_gguf
from fedtune.model.manifest import manifest_of, staged
from fedtune.model.quiet import first_line, quiet
from fedtune.model.source import cache_folder, model_folder
from fedtune.model.spec import RANDOM, ModelSpec
from fedtune.model.tiny import tiny_base, tiny_tokenizer
from fedtune.model.tokenizer_rules import tokenizer_refusal
from fedtune.spec import ConfigError, panics_as_errors

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The base's tokenizer, always with a padding token.

    A padding token only fills the rectangle of a batch: what is padding is said by the attention mask
    alone, for in many chat models the padding token is also the end-of-turn token.

    Args:
        spec: which model; its `sha256` is checked first.

    Raises:
        ConfigError: for `model.path` when there is none, or `model.sha256`.
    """
    if spec.path.startswith(RANDOM):
        return tiny_tokenizer(spec.path)
    with _pinned_files(spec, with_weights=False) as folder:
        try:
            with quiet(), panics_as_errors():
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # What parses the files raises whatever comes; they are of the model, and no record is among them.
        except Exception as error:
            raise _unreadable(spec, error) from error
    _check_rules(tokenizer, path=spec.path)
    tokenizer.name_or_path = spec.path
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(spec: ModelSpec, *, predicts_tokens: bool = False, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The base model: frozen, in evaluation mode, in `spec.dtype`, on `device`.

    Args:
        spec: which model; its `sha256` is checked first.
        predicts_tokens: with the output layer; otherwise the bare encoder or decoder.
        device: where it goes before any adapter is attached (opacus#820).

    Raises:
        ConfigError: for `model.path` or `model.sha256`.
    """
    if spec.path.startswith(RANDOM):
        if spec.sha256 is not None and spec.sha256 != (found := model_sha256(spec)):
            raise ConfigError("model.sha256", spec.sha256, f"is not the hash of {spec.path}, which is {found}")
        model = tiny_base(spec.path, predicts_tokens=predicts_tokens, dtype=_DTYPES[spec.dtype])
    else:
        with _pinned_files(spec) as folder:
            model = _pretrained(spec, folder, predicts_tokens=predicts_tokens)
    check_ignores_batch_length(model, path=spec.path)
    compute_by_row(model)
    # Training never reads the key-value cache; a generator asks for it by argument.
    model.config.use_cache = False
    model.requires_grad_(False)
    return model.eval().to(torch.device(device))


def model_sha256(spec: ModelSpec) -> str:
    """The model's hash: of its manifest, see `fedtune.model.manifest`, or for a GGUF file the one `sha256sum` prints.

    For a random model it is that of its tensors' bytes in the order of their names.
    """
    if not spec.path.startswith(RANDOM):
        return manifest_of(model_folder(spec), gguf_file=spec.gguf_file).sha256
    digest = hashlib.sha256()
    for _, tensor in sorted(tiny_base(spec.path).state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _pinned_files(spec: ModelSpec, *, with_weights: bool = True) -> Iterator[Path]:
    """The folder to load from: the files of the manifest, whose hash is `spec.sha256`, and no others."""
    with staged(model_folder(spec), gguf_file=spec.gguf_file, with_weights=with_weights or bool(spec.gguf_file)) as own:
        if spec.sha256 is not None:
            own.manifest.require(spec.sha256, path=spec.path)
        if not spec.gguf_file:
            yield own.folder
            return
        # Derived from the pinned file, by us, into the cache of this account, which is trusted as its Python is.
        expanded = expanded_gguf(own.folder / spec.gguf_file, sha256=own.manifest.sha256, cache=cache_folder(spec))
        with staged(expanded, with_weights=with_weights) as derived:
            yield derived.folder


def _pretrained(spec: ModelSpec, folder: Path, *, predicts_tokens: bool) -> PreTrainedModel:
    auto = AutoModelForCausalLM if predicts_tokens else AutoModel
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            check_size(config, auto, folder=folder, path=spec.path)
            model, report = auto.from_pretrained(
                folder,
                dtype=_DTYPES[spec.dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise _unreadable(spec, error) from error
    model.config.name_or_path = spec.path
    # Transformers fills what a checkpoint lacks with random numbers. We pool ourselves, so a missing pooler is fine.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ConfigError("model.path", spec.path, f"must hold all weights for its task; it lacks {missing[0]}")
    if model.config.is_encoder_decoder:
        raise ConfigError("model.path", spec.path, "must be an encoder or a decoder, not both")
    return model


def _check_rules(tokenizer: PreTrainedTokenizerBase, *, path: str) -> None:
    """Look at the rules that the library made: from an older file than tokenizer.json, they stand in none."""
    if not tokenizer.is_fast:
        bound = "its tokenizer is not one of the tokenizers library, so fedtune cannot bound what a record costs"
        raise ConfigError("model.path", path, bound)
    reason = tokenizer_refusal(json.loads(tokenizer.backend_tokenizer.to_str()))
    if reason is not None:
        raise ConfigError("model.path", path, f"its tokenizer {reason}")


def _unreadable(spec: ModelSpec, error: Exception) -> ConfigError:
    return ConfigError("model.path", spec.path, f"cannot be loaded: {first_line(error)}")
