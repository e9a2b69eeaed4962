"""Percentile bootstrap confidence intervals for scores and for paired differences between models.

Efron 1979; Efron and Tibshirani 1993, chapter 13.  The units (records, or users with all their records) are resampled
with replacement, with the same draws for all models, and the scores are recomputed for each draw, so a score need not
be a mean.  An interval shows the variation of a score between samples of units.  It does not cover the variation
between training runs.

Macro F1 is biased downwards on a sample with few records of a class.  The bootstrap draws are below the sample's score
by about as much as the sample's score is below the true score, so the interval is shifted up by twice that bias
(chapter 10).  The bias cancels in the difference of two models.  Other scores are not corrected: for ECE, which is
biased as well, the correction led to wrong verdicts. simulations/intervals measures the coverage of the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.formatting import format_score_name
from fedtune.spec import DataError

Figures: TypeAlias = Mapping[str, npt.NDArray[np.float64]]  # inputs of scores, by name: the first axis is the record
Scores: TypeAlias = Callable[[Figures], Mapping[str, float]]
Verdict: TypeAlias = Literal["better", "worse", "cannot be told apart"]
NO_DIFFERENCE: Verdict = "cannot be told apart"

RESAMPLES = 1000
LEVEL = 0.95
MIN_UNITS = 10
"""Minimum number of units for a verdict.  With fewer units an interval is far too narrow; with one unit it has no
width.
"""
_TOO_LOW = frozenset({"macro_f1"})
"""Scores with a downward bias on samples that equals the bias of bootstrap draws."""
_LOWER_IS_BETTER = frozenset({"loss", "perplexity", "ece", "mae", "rmse", "integrated_brier"})


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score with its confidence interval at `LEVEL`; the ends are NaN if the interval cannot be computed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired comparison of two models by one score, on the same units."""

    base: Estimate  # the model before training
    tuned: Estimate  # the model after training
    difference: Estimate  # tuned minus base, from the same draws of units
    verdict: Verdict  # whether the tuned model is better, by the interval of the difference


@dataclass(frozen=True, slots=True)
class Drawn:
    """The scores of several models on the same bootstrap draws of units."""

    values: Mapping[str, Mapping[str, float]]  # by model and score, on the original records
    draws: Mapping[str, Mapping[str, npt.NDArray[np.float64]]]  # by model and score, (draws,) each
    num_units: int  # number of units in the data set

    def estimate(self, model: str, score: str, *, judged: str | None = None) -> Estimate:
        """Return a model's score with its confidence interval; `judged` as in `compare_scores`."""
        value, draws = self.values[model][score], self.draws[model][score]
        interval = _estimate(value, draws)
        if (judged or score) not in _TOO_LOW or not math.isfinite(interval.low):
            return interval
        # The draws are biased: shift the interval back, limit it to 1, and keep the score inside.
        bias = float(draws.mean()) - value
        low, high = interval.low - 2 * bias, min(1.0, interval.high - 2 * bias)
        return Estimate(value, min(low, value), max(high, value))

    def compare_scores(self, base: str, tuned: str, score: str, *, judged: str | None = None) -> Comparison:
        """Compare two models by one score.

        Args:
            base: name of the model before training.
            tuned: name of the model after training.
            score: name of the score.
            judged: name of the score that decides whether higher or lower is better, and whether the score is biased;
                None uses `score`.
        """
        values = [self.values[model][score] for model in (base, tuned)]
        draws = [self.draws[model][score] for model in (base, tuned)]
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            difference = _estimate(float(np.subtract(values[1], values[0])), draws[1] - draws[0])
        base_score, tuned_score = (self.estimate(model, score, judged=judged) for model in (base, tuned))
        sign, verdict = get_score_direction(judged or score), NO_DIFFERENCE
        ends = sorted((sign * difference.low, sign * difference.high))
        if self.num_units >= MIN_UNITS and math.isfinite(base_score.value) != math.isfinite(tuned_score.value):
            verdict = "better" if math.isfinite(tuned_score.value) else "worse"
        elif self.num_units >= MIN_UNITS and (ends[0] > 0 or ends[1] < 0):
            verdict = "better" if ends[0] > 0 else "worse"
        return Comparison(base_score, tuned_score, difference, verdict)

    def with_mean(self, name: str, models: Sequence[str]) -> Drawn:
        """Return a copy with one more model, `name`, whose scores are the means over `models`."""
        scores = self.values[models[0]]
        values = {score: float(np.mean([self.values[model][score] for model in models])) for score in scores}
        draws = {score: np.mean([self.draws[model][score] for model in models], axis=0) for score in scores}
        return Drawn({**self.values, name: values}, {**self.draws, name: draws}, self.num_units)


