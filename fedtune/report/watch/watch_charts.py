"""The live page's charts: from the same figures as the table under each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from fedtune.report.page import drawing
from fedtune.report.page.catalogue import Catalogue
from fedtune.report.page.drawing import Panel, Series
from fedtune.report.page.wording import shortened
from fedtune.report.watch.watch_model import RunNow

_LONGEST_NAME = 18


def charts(now: RunNow, words: Catalogue) -> Mapping[str, Markup | None]:
    """The charts of a run at one moment; None where there is nothing to draw."""

    def said(key: str) -> str:
        return words.text(key).unescape()

    panels = {"epsilon": _epsilon(now, said), "scores": _scores(now, said), "traffic": _traffic(now, said)}
    return {
        code: drawing.chart(
            f"watch-{code}",
            several,
            named=(said(f"watch.{code}_chart"), said(f"watch.{code}_desc")),
            number=words.on_axis,
        )
        if several
        else None
        for code, several in panels.items()
    }


def _epsilon(now: RunNow, said: Callable[[str], str]) -> Sequence[Panel]:
    """By finished round, a line for each site, with the run's target."""
    lines = [
        Series(points=points, number=number, label=shortened(site.site, _LONGEST_NAME))
        for number, site in enumerate(now.sites[: drawing.MOST_LINES])
        if (points := [(step.round, step.epsilon) for step in site.steps if step.epsilon is not None])
    ]
    target = now.target_epsilon
    levels = [] if target is None else [(target, said("watch.target"), drawing.LIMIT)]
    x, y = said("chart.axis_round"), said("chart.axis_epsilon")
    return [Panel(series=lines, levels=levels, x=x, y=y, scale="whole")] if lines else []


def _scores(now: RunNow, said: Callable[[str], str]) -> Sequence[Panel]:
    """By round: scores above, losses under them."""
    names = list({name: None for result in now.rounds for name in result.scores})
    losses = [name for name in names if "loss" in name]
    panels: list[Panel] = []
    for group in ([name for name in names if name not in losses], losses):
        lines = [
            Series(points=points, number=number + 2 * len(panels), label=shortened(name, _LONGEST_NAME))
            for number, name in enumerate(group[: drawing.MOST_LINES])
            if (points := [(one.round, score) for one in now.rounds if (score := one.scores.get(name)) is not None])
        ]
        y = shortened(group[0], _LONGEST_NAME) if len(group) == 1 else said("utility.score")
        if lines:
            panels.append(Panel(series=lines, x=said("chart.axis_round"), y=y, scale="whole", from_zero=False))
    return panels


def _traffic(now: RunNow, said: Callable[[str], str]) -> Sequence[Panel]:
    """Seconds and megabytes of each round."""
    seconds = [(one.round, one.seconds) for one in now.rounds]
    down, up = ([(one.round, getattr(one, f"bytes_{way}") / 1e6) for one in now.rounds] for way in ("down", "up"))
    traffic = [
        Series(points=down, number=0, label=said("chart.down")),
        Series(points=up, number=1, label=said("chart.up")),
    ]
    panels = [
        Panel(series=[Series(points=seconds, number=0)], y=said("chart.axis_seconds"), scale="whole"),
        Panel(series=traffic, x=said("chart.axis_round"), y=said("chart.axis_megabytes"), scale="whole"),
    ]
    return panels if now.rounds else []
