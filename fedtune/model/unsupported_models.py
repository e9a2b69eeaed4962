"""Checks that refuse model files that redirect loading, exhaust a machine's resources, or couple a batch's examples.

Each file is checked as the bytes that will be loaded, before a library parses them.  Only listed keys are allowed,
because transformers accepts any other key as well and acts on some of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from fedtune.codec import list_items
from fedtune.model.tokenizer_rules import explain_tokenizer_refusal, quote
from fedtune.spec import ConfigError

OF_ANY_CONFIG = frozenset(
    # In every config, or in every older config.
    {"model_type", "_name_or_path", "_model_name_or_path", "torch_dtype", "num_labels", "output_attentions"}
    | {"attn_implementation", "finetuning_task", "gradient_checkpointing", "position_embedding_type", "prefix"}
    | {"tokenizer_class", "torchscript", "use_bfloat16", "transformers.js_config", "task_specific_params"}
    | {"sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id", "use_cache"}
    | {"tie_encoder_decoder", "output_past"}
    # Generation settings, which transformers ignores here.
    | {"max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"}
    | {"temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"}
    | {"encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores"}
    | {"return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"}
    | {"exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"}
    # Rotary embeddings, which transformers converts to `rope_parameters`, and sliding-window attention.
    | {"rope_theta", "rope_scaling", "rope_parameters", "rope_interleaved", "partial_rotary_factor", "rotary_pct"}
    | {"rotary_emb_base", "rope_local_base_freq", "global_rope_theta", "local_rope_theta", "head_dim"}
    | {"sliding_window_pattern", "_sliding_window_pattern"}
    # In well-known models, but not used by any code.
    | {"directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"}
    | {"pooler_size_per_head", "pooler_type", "n_ctx", "is_llama_config", "use_mrope", "tie_weights_"}
    | {"pretraining_tp", "feed_forward_length"}
    # Settings of a backbone class, which is not loaded.
    | {"out_features", "out_indices", "stage_names"}
)
"""Allowed keys of config.json in addition to the keys that an architecture's own config declares.  An allowlist is
needed, because transformers turns any other key into an attribute: through `attribute_map` a harmless key can be read
as `transformers_weights`, and `fusion_config` or `distributed_config` load other code.
"""

WITHOUT_EFFECT = frozenset({"special_tokens_map_file", "tokenizer_file", "tokenizer_config_file", "added_tokens_file"})
"""File locations written by old releases, which transformers always overrides with the folder's own files."""

OF_TOKENIZER_CONFIG = WITHOUT_EFFECT | frozenset(
    {"add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens"}
    | {"backend", "chat_template", "clean_text", "clean_up_tokenization_spaces", "do_basic_tokenize", "do_lower_case"}
    | {"errors", "extra_special_tokens", "handle_chinese_chars", "is_local", "keep_accents", "legacy"}
    | {"legacy_behaviour", "local_files_only", "max_length", "model_input_names", "model_max_length"}
    | {"model_specific_special_tokens", "name_or_path", "never_split", "normalization", "pad_to_multiple_of"}
    | {"pad_token_type_id", "padding", "padding_side", "processor_class", "remove_space", "return_token_type_ids"}
    | {"sp_model_kwargs", "spaces_between_special_tokens", "split_special_tokens", "stride", "strip_accents"}
    | {"token_type_ids_pattern", "tokenize_chinese_chars", "tokenizer_class", "transformers_version", "trim_offsets"}
    | {"truncation", "truncation_side", "truncation_strategy", "use_default_system_prompt", "use_fast", "verbose"}
    | {"vocab_size", "wordpieces_prefix"}
)
"""Allowed keys of tokenizer_config.json in addition to tokens such as `eos_token`; each is an argument of the library's
tokenizer.
"""

