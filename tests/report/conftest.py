"""Reports of a real run and a real ledger, and others on file whose figures agree; all that are made once."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from fedtune.privacy.site_policy import Policy
from fedtune.report import from_ledger, from_run
from fedtune.report.facts import LedgerFacts, RunFacts
from fedtune.report.model import Report
from fedtune.report.page.catalogue import LANGUAGES
from fedtune.report.rederive import derive

from ..books import Books

CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser")
"""The first that is there is taken; a page takes the first a third of the work of the second."""


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Headless Chromium, for all tests of this folder; its event loop would be in the way of others."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def _on_file(name: str) -> Callable[..., Report]:
    facts: TypeAdapter[RunFacts | LedgerFacts] = TypeAdapter(RunFacts | LedgerFacts)
    path = Path(__file__).parent / "reports" / f"{name}.json"
    return partial(replace, derive(facts.validate_json(path.read_bytes(), strict=True)))


@pytest.fixture(scope="session")
def a_report() -> Callable[..., Report]:
    """`a_report(**changes)`: a run at two sites, one of which was charged a round less."""
    return _on_file("run")


@pytest.fixture(scope="session")
def a_report_without_privacy() -> Callable[..., Report]:
    """The same without noise, at one site."""
    return _on_file("run_without_privacy")


@pytest.fixture(scope="session")
def a_secure_report() -> Callable[..., Report]:
    """`a_secure_report(**changes)`: three rounds of secure sums at five sites, of which one may collude."""
    return _on_file("secure")


@pytest.fixture(scope="session")
def a_ledger_report() -> Callable[..., Report]:
    """`a_ledger_report(**changes)`: a site with two ended runs, the second with noised scores."""
    return _on_file("ledger")


@pytest.fixture(scope="session")
def run_folder(simulate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run at two sites of different sizes; tests that change it take a copy."""
    return simulate("data.declared_sizes=[80,90]", into=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture
def books(tmp_path: Path, site_policy: Callable[..., Policy]) -> Callable[..., Books]:
    """`books(**changes)`: those of a new site, whose policy has these changes."""
    wide = {"limits": {"min_noise_multiplier": 1.0, "max_rounds": 50}}
    return lambda **changes: Books.made(tmp_path / "site", site_policy(**wide | changes))


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    """Each in which there are pages."""
    return str(request.param)


@pytest.fixture(scope="session")
def of_run(run_folder: Path) -> Report:
    """Its report."""
    return from_run.build(run_folder)


@pytest.fixture(scope="session")
def of_ledger(
    site_policy: Callable[..., Policy], run_proposal: Any, tmp_path_factory: pytest.TempPathFactory
) -> Report:
    """The report of a site with two open runs."""
    books = Books.made(tmp_path_factory.mktemp("sites") / "a", site_policy(limits={"max_rounds": 50}))
    books.charge(run_proposal(), 1, 2)
    books.charge(run_proposal(run="s"), 1)
    return from_ledger.build(books.site_toml)
