"""Settings of the process, made before torch computes anything."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if not __debug__:  # under -O, Python skips the assertions behind clipping, noise and the ledger
    raise ImportError("fedtune cannot run with python -O or PYTHONOPTIMIZE, which skip its assertions")

torch_came_first = "torch" in sys.modules and "MKL_CBWR" not in os.environ
"""Whether torch was imported before this module, and may have read the environment without these settings."""

# Without this setting, MKL selects kernels and splits sums among threads by the number of rows, so that the rounding of
# an example depends on the rest of its batch. training/batch_invariance.py tests this on each machine.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Read when CUDA starts: deterministic matrix products (training/accelerators.py).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# No threads in tokenizers, because processes fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Idle torch threads sleep instead of spinning: equally fast on an idle machine, two to four times as fast on a shared
# machine (simulations/benchmarks).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class _LazyModule:
    """A proxy that imports its module on the first access to an attribute."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


# Lazy, because torch takes a second to import, and reading settings or records does not need it.
if TYPE_CHECKING:
    import torch as torch
else:
    torch = _LazyModule("torch")
