"""Interface of federated algorithms: gradient correction at the sites, and the lead's update after a round.

To add an algorithm, write a module in this folder, with a class for its settings if it has any, and list it in
`fedtune.training.algorithms.algorithm_registry`. No other code of fedtune depends on the algorithm of a run.

Guarantee: both the site side and the lead side are post-processing. They see noised gradients, sent adapters, public
settings and their own earlier results; no record, no gradient before its noise and no random stream reaches them. The
types enforce this, import-linter keeps other imports out of this folder, and docs/proof.md has the argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from fedtune.codec import decode_value, require

Arrays = Mapping[str, npt.NDArray[np.float32]]
"""Arrays by name. An array with the name of an adapter tensor has the shape of this tensor."""
Requirements = Mapping[str, tuple[object, str]]
"""Key of a run setting -> the only value that the algorithm supports, and the reason."""


@dataclass(frozen=True, slots=True)
class NoisedGradient:
    """The mean gradient of a step after clipping, noise and division by the public denominator.

    This is an algorithm's only view of a site's records. Only `fedtune.training.dp_step` creates it, from a sum with
    noise. A run without privacy has no noise and no guarantee.

    Attributes:
        values: name of a trained tensor -> its mean gradient, float32.
    """

    values: Arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteRound:
    """Inputs of an algorithm at a site in one round. All inputs are public or noised.

    Attributes:
        adapter: the adapter at the start of the round, within the site's limit on values.
        sent: the arrays from the lead (`select_sent_arrays`); untrusted, but finite and of the right shapes.
        state: the site's state after the run's last committed round (`compute_next_state`); empty in the first round,
            and if the state was lost.
    """

    adapter: Arrays
    sent: Arrays
    state: Arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundOutcome:
    """Inputs of an algorithm at the lead after a round. All inputs are public.

    Attributes:
        adapter: the adapter that the sites received.
        average: the adapter that the server's strategy computed from the sites' updates.
        step_sizes: name of a trained tensor -> the sum of its learning rates over the round's steps.
        share: the participants' fraction of all sites' declared size, in (0, 1].
        noise: standard deviation of the noise in one value of (adapter - average) / step size, with SGD.
    """

    adapter: Arrays
    average: Arrays
    step_sizes: Mapping[str, float]
    share: float
    noise: float

    def compute_mean_gradient(self, name: str) -> npt.NDArray[np.float32]:
        """Compute the participants' mean gradient of a trained tensor from their average update by plain SGD."""
        moved: npt.NDArray[np.float32] = self.adapter[name] - self.average[name]
        return moved / np.float32(self.step_sizes[name])


class LocalAlgorithm:
    """Base class of the federated algorithms. Its default methods implement FedAvg.

    Methods are pure functions of their arguments and of `own`, so that a resumed run has the same result. Arrays are
    NumPy arrays, and a method returns new arrays instead of changing its arguments.
    """

    name: ClassVar[str]  # in settings, proposals, policies and reports
    # the class of the algorithm's settings (`federation.algorithm_settings`), each with a default; None: no settings
    settings: ClassVar[type[Any] | None] = None
    requires: ClassVar[Requirements] = {}
    # the reason why secure aggregation does not support the algorithm, for error messages; empty if it does
    not_in_sums: ClassVar[str] = "with secure aggregation, a site takes no optimizer step"
    # the reason why all sites must train one rank, for error messages; empty if ranks may differ
    not_with_ranks: ClassVar[str] = "it has not been derived for sites of different ranks"
    own: Any  # an instance of `settings`, or None

    def __init__(self, own: object = None) -> None:
        self.own = self.settings() if own is None and self.settings else own

    def with_settings(self, given: object) -> Self:
        """Return a copy of the algorithm with the given settings by key.

        All other settings have their default values.

        Raises:
            ConfigError: a key is unknown, or a value is out of range.
        """
        within = "algorithm_settings"
        table: Any = asdict(given) if is_dataclass(given) and not isinstance(given, type) else given
        require(within, table, isinstance(table, Mapping), "must be keys and values, as in {mu: 0.1}")
        known = [field.name for field in fields(self.settings)] if self.settings else []
        for key in table:
            bound = f"is not a setting of {self.name}; its own settings: {', '.join(known) or 'none'}"
            require(f"{within}.{key}", table[key], key in known, bound)
        return type(self)(decode_value(within, dict(table), self.settings) if self.settings else None)

    @property
    def flower_strategy(self) -> tuple[str, Mapping[str, float]]:
        """The class name of the strategy in `flwr.serverapp.strategy` that combines the updates, and its arguments."""
        return "FedAvg", {}

    # The lead's half

    def initial_arrays(self, adapter: Arrays) -> Arrays:
        """Return the initial arrays of the lead, before round 1."""
        return {}

    def select_sent_arrays(self, arrays: Arrays) -> Arrays:
        """Return the arrays that the lead sends to the sites with the adapter.

        Names and shapes are the same in every round.
        """
        return {}

    def compute_next_arrays(self, arrays: Arrays, outcome: RoundOutcome) -> Arrays:
        """Return the lead's arrays for the next round, computed from the outcome of this round."""
        return arrays

    # The site's half

    def select_frozen_tensors(self, names: Iterable[str], sent: Arrays) -> frozenset[str]:
        """Return the names of the adapter tensors that are frozen in a round. Lead and sites compute the same set."""
        return frozenset()

    def correct_gradient(self, gradient: NoisedGradient, weights: Arrays, at: SiteRound) -> Arrays:
        """Correct the gradient of the optimizer's step at `weights`. The result has the names of `gradient`."""
        return gradient.values

    def compute_next_state(self, mean: NoisedGradient, at: SiteRound) -> Arrays:
        """Return the site's state for the next round, computed from the mean of this round's noised gradients."""
        return {}

    def bound_gradient(self, noised: float, *, moved: float, sent: float) -> float:
        """Bound the size of a corrected gradient, as an absolute value or an L2 norm.

        The lead rejects larger updates.

        Args:
            noised: the bound on the size of every noised gradient of the run.
            moved: the bound on the distance from the received adapter.
            sent: the size of the received arrays.
        """
        return noised

    @property
    def corrects_gradients(self) -> bool:
        """Whether the algorithm corrects gradients or stores a state at a site.

        Otherwise, training skips its site side.
        """
        return type(self).correct_gradient is not LocalAlgorithm.correct_gradient or self.keeps_state

    @property
    def has_site_half(self) -> bool:
        """Whether a site does more than with FedAvg: it corrects gradients, stores a state or freezes tensors."""
        freezes = type(self).select_frozen_tensors is not LocalAlgorithm.select_frozen_tensors
        return freezes or self.corrects_gradients

    @property
    def keeps_state(self) -> bool:
        """Whether a site stores arrays from one round to the next."""
        return type(self).compute_next_state is not LocalAlgorithm.compute_next_state
