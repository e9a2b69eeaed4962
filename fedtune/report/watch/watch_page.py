"""The live page of a run: whole, for who opens it, and in parts, for the script that keeps it up to date.

Each figure carries its place in the page's JSON, and each chart is of the figures in the table under it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedtune.report.page import drawing
from fedtune.report.page.catalogue import Catalogue, catalogue
from fedtune.report.page.drawing import MOST_LINES, Panel, Series
from fedtune.report.page.render import environment
from fedtune.report.page.wording import MOST_ROWS, Table, figure, found_at, pointer, shortened
from fedtune.report.watch.watch_state import ASKED, NOTHING, UPDATE, RunNow, SiteNow, to_json

PARTS = ("marks", "phase", "progress", "privacy", "sites", "epsilon", "scores", "traffic", "failures")
"""What the script puts in place anew where it changed; each is a macro of the template, and an element of the page."""
_LONGEST_TITLE = 60
_LONGEST_NAME = 18
_LONGEST_HEADING = 20
_MOST_FAILURES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A run at one moment, drawn.

    Attributes:
        state: what the script gets: the figures, and the HTML of each part.
        tag: another one for everything else that can be shown.
    """

    state: str
    tag: str
    title: str
    parts: Mapping[str, Markup]


class WatchPage:
    """Draws a run again and again.

    Args:
        language: "en" or "de".

    Raises:
        ConfigError: there are no texts in this language.
    """

    def __init__(self, language: str) -> None:
        self._words: Catalogue = catalogue(language)
        self._now: RunNow | None = None
        self._shown = Shown(state="", tag="", title="", parts={})
        self._charts: Mapping[str, Markup | None] = {}

    def shown(self, now: RunNow) -> Shown:
        """All that the page shows of `now`; drawn again only where it differs from the last one."""
        if now != self._now:
            # Charts take longest, and do not depend on what changes most often.
            if self._now is None or _drawn_of(now) != _drawn_of(self._now):
                self._charts = _charts(now, self._words.for_unit(now.unit))
            self._now, self._shown = now, self._drawn(now)
        return self._shown

    def html(self, shown: Shown, *, nonce: str) -> str:
        """The whole page; nothing else may run or style it than what bears the nonce."""
        assert self._now is not None
        name = shortened(self._now.name, _LONGEST_TITLE)
        template = environment().get_template("watch.html.j2")
        return template.render(
            t=self._words.text,
            language=self._words.language,
            nonce=nonce,
            name=name,
            title=shown.title,
            tag=shown.tag,
            parts=shown.parts,
        )

    def _drawn(self, now: RunNow) -> Shown:
        words = WatchWords(now, self._words.for_unit(now.unit))
        template = environment().get_template("watch_parts.html.j2")
        module = template.make_module(
            {
                "now": now,
                "words": words,
                "t": words.text,
                "code": words.catalogue.code,
                "figure": words.figure,
                "charts": self._charts,
                "left_out": words.left_out(),
            }
        )
        parts = {part: Markup(getattr(module, part)()).strip() for part in PARTS}
        title = self._words.text("watch.title", done=now.rounds_done, planned=now.rounds_planned, name=now.name)
        state = json.dumps(
            {"title": title.unescape(), "state": to_json(now), "parts": parts}, allow_nan=False, ensure_ascii=False
        )
        digest = hashlib.sha256(state.encode()).hexdigest()
        return Shown(state=state, tag=f'"{digest}"', title=title.unescape(), parts=parts)


def _drawn_of(now: RunNow) -> object:
    """What charts depend on."""
    steps = [(site.site, site.steps) for site in now.sites]
    return steps, now.rounds, now.target_epsilon


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
        return figure(self.catalogue, found_at(self.json, at), at, kind)

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


def _charts(now: RunNow, words: Catalogue) -> Mapping[str, Markup | None]:
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
        for number, site in enumerate(now.sites[:MOST_LINES])
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
            for number, name in enumerate(group[:MOST_LINES])
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
