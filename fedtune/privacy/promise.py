"""A stronger promise than a run plans: the table `[promise]` of a site's policy, and the noise that keeps it.

The factor follows from the policy and from the plan that was proposed, so whoever knows it knows nothing of a record.
A ledger binds it when it accepts a run (`Run.noise_factor`).  From then on the site trains and is charged by
`Plan.stronger`: a step is DP-SGD with a noise multiplier of its own, which is never smaller than the plan's.  In a
secure sum the noise stays as it is, and the clip norm is shorter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from fedtune.privacy import accountant
from fedtune.privacy.distributed_noise import FINER
from fedtune.privacy.mechanism import MOST_NOISE_FACTOR
from fedtune.privacy.release import Reason
from fedtune.privacy.run_plan import Plan, scores_of
from fedtune.privacy.trust import Broken
from fedtune.spec import ConfigError, check_at_least, check_at_most, spec

NOISE_FACTOR = "noise_factor"  # of a ledger's entry of an accepted run, where it is not 1


@spec
class Promise:
    """The site's promise to its people where a run would promise less: it then trains with more noise.

    Attributes:
        noise_factor: the site's noise of training, in every run, over the noise that the run plans.
        epsilon_per_run: the most that a run's whole plan may cost here, by PLD.  A run that plans to cost more is not
            refused; the site adds as much more noise as it takes.  Infinite: each run costs what it plans.
    """

    noise_factor: float = 1.0
    epsilon_per_run: float = math.inf

    def __post_init__(self) -> None:
        check_at_least("noise_factor", self.noise_factor, 1)
        check_at_most("noise_factor", self.noise_factor, MOST_NOISE_FACTOR)
        if not self.epsilon_per_run > 0:
            raise ConfigError("epsilon_per_run", self.epsilon_per_run, "must be greater than 0")

    def factor_for(self, plan: Plan) -> float | None:
        """The least factor by which the site's noise keeps the promise; None: none does.

        One that keeps an epsilon is rounded up to four digits, and any of a secure sum to what `add_share` can round.
        None where a run adds no noise, and where released scores alone cost too much.
        """
        if self == Promise():
            return 1.0
        most, noise, digits = self.epsilon_per_run, plan.counted_noise, FINER if plan.shared else 1e4
        factor = math.ceil(self.noise_factor * FINER) / FINER if plan.shared else self.noise_factor
        if not plan.private or not plan.bears(factor):
            return None
        if math.isinf(most) or _plan_epsilon_above(plan.stronger(factor), most) is None:
            return factor
        # Of the same shape: what is needed does not depend on the noise that was planned.
        needed = _noise_within(plan.with_noise(1.0), most)
        if needed is None:
            return None
        factor = max(factor, math.ceil(needed / noise * digits) / digits)
        while plan.bears(factor) and plan.stronger(factor).counted_noise < needed:
            factor = round(factor * digits + 1) / digits
        return factor if factor <= MOST_NOISE_FACTOR and plan.bears(factor) else None

    def broken_by(
        self, plan: Plan, times: float | None, *, cap: float | None, alone: float | None, least_norm: float
    ) -> Iterator[Broken]:
        """The dearest rules; only for a plan within all other limits, whose epsilon can be computed in bounded time.

        `times` is by how much the site multiplies the noise of an accepted run, None of a new one; `cap` that on a run,
        `alone` that on one where only the site's own share of the noise hides it, and `least_norm` its least clip norm.
        """
        promised, noise = self.factor_for(plan), plan.noise_multiplier
        if promised is None or (times or promised) < promised:
            least = f"noise of at least {promised * noise:g}" if promised else "no such plan"
            yield Reason.PROMISE, f"noise of {(times or 1) * noise:g}", least
            return
        own, of_share = plan.stronger(times or promised), Reason.MAX_EPSILON_IF_ALL_COLLUDE
        if own.max_grad_norm < least_norm:
            yield Reason.MIN_GRAD_NORM, f"{own.max_grad_norm:g}, by its promise", f"at least {least_norm:g}"
        shared = [(of_share, own.by_own_noise_alone, alone)] if own.shared else []
        for reason, counted, most in ((Reason.MAX_EPSILON_PER_RUN, own, cap), *shared):
            if most is not None and (epsilon := _plan_epsilon_above(counted, most)) is not None:
                yield reason, f"{epsilon:.4g}", f"at most {most:g}"


def factor_in(accepted: Mapping[str, Any]) -> float:
    """The factor that a ledger's entry of an accepted run binds; raises ValueError where it is none."""
    factor = accepted.get(NOISE_FACTOR, 1.0)
    if NOISE_FACTOR in accepted and not (type(factor) is float and 1 < factor <= MOST_NOISE_FACTOR):
        raise ValueError("its noise is no multiple of the plan's")
    return float(factor)


@lru_cache(maxsize=256)
def _plan_epsilon_above(plan: Plan, limit: float) -> float | None:
    """Epsilon of a whole plan by PLD, which is a proof since a plan is fixed before anything is seen; None: within."""
    return accountant.epsilon_above([plan.whole], plan.delta, limit=limit)


@lru_cache(maxsize=256)
def _noise_within(plan: Plan, epsilon: float) -> float | None:
    """The least noise multiplier at which the whole plan costs at most `epsilon`; None: there is none."""
    steps, also = plan.local_steps * plan.most_rounds, scores_of(plan.metrics_noise_multiplier, plan.most_rounds)
    rate, delta = plan.sampling_rate, plan.delta
    try:
        return accountant.calibrate_noise(epsilon=epsilon, delta=delta, sampling_rate=rate, steps=steps, also=also)
    except ConfigError:
        return None
