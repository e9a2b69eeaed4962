"""Per-example gradients of DoRA and IA3 adapters match a loop over examples, with and without padding."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data import Shapes, collate
from fedtune.model import ia3_and_dora
from fedtune.model.spec import LoraSpec
from fedtune.spec import ConfigError
from fedtune.training.batch_invariance import max_batch_influence
from fedtune.training.dp_step import sum_by_halves
from fedtune.training.per_example import record_gradients

from ..builders import adapt_shapes_to_device
from .conftest import KINDS, build_fresh, build_trained, make_dummy_examples, make_examples
from .test_dp_step import compute_loop_gradient

pytestmark = pytest.mark.nightly

tasks = pytest.mark.parametrize(("path", "task"), KINDS)
kinds = pytest.mark.parametrize("kind", ["dora", "ia3"])
keeping = pytest.mark.parametrize("keeps", [False, True], ids=["uncached", "cached states"])
SHAPES = adapt_shapes_to_device(Shapes.from_limits(max_length=15, max_tokens=40))


def make_lora(kind: str, *, keeps: bool = False, **changes: Any) -> LoraSpec:
    return LoraSpec(kind=kind, rank=2, alpha=4.0, layers=(-1,) if keeps else None, **changes)


@keeping
@kinds
@tasks
def test_per_example_gradients_match_a_loop(path: str, task: str, kind: str, keeps: bool) -> None:
    model, dataset = build_trained(path, task, lora=make_lora(kind, keeps=keeps)), make_dummy_examples(task)
    looped = [compute_loop_gradient(model, dataset, index) for index in range(len(dataset))]
    site = make_examples(dataset, SHAPES, kept_by=model if keeps else None)
    with record_gradients(model) as gradients:
        for batch in site.cut(np.arange(len(dataset))):
            actual = gradients.compute_all_gradients(batch)
            assert list(actual) == list(model.trainable())
        for index, reference in enumerate(looped):
            single = gradients.compute_all_gradients(collate(dataset, [index], pad_id=0))  # no padding
            padded = gradients.compute_all_gradients(next(iter(site.cut(np.array([index])))))
            for name, expected in reference.items():
                for actual_rows in (single, padded):
                    max_error = np.abs(actual_rows[name][0].double().numpy() - expected).max()
                    assert max_error <= 2e-5 * max(0.1, np.abs(expected).max()), name
    assert any(name.endswith(".scales.offset") for name in actual)
    assert kind == "dora" or not any("lora_" in name for name in actual)


@pytest.mark.parametrize("path", ["random:bert", "random:llama"])
def test_dora_gradients_match_peft(path: str) -> None:
    # PEFT's unmodified forward pass, on equivalent parameters.
    model, dataset = build_trained(path, lora=make_lora("dora")), make_dummy_examples("classification")
    expected = [compute_loop_gradient(model, dataset, index) for index in range(3)]
    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "scales")]
    for _, layer in layers:
        magnitude = layer.lora_magnitude_vector["default"]
        with torch.no_grad():
            magnitude.weight.mul_(1 + layer.scales.offset)
        magnitude.weight.requires_grad_(True)
        layer.lora_variant["default"] = layer.resolve_lora_variant(config=model.base.peft_config["default"])
    matrices = {name: actual_rows for name, actual_rows in model.trainable().items() if "lora_" in name}
    for index in range(3):
        batch = collate(dataset, [index], pad_id=0)
        lengths = [layer.lora_magnitude_vector["default"].weight for _, layer in layers]
        actual = torch.autograd.grad(model.losses(batch).sum(), [*matrices.values(), *lengths])
        for name, gradient in zip(matrices, actual, strict=False):
            assert np.allclose(gradient.numpy(), expected[index][name], rtol=1e-3, atol=1e-5), name
        for (name, layer), gradient in zip(layers, actual[len(matrices) :], strict=True):
            # The parameter is relative to the initial length: by the chain rule, the gradient is that length times the
            # other one.
            start = lengths[0].new_tensor(1.0) * layer.lora_magnitude_vector["default"].weight
            start = start / (1 + layer.scales.offset)
            public = name.removeprefix("base.") + ".scales.offset"
            assert np.allclose((gradient * start).detach().numpy(), expected[index][public], rtol=1e-3, atol=1e-5), name


@kinds
@pytest.mark.parametrize("keeps", [False, True])
def test_dora_and_ia3_pass_the_batch_invariance_trial(kind: str, keeps: bool) -> None:
    model = build_fresh("random:llama", "causal_lm", lora=make_lora(kind, keeps=keeps))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    assert max_batch_influence(model, SHAPES, keeps_states=keeps, max_grad_norm=0.5) == 0.0
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items()), "values must be restored"


def test_base_mixing_examples_is_refused_for_ia3(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ia3_and_dora._run_ia3_forward

    def run_flattened(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
        return plain(layer, inputs.flatten(0, 1)).view(*inputs.shape[:2], -1)

    monkeypatch.setattr(ia3_and_dora, "_run_ia3_forward", run_flattened)
    with pytest.raises(ConfigError, match=r"lora\.target_modules = .*scales': mixes tokens of several examples"):
        build_fresh(lora=make_lora("ia3"), seed=97)  # not cached from another test, so the trial runs


def test_token_summation_order_depends_only_on_length() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 40):
        values = torch.randn(5, length, 3, generator=generator)
        actual = sum_by_halves(values)
        assert torch.allclose(actual, values.sum(dim=1), rtol=1e-5, atol=1e-5)
        assert math.isclose(float(actual[2, 1]), float(values[2, :, 1].double().sum()), rel_tol=1e-4, abs_tol=1e-5)
        assert all(torch.equal(actual[row], sum_by_halves(values[row : row + 1])[0]) for row in range(5))
