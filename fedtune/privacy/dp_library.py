"""Central import of dp-accounting, with lazy loading of its SciPy dependencies.

dp-accounting imports scipy.signal, scipy.stats and scipy.optimize, which take longer to load than most of fedtune's
accounting takes to run. Few of its functions use these modules, so each module is loaded at its first use. Of
scipy.stats, its Gaussian mechanisms use only the normal distribution, which is computed here by the same functions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from scipy.special import log_ndtr, ndtr, ndtri

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
        return (_DeferredNormal if name == "norm" else _DeferredName)(self.__name__, name)


class _DeferredName:
    """A placeholder for a function or object of a module, imported at the first call or attribute access."""

    def __init__(self, module: str, name: str) -> None:
        self._path = module, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def _load(self) -> Any:
        module, name = self._path
        return getattr(import_module(module), name)


class _DeferredNormal(_DeferredName):
    """A placeholder for scipy.stats.norm, which is not imported for a distribution with mean 0."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) if args or kwargs.keys() != {"scale"} else CenteredNormal(**kwargs)


class CenteredNormal:
    """The normal distribution with mean 0: `scipy.stats.norm(scale=scale)`, with equal values.

    scipy.stats checks and copies the arguments of each call, which takes longer than the function itself.

    Args:
        scale: the standard deviation, positive.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def cdf(self, x: Any) -> Any:
        """Return the probability of at most `x`, elementwise."""
        return ndtr(x / self._scale)

    def logcdf(self, x: Any) -> Any:
        """Return the natural logarithm of `cdf`, elementwise."""
        return log_ndtr(x / self._scale)

    def ppf(self, q: Any) -> Any:
        """Return the value that is not exceeded with probability `q`, elementwise."""
        return ndtri(q) * self._scale


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
