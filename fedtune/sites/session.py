"""State that one process keeps between simulated runs: a loaded and tried model, and its results on records.

A sweep, a search or a comparison makes several runs, which differ in noise, rates, rounds or who takes part.  Loading
the model, trying it, running the frozen layers over the records and scoring the model before training give each of them
the same: once is enough.  What is kept depends on public settings, on the base model and on each record alone, and is
what a run would compute itself, bit for bit.  A real site keeps nothing of its records from run to run.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:  # a command waits for none of them before it has looked at what was typed
    from fedtune.data import TextDataset
    from fedtune.evaluation.scoring import KeptBatches
    from fedtune.training.examples import SiteExamples

_M = TypeVar("_M")


@dataclass
class Session:
    """Kept by whoever makes several runs, and given to each of them; empty again when left as a context.

    Attributes:
        model: the `SharedModel` as it was tried, whose module imports this one; None before the first run.
    """

    model: Any = None
    _examples: dict[str, SiteExamples] = field(default_factory=dict)
    _batches: dict[str, KeptBatches] = field(default_factory=dict)
    _before: dict[str, Any] = field(default_factory=dict)
    _num_tokens: int = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()  # what comes next, such as scoring all runs, needs the memory

    def clear(self) -> None:
        """Keep nothing of earlier runs."""
        self.model, self._num_tokens = None, 0
        for kept in (self._examples, self._batches, self._before):
            kept.clear()

    def examples(self, dataset: TextDataset, make: Callable[[], SiteExamples]) -> SiteExamples:
        """A site's examples, of an earlier run with the same ones or made now."""
        key = _digest(dataset)
        if key not in self._examples:
            self._make_room(dataset)
            self._examples[key] = make()
        return self._examples[key]

    def batches(self, dataset: TextDataset, *, max_tokens: int) -> KeptBatches:
        """Of the lead's own records, in batches of `max_tokens`."""
        key = f"{max_tokens} {_digest(dataset)}"
        if key not in self._batches:
            self._make_room(dataset)
            self._batches[key] = {}
        return self._batches[key]

    def before(self, dataset: TextDataset, about: str, make: Callable[[], _M]) -> _M:
        """How the model did on a data set before training; `about` says how it was asked, and the references."""
        key = f"{about} {_digest(dataset)}"
        if key not in self._before:
            self._before[key] = make()
        found: _M = self._before[key]
        return found

    def _make_room(self, dataset: TextDataset) -> None:
        """Hold no more states than fit the memory set aside for them; those that a run uses stay with it."""
        self._num_tokens += dataset.num_tokens
        if not self.model.has_room_for(self._num_tokens):
            self._examples.clear()
            self._batches.clear()
            self._num_tokens = dataset.num_tokens


def _digest(dataset: TextDataset) -> str:
    whole = pickle.dumps((dataset.texts, dataset.input_ids, dataset.targets), protocol=5)
    return hashlib.sha256(whole).hexdigest()
