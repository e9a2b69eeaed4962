"""IA3 and DoRA adapters, which scale each output of a module (IA3) or each row of a LoRA module (DoRA).

PEFT keeps these factors inside the adapted module's forward pass.  They are not parameters of a module of their own, so
hooks cannot compute their per-example gradients.  Here each adapted module gets a `Scales` module, which trains the
relative offset of the factor from PEFT's initial value.  Like LoRA's B, the offset starts at zero, where it changes
nothing, so that a site's limit on values, weight decay and averaging over sites have the same meaning for every kind of
adapter.  PEFT's own tensor keeps its initial value; multiplied by 1 + the offset, it is the tensor that PEFT reads from
a saved adapter and merges.
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

from fedtune.model.adapter_files import PEFT_SCALES
from fedtune.spec import ConfigError


class Scales(nn.Module):
    """Module that multiplies the last axis by 1 + `offset`, its only trainable parameter.

    Args:
        start: PEFT's tensor for the scale, which determines the number of values and the device.
    """

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(start.numel(), dtype=torch.float32, device=start.device))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Scale `values`, (n, t, k) in float32."""
        return values * (1 + self.offset)


def scale_modules(model: PeftModel) -> None:
    """Attach a float32 `Scales` module to each of PEFT's IA3 and DoRA modules, for a base of any dtype.

    Raises:
        ConfigError: for `lora.kind`, if the weights of a DoRA module have a row of zeros, which has no direction.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, ia3.Linear):
            layer.forward = partial(_run_ia3_forward, layer)
        elif isinstance(layer, lora.Linear) and "default" in layer.lora_variant:
            layer.lora_variant["default"] = _DoraVariant()
            lengths = _compute_row_norms(layer)
            if not lengths.all():
                bound = f"is not available for this base: the weights of {name} have a row of zeros"
                raise ConfigError("lora.kind", "dora", bound)
            layer.lora_magnitude_vector["default"].weight = nn.Parameter(lengths)
        else:
            continue
        start = _compute_initial_scale(layer).requires_grad_(False)
        layer.scales = Scales(start)


def iter_peft_scales(model: PeftModel) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Yield PEFT's own scales: the name in a saved adapter, the tensor, and the current values."""
    for name, layer in model.named_modules():
        if isinstance(scales := getattr(layer, "scales", None), Scales):
            start, scale = _compute_initial_scale(layer), 1 + scales.offset.detach()
            ending = PEFT_SCALES[isinstance(layer, lora.Linear)]
            yield name + ending, start, start.detach() * scale.view_as(start)


def merge_adapter(model: PeftModel) -> Any:
    """Merge the adapter into the base's weights with PEFT, and return the plain base.

    `model` must not be used afterwards.
    """
    with torch.no_grad():
        for _, start, values in iter_peft_scales(model):
            start.copy_(values)
    return model.merge_and_unload()


def _compute_initial_scale(layer: Any) -> nn.Parameter:
    """Return PEFT's tensor for the scale: ones for IA3, and the base's row norms for DoRA."""
    scale: nn.Parameter = (
        layer.ia3_l["default"] if isinstance(layer, ia3.Linear) else layer.lora_magnitude_vector["default"].weight
    )
    return scale


def _run_ia3_forward(layer: ia3.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Run the IA3 forward pass (Liu et al. 2022, arXiv 2205.05638)."""
    output: torch.Tensor = layer.base_layer(inputs)
    return output if layer.disable_adapters else layer.scales(output.float()).to(output.dtype)


class _DoraVariant(DoraLinearVariant):  # type: ignore[misc]  # PEFT has no types
    """DoRA forward pass (Liu et al. 2024, arXiv 2402.09353): W + s B A with each row rescaled to a trained norm.

    The current row norm, the divisor, depends only on parameters.  As in PEFT and the paper (section 4.3), no gradient
    flows through it, so that the gradients of A and B have the same form as in LoRA.
    """

    @staticmethod
    def forward(module: lora.Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> Any:
        low_rank = module.lora_B[active_adapter](module.lora_A[active_adapter](x)) * module.scaling[active_adapter]
        bias = module.get_base_layer().bias
        product = (result if bias is None else result - bias).float()
        start = module.lora_magnitude_vector[active_adapter].weight
        scaled = module.scales((product + low_rank) * (start / _compute_row_norms(module)))
        return result + (scaled - product)  # at the initial offset of zero this adds exactly zero


def _compute_row_norms(module: lora.Linear) -> torch.Tensor:
    """Compute the L2 norms of the rows of W + s B A, (outputs,)."""
    with torch.no_grad():
        low_rank = module.lora_B["default"].weight @ module.lora_A["default"].weight
        weight = module.get_base_layer().weight.float()
        magnitude = module.lora_magnitude_vector["default"]
        lengths: torch.Tensor = magnitude.get_weight_norm(weight, low_rank, scaling=module.scaling["default"])
        return lengths
