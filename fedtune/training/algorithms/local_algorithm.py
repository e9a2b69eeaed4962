"""The interface of a federated algorithm: what a site does around its noisy steps, and what the lead does with the
results.

To add one: write its file in this folder, with the class of its settings if it has any, and name it in
`fedtune.training.algorithms.algorithm_registry`.  Nothing else in fedtune asks which algorithm a run has.

Guarantee: both halves are post-processing.  They see noised gradients, adapters that were sent, public settings and
what they computed from these before; no record, no gradient before its noise and no random stream reaches them.  The
types say so, import-linter keeps everything else out of this folder, and docs/guarantee.md has the argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from fedtune.codec import decode_value, require

Arrays = Mapping[str, npt.NDArray[np.float32]]
"""Arrays by name; those with the names of an adapter's tensors have their shapes."""
Requirements = Mapping[str, tuple[object, str]]
"""Setting of a run -> the only value with which an algorithm works, and why."""


@dataclass(frozen=True, slots=True)
class NoisedGradient:
    """The mean gradient of a step after clipping, noise and division by the public denominator.

    This is an algorithm's only view of a site's records.  `fedtune.training.dp_step` makes it of a sum that has its
    noise, and nothing else does; a run without privacy has no noise and no guarantee.

    Attributes:
        values: name of a trained tensor -> its mean gradient, float32.
    """

    values: Arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteRound:
    """The inputs of a site's half in one round, all public or noised.

    Attributes:
        adapter: the adapter from which the round starts, within the site's bound on values.
        sent: the arrays that the lead's half sent (`sent_arrays`); untrusted, but finite and of the right shapes.
        state: what this site's half returned in the run's last committed round (`next_state`); empty in the first
            round, and if the state was lost.
    """

    adapter: Arrays
    sent: Arrays
    state: Arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundOutcome:
    """The inputs of the lead's half after a round, all of them public.

    Attributes:
        adapter: the adapter that the sites were sent.
        average: the adapter that the server's strategy made of their updates.
        step_sizes: name of a tensor that trained -> the sum of its learning rates over the round's steps.
        share: the participants' part of all sites' declared size, in (0, 1].
        noise: standard deviation of the noise in one value of (adapter - average) / step size, with SGD.
    """

    adapter: Arrays
    average: Arrays
    step_sizes: Mapping[str, float]
    share: float
    noise: float

    def mean_gradient(self, name: str) -> npt.NDArray[np.float32]:
        """Return the participants' mean gradient of a tensor that trained, over the steps of SGD without momentum."""
        moved: npt.NDArray[np.float32] = self.adapter[name] - self.average[name]
        return moved / np.float32(self.step_sizes[name])


class LocalAlgorithm:
    """The base class of algorithms, which is FedAvg: no method changes anything.

    Methods are pure functions of their arguments and of `own`, so that a resumed run has the same result.  Arrays are
    NumPy's, and a method returns new ones instead of changing its arguments.
    """

    name: ClassVar[str]  # in settings, proposals, policies and reports
    # the class of the algorithm's settings (`federation.algorithm_settings`), each with a default; None: it has none
    settings: ClassVar[type[Any] | None] = None
    requires: ClassVar[Requirements] = {}
    # why secure aggregation cannot carry it, as the end of a sentence; empty: it can
    not_in_sums: ClassVar[str] = "a site takes no step of its own there"
    own: Any  # an instance of `settings`, or None

    def __init__(self, own: object = None) -> None:
        self.own = self.settings() if own is None and self.settings else own

    def with_settings(self, given: object) -> Self:
        """Return the same algorithm with these settings of its own, by their keys; others keep their default.

        Raises:
            ConfigError: a key is unknown, or a value is out of its bound.
        """
        within = "algorithm_settings"
        table: Any = asdict(given) if is_dataclass(given) and not isinstance(given, type) else given
        require(within, table, isinstance(table, Mapping), "must be keys and values, as in {mu: 0.1}")
        known = [one.name for one in fields(self.settings)] if self.settings else []
        for key in table:
            bound = f"is not a setting of {self.name}, which has {', '.join(known) or 'none of its own'}"
            require(f"{within}.{key}", table[key], key in known, bound)
        return type(self)(decode_value(within, dict(table), self.settings) if self.settings else None)

    @property
    def flower_strategy(self) -> tuple[str, Mapping[str, float]]:
        """The class of `flwr.serverapp.strategy` that combines the updates, and its arguments."""
        return "FedAvg", {}

    # The lead's half

    def initial_arrays(self, adapter: Arrays) -> Arrays:
        """Return the arrays that the lead keeps before round 1."""
        return {}

    def sent_arrays(self, arrays: Arrays) -> Arrays:
        """Return the arrays that go to the sites with the next adapter; names and shapes are those of every round."""
        return {}

    def next_arrays(self, arrays: Arrays, outcome: RoundOutcome) -> Arrays:
        """Return the arrays that the lead keeps after a round that was averaged."""
        return arrays

    # The site's half

    def frozen_tensors(self, names: Iterable[str], sent: Arrays) -> frozenset[str]:
        """Return the adapter's tensors that do not train in a round; lead and site compute them alike."""
        return frozenset()

    def correct_gradient(self, gradient: NoisedGradient, weights: Arrays, at: SiteRound) -> Arrays:
        """Return the gradient with which the optimizer steps from `weights`, by the names of `gradient`."""
        return gradient.values

    def next_state(self, mean: NoisedGradient, at: SiteRound) -> Arrays:
        """Return the state that the site keeps for the next round, of the mean of the round's noised gradients."""
        return {}

    def bound_gradient(self, noised: float, *, moved: float, sent: float) -> float:
        """Bound a corrected gradient, by value or by L2 norm; the lead refuses an update that moved further.

        Args:
            noised: the bound on every noised gradient of the run.
            moved: the bound on the distance from the adapter that was sent.
            sent: the size of the arrays that were sent.
        """
        return noised

    @property
    def corrects_gradients(self) -> bool:
        """Whether the site's half does anything in a step; otherwise training takes the shorter way."""
        return type(self).correct_gradient is not LocalAlgorithm.correct_gradient or self.keeps_state

    @property
    def keeps_state(self) -> bool:
        """Whether a site keeps arrays from one round to the next."""
        return type(self).next_state is not LocalAlgorithm.next_state
