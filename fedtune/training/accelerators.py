"""Accelerator detection through torch's vendor-independent interface, and numerical settings specific to CUDA."""

from __future__ import annotations

import logging
from functools import cache

import torch

from fedtune.model.hf_logging import get_first_line

log = logging.getLogger(__name__)


def find_accelerator() -> torch.device | None:
    """Return this machine's accelerator after enabling deterministic kernels, or None without a usable accelerator."""
    there = torch.accelerator.current_accelerator(check_available=True)
    if there is None or not _has_float64(there.type):
        return None
    _make_deterministic()
    return torch.device(there.type)


@cache
def _has_float64(device: str) -> bool:
    """Whether the device supports float64, which clipping uses (`dp_step`).

    Apple's accelerators and some of Intel's do not.
    """
    try:
        return bool((torch.ones(2, dtype=torch.float64, device=device) + 1).sum() == 4)
    except (TypeError, RuntimeError) as error:  # also a driver that fails, or no kernels for this device
        log.warning("device %r does not support float64 and is not used: %s", device, get_first_line(error))
        return False


@cache
def _make_deterministic() -> None:
    """Enable deterministic kernels and disable reduced precision for the rest of the process.

    CUDA's matrix products also need CUBLAS_WORKSPACE_CONFIG, which `fedtune.process` sets. In this mode
    memory-efficient attention does not split its keys by the number of rows, and flash attention sums in a fixed order.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, no benefit
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # not deterministic on Hopper


def disable_fused_attention() -> None:
    """Disable fused attention kernels for the rest of the process.

    A fused kernel may round a row differently depending on its neighbors, where plain matrix products do not.
    """
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def uses_unfused_attention() -> bool:
    """Whether attention in this process uses plain matrix products instead of fused kernels."""
    return not torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]


def get_total_memory(device: torch.device) -> int:
    """Return the total memory of the device in bytes, including used memory."""
    return torch.accelerator.get_memory_info(device)[1]


def get_device_name(device: torch.device) -> str:
    """Return the type and product name of an accelerator, such as "cuda, NVIDIA H100 80GB HBM3"."""
    named = getattr(torch.get_device_module(device), "get_device_name", str)
    return f"{device.type}, {named(device)}"


def describe_device(device: torch.device) -> str:
    """Describe a device and its numerical settings for the run record; "cpu" for a CPU."""
    if device.type == "cpu":
        return "cpu"
    attention = "unfused attention" if uses_unfused_attention() else "fused attention"
    mode = "deterministic algorithms" if torch.are_deterministic_algorithms_enabled() else "any algorithms"
    digits = "no TF32" if torch.get_float32_matmul_precision() == "highest" else "TF32"
    return f"{get_device_name(device)}, {mode}, {digits}, {attention}"
