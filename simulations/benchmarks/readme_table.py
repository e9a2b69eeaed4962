"""What each benchmark writes for people: where it ran, and its table in the README beside it."""

from __future__ import annotations

import platform
from pathlib import Path

from fedtune.privacy.durable import write_durably

README = Path(__file__).parent / "README.md"


def machine(cores: int) -> str:
    """The machine, with so many of its cores at work."""
    import torch  # here, for a process whose memory is measured

    return f"{cores} CPU core{'s' if cores > 1 else ''} ({platform.machine()}), torch {torch.__version__}"


def put(begin: str, end: str, text: str) -> None:
    """Replace what stands in the README between two marks."""
    before, rest = README.read_text().split(begin)
    write_durably(README, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}".encode())
