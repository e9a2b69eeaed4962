"""Matrix products with frozen weights, in float32 with oneDNN on a CPU or in bfloat16; they dominate a step's cost.

On x86, torch multiplies float32 matrices by MKL.  It also ships oneDNN, which is more than twice as fast in float32 on
AMD CPUs (simulations/benchmarks).  Torch exposes oneDNN through an operator of its compiler that has no gradient, so
this module implements the gradient, and computes none for the weights.

A row's product has the same bits for every number of rows except one; `fedtune.training.batch_invariance` tests this.
In bfloat16, Intel's AMX splits long products by the number of rows.  The test detects this, and then all micro-batches
of a length get the same number of rows.

With `model.dtype=mixed`, weights and inputs are rounded to bfloat16, products are accumulated in float32, and each sum
is rounded once, in the forward and in the backward pass.  A CPU with bfloat16 instructions takes half the time
(simulations/benchmarks).  All other CPUs compute the same products in float32 from the rounded numbers.  The product of
two bfloat16 numbers is exact in float32, so results differ only by the order of summation.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

_HAS_ONEDNN = torch._C._has_mkldnn and platform.machine().lower() in ("x86_64", "amd64")


def is_slow_on_cpu(dtype: str) -> bool:
    """Whether the CPU has no instructions for a dtype, so that its products take longer than in float32."""
    has_bfloat16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() or not _HAS_ONEDNN
    return dtype in ("mixed", "bfloat16", "nf4") and not has_bfloat16


def depends_on_row_count(dtype: str, device: torch.device) -> bool:
    """Whether a row's product depends on the number of rows: below float32 on a CPU with AMX or without bfloat16
    instructions, and on CUDA for every tested format (simulations/gpu).
    """
    amx = dtype in ("mixed", "bfloat16", "nf4") and torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" or (device.type == "cpu" and (amx or is_slow_on_cpu(dtype)))


class _LinearFunction(torch.autograd.Function):
    """Linear function in float32: the product of `values` (..., k) and `weight` (n, k) transposed, plus `bias` (n,).

    The backward pass computes a gradient for `values` only.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _multiply_onednn(values, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        return (_multiply_onednn(gradients[0], weight.t(), None) if ctx.needs_input_grad[0] else None), None, None


class FrozenLinear(nn.Linear):
    """Linear module with frozen float32 weights that uses oneDNN."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return multiply_frozen(values, self.weight, self.bias)


class FrozenConv1D(Conv1D):  # type: ignore[misc]  # transformers has no types for it
    """Frozen linear module with transposed weights, as in GPT-2, that uses oneDNN."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return multiply_frozen(values, self.weight.t(), self.bias)


class RoundedLinear(nn.Linear):
    """Frozen linear module that computes in bfloat16, with float32 inputs and outputs."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return multiply_bfloat16(values, self.weight, self.bias)


class RoundedConv1D(Conv1D):  # type: ignore[misc]  # as above
    """Frozen bfloat16 linear module with transposed weights, as in GPT-2."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return multiply_bfloat16(values, self.weight.t(), self.bias)


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}
_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RoundedLinear, Conv1D: RoundedConv1D}


def multiply_bfloat16(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply `values` (..., k) by bfloat16 `weight` (n, k) transposed, and add bfloat16 `bias` (n,).

    The result has the dtype of `values`.  Each value is rounded separately, so that rows stay independent.
    """
    rounded = values.bfloat16()
    if values.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # oneDNN again, because on some CPUs MKL's product of a row differs between 2, 3 and more rows.
        exact = multiply_frozen(rounded.float(), weight.float(), None if bias is None else bias.float())
        return exact.bfloat16().to(values.dtype)
    return nn.functional.linear(rounded, weight, bias).to(values.dtype)


def describe_product(module: nn.Module) -> tuple[int, int] | None:
    """Return (outputs, inputs) of a linear module that this file supports; None for any other module."""
    if type(module) not in _FROZEN:
        return None
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def convert_to_bfloat16(layers: nn.Module) -> None:
    """Convert every frozen linear module of `layers` to bfloat16 weights and products."""
    for module in layers.modules():
        if (kind := _ROUNDED.get(type(module))) is not None:
            assert not any(parameter.requires_grad for parameter in module.parameters()), "adapters come later"
            module.__class__ = kind
            module.bfloat16()


def multiply_frozen(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply `values` (..., k) by `weight` (n, k) transposed, and add `bias` (n,).

    The result equals torch's product up to rounding.
    """
    float32 = weight.dtype == values.dtype == torch.float32
    if weight.requires_grad or not float32 or not values.numel() or not _HAS_ONEDNN:
        return nn.functional.linear(values, weight, bias)
    return _LinearFunction.apply(values, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def switch_to_onednn(base: nn.Module) -> None:
    """Switch every frozen linear module of `base` to oneDNN, if torch supports it and the CPU is x86.

    Other machines are left unchanged, because the independence of rows is untested there.
    """
    if not _HAS_ONEDNN:
        return
    for module in base.modules():
        if any(parameter.requires_grad or parameter.device.type != "cpu" for parameter in module.parameters()):
            continue
        # Only the class changes; weights, names and hooks stay in place.
        module.__class__ = _FROZEN.get(type(module), type(module))


def uses_onednn(model: nn.Module) -> bool:
    """Return True if `switch_to_onednn` changed any module of `model`."""
    return any(isinstance(module, FrozenLinear | FrozenConv1D) for module in model.modules())


def _multiply_onednn(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # The operator ignores the bias's strides.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        values, weight, None if bias is None else bias.contiguous(), "none", [], ""
    )
    return product
