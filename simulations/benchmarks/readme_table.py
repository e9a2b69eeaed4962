"""What each benchmark writes for people: where it ran, and its table in the README beside it."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme

README = Path(__file__).parent / "README.md"


def machine(cores: int) -> str:
    """The machine, with so many of its cores at work."""
    import torch  # here, for a process whose memory is measured

    return f"{cores} CPU core{'s' if cores > 1 else ''} ({_processor()}), torch {torch.__version__}"


def _processor() -> str:
    """Its kind, who made it, its instructions and what oneDNN may use: figures depend on these."""
    path = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in path.read_text().splitlines()) if path.exists() else ()
    told = {key.strip(): value.strip() for key, _, value in lines}
    names = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    does = [name for name in names if name in told.get("flags", "").split()]
    most = os.environ.get("ONEDNN_MAX_CPU_ISA")
    told_of = [platform.machine(), told.get("vendor_id", ""), " ".join(does), f"oneDNN up to {most}" if most else ""]
    return ", ".join(filter(None, told_of))


def put(begin: str, end: str, text: str) -> None:
    """Replace what stands in the README between two marks."""
    readme.put(README, text, begin=begin, end=end)
