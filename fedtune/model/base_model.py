"""Loading of the frozen base model and its tokenizer from pinned files or a GGUF file, and tiny random models.

Loading first checks the files against `model.sha256`.  A GGUF file is dequantized to float32 once and cached, because
the expanded copy loads a hundred times faster; its logits are bitwise equal to those of the quantized file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fedtune.extras import require_extra
from fedtune.model.compatibility import check_ignores_batch_length, check_size, require_decoder, require_modality
from fedtune.model.frozen_linear import convert_to_bfloat16, describe_product
from fedtune.model.hf_logging import get_first_line, silence_transformers, translate_library_errors
from fedtune.model.layers import compute_norms_by_rsqrt, find_layer_stack, make_activations_rowwise
from fedtune.model.manifest import build_manifest, stage_files
from fedtune.model.quantized import quantize_linear_layers
from fedtune.model.source import find_cache_folder, find_model_folder
from fedtune.model.spec import NO_BASE, RANDOM, ModelSpec
from fedtune.model.tokenizer_rules import explain_tokenizer_refusal
from fedtune.model.unsupported_models import PROCESSOR, PROCESSOR_KIND, VISION, explain_config_refusal
from fedtune.spec import ConfigError

_DTYPES = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}
_OWN = {"local_files_only": True, "trust_remote_code": False}  # no downloads, and no code from a model's folder


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, always with a padding token.

    Padding is identified by the attention mask, never by the token id, because in many chat models the padding token is
    also the end-of-turn token.

    Raises:
        ConfigError: for `model.path`, if the model has no usable tokenizer, or for `model.sha256`.
    """
    if spec.path.startswith(RANDOM):
        return build_tiny_tokenizer(spec.path)
    with _provide_pinned_files(spec, with_weights=False) as folder, _report_loading_errors(spec):
        tokenizer = AutoTokenizer.from_pretrained(folder, **_OWN)
    # Check the rules of the loaded tokenizer: from files older than tokenizer.json, the library derives them.
    if not tokenizer.is_fast:
        bound = "its tokenizer must be from the tokenizers library, whose cost per record fedtune can bound"
        raise ConfigError("model.path", spec.path, bound)
    if (reason := explain_tokenizer_refusal(json.loads(tokenizer.backend_tokenizer.to_str()))) is not None:
        raise ConfigError("model.path", spec.path, f"its tokenizer {reason}")
    tokenizer.name_or_path = spec.path
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(spec: ModelSpec) -> tuple[Any, int, int, int]:
    """Load the image processor from the base's folder, in transformers' PIL version.

    Returns:
        The processor, the side length of its square output images, the side length of a patch, and the number of
        special tokens before the patch tokens.

    Raises:
        ConfigError: for `model.path`, if the folder has no processor whose output is square three-channel images of
            whole patches, or for `model.sha256`.
    """
    with _provide_pinned_files(spec, with_weights=False) as folder, _report_loading_errors(spec):
        config = AutoConfig.from_pretrained(folder, **_OWN)
        require_modality(config, images=True, path=spec.path)
        if not (folder / PROCESSOR).is_file():
            bound = f"lacks {PROCESSOR}; add the model's image processor settings to its folder"
            raise ConfigError("model.path", spec.path, bound)
        fields = json.loads((folder / PROCESSOR).read_text(encoding="utf-8"))
        kind = PROCESSOR_KIND.fullmatch(fields.get("image_processor_type") or fields["feature_extractor_type"])
        assert kind is not None, "staging checked the processor"
        processor = getattr(transformers, f"{kind[1]}ImageProcessorPil").from_pretrained(folder, local_files_only=True)
        # A portrait image, to detect a processor that keeps the aspect ratio.
        (pixels,) = processor(images=np.zeros((96, 64, 3), np.uint8), return_tensors="np")["pixel_values"]
    side, patch = pixels.shape[-1], config.patch_size
    if pixels.shape != (3, side, side) or side % patch or not np.isfinite(pixels).all():
        shape = " x ".join(map(str, pixels.shape))
        bound = f"its {PROCESSOR} must produce square three-color images with patches of {patch}, not {shape}"
        raise ConfigError("model.path", spec.path, bound)
    return processor, side, patch, VISION[config.model_type]


