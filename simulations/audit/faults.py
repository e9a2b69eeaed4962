"""Faults that an audit must find, put into the private step of this process and no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fedtune.privacy.mechanism import compute_cell_width
from fedtune.training import dp_step


def no_noise() -> None:
    """The clipped sum is released as it is."""

    def add_gaussian_noise(sums: Mapping[str, Any], **_: object) -> dict[str, Any]:
        return dict(sums)

    dp_step.add_gaussian_noise = add_gaussian_noise


def no_clipping() -> None:
    """Every gradient joins the sum at its own length; the noise is as planned."""

    def sum_clipped(gradients: Mapping[str, torch.Tensor], max_grad_norm: float) -> dict[str, torch.Tensor]:
        cell = compute_cell_width(max_grad_norm)
        return {name: (one.double() / cell).round().to(torch.int64).sum(dim=0) for name, one in gradients.items()}

    dp_step.sum_clipped = sum_clipped


FAULTS: dict[str, Callable[[], None]] = {"none": lambda: None, "no noise": no_noise, "no clipping": no_clipping}
