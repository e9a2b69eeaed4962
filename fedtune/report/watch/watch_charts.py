"""The live page's charts: from the same figures as the table under each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fedtune.report.page import drawing
from fedtune.report.page.catalogue import Catalogue
from fedtune.report.page.wording import shortened
from fedtune.report.watch.watch_model import RunNow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_MARKERS = 40
_LONGEST_NAME = 18
_Draw = Callable[[Sequence["Axes"]], None]


class WatchCharts:
    """The charts of a run at one moment; None where there is nothing to draw."""

    def __init__(self, now: RunNow, words: Catalogue) -> None:
        self._now, self._words = now, words

    def epsilon(self) -> Markup | None:
        """By finished round, a line for each site, with the run's target."""
        lines = {
            site.site: [(step.round, step.epsilon) for step in site.steps if step.epsilon is not None]
            for site in self._now.sites[: drawing.MOST_LINES]
        }
        lines = {site: points for site, points in lines.items() if points}

        def draw(axes: Sequence[Axes]) -> None:
            for number, (site, points) in enumerate(lines.items()):
                axes[0].plot(*zip(*points, strict=True), label=_name(site), **_style(number, len(points)))
            if self._now.target_epsilon is not None:
                style: dict[str, Any] = {"color": "#000000", "linestyle": (0, (4, 3)), "linewidth": 1.2}
                axes[0].axhline(self._now.target_epsilon, label=self._said("watch.target"), **style)
            self._label(axes[0], x="chart.axis_round", y="chart.axis_epsilon")
            _from_zero(axes[0])
            drawing.legend(axes[0])

        return self._drawn("epsilon", draw) if lines else None

    def scores(self) -> Markup | None:
        """By round: scores above, losses under them."""
        names = list({name: None for result in self._now.rounds for name in result.scores})
        losses = [name for name in names if "loss" in name]
        panels = [panel for panel in ([name for name in names if name not in losses], losses) if panel]

        def draw(axes: Sequence[Axes]) -> None:
            for place, panel in enumerate(panels):
                for number, name in enumerate(panel[: drawing.MOST_LINES]):
                    points = [(result.round, result.scores.get(name)) for result in self._now.rounds]
                    known = [point for point in points if point[1] is not None]
                    if known:
                        axes[place].plot(
                            *zip(*known, strict=True), label=_name(name), **_style(number + 2 * place, len(known))
                        )
                self._label(axes[place], x="chart.axis_round" if place == len(panels) - 1 else None, y=None)
                axes[place].set_ylabel(_name(panel[0]) if len(panel) == 1 else self._said("utility.score"))
                drawing.legend(axes[place])

        return self._drawn("scores", draw, panels=len(panels)) if panels else None

    def traffic(self) -> Markup | None:
        """Seconds and megabytes of each round."""
        rounds = [result.round for result in self._now.rounds]
        down, up = ([getattr(result, f"bytes_{way}") / 1e6 for result in self._now.rounds] for way in ("down", "up"))

        def draw(axes: Sequence[Axes]) -> None:
            axes[0].plot(rounds, [result.seconds for result in self._now.rounds], **_style(0, len(rounds)))
            axes[1].plot(rounds, down, label=self._said("chart.down"), **_style(0, len(rounds)))
            axes[1].plot(rounds, up, label=self._said("chart.up"), **_style(1, len(rounds)))
            self._label(axes[0], x=None, y="chart.axis_seconds")
            self._label(axes[1], x="chart.axis_round", y="chart.axis_megabytes")
            for panel in axes:
                _from_zero(panel)
            drawing.legend(axes[1])

        return self._drawn("traffic", draw, panels=2) if rounds else None

    def _label(self, axes: Axes, *, x: str | None, y: str | None) -> None:
        """Names of the axes, and figures as the language writes them."""
        from matplotlib.ticker import FuncFormatter

        figure = self._words.figure
        for axis, key in ((axes.xaxis, x), (axes.yaxis, y)):
            if key is not None:
                axis.set_label_text(self._said(key))
            axis.set_major_formatter(FuncFormatter(lambda value, _: figure(round(float(value), 12), "number")))
        drawing.whole_numbers(axes)

    def _said(self, key: str) -> str:
        return self._words.text(key).unescape()

    def _drawn(self, code: str, draw: _Draw, *, panels: int = 1) -> Markup:
        title, description = _NAMES[code]
        svg = drawing.drawn(f"watch-{code}", draw, panels=panels, height=1.2 + 1.5 * panels)
        return drawing.inline(svg, f"watch-{code}", self._words.text(title), self._words.text(description))


_NAMES = {
    "epsilon": ("watch.epsilon_chart", "watch.epsilon_desc"),
    "scores": ("watch.scores_chart", "watch.scores_desc"),
    "traffic": ("watch.traffic_chart", "watch.traffic_desc"),
}


def _style(number: int, points: int) -> dict[str, Any]:
    """Of a line; so many markers that they touch say nothing."""
    style = drawing.line_style(number)
    return style if points <= _MOST_MARKERS else style | {"marker": ""}


def _from_zero(axes: Axes) -> None:
    """With room for the marker of the largest value."""
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def _name(name: str) -> str:
    # A legend leaves out labels that begin with "_".
    short = shortened(name, _LONGEST_NAME)
    return f" {short}" if short.startswith("_") else short