def score_draws(
    models: Mapping[str, Figures],
    *,
    scores: Scores,
    units: Sequence[npt.NDArray[np.int64]] | None = None,
    resamples: int = RESAMPLES,
) -> Drawn:
    """Score models on the same bootstrap draws of units.

    The draws depend only on the number of units, so the same files give the same intervals.

    Args:
        models: per-record inputs of the scores, by model: the same n records in the same order.
        scores: computes scores by name from these inputs; a draw for which it raises DataError is skipped.
        units: the indices of each unit's records, at least one per unit; None: each record is a unit.
        resamples: the number of draws.
    """
    observed = {model: scores(figures) for model, figures in models.items()}
    num_records = len(next(iter(next(iter(models.values())).values())))
    num_units = num_records if units is None else len(units)
    generator, drawn = np.random.default_rng(0), list[Mapping[str, Mapping[str, float]]]()
    for _ in range(resamples):
        chosen = generator.integers(0, num_units, size=num_units)
        places = chosen if units is None else np.concatenate([units[unit] for unit in chosen])
        # A draw may contain no record that can be scored, for example no supervised token.
        with suppress(DataError):
            drawn.append(
                {
                    model: scores({name: values[places] for name, values in figures.items()})
                    for model, figures in models.items()
                }
            )
    draws = {
        model: {score: np.array([one[model][score] for one in drawn], dtype=np.float64) for score in of_model}
        for model, of_model in observed.items()
    }
    return Drawn(observed, draws, num_units)


def compare_by_scores(
    base: Figures,
    tuned: Figures,
    *,
    scores: Scores,
    units: Sequence[npt.NDArray[np.int64]] | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Comparison]:
    """Compare two models by every score; the arguments are those of `score_draws`."""
    drawn = score_draws({"base": base, "tuned": tuned}, scores=scores, units=units, resamples=resamples)
    return {score: drawn.compare_scores("base", "tuned", score) for score in drawn.values["base"]}


def _estimate(value: float, drawn: npt.NDArray[np.float64]) -> Estimate:
    if not np.isfinite(drawn).all() or not len(drawn):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def describe_against_constant(model: str, found: Estimate, constant: float, *, score: str, num_units: int) -> str:
    """Describe how a model compares with the best constant prediction, by the model's confidence interval.

    The score of the constant prediction, on the same units, is treated as known exactly.
    """
    ends = sorted(get_score_direction(score) * (end - constant) for end in (found.low, found.high))
    is_clear = num_units >= MIN_UNITS and (ends[0] > 0 or ends[1] < 0)
    what = f"is {'better' if ends[0] > 0 else 'worse'} than" if is_clear else f"{NO_DIFFERENCE} from"
    text = f"{format_score_name(score)} {found.value:.4f} ({found.low:.4f} to {found.high:.4f}) against {constant:.4f}"
    return f"{model[:1].upper()}{model[1:]} {what} the best constant answer: {text}."


def get_score_direction(name: str) -> int:
    """Return 1 if higher values of a score are better, and -1 if lower values are better."""
    return -1 if name in _LOWER_IS_BETTER else 1
