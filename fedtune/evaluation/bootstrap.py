"""How sure a comparison of two models is: percentile bootstrap intervals of scores and of their paired differences.

Efron 1979; Efron and Tibshirani 1993, chapter 13.  The units (records, or users with all their records) are drawn with
replacement, the same ones for both models, and each time the scores are computed anew: so a score need not be a mean.
An interval says how far another sample of such units may move the score.  It says nothing about another training run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.spec import DataError

Figures: TypeAlias = Mapping[str, npt.NDArray[np.float64]]
"""What scores are computed from, by name: the first axis is the record."""
Scores: TypeAlias = Callable[[Figures], Mapping[str, float]]
Verdict: TypeAlias = Literal["better", "worse", "cannot be told apart"]

RESAMPLES = 1000
LEVEL = 0.95
FEWEST_UNITS = 10
"""With fewer, an interval is far too narrow (of one unit it has no width), and nothing is called better or worse."""
_LOWER_IS_BETTER = frozenset({"loss", "perplexity", "ece", "mae", "rmse"})


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score and its interval at `LEVEL`; the ends are NaN where the score cannot be computed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One score of two models on the same units.

    Attributes:
        base: of the model before.
        tuned: of the model after.
        difference: tuned less base, from the same draws of units.
        verdict: what the difference's interval says of the tuned one.
    """

    base: Estimate
    tuned: Estimate
    difference: Estimate
    verdict: Verdict


def compared(
    base: Figures,
    tuned: Figures,
    *,
    scores: Scores,
    units: Sequence[npt.NDArray[np.int64]] | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Comparison]:
    """Compare two models by each of their scores.

    The draws are the same whenever the number of units is: the same files give the same intervals.

    Args:
        base: figures of the n records under the one model.
        tuned: figures of the same records, in the same order, under the other.
        scores: from figures to scores by name; what it raises as DataError leaves a draw out.
        units: for each unit the places of its records, at least one; None: each record is one.
        resamples: how often the units are drawn.
    """
    observed = scores(base), scores(tuned)
    num_records = len(next(iter(base.values())))
    num_units = num_records if units is None else len(units)
    drawn: dict[str, list[tuple[float, float]]] = {name: [] for name in observed[0]}
    for places in _draws(num_units, units, resamples):
        # A draw may hold no record that can be scored, such as one with a token to predict.
        with suppress(DataError):
            found = [scores({name: values[places] for name, values in figures.items()}) for figures in (base, tuned)]
            for name, pairs in drawn.items():
                pairs.append((found[0][name], found[1][name]))
    return {
        name: _comparison(
            name,
            (observed[0][name], observed[1][name]),
            np.array(pairs, dtype=np.float64).reshape(-1, 2),
            enough=num_units >= FEWEST_UNITS,
        )
        for name, pairs in drawn.items()
    }


def _draws(
    num_units: int, units: Sequence[npt.NDArray[np.int64]] | None, resamples: int
) -> Iterator[npt.NDArray[np.int64]]:
    """The places of the records of each draw of units."""
    generator = np.random.default_rng(0)
    for _ in range(resamples):
        chosen = generator.integers(0, num_units, size=num_units)
        yield chosen if units is None else np.concatenate([units[unit] for unit in chosen])


def _comparison(
    name: str, observed: tuple[float, float], drawn: npt.NDArray[np.float64], *, enough: bool
) -> Comparison:
    """Of (base, tuned) as they are, and (draws, 2) as they were drawn."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        base, tuned = (_estimate(value, drawn[:, place]) for place, value in enumerate(observed))
        difference = _estimate(float(np.subtract(observed[1], observed[0])), drawn[:, 1] - drawn[:, 0])
    return Comparison(base, tuned, difference, _verdict(name, base, tuned, difference) if enough else _UNKNOWN)


_UNKNOWN: Verdict = "cannot be told apart"


def _estimate(value: float, drawn: npt.NDArray[np.float64]) -> Estimate:
    if not np.isfinite(drawn).all() or not len(drawn):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def _verdict(name: str, base: Estimate, tuned: Estimate, difference: Estimate) -> Verdict:
    if math.isfinite(base.value) != math.isfinite(tuned.value):
        return "better" if math.isfinite(tuned.value) else "worse"
    sign = -1 if name in _LOWER_IS_BETTER else 1
    ends = sorted((sign * difference.low, sign * difference.high))
    if math.isnan(ends[0]) or ends[0] <= 0 <= ends[1]:
        return _UNKNOWN
    return "better" if ends[0] > 0 else "worse"
