"""The output layer runs only at target positions, unless the base changes its scores afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedtune.data import Batch
from fedtune.data.batching import isolate_example
from fedtune.model.layers import OutputLayer

from ..builders import record_example_gradients
from .conftest import make_batch, make_trained

IDS = torch.arange(12).view(2, 6)
SIZES: dict[str, Any] = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def build_llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def build_in_place_llama() -> PreTrainedModel:
    model = build_llama()
    forward = model.forward

    def halve_logits(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits.div_(2)
        return output

    model.forward = halve_logits
    return model


@pytest.mark.parametrize(
    "build",
    [build_llama, lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval(), build_in_place_llama],
)
def test_scores_at_selected_positions_match_the_model(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    all_logits = model(input_ids=IDS).logits
    output = OutputLayer(model)
    inputs = output.compute_inputs(lambda: model(input_ids=IDS))
    assert inputs.shape[-1] == (16 if build is build_llama else 48)
    torch.testing.assert_close(output.scores(inputs[1, [2, 4]]), all_logits[1, [2, 4]])


def test_output_layer_is_skipped_only_while_capturing_inputs() -> None:
    model = build_llama()
    output, rows = OutputLayer(model), []
    model.lm_head.register_forward_hook(lambda layer, inputs, scores: rows.append(scores[..., 0].numel()))
    output.compute_inputs(lambda: model(input_ids=IDS))
    assert rows == []
    with pytest.raises(ZeroDivisionError):
        output.compute_inputs(lambda: 1 / 0)
    model(input_ids=IDS)
    assert rows == [12], "a failed pass must leave no state"


@pytest.mark.parametrize("num_targets", [0, 1, 3, 6])
def test_gradients_do_not_depend_on_target_counts_of_neighbors(num_targets: int) -> None:
    model, batch = make_trained("random:llama", "causal_lm"), make_batch("causal_lm")
    before = record_example_gradients(model, batch)
    batch.targets[1:] = -100
    batch.targets[1:, 1 : 1 + num_targets] = 7
    beside_others = record_example_gradients(model, batch)
    assert any(gradient[0].any() for gradient in before.values())
    assert all(torch.equal(gradient[0], beside_others[name][0]) for name, gradient in before.items())


def test_empty_batch_uses_full_memory_and_single_tokens_have_no_loss() -> None:
    model, batch = make_trained("random:llama", "causal_lm"), make_batch("causal_lm")
    num_places: list[int] = []
    layer = model.base.get_base_model().lm_head
    hook = layer.register_forward_hook(lambda layer, inputs, scores: num_places.append(len(scores)))
    model.losses(batch)
    max_places = max(num_places)
    num_places.clear()
    model.task.losses(model, isolate_example(batch, None))
    hook.remove()
    assert num_places == [batch.input_ids.shape[1] - 1] * 4
    assert max_places <= num_places[0]
    short = Batch(batch.input_ids[:, :1], batch.attention_mask[:, :1], batch.targets[:, :1])
    assert all(not gradient.any() for gradient in record_example_gradients(model, short).values())
    assert model.losses(short).tolist() == [0.0] * len(short)
