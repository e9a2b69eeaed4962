"""Batch invariance of every supported architecture, bit for bit, with tiny random models."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from fedtune.data import Shapes
from fedtune.model.base_model import build_tiny_tokenizer
from fedtune.model.quantized import FourBit
from fedtune.model.spec import LoraSpec, ModelSpec
from fedtune.model.unsupported_models import ARCHITECTURES
from fedtune.tasks.task_model import build_task_model
from fedtune.training.batch_invariance import list_frozen_values, max_batch_influence

from ..model.conftest import make_spec

pytestmark = pytest.mark.nightly

ENCODERS = {"bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta"}
TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPE = {
    "distilbert": {"vocab_size": 300, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "electra": {**TINY, "embedding_size": 32},
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "gemma4_text": {**TINY, "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16}
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
    | {"word_embed_proj_dim": 32},
}
TARGETS = {
    "distilbert": ("q_lin", "v_lin"),
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "v"),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "phi3": ("qkv_proj",),
}


@pytest.mark.parametrize("dtype", ["float32", "nf4"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_gradients_are_batch_invariant_for_every_architecture(name: str, dtype: Any, tmp_path: Path) -> None:
    encoder = name in ENCODERS
    shape = SHAPE.get(name) or (TINY if encoder else {**TINY, "num_key_value_heads": 1, "head_dim": 16})
    kind = CONFIG_MAPPING[name]
    settings = {**shape, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2}
    known = {field.name for field in dataclasses.fields(kind)} | {*kind.attribute_map, "global_head_dim"}
    config = kind(**{key: value for key, value in settings.items() if key in known})
    torch.manual_seed(0)
    (AutoModel if encoder else AutoModelForCausalLM).from_config(config).save_pretrained(tmp_path)
    build_tiny_tokenizer("random:bert" if encoder else "random:llama").save_pretrained(tmp_path)
    lora = LoraSpec(rank=2, target_modules=TARGETS.get(name, ("query", "value") if encoder else ("q_proj",)))
    task = "classification" if encoder else "causal_lm"
    model = build_task_model(make_spec(task=task, model=ModelSpec(path=str(tmp_path), dtype=dtype), lora=lora))
    base = model.base.get_base_model()
    in_four_bits = [module for module in base.modules() if isinstance(module, FourBit)]
    assert bool(in_four_bits) == (dtype == "nf4")
    coded = [one for module in in_four_bits for one in module.buffers()]
    drawn = [*model.parameters(), *list_frozen_values(model).values(), *coded]
    weights = {one.data_ptr() for one in drawn}
    beside = [
        key for key, one in base.state_dict().items() if one.is_floating_point() and one.data_ptr() not in weights
    ]
    assert beside == [], "the trial must replace all values of a weights file"
    shapes = Shapes.from_limits(max_length=12, max_tokens=64, positions=60)
    assert max_batch_influence(model, shapes, keeps_states=False, max_grad_norm=1.0) == 0.0
