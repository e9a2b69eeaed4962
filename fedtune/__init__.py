"""fedtune: federated, differentially private fine-tuning with LoRA adapters.

>>> import fedtune
>>> price = fedtune.plan("banks_intents", {"privacy.epsilon": 3})
>>> round(price.plan.noise_multiplier, 1), price.epsilon <= 3
(6.2, True)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fedtune import process as process  # first, because torch reads these environment variables once
from fedtune.version import __version__ as __version__

if TYPE_CHECKING:
    from fedtune.api.public import Progress, Run, compare, evaluate, load, plan, verify
    from fedtune.api.public_ledger import Ledger
    from fedtune.config import RunConfig
    from fedtune.lab.audit.training_function import audit_training
    from fedtune.lab.studies.in_memory import simulate
    from fedtune.lab.studies.personalized import personalize
    from fedtune.lab.studies.synthetic import synthesize
    from fedtune.privacy.site_policy import Policy
    from fedtune.spec import ConfigError, DataError, FedtuneError, RefusedError, RunError, StuckError

__all__ = [
    "ConfigError",
    "DataError",
    "FedtuneError",
    "Ledger",
    "Policy",
    "Progress",
    "RefusedError",
    "Run",
    "RunConfig",
    "RunError",
    "StuckError",
    "audit_training",
    "compare",
    "evaluate",
    "load",
    "personalize",
    "plan",
    "simulate",
    "synthesize",
    "verify",
]
_ELSEWHERE = {
    "Ledger": "fedtune.api.public_ledger",
    "RunConfig": "fedtune.config",
    "Policy": "fedtune.privacy.site_policy",
    "audit_training": "fedtune.lab.audit.training_function",
    "personalize": "fedtune.lab.studies.personalized",
    "simulate": "fedtune.lab.studies.in_memory",
    **dict.fromkeys(
        ("ConfigError", "DataError", "FedtuneError", "RefusedError", "RunError", "StuckError"), "fedtune.spec"
    ),
    "synthesize": "fedtune.lab.studies.synthetic",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import fedtune` and the command line start quickly.

    Raises:
        AttributeError: fedtune has no such public name.
    """
    if name not in __all__:
        raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "fedtune.api.public")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
