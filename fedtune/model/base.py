"""The frozen base model and its tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedtune.model.gguf import expanded_gguf
from fedtune.model.quiet import first_line, quiet
from fedtune.model.source import cache_folder, files_sha256, model_folder, weights_files
from fedtune.model.spec import RANDOM, ModelSpec, Task
from fedtune.model.tiny import tiny_base, tiny_tokenizer
from fedtune.spec import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The base's tokenizer, always with a padding token.

    A padding token only fills the rectangle of a batch: what is padding is said by the attention mask
    alone, for in many chat models the padding token is also the end-of-turn token.

    Raises:
        ConfigError: for `model.path` when there is none.
    """
    if spec.path.startswith(RANDOM):
        return tiny_tokenizer(spec.path)
    folder = _plain_folder(spec)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(spec, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(spec: ModelSpec, *, task: Task, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The base model: frozen, in evaluation mode, in `spec.dtype`, on `device`.

    Args:
        spec: which model; its `sha256` is checked first.
        task: "classification" gives the bare encoder or decoder, "causal_lm" one with its output layer.
        device: where it goes before any adapter is attached (opacus#820).

    Raises:
        ConfigError: for `model.path` or `model.sha256`.
    """
    if spec.sha256 is not None:
        check_sha256(spec)
    if spec.path.startswith(RANDOM):
        model = tiny_base(spec.path, task, dtype=_DTYPES[spec.dtype])
    else:
        model = _pretrained(spec, task)
    # Training never reads the key-value cache; a generator asks for it by argument.
    model.config.use_cache = False
    model.requires_grad_(False)
    return model.eval().to(torch.device(device))


def weights_sha256(spec: ModelSpec) -> str:
    """The SHA-256 of the weights' file, the one that `sha256sum` prints.

    For several files it is the SHA-256 of `sha256sum`'s output for them in the order of their names;
    for a random model, of its tensors' bytes in the order of their names.
    """
    if not spec.path.startswith(RANDOM):
        return files_sha256(weights_files(spec))
    digest = hashlib.sha256()
    for _, tensor in sorted(tiny_base(spec.path, "classification").state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def check_sha256(spec: ModelSpec) -> None:
    """Require the weights to be those that `spec.sha256` names."""
    found = weights_sha256(spec)
    if found != spec.sha256:
        raise ConfigError("model.sha256", spec.sha256, f"is not the hash of {spec.path}'s weights, which is {found}")


def _plain_folder(spec: ModelSpec) -> Path:
    """The folder to load from: the model's own, or the cached expansion of its GGUF file."""
    if not spec.gguf_file:
        return model_folder(spec)
    files = weights_files(spec)
    return expanded_gguf(files[0], sha256=files_sha256(files), cache=cache_folder(spec))


def _pretrained(spec: ModelSpec, task: Task) -> PreTrainedModel:
    auto = AutoModel if task == "classification" else AutoModelForCausalLM
    folder = _plain_folder(spec)
    try:
        with quiet():
            model, report = auto.from_pretrained(
                folder,
                dtype=_DTYPES[spec.dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise _unreadable(spec, error) from error
    # Transformers fills what a checkpoint lacks with random numbers. We pool ourselves, so a missing pooler is fine.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ConfigError("model.path", spec.path, f"must hold all weights for {task}; it lacks {missing[0]}")
    if model.config.is_encoder_decoder:
        raise ConfigError("model.path", spec.path, "must be an encoder or a decoder, not both")
    return model


def _unreadable(spec: ModelSpec, error: Exception) -> ConfigError:
    return ConfigError("model.path", spec.path, f"cannot be loaded: {first_line(error)}")
