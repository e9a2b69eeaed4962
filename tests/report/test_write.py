"""The two files that a run leaves at its end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.report import from_run, page, signing
from fedtune.report.write import write_report
from fedtune.spec import ConfigError


@pytest.fixture(scope="module")
def folder(simulate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(into=tmp_path_factory.mktemp("runs"))


def test_a_run_ends_with_its_report(folder: Path) -> None:
    data = (folder / "report.json").read_bytes()
    report = signing.read(data)
    assert report == from_run.build(folder), "later, the same folder gives the same report"
    assert data.decode() == signing.to_text(report)
    assert (folder / "report.html").read_text() == page.render(report, language="en")
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
        "import sys, fedtune.report.from_ledger;"
        "print([name for name in ('torch', 'transformers', 'flwr', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
