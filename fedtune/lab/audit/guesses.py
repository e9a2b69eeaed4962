"""From canaries' scores to guesses: which were in, and how sure that is.  Reads scores and public numbers, no coins."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

Values = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]
Count = tuple[int, int, int]  # canaries, guesses about them, and how many of these were right
Place = str | None  # a site; None: the aggregated model, which the server and every other site see

_LEAST_SPREAD = 1e-4  # in shares of what one draw of a canary adds: rounding, where nothing else moves a score


def counted(evidence: Values, inserted: Coins, *, guesses: int) -> Count:
    """Guess the `guesses` canaries with the strongest evidence, each as in where its evidence is above zero.

    Args:
        evidence: (canaries,) above zero for "in", the further from it the surer.
        inserted: (canaries,) the coins.
        guesses: fixed before the scores were seen.
    """
    surest = np.argsort(-np.abs(evidence), kind="stable")[:guesses]
    right = (evidence[surest] > 0) == inserted[surest]
    return len(evidence), len(surest), int(right.sum())


def by_likelihood(scores: Values, controls: Values, *, steps: int, sampling_rate: float, least: float = 0.0) -> Values:
    """(canaries,) log likelihood ratios of "in" against "out", for scores to which each draw of a canary adds alike.

    A canary that was left out scores as a direction in which there is none; one that was in scores that much more for
    each step that drew it, and the number of those steps is Binomial(steps, sampling_rate).  How much a draw adds is
    measured, not taken from the plan, so that a canary that was not clipped is seen for what it is.

    Args:
        scores: (canaries,) along the canaries' directions.
        controls: along other directions.
        steps: in each of which a canary is drawn with `sampling_rate`.
        sampling_rate: above 0.
        least: a draw is known to add at least so much.
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


def by_rank(scores: Values) -> Values:
    """(canaries,) places around the median: the upper half is taken for in, the ends with most confidence."""
    places: Values = np.argsort(np.argsort(scores, kind="stable")).astype(np.float64) - (len(scores) - 1) / 2
    return places
