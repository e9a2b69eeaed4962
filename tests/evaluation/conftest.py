"""Tiny random models without files, and data to score."""

import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from fedtune.data.tokenization import TextDataset
from fedtune.evaluation.scoring import evaluate_examples
from fedtune.model.layers import attach_adapters
from fedtune.model.spec import LoraSpec, ModelSpec, TaskModelSpec
from fedtune.tasks.registry import get_task
from fedtune.tasks.task_model import TaskModel

from ..model.conftest import make_trained
from ..training.conftest import one_thread as one_thread

VOCABULARY = 50
END = 2
NUM_LABELS = 4
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"vocab_size": VOCABULARY}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words w3, w4, ... named by their ids. Padding and end of text share an id, as in many models."""
    words = {"<unk>": 0, "<bos>": 1, "<end>": END} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", bos_token="<bos>", unk_token="<unk>"
    )


def build_tiny_model(kind: Any, config: Any, lora: LoraSpec) -> TaskModel:
    """Build a tiny model whose adapters change the output, because B is not zero."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        base = attach_adapters(kind(config).requires_grad_(False), spec=lora, predicts_tokens=True, seed=0)
    for name, parameter in base.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    spec = TaskModelSpec(model=ModelSpec(path="random:llama"), lora=LoraSpec(), task="causal_lm")
    return TaskModel(spec, get_task(spec.task), base)


bert_classifier = partial(make_trained, labels=tuple(map(str, range(NUM_LABELS))))
classifier = pytest.fixture(name="classifier")(lambda: bert_classifier())
language_model = pytest.fixture(name="language_model")(lambda: build_llama(LoraSpec(rank=2)))


def build_llama(lora: LoraSpec) -> TaskModel:
    # A large range, so that the likeliest token clearly wins and texts vary.
    more = {"num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.5}
    config = transformers.LlamaConfig(**SIZES, **more, eos_token_id=END, pad_token_id=END)
    return build_tiny_model(transformers.LlamaForCausalLM, config, lora)


@pytest.fixture
def language_model_without_positions() -> TaskModel:
    """Bloom, whose attention decays with distance (ALiBi) and whose forward pass has no position ids."""
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5)
    return build_tiny_model(transformers.BloomForCausalLM, config, LoraSpec(rank=2))


@pytest.fixture
def labeled_texts() -> TextDataset:
    """Forty texts of 1 to 15 tokens in four classes."""
    generator = np.random.default_rng(1)
    input_ids = tuple(draw_ids(generator, length) for length in generator.integers(1, 16, size=40))
    return TextDataset(input_ids=input_ids, targets=generator.integers(0, NUM_LABELS, size=40, dtype=np.int64))


@pytest.fixture
def completion_texts() -> TextDataset:
    """Twenty texts of 4 to 15 tokens with prompts of 3 tokens; the last text was truncated inside its prompt."""
    generator = np.random.default_rng(2)
    input_ids = tuple(draw_ids(generator, length) for length in generator.integers(4, 16, size=20))
    targets = [ids.astype(np.int64) for ids in input_ids]
    for target in targets:
        target[:3] = -100
    targets[-1][:] = -100
    return TextDataset(input_ids=input_ids, targets=tuple(targets))


def draw_ids(generator: np.random.Generator, length: int) -> np.ndarray:
    return generator.integers(3, VOCABULARY, size=length, dtype=np.int32)


def score_model(model: TaskModel, dataset: TextDataset, **options: Any) -> dict[str, float]:
    return model.task.scores(evaluate_examples(model, dataset, **options), spec=model.spec)
