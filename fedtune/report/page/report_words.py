"""A report in the words of a language, and its places as JSON pointers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from fedtune.model.spec import NO_ADAPTER
from fedtune.report import model
from fedtune.report.derive.cells import rank_text
from fedtune.report.derive.profile import BANDS, strength_band
from fedtune.report.derive.verdicts import WORST_FIRST
from fedtune.report.facts import CohortFigures
from fedtune.report.model import Report
from fedtune.report.page.catalogue import Catalogue
from fedtune.show.drawing import MOST_LINES
from fedtune.words import shortened, unbounded

_LONGEST_IN_CHART = 18
ABSENT = object()
"""Of a place in report.json one of whose parents is null."""


class Words:
    """A report and the language that it is told in.

    Args:
        report: the whole.
        catalogue: of the language.
    """

    def __init__(self, report: Report, catalogue: Catalogue) -> None:
        self.report, self.is_ledger = report, report.kind == "ledger"
        self.catalogue = catalogue.instead(f"by_{report.unit}").instead(f"where_{self.noise}")
        self.text, self.code, self.listed = self.catalogue.text, self.catalogue.code, self.catalogue.listed
        self.json = model.to_json(report)["derived"]  # pointers on a page begin there
        self.sites = [f"/sites/{place}" for place in sorted(range(len(report.sites)), key=self._favour)]
        """Pointers to the sites, the least favourable result first."""

    def _favour(self, place: int) -> tuple[int, float]:
        site = self.report.sites[place]
        epsilon = None if site.spent is None else site.spent.epsilon
        return WORST_FIRST.index(site.verdict.state), -float("inf") if epsilon is None else -epsilon

    @property
    def worst(self) -> str | None:
        """Pointer to the site that the headline's epsilon is of; None: no site released a figure."""
        # Of several, one that signed for as much: then the figure is no upper bound.
        found = [
            (unbounded(site.spent.epsilon), not site.spent.upper_bound, -place)
            for place, site in enumerate(self.report.sites)
            if site.spent is not None
        ]
        return f"/sites/{-max(found)[-1]}" if found else None

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
        least, most = (f"{edge:g}" for edge in BANDS[band])
        key = "up_to" if band == "strong" else "above" if band == "weak" else "between"
        return self.text(f"strength.{key}", least=least, most=most)

    def at(self, pointer: str) -> Any:
        """The value in report.json that a JSON pointer names, or None where one of its parents is null."""
        found = self.find(pointer)
        return None if found is ABSENT else found

    def find(self, pointer: str) -> Any:
        """The same, or `ABSENT` where one of its parents is null."""
        found: Any = self.json
        for part in pointer.split("/")[1:]:
            if found is None:
                return ABSENT
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
        life = self.report.sites[0].lifetime if self.is_ledger else None
        return (life and life.cohorts) or ()

    @property
    def drawn(self) -> dict[int, str]:
        """The cohorts of a ledger that a chart has room for, the newest that spent anything, and their periods."""
        spent = [place for place, one in enumerate(self.cohorts) if one.epsilon != 0][-MOST_LINES:]
        return {place: self.cohorts[place].people.dates for place in spent}

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

    def rows(self, of: str, *, worst: bool = False) -> list[str]:
        """Pointers to all entries of a list that each site has, or that the worst one has."""
        sites = ([self.worst] if self.worst else []) if worst else self.sites
        return [f"{site}/{of}/{n}" for site in sites for n in range(len(self.at(f"{site}/{of}") or ()))]


def pointer(*parts: str | int) -> str:
    """A JSON pointer (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
