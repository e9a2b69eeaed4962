"""Drift detection: whether the model does worse on recent records, from the sites' noised held-out scores over a series
of renewals.

Guarantee: post-processing of noised releases that the runs have already paid for, so it has no further privacy cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean

from fedtune.federation.lead import RoundResult
from fedtune.spec import check_at_least, check_at_most, spec

FELL = "held_out_fell"  # a finding's code


@spec
class HeldOut:
    """The mean score of the sites' held-out records in one run, computed from noised sums, and its standard
    deviation.
    """

    run: str
    date: str
    mean: float
    deviation: float

    def __post_init__(self) -> None:
        for name, least in (("deviation", 1e-50), ("mean", -1e50)):  # it may be from another's folder, and is squared
            check_at_least(name, getattr(self, name), least)
            check_at_most(name, getattr(self, name), 1e50)


@spec
class Fall:
    """The change from the mean score of all earlier runs to the mean of the newest two.

    `smallest` is the drop that the test detects with 80 % power.
    """

    change: float
    found: bool
    smallest: float


def pool_held_out_scores(
    rounds: Sequence[RoundResult], sizes: Mapping[str, float], *, noise: float, run: str
) -> HeldOut | None:
    """Pool the noised held-out scores of all rounds and sites of a run into one mean.

    The noised figures of a site are shares of the held-out size that it declares; `noise` is the noise multiplier of
    each release.  Returns None if there are no scores, or too few records for the amount of noise.
    """
    parts = [(sizes[site], *shares) for one in rounds for site, shares in one.site_scores.items()]
    scores, units = sum(size * score for size, score, _ in parts), sum(size * count for size, _, count in parts)
    deviation = noise * math.sqrt(2 * len(parts))
    if units <= 5 * deviation:  # the mean would be anybody's guess
        return None
    mean, each_round = scores / units, units / sum(bool(one.site_scores) for one in rounds)
    # Of the noise in both sums; and of which units are held out, for all rounds: one score varies most as 0 or 1.
    variance = (1 + mean**2) * (deviation / units) ** 2 + max(0.0, mean * (1 - mean)) / each_round
    return HeldOut(run=run, date=max(one.ended for one in rounds), mean=mean, deviation=math.sqrt(variance))


def detect_score_drop(line: Sequence[HeldOut]) -> Fall | None:
    """Test whether the score dropped in the newest two runs, compared with all runs before (with two runs: the newest).

    A one-sided z-test on means, at a false alarm rate of 5 %, or less if runs share held-out records.  `line` is
    ordered from the oldest run to the newest.  Returns None for fewer than two runs.
    """
    if len(line) < 2:
        return None
    cut = max(1, len(line) - 2)
    (before, old), (now, new) = _compute_weighted_mean(line[:cut]), _compute_weighted_mean(line[cut:])
    deviation, limit = math.hypot(old, new), NormalDist().inv_cdf(0.95)
    change, smallest = now - before, deviation * (limit + NormalDist().inv_cdf(0.8))
    return Fall(change=change, found=-change > limit * deviation, smallest=smallest)


def _compute_weighted_mean(line: Sequence[HeldOut]) -> tuple[float, float]:
    weights = [one.deviation**-2 for one in line]  # which make the mean's own deviation least
    return fmean([one.mean for one in line], weights), sum(weights) ** -0.5
