"""How well scores tell records that were trained on from others, with confidence intervals.  Pure numpy.

These lie here and not in `fedtune.evaluation`, since nothing but an audit may look at exact scores of private records.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from fedtune.evaluation.one_run import binomial

Scores = npt.NDArray[np.float64]


def auroc(members: Scores, others: Scores, *, confidence: float) -> tuple[float, float, float]:
    """The chance that a member scores above another record, ties counted half; with its interval.

    The interval is DeLong's (DeLong, DeLong and Clarke-Pearson 1988): normal, with the variance of the placements.

    Returns:
        (estimate, low, high).
    """
    both = np.sort(others), np.sort(members)
    of_members = (np.searchsorted(both[0], members, "left") + np.searchsorted(both[0], members, "right")) / 2
    of_others = (np.searchsorted(both[1], others, "left") + np.searchsorted(both[1], others, "right")) / 2
    area = float(of_members.mean() / len(others))
    variance = _variance(of_members / len(others)) + _variance(of_others / len(members))
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return area, max(0.0, area - reach), min(1.0, area + reach)


def hit_rate(
    members: Scores, others: Scores, *, false_alarms: float, confidence: float
) -> tuple[float, float, float] | None:
    """Share of members above the lowest threshold that at most a share `false_alarms` of the others exceeds.

    The interval is Clopper and Pearson's for the members; the threshold is taken as it is, since the others that
    it was measured on are those that are compared with.

    Returns:
        (estimate, low, high); None with fewer others than 1 / false_alarms, of whom not one may be above.
    """
    allowed = math.floor(false_alarms * len(others) + 1e-9)
    if allowed < 1:
        return None
    threshold = np.sort(others)[-allowed - 1] if allowed < len(others) else -np.inf
    found = int((members > threshold).sum())
    low, high = clopper_pearson(found, len(members), confidence=confidence)
    return found / len(members), low, high


def clopper_pearson(hits: int, trials: int, *, confidence: float) -> tuple[float, float]:
    """The interval that holds the chance of a hit with at least `confidence`."""
    error = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _chance(hits, trials, tail=error)
    high = 1.0 if hits == trials else _chance(hits + 1, trials, tail=1 - error)
    return low, high


def _chance(hits: int, trials: int, *, tail: float) -> float:
    """The chance of a hit with which so many hits or more are had with the chance `tail`."""
    low, high = -40.0, 40.0  # log odds
    while high - low > 1e-9:
        middle = (low + high) / 2
        reached = float(binomial(trials, log_odds=middle)[hits:].sum()) >= tail
        low, high = (low, middle) if reached else (middle, high)
    return 1 / (1 + math.exp(-low))


def _variance(placements: Scores) -> float:
    return float(placements.var(ddof=1) / len(placements)) if len(placements) > 1 else 0.25
