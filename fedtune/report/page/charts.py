"""The page's charts: from the same places of report.json as the table that stands under each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from markupsafe import Markup

from fedtune.report.page.tables import Table, Tables, Words, in_groups, pointer
from fedtune.show.drawing import BEFORE, LIMIT, MOST_LINES, Panel, Series, chart, stacked
from fedtune.words import score_words, shortened

_MOST_BARS = 12
_MOST_POINTS = 200
_LONGEST_NAME = 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A drawing with the table that holds the same figures.

    Attributes:
        seen: what there is to see, as the drawing's title; without a drawing, why there is none.
        svg: None: there is nothing to draw, or it is the same throughout.
    """

    code: str
    seen: Markup
    svg: Markup | None
    table: Table


class Charts:
    """The charts of a report, each drawn when the template asks for it."""

    def __init__(self, words: Words, tables: Tables) -> None:
        self._words, self._tables = words, tables

    def epsilon_spent(self) -> Chart:
        """By round, or by run where a ledger's rounds are too many, with the limit."""
        lines = {site: points for site in self._sites() if (points := self._line(site))}
        alike = in_groups((tuple(points), site) for site, points in lines.items())
        series = [
            Series(points=lines[sites[0]], number=number, label=self._words.together(sites, of=len(lines)).striptags())
            for number, sites in enumerate(alike[:MOST_LINES])
        ]
        if drawn := self._words.drawn:
            by_arrival = ((self._line("/sites/0", f"cohorts/{place}"), dates) for place, dates in drawn.items())
            series = [Series(points=some, number=n, label=dates) for n, (some, dates) in enumerate(by_arrival) if some]
        target, levels = self._words.report.target_epsilon, []
        if self._is_ledger:
            series += [limit for site in lines if (limit := self._limit(site)).points]
        elif target is not None:
            levels = [(target, self._said("limit"), LIMIT)]
        x, y = self._said(self._axis_of_steps(lines)), self._said("axis_epsilon")
        panel = Panel(series=series, levels=levels, x=x, y=y, scale="days" if drawn else "whole")
        return self._chart("epsilon_spent", self._tables.steps(), [panel] if series else [], seen=self._rose(lines))

    def _rose(self, lines: Iterable[str]) -> Markup | None:
        """How high the line of the site that spent most rises."""
        worst, limit = self._words.worst, "/target_epsilon"
        if worst is None or worst not in lines:
            return None
        steps = self._words.at(f"{worst}/steps")
        last = max(place for place, step in enumerate(steps) if step["epsilon"] is not None)
        reached = self._words.figure(f"{worst}/steps/{last}/epsilon", "epsilon")
        limit = f"{worst}/approved/max_epsilon" if self._is_ledger else limit
        if self._words.at(limit) is None:
            return self._words.text("chart.rose", reached=reached)
        return self._words.text("chart.rose_of", reached=reached, limit=self._words.figure(limit, "cap"))

    def budget_left(self) -> Chart:
        """Spent, held and left at each site that has a limit."""
        bars = [site for site in self._sites() if self._words.at(f"{site}/lifetime/left") is not None][:_MOST_BARS]
        bars, rows = [site for site in bars if self._words.at(f"{site}/lifetime/epsilon") is not None], []
        for site in bars:
            spent, taken, left = self._numbers(f"{site}/lifetime/{of}" for of in ("epsilon", "with_set_aside", "left"))
            rows.append(
                (shortened(self._words.at(f"{site}/site"), _LONGEST_NAME), (spent, max(0.0, taken - spent), left))
            )
        table, labels = self._tables.named("budget_left"), [self._said(key) for key in ("spent", "held", "left")]
        if not rows:
            return self._chart("budget_left", table, [])
        svg = stacked(
            "budget_left",
            rows,
            labels,
            x=self._said("axis_epsilon"),
            named=self._named("budget_left"),
            number=self._words.catalogue.on_axis,
        )
        seen = self._words.text("chart.budget_left")
        if len(bars) == 1 and self._words.at(f"{bars[0]}/approved/max_epsilon") is not None:
            free = self._words.figure(f"{bars[0]}/lifetime/left", "left")
            limit = self._words.figure(f"{bars[0]}/approved/max_epsilon", "cap")
            seen = self._words.text("chart.left_of", left=free, limit=limit)
        return Chart(code="budget_left", seen=seen, svg=svg, table=table)

    def profile(self) -> Chart:
        """Epsilon over delta, by both accountants, at the site that spent most."""
        rows = self._words.rows("curve", worst=True)
        rows = [row for row in rows if self._words.at(f"{row}/epsilon_pld") is not None]
        series = []
        for number, key in enumerate(("pld", "rdp")):
            points = [(self._words.at(f"{row}/delta"), self._words.at(f"{row}/epsilon_{key}")) for row in rows]
            points = [point for point in points if point[1] is not None]
            if points:
                series.append(Series(points=points, number=number, label=self._said(key)))
        panel = Panel(series=series, x=self._said("axis_delta"), y=self._said("axis_epsilon"), scale="powers")
        return self._chart("profile", self._tables.named("curve"), [panel] if rows else [])

    def utility(self) -> Chart:
        """The first score that is no loss, against the epsilon spent by then."""
        names = self._tables.score_names()
        name = next((name for name in names if "loss" not in name), names[0] if names else "")
        rows = self._tables.rounds() if name else []
        keys = ("/epsilon", pointer("scores", name), "/round")
        found = [tuple(self._words.at(row + key) for key in keys) for row in rows]
        found = [one for one in found if None not in one[:2]]
        before = (self._words.at("/utility/before") or {}).get(name)
        levels = [] if before is None else [(before, self._words.text("utility.before").unescape(), BEFORE)]
        round_, ends = self._words.text("page.round").unescape(), dict.fromkeys((found[0], found[-1])) if found else ()
        panel = Panel(
            series=[Series(points=[(spent, score) for spent, score, _ in found], number=0, label=score_words(name))],
            levels=levels,
            notes=[(spent, score, f"{round_} {number}") for spent, score, number in ends],
            x=self._said("axis_epsilon"),
            y=shortened(score_words(name), 30),
            from_zero=False,
        )
        seen = self._moved(name) if found else None
        return self._chart("utility", self._tables.utility(), [panel] if found else [], seen=seen)

    def _moved(self, name: str) -> Markup | None:
        """What a score was after the first round, and after the last."""
        rows = [row for row in self._tables.rounds() if self._words.at(row + pointer("scores", name)) is not None]
        if len(rows) < 2:
            return None
        first, last = (self._words.figure(row + pointer("scores", name), "score") for row in (rows[0], rows[-1]))
        return self._words.text("chart.moved", name=shortened(score_words(name), 30), first=first, last=last)

    def reliability(self) -> Chart:
        """How often answers are right that the model was about equally sure of."""
        detail = self._words.report.utility and self._words.report.utility.detail
        found = [(one.confidence, one.right) for one in detail.reliability] if detail else []
        lines = {"reliability_found": found, "reliability_perfect": [(0.0, 0.0), (1.0, 1.0)]}
        series = [Series(points=some, number=n, label=self._said(key)) for n, (key, some) in enumerate(lines.items())]
        panel = Panel(series=series, x=self._said("axis_probability"), y=self._said("axis_right"))
        return self._chart("reliability", self._tables.named("reliability"), [panel] if found else [])

    def mechanism(self) -> Chart:
        """Noise and sampling of each run at each site."""
        rows = self._words.rows("mechanisms")
        rows = rows[-_MOST_POINTS:] if self._is_ledger else rows[:_MOST_POINTS]
        panels = [
            Panel(
                series=[Series(points=self._numbered(f"{row}/{key}" for row in rows), number=number, kind="points")],
                x=self._said("axis_run" if self._is_ledger else "axis_row"),
                y=self._said(label),
                scale="whole",
            )
            for number, (key, label) in enumerate((("noise_multiplier", "axis_noise"), ("sampling_rate", "axis_rate")))
        ]
        return self._chart("mechanism", self._tables.named("mechanisms"), panels if rows else [])

    def cost(self) -> Chart:
        """Seconds and megabytes of each round."""
        rows = self._tables.rounds()
        rounds = self._numbers(f"{row}/round" for row in rows)
        kind: Any = "line" if len(rounds) > _MOST_BARS else "bars"

        def series(key: str, number: int, label: str = "", scale: float = 1.0) -> Series:
            sizes = [size / scale for size in self._numbers(f"{row}/{key}" for row in rows)]
            return Series(points=list(zip(rounds, sizes, strict=True)), number=number, label=label, kind=kind)

        x = self._said("axis_round")
        traffic = [series(f"bytes_{key}", n, self._said(key), 1e6) for n, key in enumerate(("down", "up"))]
        panels = [
            Panel(series=[series("seconds", 0)], x=x, y=self._said("axis_seconds"), scale="whole"),
            Panel(series=traffic, x=x, y=self._said("axis_megabytes"), scale="whole"),
        ]
        return self._chart("cost", self._tables.named("cost"), panels if rows else [], seen=self._longest(rows))

    def _longest(self, rows: Sequence[str]) -> Markup | None:
        """How long the longest round took, and what each moved where that never changes."""
        if not rows:
            return None
        longest = max(rows, key=lambda row: self._words.at(f"{row}/seconds") or 0.0)
        seen = self._words.text("chart.longest", seconds=self._words.figure(f"{longest}/seconds", "seconds"))
        if any(len(set(self._numbers(f"{row}/bytes_{key}" for row in rows))) > 1 for key in ("down", "up")):
            return seen
        sizes = {key: self._words.figure(f"{rows[0]}/bytes_{key}", "bytes") for key in ("down", "up")}
        return seen + " " + self._words.text("chart.each_moved", **sizes)

    @property
    def _is_ledger(self) -> bool:
        return self._words.report.kind == "ledger"

    def _sites(self) -> list[str]:
        return [f"/sites/{place}" for place in self._words.order]

    def _said(self, key: str) -> str:
        return self._words.text(f"chart.{key}").unescape()

    def _named(self, code: str) -> tuple[str, str]:
        return self._said(code), self._said(f"{code}_desc")

    def _numbers(self, pointers: Iterable[str]) -> list[float]:
        return [self._words.at(pointer) or 0.0 for pointer in pointers]

    def _numbered(self, pointers: Iterable[str]) -> list[tuple[float, float]]:
        return [(float(number), value) for number, value in enumerate(self._numbers(pointers), 1)]

    def _steps(self, site: str) -> list[tuple[float, str]]:
        """Pointers to a site's bounded steps, and where: by round, of a ledger in order, by day where people arrive."""
        found = []
        for place, step in enumerate(self._words.at(f"{site}/steps")):
            x = step["round"] if not self._is_ledger else place + 1
            if self._words.drawn:
                x = date.fromisoformat(step["time"][:10]).toordinal()
            if x is not None and step["epsilon"] is not None:
                found.append((x, f"{site}/steps/{place}"))
        return found

    def _line(self, site: str, of: str = "epsilon") -> list[tuple[float, float]]:
        """A site's bounded figures."""
        return [(x, self._words.at(f"{step}/{of}")) for x, step in self._steps(site)]

    def _axis_of_steps(self, sites: Iterable[str]) -> str:
        """A ledger has a point for each round of its newest runs, and one for each run before those."""
        if not self._is_ledger:
            return "axis_round"
        if self._words.drawn:
            return "axis_day"
        rounds = [step["round"] is not None for site in sites for step in self._words.at(f"{site}/steps")]
        return "axis_charged" if all(rounds) else "axis_run_or_round" if any(rounds) else "axis_run"

    def _limit(self, site: str) -> Series:
        """The lifetime limit that was in force at each step of a ledger."""
        caps = self._words.at(f"{site}/lifetime/caps") or []
        limits = [(x, _cap_at(caps, self._words.at(f"{step}/time"))) for x, step in self._steps(site)]
        known = [(x, cap) for x, cap in limits if cap is not None]
        return Series(points=known, number=0, label=self._said("limit"), kind="limit")

    def _chart(self, code: str, table: Table, panels: Sequence[Panel], *, seen: Markup | None = None) -> Chart:
        """A chart of the panels in which something changes."""
        moving = [panel for panel in panels if any(len({y for _, y in one.points}) > 1 for one in panel.series)]
        if not moving:
            why = (seen or self._words.text("chart.same")) if panels else self._words.text(f"chart.{code}_none")
            return Chart(code=code, seen=why, svg=None, table=table)
        svg = chart(code, moving, named=self._named(code), number=self._words.catalogue.on_axis)
        return Chart(code=code, seen=seen or self._words.text(f"chart.{code}"), svg=svg, table=table)


def _cap_at(caps: Sequence[Mapping[str, Any]], time: str | None) -> float | None:
    """The limit in force at a time; where none was yet, the first."""
    before = [cap for cap in caps if time is None or cap["time"][: len(time)] <= time] or list(caps[:1])
    return before[-1]["max_epsilon"] if before else None
