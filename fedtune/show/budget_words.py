"""Amounts of a privacy budget in words: noise, epsilon, caps, what they rely on and what they mean for a run."""

from __future__ import annotations

import math

from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent

from fedtune.federation.planner import LEAST_SIGNAL
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.distributed_noise import Epsilons
from fedtune.privacy.run_plan import Plan
from fedtune.words import counted

SEEDED = (
    "NO GUARANTEE: the noise would come from the configured seed, and anybody who knows the seed "
    "can subtract the noise."
)


def rounded_down(epsilon: float) -> str:
    """An epsilon that is left, in three decimals."""
    return "unbounded" if math.isinf(epsilon) else f"{math.floor(epsilon * 1000) / 1000:.3f}"


def cap_text(cap: float | None) -> str:
    """A cap as the policy has it."""
    return "no cap" if cap is None or math.isinf(cap) else f"at most {cap:g}"


def noise_words(plan: Plan) -> str:
    """The plan's noise; of secure sums each site's share, and with how many of them a step counts."""
    if (shared := plan.shared) is None:
        return f"multiplier {plan.noise_multiplier:g}"
    less = f", less {shared.colluders} that may collude" if shared.colluders else ""
    return (
        f"multiplier {plan.noise_multiplier:g} at each site, {plan.counted_noise:.4g} in a secure sum of at least "
        f"{shared.threshold} of {counted(shared.num_sites, 'site')}{less}"
    )


def trust_words(by_trust: Epsilons) -> str:
    """Whom an epsilon relies on, where several sites make the noise together."""
    return (
        f"epsilon {epsilon_text(by_trust.server_alone)} against the server alone, "
        f"{epsilon_text(by_trust.with_colluders)} with as many colluding sites as planned for, "
        f"{epsilon_text(by_trust.with_all_others)} if all other sites collude"
    )


ABOUT_RDP = (
    "Epsilon by RDP bounds the same loss by an older method. That method is less exact, so its figure is larger as a "
    "rule. It is a check: the figure that counts is {counts}, and nothing is spent in addition."
)
"""What stands beside an epsilon by RDP; `counts` names the other figure."""
WEAK_SIGNAL = 1.0
"""Below it, noise moves the adapter further than all records together can; docs/planning.md has the runs behind it."""


def signal_words(ratio: float) -> str:
    """What a run's signal-to-noise ratio, `planner.signal_to_noise`, means for it."""
    times = f"noise moves the adapter {1 / max(ratio, 1e-99):.3g} times as far as all records together can"
    if ratio < LEAST_SIGNAL:
        return f"{times}: nothing is likely to be learnt; a run wants training.go_on_without_signal=true"
    if ratio < WEAK_SIGNAL:
        return f"{times}: this run is likely to learn little, and costs its epsilon all the same"
    return f"records can move the adapter at most {ratio:.2g} times as far as noise does"


def contribution(plan: Plan) -> str:
    """What one user adds to a step of a plan whose unit is that."""
    most = counted(plan.records_per_user, "record")
    return f"of each user at most {most} in a step, their mean gradient clipped once; sizes count users"


def mechanism_text(event: DpEvent, count: int) -> str:
    """`count` equal mechanisms, such as the noisy steps of a round."""
    match event:
        case PoissonSampledDpEvent():
            rate, noise = event.sampling_probability, event.event.noise_multiplier
            return f"{counted(count, 'noisy step')} (rate {rate:g}, noise {noise:g})"
        case GaussianDpEvent():
            return f"{counted(count, 'noised score')} (noise {event.noise_multiplier:g})"
        case _:
            return f"{counted(count, 'round')} WITHOUT NOISE"