OF_SPECIAL_TOKENS_MAP = frozenset(
    {f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    | {"additional_special_tokens", "extra_special_tokens"}
)
"""Allowed keys of special_tokens_map.json.  Transformers passes every key to the tokenizer and overrides the folder's
own name, so another key could name a folder or a repository to read, and allow access to the hub.
"""


PRIVATE_TO = "private_to"
"""Key in a model's settings that names the site on whose records it was trained without noise
(`fedtune.lab.personalization`).
"""
OWED = "fedtune_owed"
"""Key in an exported model's config.json that records the privacy loss of its training (`fedtune.runs.environment`)."""
PROCESSOR = "preprocessor_config.json"  # the settings of an image processor
PROCESSOR_KIND = re.compile("(ViT|DeiT|Bit|Siglip)(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)")
"""Class names of the supported image processors; the first group is the prefix of the class for PIL."""
OF_PROCESSOR = frozenset(
    {"crop_size", "data_format", "default_to_square", "device", "disable_grouping", "do_center_crop", "do_convert_rgb"}
    | {"do_normalize", "do_pad", "do_rescale", "do_resize", "feature_extractor_type", "image_mean"}
    | {"image_processor_type", "image_std", "input_data_format", "pad_size", "processor_class", "resample"}
    | {"rescale_factor", "return_tensors", "size", "_valid_processor_keys"}
)
"""Allowed keys of preprocessor_config.json; transformers turns any other key into an attribute, even the name of a
method.
"""
_OF_EVERY_PROCESSOR = {"data_format": (None, "channels_first"), "do_pad": (None, False)} | dict.fromkeys(
    ("device", "input_data_format", "pad_size", "return_tensors"), (None,)
)
_MAX_SIDE = 1024  # maximum side of an image before the center crop; determines memory and time

_MAX_BYTES = {"config.json": 1 << 20, "generation_config.json": 1 << 20, "tokenizer_config.json": 16 << 20}
_MAX_BYTES |= {PROCESSOR: 1 << 20}
_MAX_BYTES_ELSE = 256 << 20
_MAX_DEPTH = 32
_LARGEST_INTEGER = 1 << 24
_MAX_LAYERS = 1 << 10

_LOADS_MORE = "would load files or code other than the pinned ones"
_REDIRECTING = frozenset(
    {"transformers_weights", "auto_map", "quantization_config", "custom_pipelines", "configuration_files"}
    | {"backbone", "backbone_config", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone"}
)
"""Keys of config.json, at any depth, that make transformers read other files, contact a hub, run other code or change
the weights.
"""

ENCODERS = frozenset({"bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta"})
ARCHITECTURES = ENCODERS | frozenset(
    {"cohere", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gpt2", "gpt_neox", "granite", "llama", "ministral"}
    | {"mistral", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"}
    | {"vaultgemma"}
)
"""`model_type` of the supported models: dense text transformers whose code, in transformers 5.23, computes each example
of a batch independently of the others.

An allowlist is needed, because in other architectures the weights can hide a coupling of examples from any test: the
number of patches depends on the longest example (BLT), the rounding of an expert depends on its number of tokens
(GPT-OSS and every mixture of experts), a scale is taken from the largest value in the batch (Nystromformer), or a state
is carried from batch to batch (RecurrentGemma).  Before adding an architecture, read its `modeling_*.py` for such code.
"""

_KEYS_OF = {"gemma4_text": {"global_head_dim", "num_global_key_value_heads", "per_layer_config"}}
"""Additional config keys of an architecture: for Gemma 4 the attention sizes of layers that differ from the others."""
_SIZES_OF_A_LAYER = {"head_dim", "num_key_value_heads"}
_ATTENTION = (None, "eager", "sdpa")
"""Allowed attention implementations.  Other implementations are downloaded from a hub as compiled code
("kernels-community/..."), or require packages that may not be installed at a site.
"""
VISION = {"deit": 2, "dinov2": 1, "siglip_vision_model": 0, "vit": 1}
"""`model_type` of the supported image models, selected by the same rule, and the number of special tokens before the
patch tokens.
"""
_BATCH_NORM = frozenset({"efficientnet", "levit", "mobilenet_v1", "mobilenet_v2", "mobilevit", "regnet", "resnet"})

STATIC_ROTARY = frozenset({"default", "linear", "yarn", "llama3", "proportional", "axial", "mrope"})
"""Rope types whose frequencies depend only on the config, unlike "dynamic" and "longrope" in transformers 5.23."""


def get_max_file_bytes(name: str) -> int:
    """Return the maximum size in bytes of a model file other than weights."""
    return _MAX_BYTES.get(name, _MAX_BYTES_ELSE)


def check_content(name: str, content: bytes, *, folder: str) -> None:
    """Check the size, the JSON syntax and the settings of a model file other than weights.

    Raises:
        ConfigError: for `model.path`; the message names the file and the reason.
    """
    if len(content) > get_max_file_bytes(name):
        raise _explain_file_refusal(folder, name, f"is larger than {get_max_file_bytes(name) >> 20} MiB")
    if not name.endswith(".json"):
        return
    try:
        fields = _parse_json(content)
    except _UnacceptableJson as error:
        raise _explain_file_refusal(folder, name, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise _explain_file_refusal(folder, name, "is not readable JSON") from error
    if (refusal := _REFUSALS.get(name)) is not None:
        reason = refusal(fields) if isinstance(fields, dict) else "must be a JSON object"
        if reason is not None:
            raise _explain_file_refusal(folder, name, reason)


def explain_config_refusal(fields: dict[str, Any]) -> str | None:
    """Return the reason for refusing a config.json, as the end of a sentence, or None if it is acceptable."""
    if (site := fields.get(PRIVATE_TO)) is not None:
        return f"belongs to a model that is private to {quote(site)} and has no guarantee; start from another model"
    layers = 0
    for key, value in _iter_entries(fields):
        if key in _REDIRECTING and value is not None:
            return f"has {key}, which {_LOADS_MORE}"
        if re.fullmatch(r"_?attn_implementation(_internal)?", key) and not all(
            choice in _ATTENTION for choice in (value.values() if isinstance(value, dict) else (value,))
        ):
            return f"has {key} = {quote(value)}, which can load code; remove it"
        if type(value) is int and abs(value) > _LARGEST_INTEGER and "theta" not in key:
            return f"has {quote(key)} = {quote(value)}; the limit is {_LARGEST_INTEGER}"
        if type(value) is int and "layer" in key and "size" not in key and "dim" not in key:
            layers = max(layers, value)
    if layers > _MAX_LAYERS:
        return f"describes {layers} layers; the limit is {_MAX_LAYERS}"
    return (
        _explain_rope_refusal(fields) or _explain_architecture_refusal(fields) or _explain_unknown_key_refusal(fields)
    )


def _explain_architecture_refusal(fields: dict[str, Any]) -> str | None:
    inner = next(
        (
            key
            for key, value in fields.items()
            if key.endswith("_config") and isinstance(value, dict) and not _is_layer_table(key, value)
        ),
        None,
    )
    if inner is not None:
        return f"has {quote(inner)}, a nested model; only text models and image models are supported"
    model_type = fields.get("model_type")
    if fields.get("enable_moe_block"):
        return "has enable_moe_block; in a mixture of experts, rounding depends on the number of tokens per expert"
    if isinstance(model_type, str) and model_type in ARCHITECTURES | VISION.keys():
        return None
    if isinstance(model_type, str) and model_type in _BATCH_NORM:
        return f"has model_type {model_type}, which has BatchNorm and so mixes the examples of a batch"
    known = ", ".join((*sorted(ARCHITECTURES), *VISION))
    return (
        f"has model_type {quote(model_type)}, which is not known to process each example of a batch "
        f"separately; known: {known}"
    )


def _is_layer_table(key: str, value: dict[str, Any]) -> bool:
    """Return True for Gemma 4's table of attention sizes by layer number, which does not contain a nested model."""
    return key == "per_layer_config" and all(
        isinstance(sizes, dict)
        and sizes.keys() <= _SIZES_OF_A_LAYER
        and all(type(size) is int for size in sizes.values())
        for sizes in value.values()
    )


def explain_rotary_refusal(rope_type: object) -> str | None:
    """Return the reason for refusing a rope type, as the end of a sentence, or None for a static type."""
    if rope_type is None or (isinstance(rope_type, str) and rope_type in STATIC_ROTARY):
        return None
    if rope_type in ("longrope", "su") or "dynamic" in str(rope_type):
        return (
            f"has rope type {quote(rope_type)}, which chooses its frequencies from the longest example of a batch, so "
            "one record would change another's gradient"
        )
    return f"has rope type {quote(rope_type)}, whose frequencies are not known to be independent of the batch"


def _explain_unknown_key_refusal(fields: dict[str, Any]) -> str | None:
    """Return the reason for refusing a key that is not a setting of this (supported) architecture, or None."""
    # Imported late, because reading settings should not wait for it.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    declared = {field.name for field in dataclasses.fields(CONFIG_MAPPING[fields["model_type"]])}
    # Redirecting keys were checked: their value is null.
    known = declared | _KEYS_OF.get(fields["model_type"], set()) | OF_ANY_CONFIG | {OWED} | _REDIRECTING
    unknown = next((key for key in fields if key not in known), None)
    if unknown is None:
        return None
    return (
        f"has {quote(unknown)}, an unknown setting for a {fields['model_type']} model, which could change what is "
        "loaded; remove it"
    )


def _explain_rope_refusal(fields: dict[str, Any], *, inside: bool = False) -> str | None:
    """Return the reason for refusing a rope type anywhere in a config, including nested configs and per-layer
    settings.
    """
    for key, value in fields.items():
        is_type = key == "rope_type" or (inside and key == "type")
        reason = explain_rotary_refusal(value) if is_type else None
        for part in value if isinstance(value, list) else (value,):
            if reason is None and isinstance(part, dict):
                reason = _explain_rope_refusal(part, inside=inside or "rope" in key)
        if reason is not None:
            return reason
    return None


def _explain_tokenizer_config_refusal(fields: dict[str, Any]) -> str | None:
    for key, value in fields.items():
        if key not in OF_TOKENIZER_CONFIG and not (key.endswith("_token") and _is_token(value)):
            return f"has {quote(key)}, an unknown tokenizer setting; remove it"
    return None


def _explain_special_tokens_refusal(fields: dict[str, Any]) -> str | None:
    for key, value in fields.items():
        if key not in OF_SPECIAL_TOKENS_MAP:
            return f"has {quote(key)}, which is not a special token"
        # One token, a list of them, or tokens by name.
        by_name = isinstance(value, dict) and "content" not in value
        if not all(map(_is_token, value.values() if by_name else value if isinstance(value, list) else [value])):
            return f"has {key} = {quote(value)}, which is not a token"
    return None


def _explain_processor_refusal(fields: dict[str, Any]) -> str | None:
    named = [fields.get(key) for key in ("image_processor_type", "feature_extractor_type") if fields.get(key)]
    if not named or not all(isinstance(name, str) and PROCESSOR_KIND.fullmatch(name) for name in named):
        return f"has image_processor_type {quote(named)}; supported types: ViT, DeiT, Bit (DINOv2) and Siglip"
    for key, value in fields.items():
        if key not in OF_PROCESSOR or value not in _OF_EVERY_PROCESSOR.get(key, (value,)):
            return f"has {quote(key)} = {quote(value)}, an unknown image processor setting; remove it"
        sides = (value.values() if isinstance(value, dict) else [value]) if key in ("size", "crop_size") else ()
        if not all(side is None or (type(side) is int and 0 < side <= _MAX_SIDE) for side in sides):
            return f"has {key} = {quote(value)}; each side must be a whole number of at most {_MAX_SIDE}"
        three = isinstance(value, list) and len(value) == 3 and all(type(number) in (int, float) for number in value)
        if key in ("image_mean", "image_std") and not (three and (key == "image_mean" or all(value))):
            return f"has {key} = {quote(value)}; it must be three numbers, one per channel, and no deviation of 0"
    return None


_REFUSALS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "config.json": explain_config_refusal,
    "tokenizer.json": explain_tokenizer_refusal,
    "tokenizer_config.json": _explain_tokenizer_config_refusal,
    "special_tokens_map.json": _explain_special_tokens_refusal,
    "added_tokens.json": lambda fields: None,
    PROCESSOR: _explain_processor_refusal,
}


def _is_token(value: Any) -> bool:
    return value is None or isinstance(value.get("content") if isinstance(value, dict) else value, str)


class _UnacceptableJson(ValueError):
    """Error for JSON with duplicate keys, non-finite numbers or too deep nesting."""


def _parse_json(content: bytes) -> Any:
    def require_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise _UnacceptableJson(f"has the key {quote(key)} twice")
            fields[key] = value
        return fields

    def parse_finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise _UnacceptableJson(f"contains {text[:20]}, which is not a finite number")
        return value

    text = content.decode("utf-8")
    fields = json.loads(
        text, object_pairs_hook=require_unique_keys, parse_constant=parse_finite, parse_float=parse_finite
    )
    level = [fields]
    for _ in range(_MAX_DEPTH):
        level = [part for item in level for part in list_items(item) if isinstance(part, dict | list)]
    if level:
        raise _UnacceptableJson(f"is nested more than {_MAX_DEPTH} levels deep")
    return fields


def _iter_entries(fields: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value at any depth; items of a list have the key of the list."""
    for key, value in fields.items():
        yield key, value
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, dict):
                yield from _iter_entries(part)
            elif isinstance(value, list):
                yield key, part


def _explain_file_refusal(folder: str, name: str, reason: str) -> ConfigError:
    return ConfigError("model.path", folder, f"its {name} {reason}")
