"""The page of a run that goes on: what marks it, when it is written, and that it costs a run nothing."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.cli.command import ReportedInterrupt
from fedtune.cli.interruptible_run import run_simulation
from fedtune.config import read_saved_config
from fedtune.federation.lead import Checkpoints, LeadState
from fedtune.report import from_run, run_page
from fedtune.report.page.render import render
from fedtune.report.page.translations import load_catalog
from fedtune.report.run_page import UnfinishedReport
from fedtune.runs.run_paths import find_run_folder
from fedtune.show.run_progress import Display

from ..conftest import list_tiny_overrides


@pytest.fixture
def state(folder: Path) -> LeadState:
    """Of a run after its last round, before its own report."""
    (folder / "report.html").unlink()
    return Checkpoints(folder / "checkpoints", read_saved_config(folder).digest()).load()


def read_page(folder: Path) -> str:
    return (folder / "report.html").read_text()


def write_at_once(folder: Path) -> UnfinishedReport:
    page = UnfinishedReport(folder, read_saved_config(folder))
    page._due = 0.0
    return page


def test_unfinished_page_shows_its_state_and_reloads(folder: Path, state: LeadState) -> None:
    before = (folder / "report.json").read_bytes()
    write_at_once(folder).update(state)
    html = read_page(folder)
    assert f"Round {state.round} of {state.round}" in html
    assert "is running" in html
    assert re.search(r"Written \d+ \w+ \d{4}", html)
    assert f'<meta http-equiv="refresh" content="{run_page.AGAIN_S}">' in html
    assert load_catalog("en").texts["unfinished"]["no_verdict"] in html
    finished_page = render(from_run.build_run_report(folder), language="en")
    for part in ('id="sign-off"', 'id="to-do"', 'id="verdict"'):
        assert part in finished_page
        assert part not in html, "a run that goes on has neither a verdict nor lines to sign"
    for heading in ("learns", "costs"):
        assert load_catalog("en").texts["unfinished"][heading] in html
    assert html.count("<svg") in (2, 3), "the bar, the cost, and what it learns unless each round has the same score"
    assert (folder / "report.json").read_bytes() == before, "figures are written once, at the end"


def test_existing_page_is_kept_and_write_errors_are_only_logged(folder: Path, state: Any, caplog: Any) -> None:
    (folder / "report.html").write_text("the one before")
    UnfinishedReport(folder, read_saved_config(folder)).stop()
    assert read_page(folder) == "the one before"
    page = write_at_once(folder)
    (folder / "config.yaml").write_text("no: settings\n")
    page.update(state)
    assert read_page(folder) == "the one before"
    assert re.search(r"report\.html was not written after round \d+: ConfigError", caplog.text)
    assert "settings" not in caplog.text


def test_run_stopped_before_its_first_round_writes_no_page(folder: Path, state: LeadState, caplog: Any) -> None:
    page = write_at_once(folder)
    page.update(replace(state, round=0, rounds=()))
    page.stop()
    assert not (folder / "report.html").exists()
    assert caplog.text == ""


def test_page_writing_takes_a_small_share_of_the_time(
    folder: Path, state: LeadState, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, started = 0.0, []

    def write(self: UnfinishedReport, state: LeadState, *, goes_on: bool) -> None:
        nonlocal now
        now += 2.0
        started.append(state.round)

    monkeypatch.setattr(run_page.time, "monotonic", lambda: now)
    monkeypatch.setattr(UnfinishedReport, "_write_page", write)
    page = UnfinishedReport(folder, read_saved_config(folder))
    for number in range(1, 31):
        now += 5.0
        page.update(replace(state, round=number))
    assert started == [4, 12, 20, 28], "each takes 2 s, so that the next comes 40 s after it"


def simulate_and_see(words: list[str], patched: Any, *, interrupt_after: int = 0) -> tuple[Path, list[str]]:
    """A run whose page is due after each round, and its page then."""
    patched.setattr(run_page, "_SHARE", 0)
    config, pages, finished = compose_run(words), [], Display.on_round_finished
    folder = find_run_folder(config)

    def see(self: Display, state: LeadState) -> None:
        finished(self, state)
        pages.append(read_page(folder))
        if len(pages) == interrupt_after:
            raise KeyboardInterrupt

    patched.setattr(Display, "on_round_finished", see)
    with pytest.raises(ReportedInterrupt) if interrupt_after else contextlib.nullcontext():
        run_simulation(config, folder, Console(file=io.StringIO()))
    return folder, pages


@pytest.mark.by_day("en-Round {} of 3")
@pytest.mark.parametrize(("language", "text"), [("en", "Round {} of 3"), ("de", "Runde {} von 3")])
def test_page_is_written_after_every_round(tmp_path: Path, monkeypatch: Any, language: str, text: str) -> None:
    words = list_tiny_overrides("federation.num_rounds=3", f"report.language={language}", into=tmp_path)
    folder, pages = simulate_and_see(words, monkeypatch)
    assert [text.format(number) in page for number, page in enumerate(pages, 1)] == [True, True, True]
    assert 'id="state"' not in read_page(folder)


def test_interrupted_run_leaves_a_page_with_its_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, pages = simulate_and_see(
        list_tiny_overrides("federation.num_rounds=3", into=tmp_path), monkeypatch, interrupt_after=1
    )
    assert "refresh" in pages[0]
    assert "has stopped" in read_page(folder)
    assert "Round 1 of 3" in read_page(folder)
    assert "refresh" not in read_page(folder)
