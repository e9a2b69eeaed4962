"""fedtune: federated, differentially private fine-tuning with LoRA adapters.

>>> import fedtune
>>> price = fedtune.plan("banks_intents", {"privacy.epsilon": 3})
>>> round(price.plan.noise_multiplier, 1), price.epsilon <= 3
(3.2, True)
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

torch_came_first = "torch" in sys.modules and "MKL_CBWR" not in os.environ
"""Whether torch may have computed before these settings were made, which it reads once."""

# Before torch first computes: MKL otherwise chooses kernels, and parts sums among threads, by how many rows a product
# has, and so rounds an example by its neighbours.  Whether it does is tried on each machine (training/preflight.py).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# No threads that tokenizers would fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch's threads sleep rather than spin while they wait: the same speed on a quiet machine, twice to four times the
# speed where something else runs beside it (docs/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from fedtune.api.door import Ledger, Progress, Run, compare, evaluate, load, plan, simulate, verify
    from fedtune.config import RunConfig
    from fedtune.privacy.site_policy import Policy

__version__ = "0.1.0"
__all__ = [
    "Ledger",
    "Policy",
    "Progress",
    "Run",
    "RunConfig",
    "compare",
    "evaluate",
    "load",
    "plan",
    "simulate",
    "verify",
]
_ELSEWHERE = {"RunConfig": "fedtune.config", "Policy": "fedtune.privacy.site_policy"}


def __getattr__(name: str) -> object:
    """Import a name when it is first used, so that `import fedtune` and a command's first line take no second."""
    if name not in __all__:
        raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "fedtune.api.door")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
