"""The accelerator of this machine, through torch's vendor-independent interface; settings that exist only for CUDA."""

from __future__ import annotations

import logging
from functools import cache

import torch

from fedtune.model.hf_logging import get_first_line

log = logging.getLogger(__name__)


def find_accelerator() -> torch.device | None:
    """Return the accelerator that a run may use, after making it deterministic; None if there is none."""
    there = torch.accelerator.current_accelerator(check_available=True)
    if there is None or not _has_float64(there.type):
        return None
    _make_deterministic()
    return torch.device(there.type)


@cache
def _has_float64(device: str) -> bool:
    """Whether the device supports float64, in which clipping is computed (`dp_step`).

    Apple's accelerators and some of Intel's do not.
    """
    try:
        return bool((torch.ones(2, dtype=torch.float64, device=device) + 1).sum() == 4)
    except (TypeError, RuntimeError) as error:  # also a driver that fails, or no kernels for this device
        log.warning("the device %r is not used, because it has no float64: %s", device, get_first_line(error))
        return False


@cache
def _make_deterministic() -> None:
    """Make the accelerator deterministic, without reduced precision, for the rest of the process.

    CUDA's matrix products also need CUBLAS_WORKSPACE_CONFIG, which `fedtune.process` sets.  In this mode
    memory-efficient attention does not split its keys by the number of rows, and flash attention sums in a fixed order.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # takes time, for nobody
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # not deterministic on Hopper


def attend_by_products() -> None:
    """Disable fused attention for the rest of the process.

    Where a fused kernel rounds a row by its neighbors, plain matrix products may not.
    """
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def uses_unfused_attention() -> bool:
    """Whether attention in this process uses plain matrix products instead of fused kernels."""
    return not torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]


def total_memory(device: torch.device) -> int:
    """Return the total memory of the device in bytes, used or free."""
    return torch.accelerator.get_memory_info(device)[1]


def name_of(device: torch.device) -> str:
    """Return the type of an accelerator and its product name, such as "cuda, NVIDIA H100 80GB HBM3"."""
    named = getattr(torch.get_device_module(device), "get_device_name", str)
    return f"{device.type}, {named(device)}"


def describe_device(device: torch.device) -> str:
    """Describe a device and its settings for the record of a run; "cpu" for a CPU."""
    if device.type == "cpu":
        return "cpu"
    attention = "attention by products" if uses_unfused_attention() else "fused attention"
    mode = "deterministic algorithms" if torch.are_deterministic_algorithms_enabled() else "any algorithms"
    digits = "no TF32" if torch.get_float32_matmul_precision() == "highest" else "TF32"
    return f"{name_of(device)}, {mode}, {digits}, {attention}"
