"""The names of dp-accounting that fedtune uses; every other module imports them from here.

dp-accounting imports scipy's packages of signals, statistics and optimization, which take longer to load than all of
fedtune's accounting needs to answer.  Few of its functions use them, so they are loaded when one of these functions
first does.
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
    """Stands for a module whose names are loaded when they are used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        return _DeferredName(self.__name__, name)


class _DeferredName:
    """Stands for a function or an object of a module, which is loaded when it is called or one of its parts is read."""

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
    """Let the imports in the block bind stand-ins for these modules, unless they are loaded already.

    Imports outside the block get the modules themselves.  A stand-in passes every call and every attribute on, so that
    no result changes.
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
