"""Drift detection on recent records, by a z-test on the noised held-out scores of a series of renewals.

Guarantee: post-processing of noised releases that the runs have already paid for, so the test has no further privacy
cost.
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
    """Mean held-out score of one run over all sites, estimated from noised sums, with its standard deviation."""

    run: str
    date: str
    mean: float
    deviation: float

    def __post_init__(self) -> None:
        for name, least in (("deviation", 1e-50), ("mean", -1e50)):  # untrusted run folders; both values are squared
            check_at_least(name, getattr(self, name), least)
            check_at_most(name, getattr(self, name), 1e50)


@spec
class ScoreDrop:
    """Result of the drift test: the change from the mean score of all earlier runs to that of the newest two.

    `significant` is True if the drop is significant, and `min_detectable` is the smallest drop that the test detects
    with 80 % power.
    """

    change: float
    significant: bool
    min_detectable: float


def pool_held_out_scores(
    rounds: Sequence[RoundResult], sizes: Mapping[str, float], *, noise: float, run: str
) -> HeldOut | None:
    """Pool the noised held-out scores of all rounds and sites of a run into one mean score.

    A site's noised score and count are shares of its size in `sizes`; `noise` is the noise multiplier of each release.
    Returns None if there are no scores, or too few records for this noise.
    """
    parts = [(sizes[site], *shares) for result in rounds for site, shares in result.site_scores.items()]
    scores, units = sum(size * score for size, score, _ in parts), sum(size * count for size, _, count in parts)
    deviation = noise * math.sqrt(2 * len(parts))
    if units <= 5 * deviation:  # noise would dominate the mean
        return None
    mean, each_round = scores / units, units / sum(bool(result.site_scores) for result in rounds)
    # Variance of the noise in both sums, plus sampling variance of the held-out units: at most p (1 - p) per score.
    variance = (1 + mean**2) * (deviation / units) ** 2 + max(0.0, mean * (1 - mean)) / each_round
    return HeldOut(run=run, date=max(result.ended for result in rounds), mean=mean, deviation=math.sqrt(variance))


def detect_score_drop(line: Sequence[HeldOut]) -> ScoreDrop | None:
    """Test whether the newest two runs score lower than all earlier runs (with only two runs, compare these two).

    A one-sided z-test on means, at a false alarm rate of 5 %, or less if runs share held-out records.  `line` is
    ordered from the oldest run to the newest.  Returns None for fewer than two runs.
    """
    if len(line) < 2:
        return None
    cut = max(1, len(line) - 2)
    (before, old), (now, new) = _compute_weighted_mean(line[:cut]), _compute_weighted_mean(line[cut:])
    deviation, limit = math.hypot(old, new), NormalDist().inv_cdf(0.95)
    change, smallest = now - before, deviation * (limit + NormalDist().inv_cdf(0.8))
    return ScoreDrop(change=change, significant=-change > limit * deviation, min_detectable=smallest)


def _compute_weighted_mean(line: Sequence[HeldOut]) -> tuple[float, float]:
    weights = [score.deviation**-2 for score in line]  # inverse-variance weighting
    return fmean([score.mean for score in line], weights), sum(weights) ** -0.5
