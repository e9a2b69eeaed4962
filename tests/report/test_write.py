"""The two files that a run leaves at its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from fedtune.report import from_run, model, signing
from fedtune.report.page import render
from fedtune.report.page.render import write_report
from fedtune.spec import ConfigError

from .shown import NAMES, reports_of

SCHEMA = Path(model.__file__).parent / "schema" / f"report-{model.SCHEMA_VERSION}.json"


def test_a_run_ends_with_its_report(run_folder: Path) -> None:
    data = (run_folder / "report.json").read_bytes()
    report = signing.read(data)
    assert report == from_run.build(run_folder), "later, the same run_folder gives the same report"
    assert data.decode() == signing.to_text(report)
    assert (run_folder / "report.html").read_text() == render.render(report, language="en")
    assert json.loads(data)["schema_version"] == 2


def test_writing_it_again_gives_the_same_bytes(run_folder: Path) -> None:
    before = [(run_folder / name).read_bytes() for name in ("report.json", "report.html")]
    write_report(run_folder)
    assert [(run_folder / name).read_bytes() for name in ("report.json", "report.html")] == before


def test_an_unknown_language_writes_nothing(run_folder: Path) -> None:
    before = (run_folder / "report.html").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"report\.language"):
        write_report(run_folder, language="xx")
    assert (run_folder / "report.html").stat().st_mtime_ns == before


def test_a_ledgers_report_needs_no_model() -> None:
    code = (
        "import sys, fedtune.report.from_ledger, fedtune.report.page.render, fedtune.cli.report;"
        "print([name for name in ('torch', 'transformers', 'flwr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", NAMES)
def test_reports_fit_the_published_schema(name: str, request: pytest.FixtureRequest) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    data = json.loads(signing.to_text(reports_of(request)[name]))
    validator.validate(data)
    assert not validator.is_valid({**data, "epsilon": "much"})
    assert not validator.is_valid({**data, "surprise": 1})


def test_the_report_of_a_run_fits_the_published_schema(run_folder: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert list(validator.iter_errors(json.loads((run_folder / "report.json").read_bytes()))) == []
