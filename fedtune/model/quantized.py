"""Frozen linear layers in four bits a weight (nf4: Dettmers et al. 2023, QLoRA, arXiv 2305.14314).

Each 64 weights that lie side by side are a block with one scale, the largest absolute value among them.  Of a weight
is kept which of 16 levels is nearest to weight / scale.  With float32 scales that is 4.5 bits a weight.

A product makes the layer's weights of these anew, in bfloat16, and lets go of them: forward, and on the way back.  They
multiply as those of a bfloat16 base do.  What a code stands for depends on nothing but the layer, so four bits couple
no two rows; whether the products do is for `fedtune.training.preflight` to try, as with every base.

Codes, scales and weights are bitsandbytes' own, bit for bit, and come out the same on every device, since each value
is found by a few float32 operations that IEEE 754 rounds alike everywhere.  bitsandbytes itself is not used: on a CPU
the product of its release 0.50.2 for models in evaluation gives its input no gradient.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from fedtune.model.products import rounded_product
from fedtune.spec import ConfigError

BLOCK = 64  # weights with one scale
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution whose largest is 1, and zero: appendix E of the paper."""


def to_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes (weights / 2,), two in a byte, and the float32 scales (weights / 64,) of a tensor of weights."""
    blocks = weight.detach().float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    shares = blocks * (1 / scales.clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(1)
    nearest = torch.zeros_like(shares, dtype=torch.uint8)
    levels = torch.tensor(LEVELS)
    for between in ((levels[:-1] + levels[1:]) / 2).tolist():
        nearest += shares > between
    first, second = nearest.view(-1, 2).unbind(dim=1)
    return first << 4 | second, scales


def to_weights(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(weights,) in bfloat16: each level times its block's scale, rounded once."""
    pairs = _pairs(codes.device).index_select(0, codes.int()).view(torch.float32)
    return pairs.view(-1, BLOCK).mul_(scales.unsqueeze(1)).flatten().bfloat16()


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """(256,) both levels of a byte, in one word of memory, which is read at once."""
    levels = torch.tensor(LEVELS)
    both = torch.stack([levels.repeat_interleave(len(levels)), levels.repeat(len(levels))], dim=1)
    return both.view(torch.int64).flatten().to(device)


class FourBit(nn.Module):
    """A frozen linear module that keeps codes and scales of its weights, see `to_codes`, and makes `weight` anew.

    Args:
        module: the module that it replaces, which must be frozen; its bias is kept as it is.
        device: where the weights are quantized and kept.

    Raises:
        ConfigError: for `model.dtype`: the weights are not a whole number of blocks.
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
        assert not weight.requires_grad, "it is yet to get its adapter"
        if weight.numel() % BLOCK:
            shape = " x ".join(map(str, weight.shape))
            bound = f"takes {BLOCK} weights at a time, and a layer of {shape} is no multiple"
            raise ConfigError("model.dtype", "nf4", bound)
        del self.weight
        self.shape, self.bias = weight.shape, module.bias
        codes, scales = to_codes(weight.detach().to(device))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> torch.Tensor:
        """The weights that the codes stand for, as a new tensor: what is written into it is lost."""
        return to_weights(self.codes, self.scales).view(self.shape)

    def by_output(self) -> torch.Tensor:
        """Return the weights as (out, in); GPT-2's kind has them transposed."""
        return self.weight if isinstance(self, nn.Linear) else self.weight.t()

    def keep(self, weight: torch.Tensor) -> None:
        """Replace the weights by others of the same shape."""
        codes, scales = to_codes(weight)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return _Product.apply(values, self)  # type: ignore[no-any-return, no-untyped-call]


class FourBitLinear(FourBit, nn.Linear):  # type: ignore[misc, override]  # whose weights are no parameter
    """For torch's own kind."""


class FourBitConv1D(FourBit, Conv1D):  # type: ignore[misc]  # transformers has no types for it
    """For GPT-2's kind, whose weights are (in, out)."""


class _Product(torch.autograd.Function):
    """`values` (..., in) times a layer's weights, plus its bias, in the values' number format."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, layer: FourBit) -> torch.Tensor:
        ctx.layer = layer  # not its weights, or all layers' would be there until the way back is over
        return rounded_product(values, layer.by_output(), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return rounded_product(gradients[0], ctx.layer.by_output().t(), None), None


def keep_in_four_bits(layers: nn.Module, *, device: torch.device | str) -> None:
    """Keep the weights of every frozen linear module of `layers` in four bits, on `device`.

    Modules move to the device one after the other, so the device never holds the whole of the unquantized weights.

    Raises:
        ConfigError: for `model.dtype`: a module's weights are not a whole number of blocks.
    """
    kinds = {nn.Linear: FourBitLinear, Conv1D: FourBitConv1D}
    for parent in list(layers.modules()):
        for name, module in list(parent.named_children()):
            if (kind := kinds.get(type(module))) is not None:
                setattr(parent, name, kind(module, device=device))
