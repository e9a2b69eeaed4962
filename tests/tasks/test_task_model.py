"""Task models: losses, head and trainable parameters, with per-example gradients against a loop."""

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers import BertLMHeadModel, RobertaForCausalLM

from fedtune.model.base_model import load_tokenizer
from fedtune.model.compatibility import check_causal, check_examples_independent
from fedtune.model.layers import checkpoint_layers
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec
from fedtune.spec import ConfigError
from fedtune.tasks.classification import Classification
from fedtune.tasks.task_model import TaskModel, build_task_model

from ..builders import record_example_gradients
from ..model.conftest import cut_example, make_batch, make_spec, make_trained

EMBED = Classification().embed
KINDS = [
    *(("random:bert", task) for task in ("classification", "multi_label", "regression", "pairs", "triplets")),
    *(("random:llama", task) for task in ("classification", "ordinal", "causal_lm", "pairs")),
    ("random:bert", "token_classification"),
]
kinds = pytest.mark.parametrize(("path", "task"), KINDS)


@pytest.mark.parametrize("task", ["classification", "multi_label", "regression", "ordinal", "token_classification"])
def test_head_pads_small_batches_to_full_row_blocks(task: str) -> None:
    """The test counts rows, because this machine may use the same kernel for small batches."""
    model, batch, row_counts = make_trained("random:bert", task), make_batch(task), set()
    hook = model.head.register_forward_pre_hook(lambda _, inputs: row_counts.add(inputs[0].shape[0]))
    for part in (batch, *(cut_example(batch, index) for index in range(len(batch)))):
        model.losses(part)
    hook.remove()
    assert row_counts
    assert {rows % (4 if task == "token_classification" else 32) for rows in row_counts} == {0}


@pytest.mark.parametrize(
    ("path", "task", "lora"),
    [
        *((*kind, LoraSpec(rank=2)) for kind in KINDS),
        ("random:bert", "classification", LoraSpec(rank=2, layers=(-1,), train_a=False)),
        *(("random:bert", "triplets", LoraSpec(kind=kind, rank=2)) for kind in ("dora", "ia3")),
        *(("random:llama", "causal_lm", LoraSpec(kind=kind, rank=2)) for kind in ("dora", "ia3")),
    ],
)
def test_gradient_checkpointing_changes_no_loss_or_gradient(path: str, task: str, lora: LoraSpec) -> None:
    model, batch = make_trained(path, task, lora=lora), make_batch(task)
    losses, gradients = model.losses(batch), record_example_gradients(model, batch)
    model.enable_gradient_checkpointing()
    model = copy.deepcopy(model)
    torch.testing.assert_close(model.losses(batch), losses, rtol=0, atol=0)
    again = record_example_gradients(model, batch)
    assert list(again) == list(gradients)
    first, second = (torch.cat([rows.flatten(1) for rows in each.values()], dim=1) for each in (again, gradients))
    assert ((first - second).norm(dim=1) <= 1e-5 * second.norm(dim=1)).all(), "of each example's norm"
    with torch.no_grad():
        torch.testing.assert_close(model.losses(batch), losses, rtol=0, atol=0)


def test_gradient_checkpointing_stores_fewer_values() -> None:
    def count_stored(model: TaskModel) -> int:
        pack = Mock(side_effect=lambda tensor: tensor)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.losses(make_batch("classification"))
        return sum(call.args[0].numel() for call in pack.call_args_list)

    model = make_trained("random:llama", "classification")
    uncheckpointed = count_stored(model)
    model.enable_gradient_checkpointing()
    assert count_stored(model) < uncheckpointed / 3


@kinds
def test_only_trainable_modules_enter_training_mode(path: str, task: str) -> None:
    model = build_task_model(make_spec(path, task))
    for _ in range(2):
        training = {module for module in model.modules() if module.training}
        assert training == {m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))}
        model.eval()
        assert not any(module.training for module in model.modules())
        model.train()


@kinds
def test_bfloat16_base_keeps_adapter_head_and_losses_in_float32(path: str, task: str) -> None:
    model = make_trained(path, task, model=ModelSpec(path=path, dtype="bfloat16"))
    batch = make_batch(task)
    assert {parameter.dtype for parameter in model.collect_adapter_parameters().values()} == {torch.float32}
    assert next(model.base.get_base_model().parameters()).dtype == torch.bfloat16
    assert model.losses(batch).dtype == model.logits(batch).dtype == torch.float32
    assert {gradient.dtype for gradient in record_example_gradients(model, batch).values()} == {torch.float32}
    torch.testing.assert_close(model.losses(batch), make_trained(path, task).losses(batch), rtol=0.1, atol=0.1)
    empty = type(batch)(*(tensor[:0] for tensor in (batch.input_ids, batch.attention_mask, batch.targets)))
    losses = model.losses(empty)
    losses.sum().backward()
    assert (losses.shape, losses.dtype) == ((0,), torch.float32), "an empty batch must have no losses"


