"""The live page in headless Chromium: quiet, up to date while a run goes on, and usable by everybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.working_folder import only_one

from .test_browser import DESKTOP, FAINT, OPEN_ALL, PHONE, TOO_WIDE, tabbed
from .watched import MadeRun, Served, served

NORTH = ("federation.num_sites=3", "federation.num_rounds=10", "federation.site_names=[north-hospital,south,west]")


def made(name: str, folder: Path) -> MadeRun:
    """A run in one of the states."""
    match name:
        case "preparing":
            return MadeRun.at(folder)
        case "deployed":
            run = MadeRun.at(folder, "runtime.kind=deployment", *NORTH).begin()
            run.ask().finish_round({"west": "no_reply"}).ask().answer("south", "update", seconds=60)
            return run.answer("west", "awaiting_approval", seconds=50)
        case "no_privacy":
            return MadeRun.at(folder, "privacy=none", "privacy.noise_multiplier=null").begin().ask().finish_round()
        case "wide":
            run = MadeRun.at(folder, "federation.num_sites=12", "federation.num_rounds=100").begin()
            for _ in range(45):
                run.finish_round({"site-4": "no_reply", "site-7": "ledger_behind_receipt"})
            return run.ask()
        case _:
            run = MadeRun.at(folder, *NORTH).begin()
            for failed in ({}, {}, {"west": "max_epsilon"}):
                run.ask().finish_round(failed)
            return run.ask()


@dataclass
class Opened:
    """A page, the run that it shows, and what it said and asked for."""

    tab: Any
    run: MadeRun
    page: Served
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    context: Any = None

    def updated(self, expression: str) -> None:
        """Wait until the page's script has made this true; what would wait within the page is not let in there."""
        for _ in range(300):
            if self.tab.evaluate(expression):
                return
            self.tab.wait_for_timeout(100)
        raise AssertionError(expression)


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """`opened(state, language, **of_the_context)`."""
    with ExitStack() as stack:

        def make(name: str, language: str = "en", **options: Any) -> Opened:
            run = made(name, tmp_path / name)
            stack.enter_context(only_one(run.folder))
            page = stack.enter_context(served(run.folder, language=language))
            context = browser.new_context(viewport={"width": DESKTOP, "height": 900}, **options)
            stack.callback(context.close)
            found = Opened(context.new_page(), run, page, context=context)
            found.tab.on("console", lambda message: found.messages.append(f"{message.type}: {message.text}"))
            found.tab.on("pageerror", lambda error: found.messages.append(str(error)))
            found.tab.on("request", lambda asked: found.requests.append(asked.url))
            found.tab.goto(page.address)
            return found

        yield make


def test_the_page_follows_the_run_quietly(opened: Open) -> None:
    page = opened("running")
    tab, run, origin = page.tab, page.run, page.page.origin
    assert tab.title() == "3 of 10 rounds · running"
    line = "document.querySelector('[data-part=epsilon] svg').outerHTML"
    before = tab.evaluate(line)
    run.finish_round({"south": "paused"})
    page.updated("document.title.startsWith('4 of 10')")
    assert "4 of 10 rounds are done." in tab.locator("[data-part=phase]").inner_text()
    newest = tab.locator("[data-part=failures] tbody tr").first.text_content()
    assert newest.split() == ["4", "south", "the", "site", "is", "paused"]
    assert tab.evaluate(line) != before, "the chart has one more point"
    tab.evaluate("document.querySelector('[data-part=failures]').firstElementChild.dataset.mine = 'yes'")
    run.ask(5)
    page.updated("document.querySelector('[data-part=phase]').innerText.includes('Round 5 is under way')")
    assert tab.locator("[data-part=sites] tbody tr").first.inner_text().count("at most") == 1
    assert tab.locator("[data-part=failures] > [data-mine]").count() == 1, "a part that did not change is left alone"
    assert page.messages == []
    assert page.requests[:2] == [page.page.address, f"{origin}/"]
    assert set(page.requests[2:]) == {f"{origin}/state"}
    assert tab.url == f"{origin}/", "the token is not in the address that stays"
    assert tab.evaluate("document.cookie") == "", "no script reads it"


