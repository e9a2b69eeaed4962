"""Central import of dp-accounting, with lazy loading of its SciPy dependencies.

dp-accounting imports scipy.signal, scipy.stats and scipy.optimize, which take longer to load than most of fedtune's
accounting takes to run. Few of its functions use these modules, so each module is loaded at its first use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = [
    "ComposedDpEvent",
    "DpEvent",
    "GaussianDpEvent",
    "LaplaceDpEvent",
    "NeighboringRelation",
    "NonPrivateDpEvent",
    "PoissonSampledDpEvent",
    "RdpAccountant",
    "SelfComposedDpEvent",
    "compute_epsilon",
    "from_gaussian_mechanism",
    "from_mixture_gaussian_mechanism",
]
RARELY_USED = ("scipy.optimize", "scipy.signal", "scipy.stats")


class _DeferredModule(ModuleType):
    """A placeholder for a module that is imported on first use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system reads these attributes
            raise AttributeError(name)
        return _DeferredName(self.__name__, name)


class _DeferredName:
    """A placeholder for a function or object of a module, imported at the first call or attribute access."""

    def __init__(self, module: str, name: str) -> None:
        self._path = module, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._load()(*given, **named)

    def _load(self) -> Any:
        module, name = self._path
        return getattr(import_module(module), name)


@contextmanager
def defer_imports(names: tuple[str, ...]) -> Iterator[None]:
    """Replace the named modules with lazy placeholders for the imports in the block, unless they are already loaded.

    Imports outside the block get the modules themselves. A placeholder forwards every call and attribute, so results do
    not change.
    """
    stand_ins = {name: _DeferredModule(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


with defer_imports(RARELY_USED):
    from dp_accounting import (
        ComposedDpEvent,
        DpEvent,
        GaussianDpEvent,
        LaplaceDpEvent,
        NeighboringRelation,
        NonPrivateDpEvent,
        PoissonSampledDpEvent,
        SelfComposedDpEvent,
    )
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism, from_mixture_gaussian_mechanism
    from dp_accounting.rdp import RdpAccountant, compute_epsilon