def test_padding_is_masked_by_position_and_tied_embeddings_stay_frozen() -> None:
    model, batch = make_trained("random:llama", "causal_lm"), make_batch("causal_lm")
    other = type(batch)(torch.where(batch.attention_mask == 1, batch.input_ids, 9), batch.attention_mask, batch.targets)
    torch.testing.assert_close(model.losses(batch), model.losses(other), rtol=1e-6, atol=1e-6)
    ended = batch.input_ids.clone()
    ended[0, 3] = 1  # a real end-of-turn token with the padding token's id
    assert model.losses(type(batch)(ended, batch.attention_mask, batch.targets))[0] != model.losses(batch)[0]
    base = model.base.get_base_model()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert not base.get_output_embeddings().weight.requires_grad


@pytest.mark.parametrize("path", ["random:bert", "random:llama"])
def test_head_starts_at_zero_or_from_label_names(path: str) -> None:
    assert not build_task_model(make_spec(path)).logits(make_batch("classification")).any()
    model = build_task_model(make_spec(path, head=HeadSpec(init="label_names", scale=5.0, train=False)))
    assert "head.weight" in model.collect_adapter_parameters().keys() - model.trainable().keys(), (
        "a frozen head must not be trained"
    )
    tokenizer = load_tokenizer(model.spec.model)
    token_ids = torch.tensor([tokenizer("exchange rate")["input_ids"]])
    rows = model.head.weight
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(EMBED(model, token_ids, torch.ones_like(token_ids))[0], rows[1])
    head = HeadSpec(init="label_names", label_texts=("a", "exchange rate", "c"))
    described = build_task_model(make_spec(path, head=head))
    torch.testing.assert_close(described.head.weight[1], rows[1])
    assert not torch.allclose(described.head.weight[0], rows[0])


def test_layers_with_side_gradients_are_refused_for_checkpointing() -> None:
    class Layer(nn.Linear):
        def forward(self, hidden: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) + side

    layers = nn.ModuleList([Layer(2, 2)])
    checkpoint_layers(layers)
    layers[0](torch.ones(1, 2), side=torch.ones(2)).sum().backward()
    with pytest.raises(ConfigError, match=r"runtime\.gradient_checkpointing"):
        layers[0](torch.ones(1, 2), side=torch.ones(2, requires_grad=True))


class Base(nn.Module):
    def __init__(self, reads: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4).requires_grad_(False)
        self.linear, self.reads = nn.Linear(4, 4), reads

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.reads(self.linear, self.embedding(input_ids))


def test_modules_mixing_examples_or_never_used_are_refused() -> None:
    check_examples_independent(Base(lambda linear, hidden: linear(hidden)))
    with pytest.raises(ConfigError, match="several examples"):
        check_examples_independent(Base(lambda linear, hidden: linear(hidden.flatten(0, 1)).view(hidden.shape)))
    with pytest.raises(ConfigError, match="is not used in the base's forward pass"):
        check_examples_independent(Base(lambda linear, hidden: hidden))


def test_head_center_is_the_mean_label_embedding_and_stays_frozen() -> None:
    uncheckpointed = build_task_model(make_spec(head=HeadSpec(init="label_names")))
    model = build_task_model(make_spec(head=HeadSpec(init="label_names", center=True)))
    torch.testing.assert_close(model.center, uncheckpointed.head.weight.mean(dim=0))
    rows = torch.nn.functional.normalize(uncheckpointed.head.weight - model.center, dim=-1)
    torch.testing.assert_close(model.head.weight, rows)
    assert "center" not in model.trainable()
    ids = torch.tensor([[2, 7, 8, 3]])
    embedded, uncentered = (EMBED(model_spec, ids, torch.ones_like(ids)) for model_spec in (model, uncheckpointed))
    torch.testing.assert_close(embedded, torch.nn.functional.normalize(uncentered - model.center, dim=-1))


@pytest.mark.parametrize("kind", [RobertaForCausalLM, BertLMHeadModel])
def test_encoder_configured_as_decoder_is_refused(kind: Any) -> None:
    """The encoder sees no later token, but its head rounds a position by its index in the batch."""
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = kind.config_class(**small, intermediate_size=32, is_decoder=True)
    with pytest.raises(ConfigError, match=r"model\.path .*must be a decoder for causal_lm: [a-z-]+ is an encoder"):
        check_causal(kind(config), path="some/model")
