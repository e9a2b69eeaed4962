"""A stronger promise than a run plans: the table `[promise]` of a site's policy, and the noise that keeps it.

The factor follows from the policy and from the plan that was proposed, so whoever knows it knows nothing of a record.
A ledger binds it when it accepts a run (`Run.noise_factor`).  From then on the site trains and is charged by
`Plan.stronger`: a step is DP-SGD with a noise multiplier of its own, which is never smaller than the plan's.
"""

from __future__ import annotations

import math
from functools import lru_cache

from fedtune.privacy import accountant
from fedtune.privacy.mechanism import MOST_NOISE_FACTOR
from fedtune.privacy.run_plan import Plan, scores_of
from fedtune.spec import ConfigError, check_at_least, check_at_most, spec


@spec
class Promise:
    """What the site promises its people where a run would promise less: it then trains with more noise.

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
        """The least factor, rounded up to four digits, by which the site's noise keeps the promise; None: none does.

        None where a run adds no noise, where released scores alone cost too much, and where the noise of a sum is
        several sites': more of one site's share hides little.
        """
        if self == Promise():
            return 1.0
        if not plan.private or plan.shared is not None:
            return None
        factor, most, noise = self.noise_factor, self.epsilon_per_run, plan.noise_multiplier
        if not plan.bears(factor):
            return None
        if math.isinf(most) or accountant.epsilon_above([plan.stronger(factor).whole], plan.delta, limit=most) is None:
            return factor
        # Of the same shape: what is needed does not depend on the noise that was planned.
        needed = _noise_within(plan.with_noise(1.0), most)
        if needed is None:
            return None
        factor = max(factor, math.ceil(needed / noise * 1e4) / 1e4)
        while factor * noise < needed:
            factor = round(factor + 1e-4, 4)
        return factor if factor <= MOST_NOISE_FACTOR and plan.bears(factor) else None


@lru_cache(maxsize=256)
def _noise_within(plan: Plan, epsilon: float) -> float | None:
    """The least noise multiplier at which the whole plan costs at most `epsilon`; None: there is none."""
    steps, also = plan.local_steps * plan.most_rounds, scores_of(plan.metrics_noise_multiplier, plan.most_rounds)
    rate, delta = plan.sampling_rate, plan.delta
    try:
        return accountant.calibrate_noise(epsilon=epsilon, delta=delta, sampling_rate=rate, steps=steps, also=also)
    except ConfigError:
        return None
