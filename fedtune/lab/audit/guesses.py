"""Membership guesses for canaries, from their scores and public parameters only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

Values = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]
Count = tuple[int, int, int]  # (canaries, guesses, correct guesses)
Place = str | None  # a site; None: the aggregated model, which the server and every other site see

_MIN_SPREAD = 1e-4  # relative to a canary's shift per step; rounding noise if the scores have no other noise


def count_right_guesses(evidence: Values, inserted: Coins, *, guesses: int) -> Count:
    """Count the correct guesses about the canaries with the strongest evidence.

    Args:
        evidence: (canaries,) evidence; the guess is "inserted" if positive, and more certain for larger magnitudes.
        inserted: (canaries,) whether the canary was inserted.
        guesses: number of guesses, fixed in advance.

    Returns:
        (number of canaries, number of guesses, number of correct guesses).
    """
    surest = np.argsort(-np.abs(evidence), kind="stable")[:guesses]
    right = (evidence[surest] > 0) == inserted[surest]
    return len(evidence), len(surest), int(right.sum())


def compute_likelihood_ratios(
    scores: Values, controls: Values, *, steps: int, sampling_rate: float, least: float = 0.0
) -> Values:
    """Compute log-likelihood ratios (canaries,) of "inserted" against "not inserted".

    Assumes that every participation in a step shifts a canary's score by the same amount.  Scores of canaries that
    were not inserted are distributed like the control scores; scores of inserted canaries are shifted Binomial(steps,
    sampling_rate) times.  The shift is estimated from the scores instead of the plan, so that missing clipping is
    detected.

    Args:
        scores: (canaries,) scores along the canaries' coordinates.
        controls: scores along coordinates without a canary.
        steps: number of steps.
        sampling_rate: probability above 0 of a canary to be in a step.
        least: known minimum of the shift.
    """
    above = scores - np.median(controls)
    # On average, half of the canaries are inserted.
    draw = max(least, 2 * float(above.mean()) / (steps * sampling_rate), np.finfo(np.float64).tiny)
    spread = max(float(controls.std()), _MIN_SPREAD * draw)
    inside = np.full_like(above, -np.inf)
    for drawn in range(steps + 1):
        chance = binom.logpmf(drawn, steps, sampling_rate)
        inside = np.logaddexp(inside, chance - (above - drawn * draw) ** 2 / (2 * spread**2))
    return inside + above**2 / (2 * spread**2)


def compute_centered_ranks(scores: Values) -> Values:
    """Compute ranks (canaries,) centered on the median, as evidence: positive in the upper half of the scores."""
    places: Values = np.argsort(np.argsort(scores, kind="stable")).astype(np.float64) - (len(scores) - 1) / 2
    return places
