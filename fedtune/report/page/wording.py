"""A report's figures and codes in the words of a language: what the page's tables and sentences are made of.

Whatever the page shows of a report carries the place in report.json that it comes from (`data-at`, a JSON pointer), so
that anybody, and a test, can lay the two side by side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fedtune.report import model
from fedtune.report.derive.profile import TIERS_SOURCE, strength_band
from fedtune.report.derive.verdicts import WORST_FIRST
from fedtune.report.model import Report
from fedtune.report.page.catalogue import Catalogue

MOST_ROWS = 40
"""Rows of a table on the page; report.json holds the others."""
_TEXTS = ("text", "name", "hash", "key", "json", "failures_by_site", "code", "yes_no")
_LONGEST_NAME = 28  # where room is scarce; other tables show it whole
_KEY_DIGITS = 12  # enough to tell keys apart; the whole key is in report.json
_SAYING_WHY = ("epsilon", "cap", "left")  # of which None means something: unbounded, or no limit
_ABSENT = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: key of its text.
        at: where each row's cell is, from the row on; "../" in front: from what holds the row; "@": from its site on.
        kind: of figure, as in `Catalogue.figure`; or "text", "name" (shortened), "hash", "key", "json",
            "failures_by_site", "code:SECTION"; a trailing "?" puts "at most" in front where the site fell silent.
        absent: key of the text where there is nothing, and `zero` where there is a 0.
        is_named: the heading is a name of the report, not a key.
    """

    heading: str
    at: str
    kind: str
    absent: str = "word.unknown"
    zero: str = ""
    is_named: bool = False

    @classmethod
    def of(cls, heading: str, at: str, kind: str, absent: str = "word.unknown", zero: str = "") -> Column:
        """A column of `tables.toml`."""
        return cls(heading=heading, at=at, kind=kind, absent=absent, zero=zero)

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


class Words:
    """A report and the language that it is told in."""

    def __init__(self, report: Report, catalogue: Catalogue) -> None:
        self.report, self.catalogue = report, catalogue.for_unit(report.unit)
        self.json = model.to_json(report)
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
        place = max(spent, key=lambda place: float("inf") if epsilons[place] is None else epsilons[place])
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
    def band(self) -> str:
        """Code of the strength."""
        return strength_band(self.report.epsilon if self.promises else None)

    @property
    def band_source(self) -> str:
        """Who uses these words for these sizes."""
        return TIERS_SOURCE

    def at(self, pointer: str) -> Any:
        """The value in report.json that a JSON pointer names, or None where one of its parents is null."""
        found = self._find(pointer)
        return None if found is _ABSENT else found

    def _find(self, pointer: str) -> Any:
        return found_at(self.json, pointer)

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
        return figure(self.catalogue, self.at(pointer), pointer, kind)

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
            return self.text(column.absent)
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

    def table(self, caption: Markup, columns: Sequence[Column], rows: Sequence[str], *, last: bool = True) -> Table:
        """A table of the rows at these pointers; of many the last ones, or the first."""
        shown = rows[-MOST_ROWS:] if last else rows[:MOST_ROWS]
        return Table(
            caption=caption,
            columns=tuple((self._heading(column), column.is_figure) for column in columns),
            rows=tuple(tuple(self.cell(row, column) for column in columns) for row in shown),
            all=len(rows),
        )

    def _heading(self, column: Column) -> Markup:
        return Markup("{}").format(column.heading) if column.is_named else self.text(column.heading)

    def rows(self, of: str, *, sites: Sequence[int] | None = None) -> list[str]:
        """Pointers to all entries of a list that each site has."""
        places = self.order if sites is None else sites
        return [
            f"/sites/{place}/{of}/{n}" for place in places for n in range(len(self.at(f"/sites/{place}/{of}") or ()))
        ]


def found_at(data: Any, pointer: str) -> Any:
    """What a JSON pointer names, or `_ABSENT` where one of its parents is null."""
    for part in pointer.split("/")[1:]:
        if data is None:
            return _ABSENT
        data = data[int(part)] if isinstance(data, list | tuple) else data[_unescaped(part)]
    return data


def figure(catalogue: Catalogue, value: Any, pointer: str, kind: str) -> Markup:
    """A figure, told apart from text and tied to its place in the page's JSON."""
    return Markup('<data value="{}" data-at="{}" data-as="{}">{}</data>').format(
        json.dumps(value), pointer, kind, catalogue.figure(value, kind)
    )


def pointer(*parts: str | int) -> str:
    """A JSON pointer (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def _unescaped(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")


def shortened(text: str, most: int) -> str:
    """A long name, cut in its middle."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
