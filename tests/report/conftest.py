"""Reports of a real run and a real ledger, and others on file whose figures agree; all that are made once."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.report import from_ledger, from_run
from fedtune.report.model import Report
from fedtune.report.page.translations import LANGUAGES

from ..books import Books
from ..conftest import make_site_policy, run_proposal, simulate
from .shown import load_report_on_file

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


# `a_report(**changes)`: a run at two sites, one of which was charged a round less; the same without noise at one site;
# three rounds of secure aggregation at five sites, of which one may collude; a ledger of two runs, one with noised
# scores.
_run = pytest.fixture(scope="session", name="a_report")(lambda: load_report_on_file("run"))
_without = pytest.fixture(scope="session", name="a_report_without_privacy")(
    lambda: load_report_on_file("run_without_privacy")
)
_secure = pytest.fixture(scope="session", name="a_secure_report")(lambda: load_report_on_file("secure"))
_ledger = pytest.fixture(scope="session", name="a_ledger_report")(lambda: load_report_on_file("ledger"))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run at two sites of different sizes; tests that change it take a copy."""
    return simulate("data.declared_sizes=[80,90]", into=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture
def books(tmp_path: Path) -> Callable[..., Books]:
    """`books(**changes)`: those of a new site, whose policy has these changes."""
    wide = {"limits": {"min_noise_multiplier": 1.0, "max_rounds": 50}}
    return lambda **changes: Books.made(tmp_path / "site", make_site_policy(**wide | changes))


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def run_report(run_folder: Path) -> Report:
    return from_run.build_run_report(run_folder)


@pytest.fixture(scope="session")
def ledger_report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a site with two open runs."""
    books = Books.made(tmp_path_factory.mktemp("sites") / "a", make_site_policy(limits={"max_rounds": 50}))
    books.charge(run_proposal(), 1, 2)
    books.charge(run_proposal(run="s"), 1)
    return from_ledger.build_ledger_report(books.site_toml)
