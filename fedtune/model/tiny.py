"""Tiny untrained models with a byte tokenizer, for tests and for trying a configuration without weights."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_SEED = 20240
_HIDDEN, _LAYERS, _POSITIONS = 32, 2, 512
_BERT_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
_LLAMA_SPECIAL = ("<s>", "</s>")


def tiny_base(path: str, *, predicts_tokens: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that `path` ("random:bert" or "random:llama") stands for: the same weights in every call."""
    auto = AutoModelForCausalLM if predicts_tokens else AutoModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return auto.from_config(_config(path), dtype=dtype)


def tiny_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """One token a byte.  As in many chat models, the llama's padding token is its end-of-text token."""
    special = _BERT_SPECIAL if path == "random:bert" else _LLAMA_SPECIAL
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*special, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if path == "random:bert":
        ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        names["unk_token"] = "[UNK]"
    else:
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=_POSITIONS, **names)


def _config(path: str) -> PreTrainedConfig:
    # Wider than the usual 0.02: in a model this narrow the input would otherwise hardly reach the output.
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
