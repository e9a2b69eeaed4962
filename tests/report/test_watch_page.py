"""The live page's words, in both languages, and what it draws anew."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from fedtune.report.page.catalogue import LANGUAGES, catalogue
from fedtune.report.watch import watch_page
from fedtune.report.watch.watch_page import PARTS, WatchPage
from fedtune.report.watch.watch_state import Answer, Left, Mark, Phase, RunNow

from .shown import lookup, parsed
from .test_watch_state import NORTH, seen
from .watched import MadeRun


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> RunNow:
    """A run whose third round is under way."""
    run = MadeRun.at(tmp_path_factory.mktemp("runs") / "run", *NORTH).begin()
    run.ask().finish_round().ask().finish_round({"west": "paused", "south": "a_reason_of_a_later_version"})
    return seen(run.ask().folder)


def text_of(now: RunNow, language: str = "en") -> str:
    page = WatchPage(language)
    whole = re.sub(r"<(style|script|svg|head)\b.*?</\1>", "", page.html(page.shown(now), nonce="n"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", whole)).split())


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("phase", get_args(Phase))
def test_every_phase_has_words(now: RunNow, phase: Phase, language: str) -> None:
    words = catalogue(language).text(watch_page._PHASES[phase]).unescape()
    assert words in text_of(replace(now, phase=phase), language)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("mark", get_args(Mark))
def test_every_mark_has_words(now: RunNow, mark: Mark, language: str) -> None:
    shown = text_of(replace(now, marks=(mark,)), language)
    assert catalogue(language).text(f"reason.{mark}").unescape() in shown
    heading = {"en": "No guarantee", "de": "Keine Zusage"}[language]
    assert (heading in shown) == (mark != "above_target")
    assert catalogue(language).text(f"reason.{mark}").unescape() not in text_of(now, language)


@pytest.mark.parametrize(("left", "english", "german"), [
    (Left(value=20, unit="seconds"), "About 20 s left.", "Noch etwa 20 s."),
    (Left(value=3, unit="minutes"), "About 3 min left.", "Noch etwa 3 min."),
    (Left(value=2, unit="hours"), "About 2 h left.", "Noch etwa 2 h."),
])  # fmt: skip
def test_time_left(now: RunNow, left: Left, english: str, german: str) -> None:
    assert english in text_of(replace(now, left=left))
    assert german in text_of(replace(now, left=left), "de")
    assert "left." not in text_of(replace(now, left=None))


@pytest.mark.parametrize(("answer", "words"), [
    (Answer(what="nothing", round=None), "north nothing asked yet"),
    (Answer(what="asked", round=3), "north asked for round 3, no answer yet"),
    (Answer(what="update", round=2), "north update for round 2"),
    (Answer(what="no_reply", round=2), "north round 2: no reply"),
    (Answer(what="min_noise_multiplier", round=2), "north round 2: too little noise"),
    (Answer(what="of_a_later_version", round=2), "north round 2: of_a_later_version"),
])  # fmt: skip
def test_what_a_site_did_is_said_in_plain_words(now: RunNow, answer: Answer, words: str) -> None:
    first = replace(now.sites[0], latest=answer)
    assert words in text_of(replace(now, sites=(first, *now.sites[1:])))


def test_unbounded_is_never_blank_or_zero(now: RunNow) -> None:
    sites = tuple(replace(site, epsilon=None) for site in now.sites)
    shown = text_of(
        replace(now, epsilon=None, upper_bound=False, target_epsilon=None, sites=sites, marks=("no_noise",))
    )
    assert "Spent so far: epsilon unbounded" in shown
    assert "promises nothing" in shown
    assert shown.count("unbounded") >= 4


def test_a_simulation_is_told_from_real_sites(now: RunNow) -> None:
    assert "one machine could see everything" in text_of(now)
    assert "one machine could see everything" not in text_of(replace(now, simulated=False))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_figure_has_its_place_in_the_state(now: RunNow, language: str) -> None:
    page = WatchPage(language)
    shown = page.shown(now)
    root = parsed(page.html(shown, nonce="n").replace("<!doctype html>", ""))
    from fedtune.report.watch.watch_state import to_json

    figures = root.all("data")
    assert len(figures) > 40
    for figure in figures:
        at, kind = figure.attributes["data-at"], figure.attributes["data-as"]
        assert figure.text == catalogue(language).figure(lookup(listed(to_json(now)), at), kind)
    text = "".join(root.all("main")[0].texts(without=("data", "svg", "style", "script", "code")))
    assert not re.findall(r".*\d.*", text.replace("macro_f1", "")), "a number that is no figure of the state"


def listed(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, dict):
        return {key: listed(part) for key, part in value.items()}
    return [listed(part) for part in value] if isinstance(value, tuple) else value


def test_names_are_escaped(now: RunNow) -> None:
    page = WatchPage("en")
    odd = replace(now, name="<b>&", problem="<script>x</script>", phase="unreadable")
    odd = replace(odd, sites=(replace(now.sites[0], site="<i>"), *now.sites[1:]))
    whole = page.html(page.shown(odd), nonce="n")
    for bad in ("<b>", "<i>", "<script>x"):
        assert bad not in whole
    assert "&lt;script&gt;x" in whole


def test_charts_are_drawn_again_only_where_their_figures_changed(now: RunNow, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = watch_page.drawing.chart
    monkeypatch.setattr(watch_page.drawing, "chart", lambda *args, **rest: drawn.append(1) or real(*args, **rest))
    page = WatchPage("en")
    first = page.shown(now)
    assert len(drawn) == 3
    assert page.shown(now) is first
    later = page.shown(replace(now, left=Left(value=1, unit="hours")))
    assert len(drawn) == 3
    assert {part for part in PARTS if later.parts[part] != first.parts[part]} == {"progress"}
    assert later.tag != first.tag
    page.shown(replace(now, rounds=now.rounds[:1]))
    assert len(drawn) == 6


def test_each_part_is_on_the_page_once(now: RunNow) -> None:
    page = WatchPage("en")
    whole = page.html(page.shown(now), nonce="n")
    root = parsed(whole.replace("<!doctype html>", ""))
    found = [one.attributes["data-part"] for one in root.walk() if "data-part" in one.attributes]
    assert sorted(found) == sorted(PARTS)
    assert len(set(re.findall(r'\bid="([^"]+)"', whole))) == len(re.findall(r'\bid="([^"]+)"', whole))


def test_many_rounds_and_failures_are_cut(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", "federation.num_sites=8", "federation.num_rounds=60").begin()
    for _ in range(50):
        run.finish_round({"site-3": "paused"})
    shown = text_of(seen(run.folder))
    assert "The newest 40 of 50 rounds." in shown
    assert "The newest 12 of 50." in shown
    assert "The first 6 of 8 sites." in shown
