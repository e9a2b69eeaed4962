"""Adapters that scale: IA3, one factor for each output of a module, and DoRA, one for each row of a LoRA module.

PEFT keeps such a factor where the adapted module's forward pass reads it, so that there is no module of whose output it
is the parameter, and whose gradient could be found by example.  Here each gets a `Scales` of its own, which holds the
factor's offset from where PEFT starts it, as a share of that: like LoRA's B it starts at zero, zero changes nothing,
and a site's bound on values, a decay towards zero and a mean over sites mean the same for every kind of adapter.
PEFT's own tensor stays at its start; times 1 + the offset it is what PEFT reads in a saved adapter, and merges.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import ia3, lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from fedtune.spec import ConfigError

PEFT_SCALES = (".ia3_l", ".lora_magnitude_vector")
"""Endings of the names of PEFT's own scales in a saved adapter: of IA3, and of DoRA."""


class Scales(nn.Module):
    """Multiplies the last axis by 1 + `offset`, which is all that trains of it.

    Args:
        start: PEFT's own tensor, for its number of values and its device.
    """

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(start.numel(), dtype=torch.float32, device=start.device))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (n, t, k) in float32."""
        return values * (1 + self.offset)


def scale_modules(model: PeftModel) -> None:
    """Let each of PEFT's IA3 and DoRA modules be scaled by `Scales`, in float32 whatever the base's number format.

    Raises:
        ConfigError: for `lora.kind`: a row of zeros has no direction.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, ia3.Linear):
            layer.forward = partial(_scaled, layer)
        elif isinstance(layer, lora.Linear) and "default" in layer.lora_variant:
            layer.lora_variant["default"] = _Dora()
            lengths = _row_lengths(layer)
            if not lengths.all():
                bound = f"cannot scale {name}, whose weights have a row of zeros"
                raise ConfigError("lora.kind", "dora", bound)
            layer.lora_magnitude_vector["default"].weight = nn.Parameter(lengths)
        else:
            continue
        start = _start(layer).requires_grad_(False)
        layer.scales = Scales(start)


def as_peft(model: PeftModel) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """PEFT's own scales: the name in a saved adapter, the tensor, and the values that it stands for now."""
    for name, layer in model.named_modules():
        if isinstance(scales := getattr(layer, "scales", None), Scales):
            start, scale = _start(layer), 1 + scales.offset.detach()
            ending = PEFT_SCALES[isinstance(layer, lora.Linear)]
            yield name + ending, start, start.detach() * scale.view_as(start)


def merged(model: PeftModel) -> Any:
    """The plain base with the adapter merged into its weights by PEFT; `model` is used up."""
    with torch.no_grad():
        for _, start, values in as_peft(model):
            start.copy_(values)
    return model.merge_and_unload()


def _start(layer: Any) -> nn.Parameter:
    """PEFT's own tensor: of IA3 ones, of DoRA the lengths of the base's rows."""
    own: nn.Parameter = (
        layer.ia3_l["default"] if isinstance(layer, ia3.Linear) else layer.lora_magnitude_vector["default"].weight
    )
    return own


def _scaled(layer: ia3.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """IA3's forward pass, Liu et al. 2022, arXiv 2205.05638."""
    output: torch.Tensor = layer.base_layer(inputs)
    return output if layer.disable_adapters else layer.scales(output.float()).to(output.dtype)


class _Dora(DoraLinearVariant):  # type: ignore[misc]  # PEFT has no types
    """DoRA's forward pass, Liu et al. 2024, arXiv 2402.09353: (W + s B A) x, each row of the sum at a trained length.

    The row's own length, by which it is divided, follows from parameters alone.  As in PEFT and the paper (section 4.3)
    no gradient goes through it, so that those of A and B are LoRA's.
    """

    @staticmethod
    def forward(module: lora.Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> Any:
        low_rank = module.lora_B[active_adapter](module.lora_A[active_adapter](x)) * module.scaling[active_adapter]
        bias = module.get_base_layer().bias
        own = (result if bias is None else result - bias).float()
        start = module.lora_magnitude_vector[active_adapter].weight
        scaled = module.scales((own + low_rank) * (start / _row_lengths(module)))
        return result + (scaled - own)  # at the start this adds zero, exactly


def _row_lengths(module: lora.Linear) -> torch.Tensor:
    """(outputs,) the L2 norms of the rows of W + s B A."""
    with torch.no_grad():
        low_rank = module.lora_B["default"].weight @ module.lora_A["default"].weight
        weight = module.get_base_layer().weight.float()
        magnitude = module.lora_magnitude_vector["default"]
        lengths: torch.Tensor = magnitude.get_weight_norm(weight, low_rank, scaling=module.scaling["default"])
        return lengths
