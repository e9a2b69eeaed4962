"""The price of a search: trials on the same records, of which one is picked.

**What is charged.**  Each trial is a run of its own, and everything it releases goes to the lead: the adapter of every
round, of every trial.  So a site is charged for all of them.  How many there are, and what each may cost, is fixed
before the first one; which settings a trial tries may follow from earlier scores, since these are computed from
released adapters and from a file of the lead's that holds no record of a site.  So the epsilon of all trials' plans
together, by PLD, is a proof for everything that the search releases, whichever trial is picked and by whatever rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dp_accounting import ComposedDpEvent

from fedtune.privacy import accountant, events, filter
from fedtune.privacy.events import Charge
from fedtune.privacy.mechanism import Unit
from fedtune.privacy.run_plan import Plan
from fedtune.spec import spec
from fedtune.words import finite

MOST_TRIALS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchPrice:
    """The price of a search at each site; infinite without noise.

    Attributes:
        trials: how many.
        epsilon: of all of them together by PLD; `epsilon_rdp` by RDP.
        epsilon_filter: the least lifetime cap of a new ledger under which they fit.
        epsilon_of_one: of the dearest trial by itself, by PLD.
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
        """Whether anything is promised."""
        return math.isfinite(self.epsilon)


def price_of(plans: Sequence[Plan]) -> SearchPrice:
    """The price of a search whose trials have these plans, at least one, of one unit and delta."""
    wholes, delta = [plan.whole for plan in plans], plans[0].delta
    return SearchPrice(
        unit=plans[0].unit,
        delta=delta,
        trials=len(plans),
        epsilon=accountant.epsilon_pld(wholes, delta),
        epsilon_rdp=accountant.epsilon_rdp(wholes, delta),
        epsilon_filter=filter.filter_cost(ComposedDpEvent(tuple(wholes)), delta=delta),
        epsilon_of_one=max(accountant.epsilon_pld([whole], delta) for whole in set(wholes)),
    )


@spec
class Selection:
    """That a run was picked in a search, by what, and what the whole search may cost a site.

    Attributes:
        search: its name.
        judged_by: the validation score that picked, and `score` the run's own.
        trials: how many there were.
        epsilon: of all of them together; None: nothing bounds it.
        charges: everything that all trials may do to a site's records.
    """

    search: str
    method: str
    judged_by: str
    score: float | None
    trials: int
    delta: float
    epsilon: float | None
    charges: tuple[Charge, ...]

    @classmethod
    def of(cls, price: SearchPrice, plans: Sequence[Plan], **told: Any) -> Selection:
        """The selection in a search of this price, whose trials have these plans."""
        return cls(
            **told,
            trials=price.trials,
            delta=price.delta,
            epsilon=finite(price.epsilon),
            charges=tuple(Charge(event=e, count=n) for e, n in events.counted([plan.whole for plan in plans])),
        )
