"""The page's tables: which places of report.json stand in their rows and columns."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from fedtune.model.spec import NO_ADAPTER
from fedtune.report import model
from fedtune.report.derive.cells import rank_text
from fedtune.report.derive.profile import band_limits, strength_band
from fedtune.report.derive.verdicts import WORST_FIRST
from fedtune.report.facts import CohortFigures
from fedtune.report.model import Report
from fedtune.report.page.catalogue import Catalogue
from fedtune.show.budget_text import Arrivals
from fedtune.show.drawing import MOST_LINES
from fedtune.words import score_words, shortened, unbounded

One = TypeVar("One")
MOST_ROWS = 40
"""Rows of a table on the page; report.json holds the others."""
_TEXTS = ("text", "name", "hash", "key", "json", "failures_by_site", "code", "yes_no", "people")
_LONGEST_NAME = 28  # where room is scarce; other tables show it whole
_LONGEST_IN_CHART = 18
_KEY_DIGITS = 12  # enough to tell keys apart; the whole key is in report.json
_SAYING_WHY = ("epsilon", "cap", "left")  # of which None means something: unbounded, or no limit
_ABSENT = object()
_ABSENT_CLASS = Markup('class="absent"')
"""Of what stands in a cell where there is nothing: it is grey, since it changes no result."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: key of its text.
        at: where each row's cell is, from the row on; "../" in front: from what holds the row; "@": from its site on.
        kind: of figure, as in `Catalogue.figure`; or "text", "name" (shortened), "hash", "key", "json",
            "failures_by_site", "code:SECTION"; a trailing "?" puts "at most" in front where the site fell silent.
        absent: key of the text where there is nothing ("": it is not known), and `zero` where there is a 0.
        only: kind of report, or unit, that has the column; "": all.
        is_named: the heading is a name of the report, not a key.
    """

    heading: str
    at: str
    kind: str
    absent: str = ""
    zero: str = ""
    only: str = ""
    is_named: bool = False

    @property
    def is_figure(self) -> bool:
        """Whether it stands at the right."""
        return self.kind.split(":")[0] not in _TEXTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Cells as they are shown; `all` rows where only some are."""

    caption: Markup
    columns: tuple[tuple[Markup, bool], ...]
    rows: tuple[tuple[Markup, ...], ...]
    all: int

    @property
    def is_narrow(self) -> bool:
        """Whether two halves of it fit beside each other, and are worth it."""
        return len(self.columns) <= 3 and len(self.rows) > 3

    def parts(self) -> tuple[Table, ...]:
        """Its two halves where it is narrow, else itself."""
        half = (len(self.rows) + 1) // 2
        return (
            (replace(self, rows=self.rows[:half]), replace(self, rows=self.rows[half:])) if self.is_narrow else (self,)
        )


