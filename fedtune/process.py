"""Process-wide environment settings, made once before torch first computes."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

torch_came_first = "torch" in sys.modules and "MKL_CBWR" not in os.environ
"""Whether torch may have computed before these settings were made, which it reads once."""

# Before torch first computes: MKL otherwise chooses kernels, and parts sums among threads, by how many rows a product
# has, and so rounds an example by its neighbors.  Whether it does is tried on each machine
# (training/batch_invariance.py).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Read once CUDA starts: its products then compute the same bits each time (training/accelerators.py).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# No threads that tokenizers would fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch's threads sleep rather than spin while they wait: the same speed on a quiet machine, twice to four times the
# speed where something else runs beside it (simulations/benchmarks).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class _WhenUsed:
    """A lazily imported module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


# torch takes a second to import: who only reads settings or records does not wait for it.
if TYPE_CHECKING:
    import torch as torch
else:
    torch = _WhenUsed("torch")
