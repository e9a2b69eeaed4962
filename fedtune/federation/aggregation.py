"""How a round's updates become the next adapter: the interface of plain averages and of secure sums."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedtune.federation.lead import Arrays, LeadState
from fedtune.federation.replies import RoundReplies
from fedtune.model.adapter import Adapter
from fedtune.privacy.run_plan import Plan


@dataclass(frozen=True, slots=True)
class Made:
    """The result of one round.

    Attributes:
        sites: the sites whose updates it combines.
        failures: site -> why its update was left out.
        strategy: the server optimizer's state, for a checkpoint.
    """

    adapter: Adapter
    sites: tuple[str, ...]
    failures: Mapping[str, str]
    strategy: Arrays


MOST_SHARE = 4.0
"""A site's largest weight where others make more noise than the plan's, over its weight by declared size alone."""


def weights_of(
    sizes: Mapping[str, int], plan: Plan, *, factors: Mapping[str, float], values: int
) -> Mapping[str, float]:
    """Site -> its weight in an average: its declared size where every site makes the plan's noise.

    In a secure sum a site with f times the noise has clipped to a norm f times shorter, and has its size over f.  In
    plain averages a site with f times that noise has its size times v(1) / v(f), where v(f) is the variance of a value
    of its mean gradient, in squared clip norms.  With B = q n expected units in a step: f^2 z^2 / B^2 is of noise, and
    of sampling at most 1 / (B d), since B clipped gradients share d values.  Inverse variances alone would weigh equal
    noise by n^2 instead of n as soon as one site made a little more of it.  No weight is above `MOST_SHARE` times a
    size's own share: what that takes from a site goes to the others.

    Args:
        sizes: site -> declared size.
        plan: the run's.
        factors: site -> its noise over the plan's, by its signed receipt.
        values: of an adapter.
    """
    if all(factors[site] == 1 for site in sizes):
        return sizes
    if plan.shared is not None:
        total = sum(size / factors[site] for site, size in sizes.items())
        return {site: size / factors[site] / total for site, size in sizes.items()}
    noise, declared = values * plan.noise_multiplier**2, sum(sizes.values())
    weights, capped = dict[str, float](), dict[str, float]()
    for site, size in sizes.items():
        batch = plan.sampling_rate * size
        weights[site] = size * (noise + batch) / (factors[site] ** 2 * noise + batch)
    while True:
        free = {site: weight for site, weight in weights.items() if site not in capped}
        # Of shares, which add up to 1; the caps add up to more, so that some site is always free.
        scale = (1 - sum(capped.values())) / sum(free.values())
        above = {site: MOST_SHARE * sizes[site] / declared for site in free}
        above = {site: most for site, most in above.items() if free[site] * scale > most}
        if not above:
            return {site: capped.get(site, weight * scale) for site, weight in weights.items()}
        capped |= above


class Aggregation(Protocol):
    """The lead's half, for one run; the site's half is `_protect` in `site_round.py`.

    Attributes:
        session: name of the secure-sum session that the next round belongs to; empty for plain averages.
        left_out: sites that are not asked any more.
    """

    @property
    def session(self) -> str: ...

    @property
    def left_out(self) -> Collection[str]: ...

    def resume(self, state: LeadState) -> LeadState:
        """Start, or resume after an interruption, at `state`; returns the state to continue from."""

    def prepare(self) -> Sequence[str]:
        """Choose the sites of the next round, before any is charged; raises RunError if they are too few."""

    def combine(self, state: LeadState, replies: RoundReplies) -> Made:
        """Combine a round's valid updates into the next adapter; raises RunError if rounds cannot go on."""

    def restore(self, strategy: Arrays) -> None:
        """Restore an earlier state of the server optimizer."""
