"""Guesses from canary scores: which canaries were inserted, and with what confidence.

Uses scores and public numbers only, never the coin tosses.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

Values = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]
Count = tuple[int, int, int]  # canaries, guesses about them, and how many of these were right
Place = str | None  # a site; None: the aggregated model, which the server and every other site see

_LEAST_SPREAD = 1e-4  # in shares of what one draw of a canary adds: rounding, where nothing else moves a score


def count_right_guesses(evidence: Values, inserted: Coins, *, guesses: int) -> Count:
    """Guess the `guesses` canaries with the strongest evidence: inserted if the evidence is positive.

    Args:
        evidence: (canaries,) positive for "inserted"; a larger magnitude is more certain.
        inserted: (canaries,) the coin tosses.
        guesses: the number of guesses, fixed before the scores were seen.

    Returns:
        (number of canaries, number of guesses, number of correct guesses).
    """
    surest = np.argsort(-np.abs(evidence), kind="stable")[:guesses]
    right = (evidence[surest] > 0) == inserted[surest]
    return len(evidence), len(surest), int(right.sum())


def compute_likelihood_ratios(
    scores: Values, controls: Values, *, steps: int, sampling_rate: float, least: float = 0.0
) -> Values:
    """Return (canaries,) log likelihood ratios of "inserted" against "left out".

    Assumes that each draw of a canary adds the same amount to its score.  The score of a canary that was left out is
    distributed like the control scores; an inserted canary's score is shifted by that amount for each step that drew
    it, Binomial(steps, sampling_rate) times.  The amount is estimated from the scores and not taken from the plan, so
    that an unclipped canary is recognized.

    Args:
        scores: (canaries,) along the canaries' directions.
        controls: scores along directions without a canary.
        steps: the number of steps, each of which draws a canary with probability `sampling_rate`.
        sampling_rate: above 0.
        least: the known minimum that one draw adds.
    """
    above = scores - np.median(controls)
    # Half of the canaries are in, on average.
    draw = max(least, 2 * float(above.mean()) / (steps * sampling_rate), np.finfo(np.float64).tiny)
    spread = max(float(controls.std()), _LEAST_SPREAD * draw)
    inside = np.full_like(above, -np.inf)
    for drawn in range(steps + 1):
        chance = binom.logpmf(drawn, steps, sampling_rate)
        inside = np.logaddexp(inside, chance - (above - drawn * draw) ** 2 / (2 * spread**2))
    return inside + above**2 / (2 * spread**2)


def compute_centered_ranks(scores: Values) -> Values:
    """Return (canaries,) ranks centered on the median: the upper half is guessed as inserted, the extremes first."""
    places: Values = np.argsort(np.argsort(scores, kind="stable")).astype(np.float64) - (len(scores) - 1) / 2
    return places
