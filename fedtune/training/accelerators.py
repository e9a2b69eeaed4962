"""The accelerator of this machine, by torch's one interface for those of all makers; what only CUDA has is here."""

from __future__ import annotations

import logging
from functools import cache

import torch

from fedtune.model.quiet import first_line

log = logging.getLogger(__name__)


def accelerator() -> torch.device | None:
    """The accelerator that a run may train on, which then computes the same bits each time; None: there is none."""
    there = torch.accelerator.current_accelerator(check_available=True)
    if there is None or not _has_float64(there.type):
        return None
    _compute_alike_each_time()
    return torch.device(there.type)


@cache
def _has_float64(device: str) -> bool:
    """True if it has the numbers that clipping is computed in (`dp_step`); those of Apple and some of Intel do not."""
    try:
        return bool((torch.ones(2, dtype=torch.float64, device=device) + 1).sum() == 4)
    except (TypeError, RuntimeError) as error:  # also a driver that fails, or no kernels for this device
        log.warning("nothing is computed on the device %r, which has no float64: %s", device, first_line(error))
        return False


@cache
def _compute_alike_each_time() -> None:
    """No chance in the order of adding, and no fewer digits than a number format has; for the rest of the process.

    CUDA's products need CUBLAS_WORKSPACE_CONFIG too, which `fedtune.process` sets.  In this mode memory-efficient
    attention does not part its keys by how many rows there are, and flash attention adds up in one order.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # takes time, for nobody
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # not deterministic on Hopper


def attend_by_products() -> None:
    """No fused attention for the rest of the process: where one goes by its neighbours, products may not."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def attends_by_products() -> bool:
    """Attention goes by products in the process."""
    return not torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]


def memory_of(device: torch.device) -> int:
    """Bytes of the whole device, taken or free."""
    return torch.accelerator.get_memory_info(device)[1]


def name_of(device: torch.device) -> str:
    """The kind of an accelerator and its maker's name for it, such as "cuda, NVIDIA H100 80GB HBM3"."""
    named = getattr(torch.get_device_module(device), "get_device_name", str)
    return f"{device.type}, {named(device)}"


def about(device: torch.device) -> str:
    """A device's name and how it was set, for a run's record; "cpu"."""
    if device.type == "cpu":
        return "cpu"
    attention = "attention by products" if attends_by_products() else "fused attention"
    mode = "deterministic algorithms" if torch.are_deterministic_algorithms_enabled() else "any algorithms"
    digits = "no TF32" if torch.get_float32_matmul_precision() == "highest" else "TF32"
    return f"{name_of(device)}, {mode}, {digits}, {attention}"
