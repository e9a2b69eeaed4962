"""Pages in headless Chromium: quiet, whole at every width, and usable without a mouse or with a screen reader."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedtune.report.model import to_json
from fedtune.report.page.catalogue import LANGUAGES, catalogue

from .shown import NAMES, lookup, page_of, reports_of

DESKTOP, PHONE = 1280, 390
A4 = 703  # pixels between the margins of a printed page, and its height
A4_HEIGHT = 1039
WIDE = ("within", "wide_run", "wide_ledger")


@dataclass
class Opened:
    """A page, and what it said and asked for."""

    tab: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Any, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """`opened(name, language, width=..., **of_the_context)`."""
    contexts = []

    def make(name: str, language: str, *, width: int = DESKTOP, **options: Any) -> Opened:
        path = tmp_path / "report.html"
        path.write_text(page_of(request, name, language), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        found = Opened(context.new_page())
        found.tab.on("console", lambda message: found.messages.append(f"{message.type}: {message.text}"))
        found.tab.on("pageerror", lambda error: found.messages.append(str(error)))
        found.tab.on("request", lambda asked: found.requests.append(asked.url))
        found.tab.goto(path.as_uri())
        return found

    yield make
    for context in contexts:
        context.close()


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_nothing_and_asks_for_nothing(name: str, language: str, opened: Open) -> None:
    page = opened(name, language)
    page.tab.wait_for_timeout(100)
    assert page.messages == []
    assert page.requests == [page.tab.url]
    assert page.tab.evaluate("document.documentElement.lang") == language
    assert page.tab.title() == catalogue(language).text("page.title", name=_title(page)).unescape()


def _title(page: Opened) -> str:
    return str(page.tab.evaluate("document.title")).split(": ", 1)[1]


def test_a_page_needs_no_script(opened: Open) -> None:
    page = opened("ledger", "en", java_script_enabled=False)
    assert page.tab.locator("#verdict").inner_text().startswith("Result:")
    assert page.tab.locator("figure svg").count() == 4


def test_a_page_would_not_run_a_script(opened: Open) -> None:
    page = opened("wide_run", "en")
    page.tab.set_content(page.tab.content().replace("<main", "<script>document.title = 'x'</script><main"))
    assert page.tab.title() != "x"


@pytest.mark.parametrize("name", ["within", "ledger", *WIDE[1:]])
def test_charts_are_there_and_as_wide_as_their_place(name: str, language: str, opened: Open) -> None:
    for width in (DESKTOP, PHONE):
        charts = opened(name, language, width=width).tab.locator("figure.chart svg")
        assert charts.count() == (5 if name in ("within", "wide_run") else 4)
        for chart in charts.all():
            box = chart.bounding_box()
            assert box["width"] > (300 if width == PHONE else 400)
            assert 0.25 < box["height"] / box["width"] < 1.2


@pytest.mark.parametrize("name", ["within", "unbounded", "ledger", *WIDE[1:]])
def test_what_is_seen_is_what_the_json_says(
    name: str, language: str, opened: Open, request: pytest.FixtureRequest
) -> None:
    page = opened(name, language)
    page.tab.evaluate(OPEN_ALL)
    seen = page.tab.evaluate(
        "[...document.querySelectorAll('td data, th data')].map(one => [one.dataset.at, one.dataset.as, one.innerText])"
    )
    data = json.loads(json.dumps(to_json(reports_of(request)[name])))
    assert len(seen) > 30
    for at, kind, text in seen:
        assert text == catalogue(language).figure(lookup(data, at), kind)


@pytest.mark.parametrize("name", ["within", "wide_ledger"])
def test_everything_is_reached_by_the_keyboard(name: str, opened: Open) -> None:
    tab = opened(name, "en").tab
    wanted = tab.evaluate(
        """[...document.querySelectorAll('a[href], summary, [tabindex="0"]')]
           .filter(one => one.checkVisibility()).map((one, n) => (one.dataset.n = n, one.tagName))"""
    )
    reached = []
    for _ in wanted:
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("Number(document.activeElement.dataset.n)"))
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", "where the focus is cannot be seen"
    assert reached == list(range(len(wanted)))
    assert wanted[0] == "A"


def test_the_keyboard_skips_and_opens(opened: Open) -> None:
    tab = opened("within", "en").tab
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0  # the link to skip shows itself
    tab.keyboard.press("Enter")
    assert tab.url.endswith("#text")
    summary, table = (tab.locator(f"#chart-profile details {part}") for part in ("summary", "table"))
    assert not table.is_visible()
    summary.focus()
    tab.keyboard.press("Enter")
    assert table.is_visible()


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["within", "no_guarantee", "ledger", "wide_run"])
def test_axe_finds_nothing(name: str, width: int, language: str, opened: Open) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
    tab = opened(name, language, width=width, bypass_csp=True).tab
    tab.evaluate(OPEN_ALL)
    found = axe.Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()


TOO_WIDE = """
[...document.querySelectorAll('.scroll, td, th, dd, dt, p, li, h1, h2, h3, h4')]
  .filter(one => one.checkVisibility() && one.clientWidth && one.scrollWidth > one.clientWidth + 1)
  .map(one => `${one.tagName} ${one.scrollWidth} > ${one.clientWidth}: ${one.textContent.trim().slice(0, 60)}`)
"""
SIZES = """
[...document.querySelectorAll('body *')]
  .filter(one => one.checkVisibility() && !['STYLE', 'title', 'desc'].includes(one.tagName)
    && [...one.childNodes].some(part => part.nodeType === 3 && part.textContent.trim()))
  .map(one => {
    const svg = one.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return [scale * parseFloat(getComputedStyle(one).fontSize), one.textContent];
  })
"""
OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true)"


@pytest.mark.parametrize("width", [DESKTOP, 800, PHONE, 320])
@pytest.mark.parametrize("name", ["exceeded", *WIDE])
def test_nothing_is_cut_off(name: str, width: int, language: str, opened: Open) -> None:
    tab = opened(name, language, width=width).tab
    tab.evaluate(OPEN_ALL)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(TOO_WIDE) == [] or width == 320  # so narrow, a table may be scrolled


@pytest.mark.parametrize("name", WIDE)
def test_no_text_is_tiny(name: str, opened: Open) -> None:
    tab = opened(name, "de", width=PHONE).tab
    tab.evaluate(OPEN_ALL)
    sizes = tab.evaluate(SIZES)
    assert len(sizes) > 100
    assert min(sizes)[0] >= 10, min(sizes)


@pytest.mark.parametrize("name", ["exceeded", "no_guarantee", "upper_bound", *WIDE])
def test_it_prints_on_a4(name: str, language: str, opened: Open) -> None:
    tab = opened(name, language, width=A4).tab
    tab.emulate_media(media="print")
    assert tab.evaluate("document.documentElement.scrollWidth") <= A4
    assert tab.evaluate(TOO_WIDE) == []
    assert tab.locator("#page-1").bounding_box()["height"] <= A4_HEIGHT
    assert not tab.locator("nav").is_visible()
    # A table that is folded on the screen is open on paper.
    assert all(one.bounding_box()["height"] > 20 for one in tab.locator("details:not([open]) table").all())
    assert tab.locator("details:not([open]) table").count() > 0
    made = tab.pdf(prefer_css_page_size=True)
    assert made.startswith(b"%PDF-")
