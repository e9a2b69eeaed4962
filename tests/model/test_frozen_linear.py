"""Products with frozen weights match torch up to rounding, and rows are independent."""

import platform
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.model import frozen_linear
from fedtune.model.base_model import hash_model, load_base
from fedtune.model.frozen_linear import (
    RoundedLinear,
    convert_to_bfloat16,
    depends_on_row_count,
    multiply_bfloat16,
    multiply_frozen,
    switch_to_onednn,
)
from fedtune.model.layers import find_layer_stack
from fedtune.model.quantized import FourBitLinear
from fedtune.model.spec import ModelSpec

from .conftest import is_same_beside_others, multiply_both_ways, multiply_exactly

needs_onednn = pytest.mark.skipif(
    not torch._C._has_mkldnn or platform.machine().lower() not in ("x86_64", "amd64"),
    reason="oneDNN products exist only on x86",
)


def freeze_module(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize("module", [nn.Linear(96, 80), nn.Linear(96, 96, bias=False), Conv1D(80, 96)])
@needs_onednn
def test_frozen_linear_matches_torch_up_to_rounding(module: nn.Module) -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 5, 96)
    direction = torch.randn_like(module(values))
    base = freeze_module(nn.Sequential(deepcopy(module)))
    switch_to_onednn(base)
    assert isinstance(base[0], frozen_linear.FrozenLinear | frozen_linear.FrozenConv1D)
    expected = multiply_exactly(module, values, direction, transposed=isinstance(module, Conv1D))
    for actual, reference in zip(multiply_both_ways(base, values, direction), expected, strict=True):
        torch.testing.assert_close(actual.double(), reference, rtol=0, atol=1e-5)  # a float32 sum of 96 terms of size 1


@needs_onednn
def test_trained_weights_use_torch_and_second_derivatives_are_refused() -> None:
    weight, values = torch.randn(4, 6), torch.randn(5, 6)
    assert not multiply_frozen(values, weight, None).requires_grad
    for bias in (torch.arange(8.0)[::2], torch.ones(1).expand(4)):  # non-contiguous tensors
        torch.testing.assert_close(multiply_frozen(values, weight, bias), nn.functional.linear(values, weight, bias))
    multiply_frozen(values, weight.requires_grad_(), None).sum().backward()
    torch.testing.assert_close(weight.grad, values.sum(dim=0).expand(4, 6))
    values.requires_grad_()
    (slope,) = torch.autograd.grad(
        multiply_frozen(values, torch.randn(5, 6), None).pow(2).sum(), values, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@needs_onednn
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(384, 1536), (576, 192), (64, 32)])
def test_row_product_is_independent_of_the_row_count(shape: tuple[int, int], threads: int) -> None:
    weight, values = torch.randn(*shape), torch.randn(512, shape[1])
    assert is_same_beside_others(lambda rows: multiply_frozen(rows, weight, None), values, threads=threads)


def test_trainable_layers_and_other_dtypes_use_torch() -> None:
    base = nn.Sequential(nn.Linear(4, 4), freeze_module(nn.Linear(4, 4)))
    switch_to_onednn(base)
    assert type(base[0]) is nn.Linear
    weight, values = torch.randn(4, 6).bfloat16(), torch.randn(5, 6).bfloat16()
    assert torch.equal(multiply_frozen(values, weight, None), nn.functional.linear(values, weight))
    assert multiply_frozen(torch.zeros(0, 6), weight.float(), None).shape == (0, 4)


@pytest.mark.parametrize("module", [nn.Linear(96, 80), nn.Linear(96, 96, bias=False), Conv1D(80, 96)])
@pytest.mark.parametrize("instructions", [True, False], ids=["native", "no instructions"])
def test_mixed_precision_products_are_rounded_once(
    module: nn.Module, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not instructions:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    torch.manual_seed(0)
    base = freeze_module(nn.Sequential(deepcopy(module)))
    convert_to_bfloat16(base)
    assert isinstance(base[0], RoundedLinear | frozen_linear.RoundedConv1D)
    assert {actual.dtype for actual in base.parameters()} == {torch.bfloat16}
    values = torch.randn(3, 5, 96)
    direction = torch.randn_like(module(values))
    expected = multiply_exactly(base[0], values.bfloat16(), direction.bfloat16(), transposed=isinstance(module, Conv1D))
    for actual, reference in zip(multiply_both_ways(base, values, direction), expected, strict=True):
        assert actual.dtype == torch.float32
        # Half a unit in bfloat16's last place, plus the float32 rounding of a sum of 96 terms of size 1.
        torch.testing.assert_close(actual.double(), reference, rtol=2**-8, atol=1e-5)
        assert torch.equal(actual, actual.bfloat16().float())


@pytest.mark.parametrize(("dtype", "kind"), [("mixed", RoundedLinear), ("nf4", FourBitLinear)])
@pytest.mark.parametrize(("path", "predicts_tokens"), [("random:bert", False), ("random:llama", True)])
def test_reduced_precision_applies_only_to_layer_weights(
    path: str, predicts_tokens: bool, dtype: Any, kind: Any
) -> None:
    between: Any = "bfloat16" if dtype == "nf4" else "float32"  # dtype of hidden states
    spec = ModelSpec(path=path, dtype=dtype)
    base, plain = (
        load_base(actual, predicts_tokens=predicts_tokens) for actual in (spec, ModelSpec(path=path, dtype=between))
    )
    layer_modules = [module for module in find_layer_stack(base)[1].modules() if isinstance(module, nn.Linear)]
    assert layer_modules
    assert {type(module) for module in layer_modules} == {kind}
    assert [module for module in base.modules() if isinstance(module, kind)] == layer_modules
    rounded = {id(actual) for module in layer_modules for actual in module.parameters() if dtype == "mixed"}
    for name, parameter in base.named_parameters():
        expected = plain.get_parameter(name)
        assert torch.equal(parameter, expected.bfloat16() if id(parameter) in rounded else expected), name
    assert base.dtype == getattr(torch, between)
    assert hash_model(spec) == hash_model(ModelSpec(path=path)), "the hash must cover the weights as in the files"


@pytest.mark.skipif(
    depends_on_row_count("mixed", torch.device("cpu")), reason="kernels depend on the row count (sites/test_amx.py)"
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(384, 1536), (1536, 384), (576, 192), (64, 32)])
def test_mixed_precision_row_product_is_independent_of_the_row_count(shape: tuple[int, int], threads: int) -> None:
    weight, bias = torch.randn(*shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    for size, factor, plus in ((shape[1], weight, bias), (shape[0], weight.t(), None)):
        multiply = partial(multiply_bfloat16, weight=factor, bias=plus)
        assert is_same_beside_others(multiply, torch.randn(512, size), threads=threads)
