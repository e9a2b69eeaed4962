"""Products with frozen weights by oneDNN: what torch computes but for rounding, and the same beside any other rows."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.model.products import FrozenConv1D, FrozenLinear, multiply_by_onednn, product

needs_onednn = pytest.mark.skipif(
    not torch._C._has_mkldnn or platform.machine().lower() not in ("x86_64", "amd64"),
    reason="oneDNN multiplies on x86 alone",
)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize("module", [nn.Linear(96, 80), nn.Linear(96, 96, bias=False), Conv1D(80, 96)])
@needs_onednn
def test_product_and_gradient_are_torchs_own_but_for_rounding(module: nn.Module) -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 5, 96)
    base = frozen(nn.Sequential(module))
    exact = values.double().requires_grad_()
    weight = module.weight.double() if isinstance(module, nn.Linear) else module.weight.double().t()
    wanted = nn.functional.linear(exact, weight, None if module.bias is None else module.bias.double())
    multiply_by_onednn(base)
    assert isinstance(module, FrozenLinear | FrozenConv1D)
    found = base(values.requires_grad_())
    direction = torch.randn_like(found)
    found.backward(direction)
    wanted.backward(direction.double())
    assert values.grad is not None
    assert exact.grad is not None
    # Of 96 terms of size 1 in float32.
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(values.grad.double(), exact.grad, rtol=0, atol=1e-5)


@needs_onednn
def test_a_weight_that_begins_to_train_gets_torchs_gradient() -> None:
    weight, values = torch.randn(4, 6), torch.randn(5, 6)
    assert not product(values, weight, None).requires_grad
    product(values, weight.requires_grad_(), None).sum().backward()
    torch.testing.assert_close(weight.grad, values.sum(dim=0).expand(4, 6))


@needs_onednn
def test_a_bias_is_read_as_it_lies() -> None:
    weight, values = torch.randn(5, 6), torch.randn(3, 6)
    for bias in (torch.arange(10.0)[::2], torch.ones(1).expand(5)):
        torch.testing.assert_close(product(values, weight, bias), nn.functional.linear(values, weight, bias))


@needs_onednn
def test_there_is_no_second_derivative_and_nobody_is_given_a_wrong_one() -> None:
    values = torch.randn(3, 6, requires_grad=True)
    (slope,) = torch.autograd.grad(product(values, torch.randn(5, 6), None).pow(2).sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@needs_onednn
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(384, 1536), (576, 192), (64, 32)])
def test_a_rows_product_is_the_same_in_every_number_of_rows(shape: tuple[int, int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight, values = torch.randn(*shape), torch.randn(512, shape[1])
        whole = product(values, weight, None)
        for rows in (2, 12, 31, 48, 200, 511):
            assert torch.equal(product(values[1 : 1 + rows].clone(), weight, None), whole[1 : 1 + rows]), rows
    finally:
        torch.set_num_threads(before)


def test_what_trains_stays_as_it_is() -> None:
    base = nn.Sequential(nn.Linear(4, 4), frozen(nn.Linear(4, 4)))
    multiply_by_onednn(base)
    assert type(base[0]) is nn.Linear


def test_other_number_formats_are_left_to_torch() -> None:
    weight, values = torch.randn(4, 6).bfloat16(), torch.randn(5, 6).bfloat16()
    assert torch.equal(product(values, weight, None), nn.functional.linear(values, weight))
    assert product(torch.zeros(0, 6), weight.float(), None).shape == (0, 4)
