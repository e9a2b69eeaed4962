"""What a search costs: trials on the same records, of which one is picked.

**What is charged.**  Each trial is a run of its own, and everything it releases goes to the lead: the adapter of every
round, of every trial.  So a site is charged for all of them.  How many there are, and what each may cost, is fixed
before the first one; which settings a trial tries may follow from earlier scores, since these are computed from
released adapters and from a file of the lead's that holds no record of a site.  So the epsilon of all trials' plans
together, by PLD, is a proof for everything that the search releases, whichever trial is picked and by whatever rule.

**What is only told.**  Somebody who sees nothing but the picked adapter learns less where the number of trials is
random (Papernot and Steinke 2022, arXiv 2110.03620, Theorem 6).  This holds under conditions:

- The number is drawn from a Poisson distribution by the operating system's randomness, and nobody outside learns it.  A
  number that was fixed, or that a public seed gives, has no such bound.
- Every trial costs the same, and draws its settings anew from one distribution.  So neither a grid nor TPE has it.
- The lead keeps to itself all other adapters, the table of trials, the ledgers and the picked run's own records, which
  tell how many trials there were.

A site does not rely on what a lead keeps to itself, so no ledger is ever charged with this figure, and it does not hold
against the lead.  A search that draws its number must have room for nearly every number: its sites are asked for
`most` trials before one is drawn.  The theorem is used at half of delta.  Cutting the number off at `most` changes what
comes out with a chance t at most, which takes t (1 + exp(epsilon)) of delta: at most the other half.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from dp_accounting import ComposedDpEvent, DpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from scipy import special

from fedtune.privacy import accountant, events, filter
from fedtune.privacy.events import Charge
from fedtune.privacy.mechanism import Unit
from fedtune.privacy.run_plan import Plan
from fedtune.spec import ConfigError, check_at_least, spec
from fedtune.words import finite

MOST_TRIALS = 1000
_ROUNDING = 2.0**-50
"""Of the draw, whose uniform number has 53 bits, and of the sums that it is compared with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchPrice:
    """The price of a search at each site; infinite without noise.

    Attributes:
        trials: that are paid for: the most that there can be.
        epsilon: of all of them together by PLD; `epsilon_rdp` by RDP.
        epsilon_filter: the least lifetime cap of a new ledger under which they fit.
        epsilon_of_one: of the dearest trial by itself, by PLD.
        mean: of the Poisson distribution that the number is drawn from; None: it is fixed.
        epsilon_of_picked: for who sees the picked adapter alone; None: the number is fixed, so there is no such bound.
    """

    unit: Unit
    delta: float
    trials: int
    epsilon: float
    epsilon_rdp: float
    epsilon_filter: float
    epsilon_of_one: float
    mean: float | None = None
    epsilon_of_picked: float | None = None

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


def price_of_drawn(plan: Plan, *, mean: float, key: str) -> SearchPrice:
    """The price of a search that draws its number of trials, all of one plan.

    Raises:
        ConfigError: names `key` where the mean is no such number, or nothing bounds what the picked adapter tells.
    """
    check_at_least(key, mean, 1)
    if mean > MOST_TRIALS / 2:
        raise ConfigError(key, mean, f"must be at most {MOST_TRIALS // 2}")
    if not plan.private:
        raise ConfigError(key, mean, "is for private trials: without noise nothing bounds what a picked adapter tells")
    picked, most = best_of_poisson(plan.whole, mean=mean, delta=plan.delta)
    if most is None:
        bound = "gives no bound for who sees the picked adapter alone: give a fixed number, or make a trial cheaper"
        raise ConfigError(key, mean, bound)
    return replace(price_of([plan] * most), mean=mean, epsilon_of_picked=picked)


def best_of_poisson(trial: DpEvent, *, mean: float, delta: float) -> tuple[float, int | None]:
    """Epsilon at `delta` of the best of a Poisson number of trials, and the number at which that is cut off.

    None in place of a number: no cut is rare enough, and nothing is bounded.
    """
    repeated = RepeatAndSelectDpEvent(trial, mean, math.inf)
    epsilon = float(accountant.composed_rdp(((repeated, 1),)).get_epsilon(delta / 2))
    rare = delta / 2 / (1 + math.exp(min(epsilon, 700.0))) - _ROUNDING
    if rare <= 0:
        return math.inf, None
    return epsilon, next(most for most in count(1) if special.pdtrc(most, mean) <= rare)


def draw_number(mean: float, *, most: int) -> int:
    """A Poisson number, cut off at `most`, from the operating system's randomness."""
    uniform = secrets.randbits(53) * 2.0**-53
    return next((number for number in range(most) if uniform < special.pdtr(number, mean)), most)


@spec
class Selection:
    """That a run was picked in a search, by what, and what the whole search may cost a site.

    Attributes:
        search: its name.
        judged_by: the validation score that picked, and `score` the run's own.
        trials: how many there were; None: the number was drawn, and stays with the lead.
        most_trials: that were paid for.
        mean_trials: see `SearchPrice`, as for the epsilons; None of these: nothing bounds it.
        charges: everything that all paid trials may do to a site's records.
    """

    search: str
    method: str
    judged_by: str
    score: float | None
    trials: int | None
    most_trials: int
    mean_trials: float | None
    delta: float
    epsilon: float | None
    epsilon_of_picked: float | None
    charges: tuple[Charge, ...]

    @classmethod
    def of(cls, price: SearchPrice, plans: Sequence[Plan], **told: Any) -> Selection:
        """The selection in a search of this price, whose paid trials have these plans."""
        picked = price.epsilon_of_picked
        return cls(
            **told,
            most_trials=price.trials,
            mean_trials=price.mean,
            delta=price.delta,
            epsilon=finite(price.epsilon),
            epsilon_of_picked=None if picked is None else finite(picked),
            charges=tuple(Charge(event=e, count=n) for e, n in events.counted([plan.whole for plan in plans])),
        )
