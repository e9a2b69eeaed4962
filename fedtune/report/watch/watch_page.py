"""The live page of a run: whole, for who opens it, and in parts, for the script that keeps it up to date."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from fedtune.report.page.catalogue import Catalogue, catalogue
from fedtune.report.page.render import environment
from fedtune.report.page.wording import shortened
from fedtune.report.watch import watch_charts
from fedtune.report.watch.watch_model import RunNow, to_json
from fedtune.report.watch.watch_words import WatchWords

PARTS = ("marks", "phase", "progress", "privacy", "sites", "epsilon", "scores", "traffic", "failures")
"""What the script puts in place anew where it changed; each is a macro of the template, and an element of the page."""
_LONGEST_NAME = 60


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
                self._charts = watch_charts.charts(now, self._words.for_unit(now.unit))
            self._now, self._shown = now, self._drawn(now)
        return self._shown

    def html(self, shown: Shown, *, nonce: str) -> str:
        """The whole page; nothing else may run or style it than what bears the nonce."""
        assert self._now is not None
        name = shortened(self._now.name, _LONGEST_NAME)
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
