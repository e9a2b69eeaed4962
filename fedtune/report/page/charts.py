"""The page's charts: from the same places of report.json as the table that stands under each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fedtune.report.page import drawing
from fedtune.report.page.tables import Tables
from fedtune.report.page.wording import Table, Words, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BARS = 12
_MOST_POINTS = 200
_LONGEST_NAME = 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A drawing with the table that holds the same figures; no drawing: there is nothing to draw."""

    code: str
    svg: Markup | None
    table: Table


class Charts:
    """The charts of a report, each drawn when the template asks for it."""

    def __init__(self, words: Words, tables: Tables) -> None:
        self._words, self._tables = words, tables

    def epsilon_spent(self) -> Chart:
        """By round of a run, or by run of a ledger, with the limit."""
        lines = {site: self._line(site) for site in self._sites()}
        lines = {site: points for site, points in lines.items() if points}

        def draw(axes: Sequence[Axes]) -> None:
            for number, (site, points) in enumerate(list(lines.items())[: drawing.MOST_LINES]):
                axes[0].plot(*zip(*points, strict=True), label=self._name(site), **drawing.line_style(number))
            self._draw_limit(axes[0], lines)
            self._label(axes[0], x="axis_run" if self._is_ledger else "axis_round", y="axis_epsilon")
            axes[0].set_ylim(bottom=0)
            drawing.whole_numbers(axes[0])
            drawing.legend(axes[0])

        return self._chart("epsilon_spent", self._tables.steps(), draw if lines else None)

    def budget_left(self) -> Chart:
        """Spent, held and left at each site that has a limit."""
        bars = [site for site in self._sites() if self._words.at(f"{site}/left") is not None][:_MOST_BARS]
        bars = [site for site in bars if self._words.at(f"{site}/lifetime/epsilon") is not None]

        def draw(axes: Sequence[Axes]) -> None:
            names = [self._name(site) for site in bars]
            spent = self._numbers(f"{site}/lifetime/epsilon" for site in bars)
            taken = self._numbers(f"{site}/lifetime/with_set_aside" for site in bars)
            left = self._numbers(f"{site}/left" for site in bars)
            held = [max(0.0, with_plans - alone) for with_plans, alone in zip(taken, spent, strict=True)]
            parts = (
                ("spent", spent, drawing.COLOURS[0], ""),
                ("held", held, "#ffffff", "xx"),
                ("left", left, "#ffffff", "//"),
            )
            start = [0.0] * len(bars)
            for key, widths, colour, hatch in parts:
                label = self._words.text(f"chart.{key}").unescape()
                fill: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "#000000", "linewidth": 0.8}
                axes[0].barh(range(len(bars)), widths, left=start, height=0.55, label=label, **fill)
                start = [a + b for a, b in zip(start, widths, strict=True)]
            axes[0].set_yticks(range(len(bars)), names)
            axes[0].invert_yaxis()
            axes[0].grid(visible=False, axis="y")
            self._label(axes[0], x="axis_epsilon", y=None)
            drawing.legend(axes[0])

        height = 1.3 + 0.38 * len(bars)
        return self._chart("budget_left", self._tables.named("budget_left"), draw if bars else None, height=height)

    def profile(self) -> Chart:
        """Epsilon over delta, by both accountants, at the site that spent most."""
        worst = self._words.worst
        rows = [] if worst is None else self._words.rows("curve", sites=[int(worst.rsplit("/", 1)[1])])
        rows = [row for row in rows if self._words.at(f"{row}/epsilon_pld") is not None]

        def draw(axes: Sequence[Axes]) -> None:
            for number, key in enumerate(("pld", "rdp")):
                points = [(self._words.at(f"{row}/delta"), self._words.at(f"{row}/epsilon_{key}")) for row in rows]
                points = [point for point in points if point[1] is not None]
                if points:
                    label = self._words.text(f"chart.{key}").unescape()
                    axes[0].plot(*zip(*points, strict=True), label=label, **drawing.line_style(number))
            axes[0].set_xscale("log")
            axes[0].set_ylim(bottom=0)
            self._label(axes[0], x="axis_delta", y="axis_epsilon")
            drawing.powers_of_ten(axes[0])
            drawing.legend(axes[0])

        return self._chart("profile", self._tables.named("curve"), draw if rows else None)

    def utility(self) -> Chart:
        """The first score that is no loss, against the epsilon spent by then."""
        names = self._tables.score_names()
        name = next((name for name in names if "loss" not in name), names[0] if names else "")
        points = [
            (self._words.at(f"{row}/epsilon"), self._words.at(row + _score(name)), self._words.at(f"{row}/round"))
            for row in self._tables.rounds()
            if name
        ]
        points = [point for point in points if point[0] is not None and point[1] is not None]

        def draw(axes: Sequence[Axes]) -> None:
            spent, scores, rounds = zip(*points, strict=True)
            axes[0].plot(spent, scores, **drawing.line_style(0))
            for place in sorted({0, len(points) - 1}):
                label = f"{self._words.text('page.round').unescape()} {rounds[place]}"
                where: dict[str, Any] = {
                    "ha": "left" if place == 0 else "right",
                    "va": "top",
                    "textcoords": "offset points",
                }
                axes[0].annotate(label, (spent[place], scores[place]), xytext=(0, -7), **where)
            self._draw_levels(axes[0], name)
            self._label(axes[0], x="axis_epsilon", y=None)
            axes[0].set_ylabel(shortened(name, 30))

        return self._chart("utility", self._tables.utility(), draw if points else None)

    def mechanism(self) -> Chart:
        """Noise and sampling of each run at each site."""
        rows = self._words.rows("mechanisms")
        rows = rows[-_MOST_POINTS:] if self._is_ledger else rows[:_MOST_POINTS]

        def draw(axes: Sequence[Axes]) -> None:
            places = range(1, len(rows) + 1)
            for number, (key, label) in enumerate((("noise_multiplier", "axis_noise"), ("sampling_rate", "axis_rate"))):
                style = drawing.line_style(number) | {"linestyle": "none"}
                axes[number].plot(places, self._numbers(f"{row}/{key}" for row in rows), **style)
                self._label(axes[number], x=None, y=label)
                axes[number].set_ylim(bottom=0)
            self._label(axes[1], x="axis_run" if self._is_ledger else "axis_row", y="axis_rate")
            drawing.whole_numbers(axes[1])

        table = self._tables.named("mechanisms")
        return self._chart("mechanism", table, draw if rows else None, panels=2)

    def cost(self) -> Chart:
        """Seconds and megabytes of each round."""
        rows = self._tables.rounds()

        def draw(axes: Sequence[Axes]) -> None:
            rounds = self._numbers(f"{row}/round" for row in rows)
            self._bars(axes[0], rounds, self._numbers(f"{row}/seconds" for row in rows), number=0, of=1)
            for number, key in enumerate(("down", "up")):
                megabytes = [size / 1e6 for size in self._numbers(f"{row}/bytes_{key}" for row in rows)]
                label = self._words.text(f"chart.{key}").unescape()
                self._bars(axes[1], rounds, megabytes, number=number, of=2, label=label)
            self._label(axes[0], x=None, y="axis_seconds")
            self._label(axes[1], x="axis_round", y="axis_megabytes")
            drawing.whole_numbers(axes[1])
            drawing.legend(axes[1])

        return self._chart("cost", self._tables.named("cost"), draw if rows else None, panels=2)

    def _bars(
        self, axes: Axes, rounds: Sequence[float], sizes: Sequence[float], *, number: int, of: int, label: str = ""
    ) -> None:
        """Bars beside each other, or lines where there are too many."""
        if len(rounds) > _MOST_BARS:
            axes.plot(rounds, sizes, label=label, **drawing.line_style(number))
            axes.set_ylim(bottom=0)
            return
        shift = (number - (of - 1) / 2) * 0.8 / of
        fill: dict[str, Any] = {"color": "#ffffff" if number else "#56B4E9", "hatch": "///" if number else ""}
        places = [place + shift for place in rounds]
        axes.bar(places, sizes, width=0.8 / of, label=label, edgecolor="#000000", **fill)

    @property
    def _is_ledger(self) -> bool:
        return self._words.report.kind == "ledger"

    def _sites(self) -> list[str]:
        return [f"/sites/{place}" for place in self._words.order]

    def _name(self, site: str) -> str:
        # A legend leaves out labels that begin with "_".
        name = shortened(self._words.at(f"{site}/site"), _LONGEST_NAME)
        return f" {name}" if name.startswith("_") else name

    def _numbers(self, pointers: Any) -> list[float]:
        return [self._words.at(pointer) or 0.0 for pointer in pointers]

    def _line(self, site: str) -> list[tuple[float, float]]:
        """Points of a site that are bounded: a run's by round, a ledger's by run."""
        steps = self._words.at(f"{site}/steps")
        numbered = list(enumerate(steps, 1)) if self._is_ledger else [(step["round"], step) for step in steps]
        return [(x, step["epsilon"]) for x, step in numbered if x is not None and step["epsilon"] is not None]

    def _draw_limit(self, axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
        """The run's target, or the lifetime limit that was in force at each run of a ledger."""
        label = self._words.text("chart.limit").unescape()
        style: dict[str, Any] = {"color": "#000000", "linestyle": (0, (4, 3)), "linewidth": 1.2, "label": label}
        if not self._is_ledger:
            if (target := self._words.report.target_epsilon) is not None:
                axes.axhline(target, **style)
            return
        for site, points in lines.items():
            caps = self._words.at(f"{site}/lifetime/caps") or []
            steps = self._words.at(f"{site}/steps")
            limits = [(x, _cap_at(caps, steps[int(x) - 1]["time"])) for x, _ in points]
            known = [(x, cap) for x, cap in limits if cap is not None]
            if known:
                axes.step(*zip(*known, strict=True), where="post", **style)

    def _draw_levels(self, axes: Axes, name: str) -> None:
        """The same score before training, and without privacy where it is known."""
        for key, dashes in (("before", (0, (1, 2))), ("non_private", (0, (6, 3)))):
            level = (self._words.at(f"/utility/{key}") or {}).get(name)
            if level is not None:
                label = self._words.text(f"utility.{key}").unescape()
                axes.axhline(level, color="#000000", linestyle=dashes, linewidth=1.2, label=label)
        drawing.legend(axes)

    def _label(self, axes: Axes, *, x: str | None, y: str | None) -> None:
        """Names of the axes, and figures as the language writes them."""
        from matplotlib.ticker import FuncFormatter

        figure = self._words.catalogue.figure
        for axis, key in ((axes.xaxis, x), (axes.yaxis, y)):
            if key is not None:
                axis.set_label_text(self._words.text(f"chart.{key}").unescape())
                axis.set_major_formatter(FuncFormatter(lambda value, _: figure(round(float(value), 12), "number")))

    def _chart(
        self,
        code: str,
        table: Table,
        draw: Callable[[Sequence[Axes]], None] | None,
        *,
        panels: int = 1,
        height: float = 0,
    ) -> Chart:
        if draw is None:
            return Chart(code=code, svg=None, table=table)
        title, description = self._words.text(f"chart.{code}"), self._words.text(f"chart.{code}_desc")
        svg = drawing.drawn(code, draw, panels=panels, height=height or 1.2 + 1.5 * panels)
        return Chart(code=code, svg=drawing.inline(svg, code, title, description), table=table)


def _cap_at(caps: Sequence[Mapping[str, Any]], time: str | None) -> float | None:
    """The limit in force at a time; where none was yet, the first."""
    before = [cap for cap in caps if time is None or cap["time"][: len(time)] <= time] or list(caps[:1])
    return before[-1]["max_epsilon"] if before else None


def _score(name: str) -> str:
    return "/scores/" + name.replace("~", "~0").replace("/", "~1")