class Words:
    """A report and the language that it is told in.

    Args:
        report: the whole.
        catalogue: of the language.
    """

    def __init__(self, report: Report, catalogue: Catalogue) -> None:
        self.report = report
        self.catalogue = catalogue.instead(f"by_{report.unit}").instead(f"where_{self.noise}")
        self.json = model.to_json(report)["derived"]  # pointers on a page begin there
        self.order = tuple(sorted(range(len(report.sites)), key=self._favour))
        """Places of the sites, the least favourable result first."""

    def _favour(self, place: int) -> tuple[int, float]:
        site = self.report.sites[place]
        epsilon = None if site.spent is None else site.spent.epsilon
        return WORST_FIRST.index(site.verdict.state), -float("inf") if epsilon is None else -epsilon

    @property
    def worst(self) -> str | None:
        """Pointer to the site that the headline's epsilon is of; None: no site released a figure."""
        spent = [place for place in range(len(self.report.sites)) if self.report.sites[place].spent is not None]
        epsilons = {place: self.at(f"/sites/{place}/spent/epsilon") for place in spent}
        if not spent:
            return None
        # Of several, one that signed for as much: then the figure is no upper bound.
        place = max(
            spent, key=lambda place: (unbounded(epsilons[place]), not self.at(f"/sites/{place}/spent/upper_bound"))
        )
        return f"/sites/{place}"

    @property
    def promises(self) -> bool:
        """Whether there is anything to promise."""
        return self.report.verdict.state != "no_guarantee" and self.report.epsilon is not None

    @property
    def noise(self) -> str:
        """Whether there was noise that hides anything: "noised", "seeded", or "no_noise" where some lacked it."""
        noises = [one.noise_multiplier for site in self.report.sites for one in site.mechanisms]
        if 0 in noises or "no_noise" in self.report.verdict.reasons:
            return "no_noise"
        return "seeded" if self.report.seeded_noise else "noised"

    @property
    def without_base(self) -> bool:
        """Whether every run trained a head that is the whole model."""
        ranks = [cell.facts["rank"] for cell in self.report.cells if "rank" in cell.facts]
        return {one for listed in ranks for one in listed.split(", ")} == {rank_text(NO_ADAPTER, 0)}

    @property
    def shared(self) -> bool:
        """Whether a secure sum is part of it, whose noise several sites made together."""
        return any(one.shared for site in self.report.sites for one in site.mechanisms)

    @property
    def band(self) -> str:
        """Code of the strength."""
        return strength_band(self.report.epsilon if self.promises else None)

    def band_range(self, band: str) -> Markup:
        """For which epsilons the word for a strength stands."""
        least, most = (f"{edge:g}" for edge in band_limits(band))
        key = "up_to" if band == "strong" else "above" if band == "weak" else "between"
        return self.text(f"strength.{key}", least=least, most=most)

    def at(self, pointer: str) -> Any:
        """The value in report.json that a JSON pointer names, or None where one of its parents is null."""
        found = self._find(pointer)
        return None if found is _ABSENT else found

    def _find(self, pointer: str) -> Any:
        """The same, or `_ABSENT` where one of its parents is null."""
        found: Any = self.json
        for part in pointer.split("/")[1:]:
            if found is None:
                return _ABSENT
            name = part.replace("~1", "/").replace("~0", "~")
            of_list, unsaid = isinstance(found, list | tuple), name in model.UNSAID
            found = found[int(name)] if of_list else found.get(name) if unsaid else found[name]
        return found

    def together(self, sites: Sequence[str], *, of: int) -> Markup:
        """What the sites at these pointers, which are alike, are called beside a chart's line; `of` so many in all."""
        name = shortened(self.at(f"{sites[0]}/site"), _LONGEST_IN_CHART)
        if len(sites) == 1:
            return Markup("{}").format(name)
        count = Markup('<span class="rows">{}</span>').format
        if len(sites) == of:
            return self.text("chart.all_alike", sites=count(of))
        return self.text("chart.some_alike", name=name, others=count(len(sites) - 1))

    @property
    def cohorts(self) -> tuple[CohortFigures, ...]:
        """What people of a ledger spent by when they came; none where one figure is everybody's."""
        life = self.report.sites[0].lifetime if self.report.kind == "ledger" else None
        return (life and life.cohorts) or ()

    @property
    def drawn(self) -> dict[int, str]:
        """The cohorts of a ledger that a chart has room for, the newest that spent anything, and their periods."""
        spent = [place for place, one in enumerate(self.cohorts) if one.epsilon != 0][-MOST_LINES:]
        return {place: self.cohorts[place].people.dates for place in spent}

    def text(self, key: str, **values: object) -> Markup:
        """A text of the catalogue."""
        return self.catalogue.text(key, **values)

    def code(self, section: str, code: str) -> Markup:
        """The words for a code."""
        return self.catalogue.code(section, code)

    def listed(self, section: str, codes: Sequence[str]) -> Markup:
        """The words for several codes."""
        return self.catalogue.listed(section, list(codes))

    def figure(self, pointer: str, kind: str) -> Markup:
        """The figure at a pointer, told apart from text and tied to its place in report.json."""
        value = self.at(pointer)
        return Markup('<data value="{}" data-at="{}" data-as="{}">{}</data>').format(
            json.dumps(value), pointer, kind, self.catalogue.figure(value, kind)
        )

    def spent(self, site: str, at: str, kind: str = "epsilon") -> Markup:
        """A figure of a site's charges; "at most" where it fell silent."""
        figure = self.figure(f"{site}/{at}", kind)
        if not self.at(f"{site}/spent/upper_bound"):
            return figure
        return Markup("<span>{}</span>").format(self.text("word.at_most", figure=figure))

    def cell(self, row: str, column: Column) -> Markup:
        """What a table shows of the row at a pointer."""
        site = "/".join(row.split("/")[:3])
        at, parents = column.at.removeprefix("@"), column.at.count("../")
        start = site if column.at.startswith("@") else row.rsplit("/", parents)[0]
        pointer = f"{start}/{at[3 * parents :]}"
        kind = column.kind.removesuffix("?")
        found = self._find(pointer)
        if found is _ABSENT or (found is None and kind not in _SAYING_WHY):
            return Markup("<span {}>{}</span>").format(_ABSENT_CLASS, self.text(column.absent or "word.unknown"))
        if column.zero and found == 0:
            return self.text(column.zero)
        if column.is_figure:
            within = pointer.removeprefix(f"{site}/")
            return self.spent(site, within, kind) if column.kind.endswith("?") else self.figure(pointer, kind)
        return Markup('<span data-at="{}">{}</span>').format(pointer, self._words(found, kind))

    def _words(self, value: Any, kind: str) -> Markup:
        if value is None or value in ([], {}):
            return self.text("word.unknown" if value is None else "word.none")
        match kind.split(":"):
            case ["name"]:
                return Markup("{}").format(shortened(value, _LONGEST_NAME))
            case ["hash"]:
                return Markup("<code>{}</code>").format(value)
            case ["key"]:
                return Markup('<code title="{}">{}</code>').format(value, value[:_KEY_DIGITS] + "…")
            case ["yes_no"]:
                return self.text("word.yes" if value else "word.no")
            case ["people"]:
                return self.catalogue.arrivals([Arrivals(**value)])
            case ["json"]:
                return Markup("<code>{}</code>").format(json.dumps(value, separators=(",", ":")))
            case ["failures_by_site"]:
                return Markup(", ").join(
                    Markup("{}: {}").format(site, self.code("refusal", why)) for site, why in value.items()
                )
            case ["code", section] if isinstance(value, list):
                return self.listed(section, value)
            case ["code", section]:
                return self.code(section, value)
        return Markup("{}").format(value)

    def table(
        self,
        caption: Markup,
        columns: Sequence[Column],
        rows: Sequence[str],
        *,
        last: bool = True,
        most: int = MOST_ROWS,
    ) -> Table:
        """A table of the rows at these pointers; of more than `most` the last ones, or the first."""
        shown = rows[-most:] if last else rows[:most]
        return Table(
            caption=caption,
            columns=tuple((self._heading(column), column.is_figure) for column in columns),
            rows=tuple(tuple(self.cell(row, column) for column in columns) for row in shown),
            all=len(rows),
        )

    def _heading(self, column: Column) -> Markup:
        return Markup("{}").format(column.heading) if column.is_named else self.text(column.heading)

    def rows(self, of: str, *, worst: bool = False) -> list[str]:
        """Pointers to all entries of a list that each site has, or that the worst one has."""
        sites = ([self.worst] if self.worst else []) if worst else [f"/sites/{place}" for place in self.order]
        return [f"{site}/{of}/{n}" for site in sites for n in range(len(self.at(f"{site}/{of}") or ()))]


