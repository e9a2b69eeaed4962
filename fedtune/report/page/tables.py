"""The page's tables, whose cells are addressed by JSON pointers into report.json, and its charts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from markupsafe import Markup

from fedtune.formatting import format_score_name
from fedtune.report.facts import NOT_RECORDED, LedgerFacts
from fedtune.report.page.translations import Catalog
from fedtune.report.page.view import Words, format_row_count, get_pointer_name, group_by_key, load_page_layout, pointer
from fedtune.show.budget_text import ArrivalRange
from fedtune.show.drawing import BEFORE, LIMIT, MAX_LINES, Panel, Points, Series, chart
from fedtune.show.lines import shorten_middle

MAX_ROWS = 12  # rows of a table that the page shows whole; report.json contains all rows
ROWS_OF_LONGER = 4  # rows shown of a longer table
_LONGEST_NAME = 28  # characters of a name in narrow columns
_KEY_DIGITS = 12  # enough digits to distinguish keys; report.json contains the whole key
_SAYING_WHY = ("epsilon", "cap", "left")  # kinds for which None is a value: unbounded, or no limit
_ROUNDS = "/facts/rounds/*"
_OF_SITES = ("sites", "facts", "own", "life")
_SITE = "@sites/site"
_PLAIN, _CODE, _COMMA = Markup("{}").format, Markup("<code>{}</code>").format, Markup(", ")
_NAME = Markup('<span class="name">{}</span>').format
_TEXTS: Mapping[str, Callable[[Catalog, str, Any], Markup]] = {
    "text": lambda words, of, value: _PLAIN(", ".join(value) if isinstance(value, list) else value),
    "name": lambda words, of, value: _NAME(shorten_middle(value, _LONGEST_NAME)),
    "hash": lambda words, of, value: _CODE(value),
    "key": lambda words, of, value: Markup('<code title="{}">{}</code>').format(value, value[:_KEY_DIGITS] + "…"),
    "json": lambda words, of, value: _CODE(json.dumps(value, separators=(",", ":"))),
    "failures_by_site": lambda words, of, value: _COMMA.join(
        Markup("{}: {}").format(site, words.code("refusal", why)) for site, why in value.items()
    ),
    "counts": lambda words, of, value: _COMMA.join(
        f"{name}: {words.figure(one, 'count')}" for name, one in value.items()
    ),
    "scores": lambda words, of, value: _COMMA.join(
        f"{format_score_name(name)} {words.figure(one, 'score')}" for name, one in value.items()
    ),
    "code": lambda words, of, value: words.listed(of, value) if isinstance(value, list) else words.code(of, value),
    "yes_no": lambda words, of, value: words.text("word.yes" if value else "word.no"),
    "people": lambda words, of, value: words.arrivals([ArrivalRange(**value)]),
}
"""Kind of a non-numeric cell -> function of the catalog, the section of a code, and the value that renders its text."""
_ABSENT = object()
_ABSENT_CLASS = Markup('class="absent"')  # CSS class of cells without a value


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A column of a table.

    `at` is the cell's path relative to its row. A leading "../" starts at the row's parent, "@" at a section of the
    row's site, and "/" at the root of the report, where * is the row's own index or name. "#" is the name of the row's
    score. `kind` is a kind of `Catalog.figure` or of `_TEXTS`, with a section as in "code:SECTION"; a trailing "?" adds
    "at most" if the site has not signed a final receipt.
    """

    heading: str  # text key of the heading, or the heading itself if `is_named`
    at: str
    kind: str
    absent: str = ""  # text key for a missing value; "": the text for an unknown value
    zero: str = ""  # text key for the value 0
    only: str = ""  # kind of report, or unit, to which the column is limited; "": all
    is_named: bool = False

    @property
    def is_figure(self) -> bool:
        return self.kind.split(":")[0] not in _TEXTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A rendered table; `all` is the total number of rows, of which the page may show only some.

    If the table has a chart, `seen` is the title of the drawing `svg`, or the reason why there is no drawing.
    """

    caption: Markup
    columns: tuple[tuple[Markup, bool], ...]
    rows: tuple[tuple[Markup, ...], ...]
    all: int
    chart: str = ""
    seen: Markup | None = None
    svg: Markup | None = None


class Charts(Words):
    """The tables and charts of the page, which templates request by method."""

    def cell(self, row: str, column: TableColumn) -> Markup:
        """Render the cell of a column in the row at a JSON pointer."""
        parents = column.at.count("../")
        pointer = f"{row.rsplit('/', parents)[0]}/{column.at[3 * parents :]}"
        if column.at.startswith("@"):
            start, _, at = column.at[1:].partition("/")
            pointer = f"{self.place(start, self.get_site_pointer(row))}/{at}"
        elif column.at.startswith("/"):
            pointer = column.at.replace("*", row.rpartition("/")[2])
        if column.at == "#":
            return Markup("{}").format(format_score_name(get_pointer_name(row)))
        kind, of = column.kind.removesuffix("?"), self.at(column.at.removesuffix("/*")) if "*" in column.at else ()
        is_there = not isinstance(of, dict) or get_pointer_name(row) in of
        found = self.at(pointer, absent=_ABSENT) if is_there else _ABSENT
        if found is _ABSENT or (found is None and kind not in _SAYING_WHY):
            return self._render_absent_cell(column.absent or "word.unknown")
        if found == NOT_RECORDED:
            return self._render_absent_cell("value.not_recorded")
        if column.zero and found == 0:
            return self.text(column.zero)
        if column.kind.endswith("?"):
            return self.spent(pointer, kind)
        if column.is_figure:
            return self.figure(pointer, kind)
        return Markup('<span data-at="{}">{}</span>').format(pointer, self._render_as_text(found, kind))

    def shown(self, at: str, kind: str) -> Markup:
        """Render the value at a JSON pointer."""
        return self.cell("", TableColumn("", at, kind))

    def _render_absent_cell(self, key: str) -> Markup:
        return Markup("<span {}>{}</span>").format(_ABSENT_CLASS, self.text(key))

    def _render_as_text(self, value: Any, kind: str) -> Markup:
        if value is None or value in ([], {}):
            return self.text("word.unknown" if value is None else "word.none")
        kind, _, section = kind.partition(":")
        return _TEXTS[kind](self.catalog, section, value)

    def table(
        self,
        caption: Markup,
        columns: Sequence[TableColumn],
        rows: Sequence[str],
        *,
        last: bool = True,
        most: int = MAX_ROWS,
    ) -> Table:
        """Build a table of the rows at the given pointers; if there are more than `most`, show only the last or the
        first few.
        """
        few = len(rows) if len(rows) <= most else ROWS_OF_LONGER
        shown, text, named = rows[-few:] if last else rows[:few], self.text, Markup("{}").format
        headings = [(named(one.heading) if one.is_named else text(one.heading), one.is_figure) for one in columns]
        cells = tuple(tuple(self.cell(row, column) for column in columns) for row in shown)
        return Table(caption=caption, columns=tuple(headings), rows=cells, all=len(rows))

    def named(self, name: str, more: Sequence[TableColumn] = ()) -> Table:
        """Build the table with the given name in page.toml, with the columns `more` appended."""
        layout, columns = load_page_layout()["table"][name], [*self._list_columns(name), *more]
        caption = self.text(layout["caption"], delta=self.figure(self.delta_at, "exact"))
        of = layout["rows"]
        # A ledger's report has no rows for tables about a single run.
        rows, last = [] if layout.get("of", self.facts.kind) != self.facts.kind else self.rows(of), of == _ROUNDS
        if of.partition("/")[0] in _OF_SITES and "/*" in of:
            # A ledger's rows are one site's history, whose end matters most; a run's rows start with the worst site.
            last, same = self.is_ledger, "page.site" if self.is_ledger else "page.run"
            columns = [column for column in columns if column.heading != same]
        if columns[0].at == _SITE and len(self.sites) > 1:
            return self._merge_equal_sites(self.table(caption, columns, rows, most=len(rows)), named=name == "verdicts")
        return self.table(caption, columns, rows, last=last)

    def _list_columns(self, name: str) -> list[TableColumn]:
        layout, shown = load_page_layout()["table"][name], ("", self.facts.kind, self.facts.unit)
        columns = [TableColumn(*column) for column in layout["columns"]]
        of_sites = layout["rows"].split("/")[0].split(" ")[0] in _OF_SITES
        first = [TableColumn("page.site", _SITE, "text")] if of_sites else []
        return first + [column for column in columns if column.only in shown]

    def _merge_equal_sites(self, table: Table, *, named: bool) -> Table:
        """Merge the rows of sites with equal values into one row, which lists the sites if `named` and otherwise counts
        them.
        """
        times, keyed, rows = Counter[tuple[str, ...]](), [], []
        for row in table.rows:  # group rows that differ only in the site; repeated rows of one site stay separate
            said = tuple(cell.striptags() for cell in row)
            keyed.append(((times[said], *said[1:]), row))
            times[said] += 1
        for group in group_by_key(keyed):
            name, others = group[0][0], [row[0] for row in group[1:]]
            if named:
                name = Markup(", ").join([name, *(other.striptags() for other in others)])
            elif others:
                name = self.text("budget.alike", name=name, others=format_row_count(len(others)))
            rows.append((name, *group[0][1:]))
        return replace(table, rows=tuple(rows[:MAX_ROWS]), all=len(rows))

    def budget(self) -> Table:
        """Build the table of the budget that each site has used, without empty columns."""
        columns = [replace(one, kind="name") if one.at == _SITE else one for one in self._list_columns("budget")]
        rows = [tuple(self.cell(site, column) for column in columns) for site in self.sites]
        used = [column for n, column in enumerate(columns) if not all(_ABSENT_CLASS in row[n] for row in rows)]
        found = self.table(self.text("budget.heading"), used, self.sites, last=False, most=len(self.sites))
        return found if len(self.sites) == 1 else self._merge_equal_sites(found, named=False)

    def steps(self) -> Table:
        """Build the table of epsilon after each round of a run, or after each run of a ledger with one column per
        cohort.
        """
        drawn = self.drawn.items()
        return self.named("steps", [TableColumn(one, f"cohorts/{n}", "epsilon", is_named=True) for n, one in drawn])

    def by_round(self) -> Table:
        """Build the table of scores by round, with the cumulative epsilon."""
        names, spent = self.score_names(), TableColumn("utility.epsilon", "/utility/epsilons/*", "epsilon")
        scores = [
            TableColumn(format_score_name(name), pointer("metrics", name)[1:], "score", is_named=True) for name in names
        ]
        columns = [TableColumn("page.round", "round", "count"), *scores, spent]
        return self.table(self.text("utility.caption"), columns, self.rows(_ROUNDS))

    def score_names(self) -> list[str]:
        """Return the names of the scores that are present in every round."""
        rounds = () if isinstance(self.facts, LedgerFacts) else self.facts.rounds
        named = dict.fromkeys(name for one in rounds for name in one.metrics)  # in order of first occurrence
        return [name for name in named if all(name in one.metrics for one in rounds)]

    def epsilon_spent(self, planned: int | None = None) -> Table:
        """Build the chart of epsilon by round with the limit; for a ledger with many rounds, epsilon by run.

        For a run in progress, another line leads to the epsilon of the whole plan in the last `planned` round.
        """
        lines = {site: points for site in self.sites if (points := self._list_line_points(site))}
        alike = group_by_key((tuple(points), site) for site, points in lines.items())
        named = [(self.together(sites, of=len(lines)).striptags(), lines[sites[0]]) for sites in alike[:MAX_LINES]]
        if drawn := self.drawn:
            named = [(dates, self._list_line_points("/sites/0", f"cohorts/{place}")) for place, dates in drawn.items()]
        series = _build_series(named)
        levels, axis = [], "axis_round"
        if self.is_ledger:
            series += [limit for site in lines if (limit := self._build_limit_series(site)).points]
            # There is a point for each round, or for each run if there are too many rounds.
            rounds = [step["round"] is not None for site in lines for step in self.at(f"{site}/steps")]
            axis = "axis_day" if drawn else "axis_charged" if any(rounds) else "axis_run"
        elif planned is not None and self.worst in lines:
            whole = self.at(f"{self.worst}/spent/planned_epsilon")
            plan = [lines[self.worst][-1], (planned, whole)]
            series.append(Series(points=plan, number=len(series), label=self._find_chart_text("plan")))
        if not self.is_ledger and (target := self.limit()):
            levels = [(self.at(target), self._find_chart_text("limit"), LIMIT)]
        x, y = self._find_chart_text(axis), self._find_chart_text("axis_epsilon")
        panel = Panel(series=series, levels=levels, x=x, y=y, scale="days" if drawn else "whole")
        return self._add_chart("epsilon_spent", self.steps(), panel, seen=self._describe_rise(lines))

    def _describe_rise(self, lines: Iterable[str]) -> Markup | None:
        """Describe the final epsilon of the site that spent the most."""
        worst = self.worst
        if worst not in lines:
            return None
        reached = self.figure(f"{worst}/spent/{'epsilon' if self.is_ledger else 'epsilon_pld'}", "epsilon")
        if (limit := self.limit()) is None:
            return self.text("chart.rose", reached=reached)
        return self.text("chart.rose_of", reached=reached, limit=self.figure(limit, "cap"))

    def profile(self) -> Table:
        """Build the chart of epsilon as a function of delta by both accountants, for the site that spent the most."""
        curve = [self.at(row) for row in self.rows("worst/curve/* having epsilon_pld")]
        lines = {
            self._find_chart_text(key): [
                (one["delta"], spent) for one in curve if (spent := one[f"epsilon_{key}"]) is not None
            ]
            for key in ("pld", "rdp")
        }
        x, y = self._find_chart_text("axis_delta"), self._find_chart_text("axis_epsilon")
        panel = Panel(series=_build_series(lines.items()), x=x, y=y, scale="powers")
        return self._add_chart("profile", self.named("curve"), panel)

    def utility(self) -> Table:
        """Build the chart of the first score that is not a loss, as a function of the cumulative epsilon."""
        names = self.score_names()
        name = next((name for name in names if "loss" not in name), names[0] if names else "")
        rows, score = self.rows(_ROUNDS) if name else [], pointer("metrics", name)
        every = zip(self.at("/utility/epsilons"), map(self.at, rows), strict=False)
        found = [(spent, one["metrics"][name], one["round"]) for spent, one in every]
        found = [one for one in found if None not in one[:2]]
        round_, ends = self.text("page.round").unescape(), dict.fromkeys((found[0], found[-1])) if found else ()
        panel = self._build_score_panel(name, [one[:2] for one in found], axis="axis_epsilon")
        panel = replace(panel, notes=[(x, y, f"{round_} {number}") for x, y, number in ends])
        scored, seen = [row + score for row in rows if self.at(row + score) is not None], None
        if found and len(scored) > 1:
            first, last = (self.figure(place, "score") for place in (scored[0], scored[-1]))
            seen = self.text("chart.moved", name=panel.y, first=first, last=last)
        return self._add_chart("utility", self.by_round(), panel, seen=seen)

    def draw_learning(self, planned: int) -> Table:
        """Build the chart of the primary metric by round for a run in progress, with an x axis up to the `planned`
        round.
        """
        assert not isinstance(self.facts, LedgerFacts)
        names = self.score_names()
        name = self.facts.primary_metric if self.facts.primary_metric in names else names[0] if names else ""
        found = [(one.round, score) for one in self.facts.rounds if (score := one.metrics.get(name)) is not None]
        panel = replace(self._build_score_panel(name, found, axis="axis_round"), scale="whole", until=planned)
        reached = self.catalog.figure(found[-1][1], "score") if found else ""
        seen = self.text("chart.reached", name=panel.y, score=reached) if found else None
        return self._add_chart("learning", self.by_round(), panel, seen=seen)

    def _build_score_panel(self, name: str, points: Points, *, axis: str) -> Panel:
        """Build the panel of a score, with a line at the score before training."""
        before, label = self.at("/facts/before").get(name), shorten_middle(format_score_name(name), 30)
        return Panel(
            series=_build_series([(label, points)]),
            levels=[] if before is None else [(before, self.text("utility.before").unescape(), BEFORE)],
            x=self._find_chart_text(axis),
            y=label,
            from_zero=False,
        )

    def reliability(self) -> Table:
        """Build the reliability diagram: accuracy in each bin of model confidence."""
        bins = self.at("/facts/detail/reliability") or ()
        lines = {
            "reliability_found": [(one["confidence"], one["accuracy"]) for one in bins],
            "reliability_perfect": [(0.0, 0.0), (1.0, 1.0)],
        }
        series = _build_series((self._find_chart_text(key), points) for key, points in lines.items())
        panel = Panel(series=series, x=self._find_chart_text("axis_probability"), y=self._find_chart_text("axis_right"))
        return self._add_chart("reliability", self.named("reliability"), panel)

    def _find_chart_text(self, key: str) -> str:
        return self.text(f"chart.{key}").unescape()

    def _list_bounded_steps(self, site: str) -> list[tuple[float, str]]:
        """Return (x, JSON pointer) for each step of a site with a bounded epsilon.

        x is the round in a run, the index of the step in a ledger, and the date in a ledger with arrival cohorts.
        """
        found = []
        for place, step in enumerate(self.at(f"{site}/steps")):
            x = step["round"] if not self.is_ledger else place + 1
            if self.drawn:
                x = date.fromisoformat(step["time"][:10]).toordinal()
            if x is not None and step["epsilon"] is not None:
                found.append((x, f"{site}/steps/{place}"))
        return found

    def _list_line_points(self, site: str, of: str = "epsilon") -> list[tuple[float, float]]:
        return [(x, self.at(f"{step}/{of}")) for x, step in self._list_bounded_steps(site)]

    def _build_limit_series(self, site: str) -> Series:
        """Return the lifetime cap in force at each step of a ledger as a series; steps before the first cap use the
        first cap.
        """
        caps, points = self.at("/facts/caps"), []
        for x, step in self._list_bounded_steps(site):
            time = self.at(f"{step}/time")
            begun = [cap for cap in caps if time is None or cap["time"][: len(time)] <= time] or caps[:1]
            if begun and begun[-1]["max_epsilon"] is not None:
                points.append((x, begun[-1]["max_epsilon"]))
        return Series(points=points, number=0, label=self._find_chart_text("limit"), kind="limit")

    def _add_chart(self, code: str, table: Table, panel: Panel, *, seen: Markup | None = None) -> Table:
        """Add the chart of a panel to a table, or only a sentence if no series in the panel changes its value."""
        if not any(len({y for _, y in one.points}) > 1 for one in panel.series):
            why = (seen or self.text("chart.same")) if panel.series else self.text(f"chart.{code}_none")
            return replace(table, chart=code, seen=why)
        named = self._find_chart_text(code), self._find_chart_text(f"{code}_desc")
        figure = self.catalog.figure
        svg = chart(code, panel, named=named, number=lambda tick: figure(float(f"{tick:.12g}"), "number"))
        return replace(table, chart=code, seen=seen or self.text(f"chart.{code}"), svg=svg)


def _build_series(lines: Iterable[tuple[str, Points]]) -> list[Series]:
    """Build a series for each (label, points) with points; its place determines its color."""
    return [Series(points=some, number=n, label=label) for n, (label, some) in enumerate(lines) if some]
