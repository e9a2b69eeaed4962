"""Products with frozen weights, most of what a step computes: in float32 by oneDNN on a CPU, or in bfloat16.

torch multiplies float32 matrices by the library that it was built with, on x86 MKL.  Beside it torch carries oneDNN,
which does the same work in float32 more than twice as fast on AMD's CPUs (simulations/benchmarks).  torch's own way to
it is an operator that its compiler uses, without a gradient; so the gradient is here, and none is computed for weights.

A row's product is the same, bit for bit, in every number of rows but one; `fedtune.training.preflight` tries that.
In bfloat16 Intel's AMX parts long products by the number of rows; the trial finds that, and then all micro-batches of a
length have one number of rows.

With `model.dtype=mixed` weights and what they multiply are rounded to bfloat16, products are added up in float32, and
each sum is rounded once; forward and on the way back.  A CPU with instructions for bfloat16 does so in half the time
(simulations/benchmarks).  Every other computes the same from rounded numbers in float32, where a product of two of them
is exact: sums differ by the order in which they are added up alone.
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
    """Whether the CPU lacks the instructions of a number format, so that rounding costs time and saves none."""
    has_bfloat16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() or not _HAS_ONEDNN
    return dtype in ("mixed", "bfloat16", "nf4") and not has_bfloat16


def goes_by_rows(dtype: str, device: torch.device) -> bool:
    """A row's product hangs on the number of rows: AMX parts long products in bfloat16 by it, a GPU all."""
    amx = dtype in ("mixed", "bfloat16", "nf4") and device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return amx or device.type == "cuda"  # in every number format that was tried (simulations/gpu)


class _Product(torch.autograd.Function):
    """`values` (..., k) times `weight` (n, k) transposed, plus `bias` (n,), in float32; only values get a gradient."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _multiply(values, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        return (_multiply(gradients[0], weight.t(), None) if ctx.needs_input_grad[0] else None), None, None


class FrozenLinear(nn.Linear):
    """A linear module whose weights never train."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return product(values, self.weight, self.bias)


class FrozenConv1D(Conv1D):  # type: ignore[misc]  # transformers has no types for it
    """The same with its weights transposed, as GPT-2 has them."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return product(values, self.weight.t(), self.bias)


class RoundedLinear(nn.Linear):
    """A linear module whose weights never train, in bfloat16, between values in float32."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return rounded_product(values, self.weight, self.bias)


class RoundedConv1D(Conv1D):  # type: ignore[misc]  # as above
    """The same with its weights transposed."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return rounded_product(values, self.weight.t(), self.bias)


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}
_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RoundedLinear, Conv1D: RoundedConv1D}


def rounded_product(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`values` (..., k) times bfloat16 `weight` (n, k) transposed, plus bfloat16 `bias` (n,), in the values' format.

    Each of the values is rounded by itself, so that none of a row depends on another row.
    """
    rounded = values.bfloat16()
    if values.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # By oneDNN here too: MKL's product of a row differs between 2, 3 and more rows on some CPUs.
        exact = product(rounded.float(), weight.float(), None if bias is None else bias.float())
        return exact.bfloat16().to(values.dtype)
    return nn.functional.linear(rounded, weight, bias).to(values.dtype)


def round_products(layers: nn.Module) -> None:
    """Keep every frozen linear module of `layers` in bfloat16, and let it multiply so."""
    for module in layers.modules():
        if (kind := _ROUNDED.get(type(module))) is not None:
            assert not any(parameter.requires_grad for parameter in module.parameters()), "it is yet to get its adapter"
            module.__class__ = kind
            module.bfloat16()


def product(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`values` (..., k) times `weight` (n, k) transposed, plus `bias` (n,): torch's own but for rounding."""
    float32 = weight.dtype == values.dtype == torch.float32
    if weight.requires_grad or not float32 or not values.numel() or not _HAS_ONEDNN:
        return nn.functional.linear(values, weight, bias)
    return _Product.apply(values, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def multiply_by_onednn(base: nn.Module) -> None:
    """Let every frozen linear module of `base` multiply by oneDNN, where this torch has it and the CPU is x86.

    Elsewhere nothing changes: nobody has tried whether a row's product depends on its neighbours there.
    """
    if not _HAS_ONEDNN:
        return
    for module in base.modules():
        if any(parameter.requires_grad or parameter.device.type != "cpu" for parameter in module.parameters()):
            continue
        # Their class alone changes: weights, names and hooks stay what and where they are.
        module.__class__ = _FROZEN.get(type(module), type(module))


def uses_onednn(model: nn.Module) -> bool:
    """True if `multiply_by_onednn` has changed anything in it."""
    return any(isinstance(module, FrozenLinear | FrozenConv1D) for module in model.modules())


def _multiply(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # It reads a bias as if its values lay side by side.
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        values, weight, None if bias is None else bias.contiguous(), "none", [], ""
    )
    return found
