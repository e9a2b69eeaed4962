"""Frozen linear layers with four bits per weight (nf4: Dettmers et al. 2023, QLoRA, arXiv 2305.14314).

Every 64 adjacent weights form a block with one scale, their largest absolute value.  Each weight is stored as the index
of the closest of 16 levels to weight / scale.  With float32 scales that is 4.5 bits per weight.

Every product, in the forward and in the backward pass, dequantizes the layer's weights to bfloat16, discards them
afterwards, and is computed as in a bfloat16 base.  Dequantization depends only on the layer, so quantization does not
couple rows; `fedtune.training.batch_invariance` tests the products themselves, as for every base.

Codes, scales and weights are bit-identical to those of bitsandbytes on every device, because each value results from a
few float32 operations that IEEE 754 rounds identically everywhere. bitsandbytes itself is not used: on a CPU, its
release 0.50.2 computes no gradient for the input of a model in evaluation mode.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from fedtune.model.frozen_linear import multiply_bfloat16
from fedtune.spec import ConfigError

BLOCK = 64  # weights per scale
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution, scaled to a maximum of 1, and zero: appendix E of the paper."""


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weights to codes (weights / 2,), two per byte, and float32 scales (weights / 64,)."""
    blocks = weight.detach().float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    shares = blocks * (1 / scales.clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(1)
    nearest = torch.zeros_like(shares, dtype=torch.uint8)
    levels = torch.tensor(LEVELS)
    for between in ((levels[:-1] + levels[1:]) / 2).tolist():
        nearest += shares > between
    first, second = nearest.view(-1, 2).unbind(dim=1)
    return first << 4 | second, scales


def dequantize_nf4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantize to bfloat16 (weights,): each level times its block's scale, rounded once."""
    pairs = _build_pair_lookup_table(codes.device).index_select(0, codes.int()).view(torch.float32)
    return pairs.view(-1, BLOCK).mul_(scales.unsqueeze(1)).flatten().bfloat16()


@cache
def _build_pair_lookup_table(device: torch.device) -> torch.Tensor:
    """Build a lookup table (256,) with both levels of a byte in one 64-bit word, so that each byte takes one access."""
    levels = torch.tensor(LEVELS)
    both = torch.stack([levels.repeat_interleave(len(levels)), levels.repeat(len(levels))], dim=1)
    return both.view(torch.int64).flatten().to(device)


class FourBit(nn.Module):
    """Frozen linear module that stores quantized weights (see `quantize_nf4`), and dequantizes `weight` on access.

    Args:
        module: the frozen module to replace; its bias stays unquantized.
        device: the device on which the weights are quantized and stored.

    Raises:
        ConfigError: for `model.dtype`, if the number of weights is not a multiple of the block size.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    shape: torch.Size  # of the weights

    def __init__(self, module: nn.Linear | Conv1D, *, device: torch.device | str) -> None:
        with torch.device("meta"):
            if isinstance(module, nn.Linear):
                nn.Linear.__init__(self, module.in_features, module.out_features)  # type: ignore[arg-type]
            else:
                Conv1D.__init__(self, module.nf, module.nx)
        weight = module.get_parameter("weight")
        assert not weight.requires_grad, "adapters are attached after quantization"
        if weight.numel() % BLOCK:
            shape = " x ".join(map(str, weight.shape))
            bound = f"requires a multiple of {BLOCK} weights in each layer, but a layer has {shape}; use bfloat16"
            raise ConfigError("model.dtype", "nf4", bound)
        del self.weight
        self.shape, self.bias = weight.shape, module.bias
        codes, scales = quantize_nf4(weight.detach().to(device))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized weights as a new tensor; changes to it have no effect on the module."""
        return dequantize_nf4(self.codes, self.scales).view(self.shape)

    def get_output_first_weight(self) -> torch.Tensor:
        """Return the weights as (out, in); GPT-2's Conv1D stores them transposed."""
        return self.weight if isinstance(self, nn.Linear) else self.weight.t()

    def store_weight(self, weight: torch.Tensor) -> None:
        """Quantize and store new weights of the same shape."""
        codes, scales = quantize_nf4(weight)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Apply the layer: (..., in) -> (..., out)."""
        return _QuantizedLinearFunction.apply(values, self)  # type: ignore[no-any-return, no-untyped-call]


class FourBitLinear(FourBit, nn.Linear):  # type: ignore[misc, override]  # its weights are not a parameter
    """Four-bit version of `nn.Linear`."""


class FourBitConv1D(FourBit, Conv1D):  # type: ignore[misc]  # transformers has no types for it
    """Four-bit version of GPT-2's Conv1D, whose weights are (in, out)."""


class _QuantizedLinearFunction(torch.autograd.Function):
    """Product of `values` (..., in) and a layer's weights, plus its bias, in the dtype of `values`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, layer: FourBit) -> torch.Tensor:
        ctx.layer = layer  # not its weights, which would stay in memory for all layers until the backward pass
        return multiply_bfloat16(values, layer.get_output_first_weight(), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return multiply_bfloat16(gradients[0], ctx.layer.get_output_first_weight().t(), None), None


def quantize_linear_layers(layers: nn.Module, *, device: torch.device | str) -> None:
    """Replace every frozen linear module of `layers` by a four-bit version on `device`.

    The modules are moved one at a time, so that the device never holds all of the unquantized weights.

    Raises:
        ConfigError: for `model.dtype`, if a module's number of weights is not a multiple of the block size.
    """
    kinds = {nn.Linear: FourBitLinear, Conv1D: FourBitConv1D}
    for parent in list(layers.modules()):
        for name, module in list(parent.named_children()):
            if (kind := kinds.get(type(module))) is not None:
                setattr(parent, name, kind(module, device=device))