def load_base(
    spec: ModelSpec, *, predicts_tokens: bool = False, images: bool | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load the base model: frozen, in evaluation mode, in `spec.dtype`, on `device`.

    Args:
        spec: the model's settings.
        predicts_tokens: whether to load the model with its output layer over the vocabulary.
        images: True requires an image model, False a text model; None accepts either.
        device: the device of the base, set before any adapter is attached (opacus#820).

    Raises:
        ConfigError: for `model.path`, `model.sha256` or `model.dtype`.
    """
    if spec.dtype == "auto":
        bound = "must be a number format: call fedtune.sites.virtual_site.fix_number_format first"
        raise ConfigError("model.dtype", "auto", bound)
    if spec.path.startswith(RANDOM):
        if spec.sha256 is not None:
            _require_pinned(spec, hash_model(spec))
        model = build_tiny_base(spec.path, predicts_tokens=predicts_tokens, dtype=_DTYPES[spec.dtype])
    else:
        with _provide_pinned_files(spec) as folder:
            model = _load_pretrained(spec, folder, predicts_tokens=predicts_tokens, images=images)
    check_ignores_batch_length(model, path=spec.path)
    make_activations_rowwise(model)
    compute_norms_by_rsqrt(model)
    # Training never uses the key-value cache; generation enables it by argument.
    model.config.use_cache = False
    model.requires_grad_(False).eval()
    if spec.dtype == "mixed":
        convert_to_bfloat16(find_layer_stack(model)[1])
    if spec.dtype == "nf4":
        quantize_linear_layers(find_layer_stack(model)[1], device=device)
    return model.to(torch.device(device))


def count_frozen_products(spec: ModelSpec) -> dict[tuple[int, int], int]:
    """Count the linear modules in the base's layers by (outputs, inputs), without loading weights.

    Raises:
        ConfigError: for `model.path` or `model.sha256`.
    """
    if spec.path.startswith(RANDOM):
        base = build_tiny_base(spec.path)
    else:
        with _provide_pinned_files(spec, with_weights=False) as folder, _report_loading_errors(spec):
            config = AutoConfig.from_pretrained(folder, **_OWN)
            with torch.device("meta"):
                base = AutoModel.from_config(config, dtype=torch.float32)
    shapes = (describe_product(module) for module in find_layer_stack(base)[1].modules())
    return Counter(shape for shape in shapes if shape is not None)


def hash_model(spec: ModelSpec) -> str:
    """Compute the model's hash: the hash of its manifest (`fedtune.model.manifest`), or the SHA-256 of its GGUF file.

    The hash of a random model covers its tensors' bytes, in the order of their names.  Without a base, the result is
    the hash of an empty byte string.
    """
    if not spec.is_built_in:
        return build_manifest(find_model_folder(spec), gguf_file=spec.gguf_file).sha256
    digest = hashlib.sha256()
    for _, tensor in sorted(build_tiny_base(spec.path).state_dict().items()) if spec.path != NO_BASE else ():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _provide_pinned_files(spec: ModelSpec, *, with_weights: bool = True) -> Iterator[Path]:
    """Check the model's hash against `spec.sha256`, and provide a folder with exactly the files of its manifest."""
    if spec.gguf_file is not None:
        require_extra("model.gguf_file", spec.gguf_file, "gguf")
    reads_weights = with_weights or bool(spec.gguf_file)
    with stage_files(find_model_folder(spec), gguf_file=spec.gguf_file, with_weights=reads_weights) as (path, manifest):
        _require_pinned(spec, manifest.sha256)
        if not spec.gguf_file:
            yield path
            return
        # The expanded copy is derived from the pinned file, in this account's cache, which is trusted like its Python.
        expanded = expand_gguf(path / spec.gguf_file, sha256=manifest.sha256, cache=find_cache_folder(spec))
        with stage_files(expanded, with_weights=with_weights) as (derived, _):
            yield derived


def _load_pretrained(spec: ModelSpec, folder: Path, *, predicts_tokens: bool, images: bool | None) -> PreTrainedModel:
    auto = AutoModelForCausalLM if predicts_tokens else AutoModel
    with _report_loading_errors(spec):
        config = AutoConfig.from_pretrained(folder, **_OWN)
        if images is not None:
            require_modality(config, images=images, path=spec.path)
        check_size(config, auto, folder=folder, path=spec.path)
        if predicts_tokens:
            require_decoder(config, path=spec.path)
        model, report = auto.from_pretrained(
            folder, dtype=_DTYPES[spec.dtype], use_safetensors=True, output_loading_info=True, **_OWN
        )
    model.config.name_or_path = spec.path
    # Transformers fills missing weights with random numbers.  fedtune pools itself, so a missing pooler is harmless.
    if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):
        raise ConfigError("model.path", spec.path, f"lacks weights for its task, such as {missing[0]}")
    if model.config.is_encoder_decoder:
        raise ConfigError("model.path", spec.path, "must be an encoder or a decoder, not an encoder-decoder model")
    return model


def _require_pinned(spec: ModelSpec, sha256: str) -> None:
    if spec.sha256 not in (None, sha256):
        raise ConfigError("model.sha256", spec.sha256, f"does not match {spec.path}: must be {sha256} or null")


def _report_loading_errors(spec: ModelSpec) -> AbstractContextManager[None]:
    return translate_library_errors("model.path", spec.path, "cannot be loaded: {}")


_log = logging.getLogger(__name__)


def expand_gguf(file: Path, *, sha256: str, cache: Path) -> Path:
    """Return a folder with a GGUF file's model and tokenizer in safetensors format, from the cache or newly expanded.

    Args:
        file: the GGUF file, alone in its folder, because transformers also reads other files there.
        sha256: the file's hash, the name of the cache entry.
        cache: fedtune's cache folder.

    Raises:
        ConfigError: the file is not a readable causal language model, or the cache is not writable.
    """
    # Another release of transformers may read the same file differently.
    target = cache / "gguf" / f"{sha256}-transformers-{transformers.__version__}"
    if target.is_dir():
        return target
    _log.info("dequantizing %s once, into %s", file.name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".draft-", dir=target.parent) as scratch:
            draft = Path(scratch, "draft")
            _convert_gguf(file, draft)
            try:
                os.rename(draft, target)
            except OSError:  # another process has already written the same entry
                if not target.is_dir():
                    raise
    except OSError as error:
        bound = f"must be a writable folder ({get_first_line(error)})"
        raise ConfigError("model.cache_dir", str(cache), bound) from error
    return target


def load_gguf(file: Path) -> PreTrainedModel:
    """Load the causal language model in `file`, dequantized to float32 in memory."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **_OWN)


def save_as_plain_model(model: PreTrainedModel, folder: Path) -> None:
    """Save a model as an ordinary instance of its class, for other programs to load.

    Transformers treats a model from a GGUF file as quantized and refuses to save it.  A frozen base also has fedtune's
    row-wise activations and a config that disables the key-value cache; the saved copy has neither.
    """
    config = copy.deepcopy(model.config)
    config.use_cache = True
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    if plain.can_generate():
        plain.generation_config = model.generation_config
    plain.save_pretrained(folder)


def _convert_gguf(file: Path, folder: Path) -> None:
    # One progress bar ignores the setting that disables progress bars.
    bound = "must be a GGUF causal language model ({})"
    with translate_library_errors("model.gguf_file", file.name, bound), redirect_stderr(StringIO()):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, **_OWN)
        # Apply the rules for a config.json before any memory is allocated.
        fields = json.loads(config.to_json_string(use_diff=False))
        if reason := explain_config_refusal(fields | {"quantization_config": None}):
            raise ConfigError("model.gguf_file", file.name, f"its metadata {reason}")
        model = load_gguf(file)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **_OWN)
    with silence_transformers():
        save_as_plain_model(model, folder)
    tokenizer.save_pretrained(folder)


_SEED = 20240
_HIDDEN, _LAYERS, _POSITIONS = 32, 2, 512
_BERT_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
_LLAMA_SPECIAL = ("<s>", "</s>")


def build_tiny_base(path: str, *, predicts_tokens: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the tiny random model for `path` ("random:bert" or "random:llama"), with the same weights in every call."""
    auto = AutoModelForCausalLM if predicts_tokens else AutoModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return auto.from_config(_build_tiny_config(path), dtype=dtype)


def build_tiny_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte.

    As in many chat models, the padding token of `random:llama` is its end-of-text token.
    """
    special = _BERT_SPECIAL if path == "random:bert" else _LLAMA_SPECIAL
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*special, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if path == "random:bert":
        ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
        names = {f"{token[1:-1].lower()}_token": token for token in _BERT_SPECIAL}
    else:
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    takes = ["input_ids", "attention_mask"]  # llama refuses other arguments
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=_POSITIONS, model_input_names=takes, **names
    )


def _build_tiny_config(path: str) -> PreTrainedConfig:
    # The initializer range is larger than the usual 0.02, with which the input would hardly affect such a narrow model.
    shape = {
        "hidden_size": _HIDDEN,
        "intermediate_size": 2 * _HIDDEN,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": _POSITIONS,
        "initializer_range": 0.2,
    }
    if path == "random:bert":
        return BertConfig(vocab_size=256 + len(_BERT_SPECIAL), pad_token_id=0, **shape)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return LlamaConfig(
        vocab_size=256 + len(_LLAMA_SPECIAL), num_key_value_heads=1, tie_word_embeddings=True, **ends, **shape
    )
