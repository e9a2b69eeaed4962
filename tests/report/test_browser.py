"""Pages in headless Chromium: quiet, whole at every width and on paper, and usable without mouse or eyes."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.report.model import to_json
from fedtune.report.page.translations import load_catalog

from . import shown

pytestmark = pytest.mark.nightly

DESKTOP, PHONE = 1280, 390
PHONE_HEIGHT, MAX_SCREENS = 844, 8
MAX_SHEETS = 9  # of A4
A4 = 703  # pixels between the margins of a printed page, and its height but for 5 mm
A4_HEIGHT = 1020
SMALLEST_IN_PRINT = 12  # pixels; 9 pt


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """`opened(name, language, **of_the_context)`: a page, and what it said and asked for."""
    with ExitStack() as contexts:

        def make(name: str, language: str, **options: Any) -> SimpleNamespace:
            path = tmp_path / "report.html"
            path.write_text(shown.render_page(name, language), encoding="utf-8")
            context = browser.new_context(viewport={"width": DESKTOP, "height": 900}, **options)
            contexts.callback(context.close)
            page = SimpleNamespace(tab=context.new_page(), messages=[], requests=[])
            page.tab.on("console", lambda message: page.messages.append(f"{message.type}: {message.text}"))
            page.tab.on("pageerror", lambda error: page.messages.append(str(error)))
            page.tab.on("request", lambda request: page.requests.append(request.url))
            page.tab.goto(path.as_uri())
            return page

        yield make


def resize_tab(tab: Any, width: int) -> Any:
    tab.set_viewport_size({"width": width, "height": 900})
    return tab


OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true)"
FIGURES = (
    "[...document.querySelectorAll('td data, th data')].map(one => [one.dataset.at, one.dataset.as, one.innerText])"
)
TOO_WIDE = """
[...document.querySelectorAll('.scroll, td, th, dd, dt, p, li, h1, h2, h3, h4, figcaption')]
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


@pytest.mark.parametrize("name", shown.NAMES)
def test_page_renders_completely_without_requests_or_console_messages(name: str, language: str, open_page: Any) -> None:
    """On the screen at each width, and then on paper; loading a page takes longer than looking at it."""
    page = open_page(name, language)
    words, report = load_catalog(language), shown.build_reports()[name]
    assert page.tab.evaluate("document.documentElement.lang") == language
    assert page.tab.title() == words.text("page.title", name=report.facts.name).unescape()

    data = json.loads(json.dumps(to_json(report)))
    open_at_first = page.tab.locator("details[open]").count()
    page.tab.evaluate(OPEN_ALL)
    figures = page.tab.evaluate(FIGURES)
    assert len(figures) > 30
    for at, kind, text in figures:
        assert text == words.figure(shown.look_up(data, at), kind)

    for width in (DESKTOP, 800, PHONE, 320):
        tab = resize_tab(page.tab, width)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(TOO_WIDE) == [] or width == 320  # so narrow, a table may be scrolled
        for drawing in tab.locator("figure.chart svg").all() if width in (DESKTOP, PHONE) else ():
            box = drawing.bounding_box()
            assert box["width"] > (300 if width == PHONE else 400)
            assert 0.25 < box["height"] / box["width"] < 1.2
        if width == PHONE:
            fold = "document.querySelectorAll('.part').forEach(one => one.open = {})"
            tab.evaluate(fold.format("false"))
            assert tab.evaluate("document.documentElement.scrollHeight") <= MAX_SCREENS * PHONE_HEIGHT
            tab.evaluate(fold.format("true"))
            sizes = tab.evaluate(SIZES)
            assert len(sizes) > 100
            assert min(sizes)[0] >= 10, min(sizes)

    tab = resize_tab(page.tab, A4)
    tab.evaluate(f"[...document.querySelectorAll('details')].slice({open_at_first}).forEach(one => one.open = false)")
    tab.emulate_media(media="print")
    assert tab.evaluate("document.documentElement.scrollWidth") <= A4
    assert tab.evaluate(TOO_WIDE) == []
    assert tab.locator("#page-1").bounding_box()["height"] <= A4_HEIGHT
    sizes = [element for element in tab.evaluate(SIZES) if element[0] < SMALLEST_IN_PRINT - 0.01]
    assert sizes == []
    margins = re.findall(r"@(?:top|bottom)-[a-z]+ \{[^}]*?([\d.]+)pt", shown.render_page(name, language))
    assert len(margins) == 3, "the banner, the foot and the number of each page"
    assert min(map(float, margins)) >= 9
    assert not any(element.is_visible() for element in tab.locator(".banner").all()), "each page has it in its margin"
    assert not tab.locator("nav").is_visible()
    # A table that is folded on the screen is open on paper.
    assert tab.locator("details:not([open]) table").count() > 0
    assert all(element.bounding_box()["height"] > 20 for element in tab.locator("details:not([open]) table").all())
    assert page.messages == []
    assert page.requests == [page.tab.url]


@pytest.mark.parametrize("name", [name for name in shown.NAMES if name != "wide_run"])
def test_report_takes_at_most_nine_sheets(name: str, language: str, open_page: Any) -> None:
    pages = open_page(name, language).tab.pdf(prefer_css_page_size=True)
    assert 1 < len(re.findall(rb"/Type\s*/Page\b", pages)) <= MAX_SHEETS


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_only_one_scale_is_visible_at_each_width(width: int, open_page: Any) -> None:
    tab = resize_tab(open_page("within", "en").tab, width)
    visible = [element.get_attribute("class") for element in tab.locator("#scale svg").all() if element.is_visible()]
    assert visible == ["narrow" if width == PHONE else "wide"]


