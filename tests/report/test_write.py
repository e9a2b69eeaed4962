"""The two files that a run leaves at its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from fedtune.report import from_run, model, signing
from fedtune.report.page import render
from fedtune.report.page.render import write_report
from fedtune.spec import ConfigError

from .shown import NAMES, reports_of

SCHEMA = Path(model.__file__).parent / "schema" / f"report-{model.SCHEMA_VERSION}.json"


@pytest.fixture(scope="module")
def folder(simulate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(into=tmp_path_factory.mktemp("runs"))


def test_a_run_ends_with_its_report(folder: Path) -> None:
    data = (folder / "report.json").read_bytes()
    report = signing.read(data)
    assert report == from_run.build(folder), "later, the same folder gives the same report"
    assert data.decode() == signing.to_text(report)
    assert (folder / "report.html").read_text() == render.render(report, language="en")
    assert json.loads(data)["schema_version"] == 2


def test_writing_it_again_gives_the_same_bytes(folder: Path) -> None:
    before = [(folder / name).read_bytes() for name in ("report.json", "report.html")]
    write_report(folder)
    assert [(folder / name).read_bytes() for name in ("report.json", "report.html")] == before


def test_an_unknown_language_writes_nothing(folder: Path) -> None:
    before = (folder / "report.html").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"report\.language"):
        write_report(folder, language="xx")
    assert (folder / "report.html").stat().st_mtime_ns == before


def test_a_ledgers_report_needs_no_model() -> None:
    code = (
        "import sys, fedtune.report.from_ledger, fedtune.report.page.render, fedtune.cli.report_commands;"
        "print([name for name in ('torch', 'transformers', 'flwr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_the_published_schema_is_that_of_the_code() -> None:
    if os.environ.get("FEDTUNE_WRITE_GOLDEN"):
        SCHEMA.write_text(model.schema_text())
    assert SCHEMA.read_text() == model.schema_text(), "rewrite it, and raise SCHEMA_VERSION where readers would break"


@pytest.mark.parametrize("name", NAMES)
def test_reports_fit_the_published_schema(name: str, request: pytest.FixtureRequest) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    data = json.loads(signing.to_text(reports_of(request)[name]))
    validator.validate(data)
    assert not validator.is_valid({**data, "epsilon": "much"})
    assert not validator.is_valid({**data, "surprise": 1})


def test_the_report_of_a_run_fits_the_published_schema(folder: Path) -> None:
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(
        json.loads((folder / "report.json").read_bytes())
    )
