"""The live page's figures and tables in the words of a language, each figure with its place in the page's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fedtune.report.page.catalogue import Catalogue
from fedtune.report.page.drawing import MOST_LINES
from fedtune.report.page.wording import MOST_ROWS, Table, pointer, shortened
from fedtune.report.watch.watch_model import RunNow, SiteNow, to_json
from fedtune.report.watch.watch_state import ASKED, NOTHING, UPDATE

_LONGEST_HEADING = 20
_MOST_FAILURES = 12


class WatchWords:
    """A run at one moment and the language that it is told in."""

    def __init__(self, now: RunNow, catalogue: Catalogue) -> None:
        self.now, self.catalogue = now, catalogue
        self.json = to_json(now)

    def text(self, key: str, **values: object) -> Markup:
        """A text of the catalogue."""
        return self.catalogue.text(key, **values)

    def figure(self, at: str, kind: str) -> Markup:
        """The figure at a JSON pointer, tied to its place."""
        value: Any = self.json
        for part in at.split("/")[1:]:
            value = value[int(part)] if isinstance(value, tuple) else value[part.replace("~1", "/").replace("~0", "~")]
        shown = self.catalogue.figure(value, kind)
        return Markup('<data value="{}" data-at="{}" data-as="{}">{}</data>').format(json.dumps(value), at, kind, shown)

    def epsilon(self, of: str = "") -> Markup:
        """Of a site at a pointer, or of the run; "at most" where a round may have been charged that nobody signed."""
        figure = self.figure(f"{of}/epsilon", "epsilon")
        upper_bound = self.now.upper_bound if not of else self.now.sites[int(of.rsplit("/", 1)[1])].upper_bound
        return Markup("<span>{}</span>").format(self.text("word.at_most", figure=figure)) if upper_bound else figure

    def phase(self) -> Markup:
        """Where the run stands."""
        return self.text(_PHASES[self.now.phase])

    def left(self) -> Markup | None:
        """The time left, where it can be told."""
        left = self.now.left
        return None if left is None else self.text(_LEFT[left.unit], value=self.figure("/left/value", "count"))

    def final(self) -> Markup:
        """The finished run's scores, in a row."""
        return Markup(", ").join(
            Markup("{} {}").format(name, self.figure(pointer("final", name), "score")) for name in self.now.final
        )

    def sites(self) -> Table:
        """Each site, in the run's order."""
        columns = (
            ("page.site", False),
            ("watch.latest", False),
            ("watch.updates", True),
            ("watch.without_update", True),
            ("watch.charged", True),
            ("watch.epsilon", True),
        )
        rows = [tuple(self._site(place, site)) for place, site in enumerate(self.now.sites)]
        return self._table("watch.sites", columns, rows)

    def _site(self, place: int, site: SiteNow) -> Iterator[Markup]:
        at = f"/sites/{place}"
        yield Markup("{}").format(site.site)
        # One element, which a narrow screen sets beside its heading.
        yield Markup("<span>{}</span>").format(self._latest(f"{at}/latest", site))
        yield self.figure(f"{at}/updates", "count")
        yield self.figure(f"{at}/failures", "count")
        yield self.figure(f"{at}/charged", "count")
        yield self.epsilon(at)

    def _latest(self, at: str, site: SiteNow) -> Markup:
        what = site.latest.what
        if what == NOTHING:
            return self.text("watch.nothing")
        number = self.figure(f"{at}/round", "count")
        if what == ASKED:
            return self.text("watch.asked", round=number)
        if what == UPDATE:
            return self.text("watch.update", round=number)
        why = Markup('<strong data-at="{}">{}</strong>').format(f"{at}/what", self.catalogue.code("refusal", what))
        return self.text("watch.refused", round=number, why=why)

    def epsilons(self) -> Table:
        """After each of the newest rounds, at the sites that are drawn."""
        sites = range(min(len(self.now.sites), MOST_LINES))
        names = [(Markup("{}").format(shortened(self.now.sites[n].site, _LONGEST_HEADING)), True) for n in sites]
        rows = [
            (
                self.figure(f"/sites/0/steps/{step}/round", "count"),
                *(self.figure(f"/sites/{site}/steps/{step}/epsilon", "epsilon") for site in sites),
            )
            for step in self._newest()
        ]
        return Table(
            caption=self.text("watch.epsilon_chart"),
            columns=((self.text("page.round"), False), *names),
            rows=tuple(rows),
            all=len(rows),
        )

    def scores(self) -> Table:
        """Of the newest rounds."""
        names = list({name: None for result in self.now.rounds for name in result.scores})
        rows = [
            (self.figure(f"/rounds/{place}/round", "count"), *(self._score(place, name) for name in names))
            for place in self._newest()
        ]
        return Table(
            caption=self.text("watch.scores_chart"),
            columns=((self.text("page.round"), False), *((Markup("{}").format(name), True) for name in names)),
            rows=tuple(rows) if names else (),
            all=len(rows),
        )

    def _score(self, place: int, name: str) -> Markup:
        if name not in self.now.rounds[place].scores:
            return self.text("word.dash")
        return self.figure(pointer("rounds", place, "scores", name), "score")

    def traffic(self) -> Table:
        """Time and traffic of the newest rounds."""
        columns = (("page.round", False), ("cost.seconds", True), ("cost.down", True), ("cost.up", True))
        kinds = {"round": "count", "seconds": "seconds", "bytes_down": "bytes", "bytes_up": "bytes"}
        rows = [
            tuple(self.figure(f"/rounds/{place}/{name}", kind) for name, kind in kinds.items())
            for place in self._newest()
        ]
        return self._table("watch.traffic_chart", columns, rows)

    def failures(self) -> Table:
        """Who was missing, in which round, and why."""
        columns = (("page.round", False), ("page.site", False), ("watch.why", False))
        rows = [
            (
                self.figure(f"/failures/{place}/round", "count"),
                Markup("{}").format(failure.site),
                Markup('<span data-at="{}">{}</span>').format(
                    f"/failures/{place}/reason", self.catalogue.code("refusal", failure.reason)
                ),
            )
            for place, failure in enumerate(self.now.failures[:_MOST_FAILURES])
        ]
        return self._table("watch.failures_caption", columns, rows)

    def left_out(self) -> Mapping[str, Markup]:
        """What to say where not all is shown, by the part of the page."""
        sites, rounds, failures = len(self.now.sites), len(self.now.rounds), len(self.now.failures)
        found = {
            "epsilon": (sites > MOST_LINES, "watch.first_sites", MOST_LINES, sites),
            "rounds": (rounds > MOST_ROWS, "watch.newest_rounds", MOST_ROWS, rounds),
            "failures": (failures > _MOST_FAILURES, "watch.newest_failures", _MOST_FAILURES, failures),
        }
        return {part: self.text(key, shown=few, all=all) for part, (is_so, key, few, all) in found.items() if is_so}

    def _newest(self) -> range:
        """Places of the newest rounds."""
        return range(max(0, len(self.now.rounds) - MOST_ROWS), len(self.now.rounds))

    def _table(self, caption: str, columns: tuple[tuple[str, bool], ...], rows: Sequence[tuple[Markup, ...]]) -> Table:
        return Table(
            caption=self.text(caption),
            columns=tuple((self.text(heading), is_figure) for heading, is_figure in columns),
            rows=tuple(rows),
            all=len(rows),
        )


_PHASES = {
    "waiting": "watch.waiting",
    "preparing": "watch.preparing",
    "running": "watch.running",
    "finished": "watch.finished",
    "stopped": "watch.stopped",
    "unreadable": "watch.unreadable",
}
_LEFT = {"seconds": "watch.left_seconds", "minutes": "watch.left_minutes", "hours": "watch.left_hours"}
