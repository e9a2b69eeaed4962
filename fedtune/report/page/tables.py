"""The page's tables: which places of report.json stand in their rows and columns."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from markupsafe import Markup

from fedtune.report.page.drawing import MOST_LINES
from fedtune.report.page.wording import MOST_ROWS, Column, Table, Words, pointer, shortened

PAGE_ONE_SITES = 4
"""Sites on page 1, the least favourable first; later tables list each."""
_LONGEST_HEADING = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A table of `tables.toml`."""

    caption: str
    rows: str
    columns: tuple[Column, ...]


@cache
def layouts() -> Mapping[str, Layout]:
    """All of them, by name."""
    tables = tomllib.loads((Path(__file__).parent / "tables.toml").read_text(encoding="utf-8"))
    return {
        name: Layout(
            caption=table["caption"],
            rows=table["rows"],
            columns=tuple(Column.of(*column) for column in table["columns"]),
        )
        for name, table in tables.items()
    }


class Tables:
    """Every table of the page, made when the template asks for it."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._is_ledger = words.report.kind == "ledger"
        self._sites = [f"/sites/{place}" for place in words.order]

    def named(self, name: str, **values: object) -> Table:
        """The table with a name; a ledger's and a run's, a record's and a user's may differ."""
        kind, unit = self._words.report.kind, self._words.report.unit
        names = (name, f"{name}_of_{kind}", f"{name}_by_{unit}")
        layout = next(layouts()[name] for name in names if name in layouts())
        rows, columns, last = self._rows(layout.rows), layout.columns, layout.rows.startswith("/utility")
        if not layout.rows.startswith(("/", "sites", "worst ")):
            # A ledger's rows are one site's history, whose end matters most; a run's begin with its worst site.
            last, same = self._is_ledger, "page.site" if self._is_ledger else "page.run"
            columns = tuple(column for column in columns if column.heading != same)
        return self._words.table(self._words.text(layout.caption, **values), columns, rows, last=last)

    def _rows(self, of: str) -> list[str]:
        if of.startswith("/"):
            return self._in_report(of)
        if of.startswith("sites"):
            having = of.removeprefix("sites having ") if " " in of else "site"
            return [site for site in self._sites if self._words.at(f"{site}/{having}") is not None]
        if of.startswith("worst "):
            worst = self._words.worst
            sites = [] if worst is None else [int(worst.rsplit("/", 1)[1])]
            return self._words.rows(of.removeprefix("worst "), sites=sites)
        if "/*/" in of:
            outer, inner = of.split("/*/")
            return [place for row in self._words.rows(outer) for place in self._in_report(f"{row}/{inner}")]
        return self._words.rows(of)

    def _in_report(self, of: str) -> list[str]:
        return [f"{of}/{place}" for place in range(len(self._words.at(of) or ()))]

    def budget(self) -> Table:
        """Page 1's table of sites."""
        table = self.named("budget")
        return replace(table, rows=table.rows[:PAGE_ONE_SITES], all=len(self._sites))

    def charges(self) -> Table:
        """Each site's charges by both accountants."""
        return self.named("charges", delta=self._words.figure("/delta", "exact"))

    def steps(self) -> Table:
        """Epsilon after each run of a ledger; of a run, after each round at the sites that are drawn."""
        if self._is_ledger:
            return self.named("steps")
        sites = [site for site in self._sites if self._words.at(f"{site}/steps")][:MOST_LINES]
        steps = {site: {step["round"]: n for n, step in enumerate(self._words.at(f"{site}/steps"))} for site in sites}
        rounds = sorted({number for known in steps.values() for number in known if number is not None})
        shown = rounds[-MOST_ROWS:]
        return Table(
            caption=self._words.text("chart.epsilon_spent"),
            columns=((self._words.text("page.round"), False), *((self._name(site), True) for site in sites)),
            rows=tuple((self._round(steps, number), *self._epsilons(steps, number)) for number in shown),
            all=len(rounds),
        )

    def _name(self, site: str) -> Markup:
        return Markup("{}").format(shortened(self._words.at(f"{site}/site"), _LONGEST_HEADING))

    def _round(self, steps: Mapping[str, Mapping[int, int]], number: int) -> Markup:
        site = next(site for site, known in steps.items() if number in known)
        return self._words.figure(f"{site}/steps/{steps[site][number]}/round", "count")

    def _epsilons(self, steps: Mapping[str, Mapping[int, int]], number: int) -> Iterator[Markup]:
        for site, known in steps.items():
            at = f"{site}/steps/{known[number]}/epsilon" if number in known else None
            yield self._words.text("word.dash") if at is None else self._words.figure(at, "epsilon")

    def utility(self) -> Table:
        """Scores by round, beside what was spent by then."""
        scores = (
            Column(heading=name, at=pointer("scores", name)[1:], kind="score", is_named=True)
            for name in self.score_names()
        )
        columns = (
            Column.of("page.round", "round", "count"),
            *scores,
            Column.of("utility.epsilon", "epsilon", "epsilon", "word.not_released"),
        )
        return self._words.table(self._words.text("utility.caption"), columns, self.rounds())

    def rounds(self) -> list[str]:
        """Pointers to the rounds of a run's report."""
        return self._in_report("/utility/rounds")

    def score_names(self) -> list[str]:
        """Scores that every round has."""
        utility = self._words.report.utility
        if utility is None:
            return []
        named = {name: None for one in utility.rounds for name in one.scores}  # in their order
        return [name for name in named if all(name in one.scores for one in utility.rounds)]

    def scores(self) -> Table:
        """Before and after training, and without privacy where that is known."""
        utility = self._words.json["utility"] or {}
        kinds = [kind for kind in ("before", "final", "non_private") if utility.get(kind) is not None]
        names = list({name: None for kind in kinds for name in utility[kind]})
        return Table(
            caption=self._words.text("utility.scores_caption"),
            columns=(
                (self._words.text("utility.score"), False),
                *((self._words.text(f"utility.{kind}"), True) for kind in kinds),
            ),
            rows=tuple(
                (Markup("{}").format(name), *(self._score(kind, name, utility[kind]) for kind in kinds))
                for name in names
            ),
            all=len(names),
        )

    def _score(self, kind: str, name: str, known: Mapping[str, object]) -> Markup:
        if name not in known:
            return self._words.text("word.unknown")
        return self._words.figure(pointer("utility", kind, name), "score")
