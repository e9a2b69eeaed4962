"""A cache for consecutive simulated runs: the loaded and tested model, and the model's outputs on records.

The runs of a sweep, search or comparison differ in noise, rates, rounds or sites. Loading and testing the model,
running the frozen layers over the records, and scoring the model before training give identical results in each run, so
they are done once. The cached state depends only on public settings, the base model and individual records, and is
bit-identical to what a run would compute itself. A real site caches nothing about its records between runs.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:  # slow imports, which commands need only after validating their arguments
    from fedtune.config import RunConfig
    from fedtune.data import TextDataset

_M = TypeVar("_M")


@dataclass
class RunCache:
    """A cache that several runs share. As a context manager, it is cleared on exit."""

    # `LoadedModel` of the newest run, or None (Any, to avoid a circular import)
    model: Any = None
    _states: dict[str, Any] = field(default_factory=dict)
    _before: dict[str, Any] = field(default_factory=dict)
    _num_tokens: int = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()  # free the memory for subsequent work, such as scoring all runs

    def clear(self) -> None:
        """Drop the cached state of all runs."""
        self.model, self._num_tokens = None, 0
        self._states.clear()
        self._before.clear()

    def reuse_or_load_model(self, config: RunConfig, *, inexact_allowed: bool, load: Callable[[], _M]) -> _M:
        """Return the cached model if the run can use it, else load a new one.

        Args:
            config: the next run's configuration.
            inexact_allowed: accept a model whose gradients depend on the rest of the batch by rounding.
            load: function that loads a new model.
        """
        if self.model is None or not self.model.is_reusable_for(
            config, declared_size=None, inexact_allowed=inexact_allowed
        ):
            self.clear()  # free the old model and its cache before loading the new one
            self.model = load()
        model: _M = self.model
        return model

    def get_cached_states(self, about: str, dataset: TextDataset, make: Callable[[], _M]) -> _M:
        """Return the cached store for the frozen layers' outputs on a data set, or create a new store.

        If a new store exceeds the reserved memory, older stores are dropped from the cache.

        Args:
            about: kind of store, part of the cache key.
            dataset: the data set.
            make: function that creates a store.
        """
        key = f"{about} {_hash_dataset(dataset)}"
        if key not in self._states:
            self._num_tokens += dataset.num_tokens
            if not self.model.has_room_for(self._num_tokens):
                self._states.clear()
                self._num_tokens = dataset.num_tokens
            self._states[key] = make()
        states: _M = self._states[key]
        return states

    def get_cached_baseline(self, dataset: TextDataset, about: str, make: Callable[[], _M]) -> _M:
        """Return the cached evaluation of the untrained adapter on a data set, or compute it.

        Args:
            dataset: the data set.
            about: scoring settings and references, part of the cache key.
            make: function that computes the result.
        """
        key = f"{about} {_hash_dataset(dataset)}"
        if key not in self._before:
            self._before[key] = make()
        baseline: _M = self._before[key]
        return baseline


def _hash_dataset(dataset: TextDataset) -> str:
    whole = pickle.dumps((dataset.texts, dataset.input_ids, dataset.targets), protocol=5)
    return hashlib.sha256(whole).hexdigest()
