"""Notebook view of a model comparison: a chart of confidence intervals and an HTML table."""

from __future__ import annotations

import math
from dataclasses import fields

from fedtune.evaluation.bootstrap import Estimate
from fedtune.formatting import format_html_table, format_score_name
from fedtune.runs.model_comparison import SideBySide
from fedtune.runs.saved_model import BASE
from fedtune.show.drawing import MAX_LINES, Panel, Series, chart
from fedtune.show.svg_figure import SvgFigure
from fedtune.spec import ConfigError

_HEIGHT = 1e12
"""Offset of the y coordinates, above every possible score, so that `plot` can hide the meaningless y tick labels."""


class ComparedModels(SideBySide):
    """Scores of several models on the same records, displayed as a chart or an HTML table."""

    @classmethod
    def from_side_by_side(cls, scores: SideBySide) -> ComparedModels:
        """Build the notebook view from the scores of a comparison."""
        return cls(**{one.name: getattr(scores, one.name) for one in fields(scores)})

    def plot(self, score: str | None = None) -> SvgFigure:
        """Draw each model's score with its 95 % confidence interval.

        Args:
            score: name of the score; None: the task's primary metric.

        Raises:
            ValueError: the score does not exist, or there are more models than the chart has colors.
        """
        score, models = score or self.primary_metric, [*self.measured]
        if len(models) > MAX_LINES:
            raise ConfigError("plot", f"{len(models)} models", f"must compare at most {MAX_LINES} models")
        series = []
        for place, model in enumerate(models):
            one, height = self.estimate(model, score), _HEIGHT + len(models) - place
            points = [(x, height) for x in (one.low, one.value, one.high) if math.isfinite(x)]
            series.append(Series(points=points, number=place, label=model))
        estimates = "; ".join(f"{one}: {self._format_estimate(one, score)}" for one in models)
        named = (f"{format_score_name(score)} of each model", estimates)
        panel = Panel(series=series, x=format_score_name(score), from_zero=False)
        drawn = chart("models", panel, named=named, number=lambda tick: "" if tick > _HEIGHT / 2 else f"{tick:g}")
        return SvgFigure(drawn)

    def _format_estimate(self, model: str, score: str) -> str:
        one: Estimate = self.estimate(model, score)
        return f"{one.value:.4f} ({one.low:.4f} to {one.high:.4f})"

    def _repr_html_(self) -> str:
        score = self.primary_metric
        rows = []
        for model in self.measured:
            verdict = "" if model == BASE or BASE not in self.measured else self.compare_models(BASE, model).verdict
            rows.append((model, self._format_estimate(model, score), verdict))
        title = f"{format_score_name(score)} on {len(self.records):,} records, with 95 % intervals"
        return format_html_table(title, rows)
