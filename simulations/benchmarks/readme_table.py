"""What each benchmark writes for people: where it ran, and its table in the README beside it."""

from __future__ import annotations

import platform
from pathlib import Path

from fedtune.privacy.durable import write_durably

README = Path(__file__).parent / "README.md"


def machine(cores: int) -> str:
    """The machine, with so many of its cores at work."""
    import torch  # here, for a process whose memory is measured

    return f"{cores} CPU core{'s' if cores > 1 else ''} ({_processor()}), torch {torch.__version__}"


def _processor() -> str:
    """Its kind, who made it, and whether it multiplies bfloat16 numbers itself: figures hang on these."""
    path = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in path.read_text().splitlines()) if path.exists() else ()
    told = {key.strip(): value.strip() for key, _, value in lines}
    does = next((name for name in ("amx_bf16", "avx512_bf16") if name in told.get("flags", "").split()), "")
    return ", ".join(filter(None, [platform.machine(), told.get("vendor_id", ""), does]))


def put(begin: str, end: str, text: str) -> None:
    """Replace what stands in the README between two marks."""
    before, rest = README.read_text().split(begin)
    write_durably(README, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}".encode())