def test_details_are_collapsed_on_phones_and_expanded_in_print(open_page: Any) -> None:
    """On a wide screen, and on paper, all of it is there without opening anything."""
    page = open_page("within", "en")
    tables = page.tab.locator("#engineer table").first
    assert tables.is_visible()
    tab = resize_tab(page.tab, PHONE)
    assert not tables.is_visible()
    tab.locator(".part > summary").first.click()
    assert tables.is_visible()
    tab.locator(".part > summary").first.click()
    tab.emulate_media(media="print")
    assert tables.is_visible()


def test_page_works_without_scripts_and_blocks_injected_scripts(open_page: Any) -> None:
    page = open_page("ledger", "en", java_script_enabled=False)
    assert page.tab.locator("#verdict").inner_text().startswith("Was the limit kept?")
    assert page.tab.locator("figure svg").count() == 2
    page = open_page("wide_run", "en")
    assert page.tab.locator("figure svg").count() == 3
    page.tab.set_content(page.tab.content().replace("<main", "<script>document.title = 'x'</script><main"))
    assert page.tab.title() != "x"
    assert page.tab.pdf(prefer_css_page_size=True).startswith(b"%PDF-")


REACHED = """
[...document.querySelectorAll('a[href], summary, [tabindex="0"]')]
  .filter(one => one.checkVisibility()).map((one, n) => (one.dataset.n = n, one.tagName))
"""


def test_keyboard_reaches_and_opens_every_control(open_page: Any) -> None:
    tab = open_page("within", "en").tab
    tags = tab.evaluate(REACHED)
    assert tags[0] == "A"
    for index in range(len(tags)):  # in order, and to be seen when it has the focus
        tab.keyboard.press("Tab")
        assert tab.evaluate("Number(document.activeElement.dataset.n)") == index
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    tab.reload()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0  # the link to skip shows itself
    tab.keyboard.press("Enter")
    assert tab.url.endswith("#text")
    summary, table = (tab.locator(f"#chart-profile details {part}") for part in ("summary", "table"))
    assert not table.is_visible()
    summary.focus()
    tab.keyboard.press("Enter")
    assert table.is_visible()


FAINT = """
(() => {
  const parts = text => (text.match(/^rgba?\\((.*)\\)$/) ?? [, ''])[1].split(',').map(Number);
  const light = rgb => rgb.slice(0, 3).map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, place) => sum + c * [.2126, .7152, .0722][place], 0);
  const ground = light(parts(getComputedStyle(document.body).backgroundColor));
  const contrast = text => {
    const rgb = parts(text);
    if (rgb.length < 3 || rgb[3] === 0) return 0;
    const one = light(rgb);
    return (Math.max(one, ground) + .05) / (Math.min(one, ground) + .05);
  };
  return [...document.querySelectorAll('svg :is(text, path, rect, circle)')]
    .filter(one => one.checkVisibility() && !one.closest('defs') && one.getAttribute('stroke-width') !== '0.6')
    .map(one => {
      const style = getComputedStyle(one), isText = one.tagName === 'text';
      const shown = isText ? contrast(style.fill) : Math.max(contrast(style.fill), contrast(style.stroke));
      return [shown, isText ? 4.5 : 3, one.outerHTML.slice(0, 120)];
    })
    .filter(([shown, least]) => shown > 1.001 && shown < least);
})()
"""
"""What is drawn and cannot be told from the page's ground; grids and empty parts of bars are meant to be faint."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "language"), [("exceeded", "de"), ("used_up", "en"), ("wide_run", "en")])
def test_charts_have_sufficient_contrast_in_light_and_dark_mode(
    name: str, language: str, scheme: str, open_page: Any
) -> None:
    tab = open_page(name, language, color_scheme=scheme).tab
    tab.evaluate(OPEN_ALL)
    ground = "getComputedStyle(document.body).backgroundColor"
    assert (tab.evaluate(ground) == "rgb(255, 255, 255)") == (scheme == "light")
    assert tab.locator("svg text").count() > 20
    assert tab.evaluate(FAINT) == []
    tab.emulate_media(media="print")
    assert tab.evaluate(ground) == "rgb(255, 255, 255)", "paper is light"
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(26, 26, 26)"
    assert tab.evaluate(FAINT) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "language"), [("within", "en"), ("no_guarantee", "de"), ("ledger", "de"), ("wide_run", "en")]
)
def test_axe_reports_no_accessibility_violations(name: str, language: str, scheme: str, open_page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
    page = open_page(name, language, bypass_csp=True, color_scheme=scheme)
    page.tab.evaluate(OPEN_ALL)
    for width in (DESKTOP, PHONE):
        found = axe.Axe().run(resize_tab(page.tab, width))
        assert found.violations_count == 0, found.generate_report()


def test_page_one_answers_span_the_full_width_on_phones(browser: Any, language: str) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.set_content(shown.render_page("within", language))
    widths = tab.evaluate("[...document.querySelectorAll('#page-1 .answer')].map(e => e.clientWidth)")
    tab.close()
    assert min(widths) > 300, "each answer is below its question"
