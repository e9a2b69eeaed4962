"""Linear layers that keep something coarser in place of their weights: `four_bit` and `int8` say what."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Quantized(nn.Module):
    """A linear module that never trains and whose `weight` is made anew from what it keeps, in its buffers.

    Attributes:
        shape: of its weights.
        bias: as the module had it in whose place it stands.
    """

    bias: torch.Tensor | None
    shape: torch.Size

    @property
    def weight(self) -> torch.Tensor:
        """The weights that it stands for, for code that reads them; what is written into them is lost."""
        raise NotImplementedError

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The buffers that stand for `weight`.

        Raises:
            ConfigError: for `model.dtype`: they cannot.
        """
        raise NotImplementedError

    def keep(self, weight: torch.Tensor) -> None:
        """Keep others of the same shape in their place."""
        for name, values in self.quantize(weight).items():
            self.get_buffer(name).copy_(values)

    def take_over(self, module: nn.Linear | Conv1D, device: torch.device | str) -> None:
        """Stand for `module`, a frozen one, on `device`: its weights are quantized there, and its bias is ours."""
        weight = module.get_parameter("weight")
        assert not weight.requires_grad, "it is yet to get its adapter"
        del self.weight
        self.shape, self.bias = weight.shape, module.bias
        for name, values in self.quantize(weight.detach().to(device)).items():
            self.register_buffer(name, values)


def quantize_linear(
    layers: nn.Module, linear: type[Quantized], transposed: type[Quantized], *, device: torch.device | str
) -> None:
    """Put a `linear` in the place of each `nn.Linear` of `layers`, and a `transposed` in that of each `Conv1D`.

    One module after the other goes to `device`, so that the whole of the weights need never fit it.

    Raises:
        ConfigError: for `model.dtype`, with the module's name: its weights cannot be kept so.
    """
    kinds = {nn.Linear: linear, Conv1D: transposed}
    for parent in list(layers.modules()):
        for name, module in list(parent.named_children()):
            if (kind := kinds.get(type(module))) is not None:
                setattr(parent, name, kind(module, device=device))
