"""The live page in headless Chromium: quiet, up to date while a run goes on, and usable by everybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.run_folder import only_one
from fedtune.report.page.catalogue import LANGUAGES, catalogue

from .shown import lookup
from .watched import MadeRun, Served, served

DESKTOP, PHONE = 1280, 390
NORTH = ("federation.num_sites=3", "federation.num_rounds=10", "federation.site_names=[north-hospital,south,west]")
STATES = ("running", "deployed", "preparing", "finished", "stopped", "seeded", "no_privacy", "wide")


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
        case "seeded":
            return MadeRun.at(folder, "runtime.seeded_noise=true").begin().ask().finish_round()
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
    run: Any
    page: Served
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    context: Any = None

    def state(self) -> Any:
        """What the page's own script would get now."""
        return self.tab.evaluate("fetch('/state').then(answer => answer.json())")["state"]

    def updated(self, expression: str) -> None:
        """Wait until the page's script has made this true; what would wait within the page is not let in there."""
        for _ in range(300):
            if self.tab.evaluate(expression):
                return
            self.tab.wait_for_timeout(100)
        raise AssertionError(expression)


Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def finished(simulate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run."""
    return simulate(into=tmp_path_factory.mktemp("runs"), name="finished")


@pytest.fixture
def opened(browser: Any, tmp_path: Path, finished: Path) -> Iterator[Open]:
    """`opened(state, language, width=..., **of_the_context)`."""
    with ExitStack() as stack:

        def make(name: str, language: str = "en", *, width: int = DESKTOP, **options: Any) -> Opened:
            run = None if name == "finished" else made(name, tmp_path / name)
            folder = finished if run is None else run.folder
            if name not in ("finished", "stopped"):
                stack.enter_context(only_one(folder))
            page = stack.enter_context(served(folder, language=language))
            context = browser.new_context(viewport={"width": width, "height": 900}, **options)
            stack.callback(context.close)
            found = Opened(context.new_page(), run, page, context=context)
            found.tab.on("console", lambda message: found.messages.append(f"{message.type}: {message.text}"))
            found.tab.on("pageerror", lambda error: found.messages.append(str(error)))
            found.tab.on("request", lambda asked: found.requests.append(asked.url))
            found.tab.goto(page.address)
            return found

        yield make


@pytest.mark.parametrize("name", STATES)
def test_a_page_is_quiet_and_asks_its_own_origin_alone(name: str, opened: Open) -> None:
    page = opened(name)
    with page.tab.expect_response(f"{page.page.origin}/state"):
        pass
    page.tab.wait_for_timeout(100)
    assert page.messages == []
    assert page.requests[:2] == [page.page.address, f"{page.page.origin}/"]
    assert set(page.requests[2:]) == {f"{page.page.origin}/state"}
    assert page.tab.url == f"{page.page.origin}/", "the token is not in the address that stays"
    assert page.tab.evaluate("document.cookie") == "", "no script reads it"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", STATES)
def test_what_is_seen_is_what_the_state_says(name: str, language: str, opened: Open) -> None:
    page = opened(name, language)
    page.tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    seen = page.tab.evaluate(
        "[...document.querySelectorAll('data')].map(one => [one.dataset.at, one.dataset.as, one.innerText])"
    )
    state, words = page.state(), catalogue(language)
    assert len(seen) > 8
    for at, kind, text in seen:
        if not at.startswith("/left"):  # which time has passed since
            assert text == words.figure(lookup(state, at), kind), at
    assert page.tab.evaluate("document.documentElement.lang") == language
    sites = page.tab.locator("[data-part=sites] tbody th").all_inner_texts()
    assert sites == [site["site"] for site in state["sites"]]


def test_the_page_follows_the_run(opened: Open) -> None:
    page = opened("running")
    tab, run = page.tab, page.run
    assert tab.title() == "3 of 10 rounds · running"
    line = "document.querySelector('[data-part=epsilon] svg').outerHTML"
    before = tab.evaluate(line)
    run.finish_round({"south": "paused"})
    page.updated("document.title.startsWith('4 of 10')")
    assert "4 of 10 rounds are done." in tab.locator("[data-part=phase]").inner_text()
    assert tab.locator("[data-part=failures] tbody tr").first.inner_text().split() == [
        "4",
        "south",
        "the",
        "site",
        "is",
        "paused",
    ]
    assert tab.evaluate(line) != before, "the chart has one more point"
    run.ask(5)
    page.updated("document.querySelector('[data-part=phase]').innerText.includes('Round 5 is under way')")
    assert tab.locator("[data-part=sites] tbody tr").first.inner_text().count("at most") == 1
    assert page.messages == []


def test_what_somebody_opened_and_focused_stays_so(opened: Open) -> None:
    page = opened("running")
    summary = page.tab.locator("[data-part=epsilon] summary")
    summary.focus()
    page.tab.keyboard.press("Enter")
    page.run.finish_round()
    page.updated("document.title.startsWith('4 of 10')")
    assert page.tab.locator("[data-part=epsilon] table").is_visible()
    assert page.tab.locator("[data-part=epsilon] tbody tr").count() == 4
    assert page.tab.evaluate("document.activeElement.tagName") == "SUMMARY"
    assert page.tab.evaluate("document.activeElement.closest('[data-part]').dataset.part") == "epsilon"


def test_parts_that_did_not_change_are_left_alone(opened: Open) -> None:
    page = opened("running")
    page.run.finish_round()
    page.updated("document.title.startsWith('4 of 10')")
    page.tab.evaluate("document.querySelector('[data-part=failures]').firstElementChild.dataset.mine = 'yes'")
    page.run.finish_round()
    page.updated("document.title.startsWith('5 of 10')")
    assert page.tab.locator("[data-part=failures] > [data-mine]").count() == 1


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


def test_no_other_script_or_style_would_run(opened: Open) -> None:
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


def test_names_and_problems_are_text(opened: Open) -> None:
    page = opened("running")
    (page.run.folder / "checkpoints/round-0003.safetensors").write_bytes(b"<script>document.title = 'x'</script>")
    page.updated("document.querySelector('[data-part=marks]').innerText.includes('cannot be read')")
    assert page.tab.locator("[data-part] script").count() == 0
    assert "3 of 10 rounds are done." in page.tab.locator("[data-part=phase]").inner_text()


@pytest.mark.parametrize(("name", "words"), [
    ("no_privacy", "No noise was added, so nothing hides a single record."),
    ("seeded", "a study, not a protected run"),
])  # fmt: skip
def test_what_is_no_promise_stands_above_all(name: str, words: str, opened: Open) -> None:
    page = opened(name)
    box = page.tab.locator(".verdict.no_guarantee")
    assert box.locator("h2").inner_text() == "No guarantee"
    assert words in box.inner_text()
    assert box.bounding_box()["y"] < page.tab.locator("#heading-progress").bounding_box()["y"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", STATES)
def test_it_claims_nothing_that_only_people_can(name: str, language: str, opened: Open) -> None:
    text = opened(name, language).tab.locator("body").inner_text().lower()
    for word in ("anonym", "complian", "konform", "guaranteed", "✓", "✔"):
        assert word not in text


@pytest.mark.parametrize("name", ["running", "wide"])
def test_everything_is_reached_by_the_keyboard(name: str, opened: Open) -> None:
    tab = opened(name).tab
    wanted = tab.evaluate(
        """[...document.querySelectorAll('a[href], summary, [tabindex="0"]')]
           .filter(one => one.checkVisibility()).map((one, n) => (one.dataset.n = n, one.tagName))"""
    )
    assert wanted[0] == "A"
    for place in range(len(wanted)):
        tab.keyboard.press("Tab")
        assert tab.evaluate("Number(document.activeElement.dataset.n)") == place
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize(("name", "language"), [(name, LANGUAGES[n % 2]) for n, name in enumerate(STATES)])
def test_axe_finds_nothing(name: str, language: str, width: int, opened: Open) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
    tab = opened(name, language, width=width, bypass_csp=True).tab
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    found = axe.Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()


TOO_WIDE = """
[...document.querySelectorAll('.scroll, td, th, p, li, h1, h2, figcaption')]
  .filter(one => one.checkVisibility() && one.clientWidth && one.scrollWidth > one.clientWidth + 1)
  .map(one => `${one.tagName} ${one.scrollWidth} > ${one.clientWidth}: ${one.textContent.trim().slice(0, 60)}`)
"""


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("width", [DESKTOP, 800, PHONE])
@pytest.mark.parametrize("name", ["wide", "deployed", "no_privacy"])
def test_nothing_is_cut_off(name: str, width: int, language: str, opened: Open) -> None:
    tab = opened(name, language, width=width).tab
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(TOO_WIDE) == []
    for chart in tab.locator("figure svg").all():
        assert chart.bounding_box()["width"] > (300 if width == PHONE else 340)