def test_what_somebody_opened_and_focused_stays_so(opened: Open) -> None:
    page = opened("running")
    summary = page.tab.locator("[data-part=epsilon] summary").first
    summary.focus()
    page.tab.keyboard.press("Enter")
    page.run.finish_round()
    page.updated("document.title.startsWith('4 of 10')")
    assert page.tab.locator("[data-part=epsilon] table").first.is_visible()
    assert page.tab.locator("[data-part=epsilon] figure tbody tr").count() == 4
    assert page.tab.evaluate("document.activeElement.tagName") == "SUMMARY"
    assert page.tab.evaluate("document.activeElement.closest('[data-part]').dataset.part") == "epsilon"


def test_without_contact_the_page_says_so_and_finds_back(opened: Open) -> None:
    page = opened("running")
    assert not page.tab.locator("#lost").is_visible()
    page.context.set_offline(True)
    page.tab.wait_for_selector("#lost", state="visible", timeout=30_000)
    page.context.set_offline(False)
    page.tab.wait_for_selector("#lost", state="hidden", timeout=30_000)


def test_it_works_without_javascript(opened: Open) -> None:
    page = opened("running", java_script_enabled=False)
    assert page.tab.locator("[data-part=phase]").inner_text().startswith("Running")
    assert page.tab.locator("figure svg").count() == 3
    assert "loads itself again" in page.tab.locator("header").inner_text()
    assert page.tab.locator("meta[http-equiv=refresh]").get_attribute("content") == "10"
    page.run.finish_round()
    page.tab.reload()
    assert "4 of 10 rounds" in page.tab.locator("[data-part=phase]").inner_text()


def test_no_other_script_or_style_would_run_and_problems_are_text(opened: Open) -> None:
    page = opened("running")
    page.tab.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "document.title = 'x'";
          document.body.append(script);
          document.body.insertAdjacentHTML("beforeend", "<img src='data:,x' onerror=\\"document.title = 'x'\\">");
        }"""
    )
    page.tab.wait_for_timeout(300)
    assert page.tab.title() != "x"
    refused = page.tab.evaluate("fetch('http://localhost:9/').then(() => 'went out', error => 'refused')")
    assert refused == "refused"
    assert [one for one in page.requests if ":9/" in one] == []
    (page.run.folder / "checkpoints/round-0003.safetensors").write_bytes(b"<script>document.title = 'x'</script>")
    page.updated("document.querySelector('[data-part=marks]').innerText.includes('cannot be read')")
    assert page.tab.locator("[data-part] script").count() == 0
    assert "3 of 10 rounds are done." in page.tab.locator("[data-part=phase]").inner_text()


@pytest.mark.parametrize(
    ("name", "language"),
    [("wide", "en"), ("wide", "de"), ("deployed", "de"), ("no_privacy", "en"), ("preparing", "de")],
)
def test_nothing_is_cut_off_and_everybody_can_use_it(name: str, language: str, opened: Open) -> None:
    """On a light screen and on a dark one."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
    tab = opened(name, language, bypass_csp=True).tab
    assert tab.evaluate("document.documentElement.lang") == language
    assert tabbed(tab)[0] == "A"
    if name == "no_privacy":
        box = tab.locator(".verdict.no_guarantee")
        assert "No noise was added, so nothing hides a single record." in box.inner_text()
        assert box.bounding_box()["y"] < tab.locator("#heading-progress").bounding_box()["y"]
    tab.evaluate(OPEN_ALL)
    for width in (DESKTOP, 800, PHONE):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(TOO_WIDE) == []
        for chart in tab.locator("figure svg").all():
            assert chart.bounding_box()["width"] > (300 if width == PHONE else 340)
        for scheme in ("light", "dark") if width != 800 else ():
            tab.emulate_media(color_scheme=scheme)
            assert tab.evaluate(FAINT) == []
            found = axe.Axe().run(tab)
            assert found.violations_count == 0, found.generate_report()
