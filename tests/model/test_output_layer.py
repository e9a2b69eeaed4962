"""The output layer runs at the places that learn a token, and whole where a base changes its scores afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedtune.model.layers import OutputLayer
from fedtune.tasks import TaskModel

IDS = torch.arange(12).view(2, 6)
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def scaled() -> PreTrainedModel:
    """Divides its scores by 8 after the output layer."""
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()


@pytest.mark.parametrize("make", [llama, scaled])
def test_scores_of_chosen_places_are_the_models_own(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    whole = model(input_ids=IDS).logits
    output = OutputLayer(model)
    inputs = output.inputs(lambda: model(input_ids=IDS))
    assert inputs.shape[-1] == (16 if make is llama else 48)
    torch.testing.assert_close(output.scores(inputs[1, [2, 4]]), whole[1, [2, 4]])


def test_the_layer_does_not_run_while_its_inputs_are_taken_and_runs_again_afterwards() -> None:
    model = llama()
    output, rows = OutputLayer(model), []
    model.lm_head.register_forward_hook(lambda layer, inputs, scores: rows.append(scores[..., 0].numel()))
    output.inputs(lambda: model(input_ids=IDS))
    model(input_ids=IDS)
    assert rows == [0, 12]
    with pytest.raises(ZeroDivisionError):
        output.inputs(lambda: 1 / 0)
    model(input_ids=IDS)
    assert rows == [0, 12, 12], "a pass that failed leaves nothing behind"


@pytest.mark.parametrize("neighbours", [1, 3])
def test_how_many_tokens_neighbours_learn_changes_no_bit(
    trained: Callable[..., TaskModel], examples: Callable[..., Any], neighbours: int
) -> None:
    model, batch = trained("random:llama", "causal_lm"), examples("causal_lm")
    loss = model.losses(batch)[0]
    batch.targets[1:] = -100
    batch.targets[1:, :neighbours] = 7
    assert torch.equal(model.losses(batch)[0], loss)