def _alike(rows: Iterable[tuple[Markup, ...]]) -> list[list[tuple[Markup, ...]]]:
    """The rows in groups that differ in their site, the first cell, alone; what one site has twice stays apart."""
    counts: Counter[tuple[str, ...]] = Counter()
    keyed = []
    for row in rows:
        said = tuple(cell.striptags() for cell in row)
        keyed.append(((counts[said], *said[1:]), row))
        counts[said] += 1
    return in_groups(keyed)


def in_groups(keyed: Iterable[tuple[Hashable, One]]) -> list[list[One]]:
    """What has the same key together, in the order of the first."""
    groups: dict[Hashable, list[One]] = {}
    for key, one in keyed:
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def pointer(*parts: str | int) -> str:
    """A JSON pointer (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


PAGE_ONE_SITES = 8
"""Sites on page 1, the least favourable first; later tables list each."""


@cache
def data() -> Mapping[str, Any]:
    """What `page.toml` says the page is made of."""
    return tomllib.loads(Path(__file__).with_name("page.toml").read_text(encoding="utf-8"))


class Tables:
    """Every table of the page, made when the template asks for it."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._is_ledger = words.report.kind == "ledger"
        self._sites = [f"/sites/{place}" for place in words.order]

    def named(self, name: str, more: Sequence[Column] = ()) -> Table:
        """The table with a name, and perhaps more columns."""
        layout, columns = data()["table"][name], [*self._columns(name), *more]
        caption = self._words.text(layout["caption"], delta=self._words.figure("/delta", "exact"))
        of = layout["rows"]
        rows, last = self._rows(of), of.startswith("/utility/rounds")
        if not of.startswith(("/", "sites", "worst ")):
            # A ledger's rows are one site's history, whose end matters most; a run's begin with its worst site.
            last, same = self._is_ledger, "page.site" if self._is_ledger else "page.run"
            columns = [column for column in columns if column.heading != same]
        if columns[0].at == "@site" and len(self._sites) > 1:
            return self._together(self._words.table(caption, columns, rows, most=len(rows)), named=name == "verdicts")
        return self._words.table(caption, columns, rows, last=last)

    def _columns(self, name: str) -> list[Column]:
        """Those that this kind of report has."""
        shown = ("", self._words.report.kind, self._words.report.unit)
        columns = [Column(*column) for column in data()["table"][name]["columns"]]
        return [column for column in columns if column.only in shown]

    def _together(self, table: Table, *, named: bool) -> Table:
        """The first lines of a table, with one for what several sites have alike: each `named`, or counted."""
        rows = tuple((self._called(group, named=named), *group[0][1:]) for group in _alike(table.rows))
        return replace(table, rows=rows[:MOST_ROWS], all=len(rows))

    def _rows(self, of: str) -> list[str]:
        if of.startswith("/"):
            return self._in_report(of)
        if " having " in of:
            of, having = of.split(" having ")
            return [row for row in self._rows(of) if self._words.at(f"{row}/{having}") is not None]
        if of == "sites":
            return self._sites
        if of.startswith("worst "):
            return self._words.rows(of.removeprefix("worst "), worst=True)
        if "/*/" in of:
            outer, inner = of.split("/*/")
            return [place for row in self._words.rows(outer) for place in self._in_report(f"{row}/{inner}")]
        return self._words.rows(of)

    def _in_report(self, of: str) -> list[str]:
        return [f"{of}/{place}" for place in range(len(self._words.at(of) or ()))]

    def budget(self) -> Table:
        """Page 1's table of sites, each by its name, without columns that hold nothing."""
        columns = self._columns("budget")
        rows = [tuple(self._words.cell(site, column) for column in columns) for site in self._sites]
        used = [n for n in range(len(columns)) if not all(_ABSENT_CLASS in row[n] for row in rows)]
        return self._words.table(
            self._words.text("budget.heading"), [columns[n] for n in used], self._sites, last=False, most=PAGE_ONE_SITES
        )

    def _called(self, alike: Sequence[tuple[Markup, ...]], *, named: bool) -> Markup:
        """What a line of sites that are alike is called."""
        name, others = alike[0][0], len(alike) - 1
        if named or not others:
            return Markup(", ").join([name, *(row[0].striptags() for row in alike[1:])])
        return self._words.text("budget.alike", name=name, others=Markup('<span class="rows">{}</span>').format(others))

    def steps(self) -> Table:
        """Epsilon after each run of a ledger; of a run, after each round at the sites that are drawn."""
        if self._is_ledger:
            more = [Column(dates, f"cohorts/{n}", "epsilon", is_named=True) for n, dates in self._words.drawn.items()]
            return self.named("steps", more)
        known = {site: self._words.at(f"{site}/steps") for site in self._sites if self._words.at(f"{site}/steps")}
        alike = in_groups((tuple((step["round"], step["epsilon"]) for step in of), site) for site, of in known.items())
        names = {sites[0]: self._words.together(sites, of=len(known)) for sites in alike[:MOST_LINES]}
        steps = {site: {step["round"]: n for n, step in enumerate(known[site])} for site in names}
        rounds = sorted({number for known in steps.values() for number in known if number is not None})
        shown = rounds[-MOST_ROWS:]
        return Table(
            caption=self._words.text("chart.epsilon_spent"),
            columns=((self._words.text("page.round"), False), *((name, True) for name in names.values())),
            rows=tuple((self._round(steps, number), *self._epsilons(steps, number)) for number in shown),
            all=len(rounds),
        )

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
            Column(score_words(name), pointer("scores", name)[1:], "score", is_named=True)
            for name in self.score_names()
        )
        columns = (
            Column("page.round", "round", "count"),
            *scores,
            Column("utility.epsilon", "epsilon", "epsilon", "word.not_released"),
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
        """Before and after training."""
        utility = self._words.json["utility"] or {}
        kinds = [kind for kind in ("before", "final") if utility.get(kind) is not None]
        names = list({name: None for kind in kinds for name in utility[kind]})
        return Table(
            caption=self._words.text("utility.scores_caption"),
            columns=(
                (self._words.text("utility.score"), False),
                *((self._words.text(f"utility.{kind}"), True) for kind in kinds),
            ),
            rows=tuple(
                (Markup("{}").format(score_words(name)), *(self._score(kind, name, utility[kind]) for kind in kinds))
                for name in names
            ),
            all=len(names),
        )

    def _score(self, kind: str, name: str, known: Mapping[str, object]) -> Markup:
        if name not in known:
            return self._words.text("word.unknown")
        return self._words.figure(pointer("utility", kind, name), "score")
