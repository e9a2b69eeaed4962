"""The privacy cost of a hyperparameter search: several trials on the same records, one of which is selected.

**What is charged.** Each trial is a run, and the lead sees everything that it releases: every adapter of every round.
So a site is charged for all trials. The number of trials, and the cost of each trial, are fixed before the first trial.
The settings of a trial may depend on earlier scores, because these are post-processing: they are computed from released
adapters and a file of the lead that contains no record of a site. So the PLD epsilon of all plans together is an upper
bound for the search, for any rule that selects a trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.formatting import convert_infinite_to_none, convert_none_to_infinite
from fedtune.privacy import accountant, events, filter
from fedtune.privacy.dp_library import ComposedDpEvent
from fedtune.privacy.events import Charge
from fedtune.privacy.mechanism import Unit
from fedtune.privacy.run_plan import Plan
from fedtune.spec import spec

MAX_TRIALS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchCost:
    """The privacy cost of a hyperparameter search at each site. All epsilons are infinite without noise.

    Attributes:
        trials: number of trials.
        epsilon: PLD epsilon of all trials together.
        epsilon_rdp: RDP epsilon of all trials together.
        epsilon_filter: smallest lifetime cap under which a new ledger accepts all trials.
        epsilon_of_one: PLD epsilon of the most expensive trial alone.
    """

    unit: Unit
    delta: float
    trials: int
    epsilon: float
    epsilon_rdp: float
    epsilon_filter: float
    epsilon_of_one: float

    @property
    def private(self) -> bool:
        """Whether the search has a privacy guarantee."""
        return math.isfinite(self.epsilon)


def compute_search_cost(plans: Sequence[Plan]) -> SearchCost:
    """Compute the privacy cost of a search with at least one trial.

    The plans of all trials have the same unit and delta.
    """
    wholes, delta = [plan.full_event for plan in plans], plans[0].delta
    return SearchCost(
        unit=plans[0].unit,
        delta=delta,
        trials=len(plans),
        epsilon=accountant.epsilon_pld(wholes, delta),
        epsilon_rdp=accountant.epsilon_rdp(wholes, delta),
        epsilon_filter=filter.find_smallest_cap(ComposedDpEvent(tuple(wholes)), delta=delta)[0],
        epsilon_of_one=max(accountant.epsilon_pld([whole], delta) for whole in set(wholes)),
    )


@spec
class Selection:
    """The hyperparameter search that a run belongs to, with the privacy cost of all its trials at a site.

    Attributes:
        search: name of the search.
        primary_metric: validation metric that selects the best trial.
        score: the run's value of this metric; None if the search selected another run.
        trials: number of trials.
        epsilon: epsilon of all trials together; None: unbounded.
        charges: the privacy events of all trials.
    """

    search: str
    method: str
    primary_metric: str
    score: float | None
    trials: int
    delta: float
    epsilon: float | None
    charges: tuple[Charge, ...]

    @classmethod
    def from_cost(cls, price: SearchCost, plans: Sequence[Plan], **fields: Any) -> Selection:
        """Create the record of a search from its privacy cost.

        Args:
            price: privacy cost of the search.
            plans: the plans of all trials.
            **fields: all other fields of the record.
        """
        return cls(
            **fields,
            trials=price.trials,
            delta=price.delta,
            epsilon=convert_infinite_to_none(price.epsilon),
            charges=tuple(
                Charge(event=e, count=n)
                for e, n in events.count_mechanisms_as_json([plan.full_event for plan in plans])
            ),
        )


def compute_released_epsilon(
    epsilon: float | None, delta: float, search: Selection | None
) -> tuple[float | None, float]:
    """Compute the (epsilon, delta) of a finished run, with None for an unbounded epsilon.

    For a trial of a search, the result covers at least the whole search.
    """
    search_epsilon, search_delta = (search.epsilon, search.delta) if search else (epsilon, delta)
    return convert_infinite_to_none(
        max(convert_none_to_infinite(convert_infinite_to_none(value)) for value in (epsilon, search_epsilon))
    ), max(delta, search_delta)
