"""Four-bit base models: per-example gradients match the dequantized weights, and records are independent."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.data import Batch, MicroBatch, Shapes, TextDataset
from fedtune.data.batching import isolate_example
from fedtune.model.frozen_linear import FrozenLinear, RoundedLinear
from fedtune.model.quantized import FourBit
from fedtune.model.spec import LoraSpec
from fedtune.tasks.task_model import TaskModel
from fedtune.training.batch_invariance import max_batch_influence

from ..builders import adapt_shapes_to_device, record_example_gradients
from .conftest import KINDS, LAST, build_trained, make_dummy_examples, make_examples

kinds = pytest.mark.parametrize(("path", "task"), KINDS[:2])


def dequantize_model(model: TaskModel, coarse: TaskModel) -> TaskModel:
    """Return the bfloat16 model `coarse` with the dequantized weights of `model` and torch's own gradients."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            coarse.get_parameter(name).copy_(parameter)  # also the initial values of DoRA, which depend on the weights
        for name, module in model.named_modules():
            if isinstance(module, FourBit):
                coarse.get_parameter(f"{name}.weight").copy_(module.weight)
                coarse.get_submodule(name).__class__ = RoundedLinear
    assert not any(isinstance(module, FourBit) for module in coarse.modules())
    return coarse


def disable_onednn(model: TaskModel) -> TaskModel:
    """Disable oneDNN, which only a model with recorded gradients would use."""
    for module in (one for one in model.modules() if isinstance(one, FrozenLinear)):
        module.__class__ = nn.Linear
    return model


def make_micro_batch(dataset: TextDataset) -> Batch:
    """Make a micro-batch in the shape of a step, because shapes determine rounding."""
    shapes = adapt_shapes_to_device(Shapes.from_limits(max_length=15, max_tokens=16 * len(dataset)))
    examples = make_examples(dataset, shapes)
    length = shapes.lengths[-1]
    return examples.batch(MicroBatch(np.arange(len(dataset)), shapes.rows(length)[0], length))


@pytest.mark.by_day(
    "random:bert-classification-lora-native",
    "random:llama-causal_lm-dora-no instructions",
    "random:bert-classification-ia3-native",
)
@pytest.mark.parametrize("instructions", [True, False], ids=["native", "no instructions"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@kinds
def test_nf4_gradients_match_autograd_on_the_dequantized_weights(
    path: str, task: str, kind: str, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not instructions:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    lora = LoraSpec(kind=kind, rank=2, alpha=4.0)
    formats = ("nf4", "bfloat16", "float32")
    model, coarse, exact = (disable_onednn(build_trained(path, task, dtype=dtype, lora=lora)) for dtype in formats)
    batch = make_micro_batch(make_dummy_examples(task, 8))
    grads, rounded = record_example_gradients(model, batch), record_example_gradients(exact, batch)
    assert any(not torch.allclose(grads[name], rounded[name], rtol=0.01) for name in grads), "4 bits must be coarse"
    # A loop alone would prove nothing: layers that pass no gradient to their input would match themselves.
    same = record_example_gradients(dequantize_model(model, coarse), batch)
    assert all(torch.equal(grads[name], same[name]) for name in grads)
    for module in (model, coarse):
        parameters = module.trainable()
        for row in range(8):
            losses = module.losses(isolate_example(batch, row))
            expected = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, expected, strict=True):
                assert gradient is not None, name
                assert (grads[name][row] - gradient).norm() <= 1e-5 * gradient.norm(), name


@kinds
def test_checkpointing_does_not_change_nf4_gradients(path: str, task: str) -> None:
    batch = make_micro_batch(make_dummy_examples(task, 8))
    plain, recomputed = (build_trained(path, task, dtype="nf4", lora=LAST) for _ in range(2))
    recomputed.enable_gradient_checkpointing()
    first, second = record_example_gradients(plain, batch), record_example_gradients(recomputed, batch)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert plain.compute_frozen_states(batch).dtype == torch.bfloat16


@kinds
def test_trial_replaces_and_restores_nf4_codes(path: str, task: str) -> None:
    model = build_trained(path, task, dtype="nf4")
    layers = [module for module in model.modules() if isinstance(module, FourBit)]

    def copy_codes() -> Iterator[torch.Tensor]:
        return (one.clone() for layer in layers for one in (layer.codes, layer.scales))

    original, changed = list(copy_codes()), []

    def see(_: Any) -> None:
        changed.append([not torch.equal(one, before) for one, before in zip(copy_codes(), original, strict=True)])

    shapes = adapt_shapes_to_device(Shapes.from_limits(max_length=12, max_tokens=48))
    assert max_batch_influence(model, shapes, keeps_states=False, max_grad_norm=0.1, see=see) == 0.0
    assert not any(changed[0]), "the first pass must use its own codes"
    assert all(changed[-1]), "later passes must use random codes in every layer"
    assert all(map(torch.equal, copy_codes(), original))
    layers[0].register_forward_hook(lambda module, inputs, output: output + output.mean(dim=0) / 8)
    mixed = max_batch_influence(model, shapes, keeps_states=False, max_grad_norm=0.1)
    assert mixed > 0.01, "the trial must detect layers that mix records"
