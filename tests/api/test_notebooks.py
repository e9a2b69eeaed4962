"""Notebooks in docs/notebooks, and an application that uses fedtune as a library."""

import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from ..conftest import run_python

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_executes_without_errors(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / ".jupyter"))
    client = NotebookClient(
        nbformat.read(path, as_version=4), timeout=1800, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()


def test_example_application_selects_the_smallest_sufficient_epsilon(tmp_path: Path) -> None:
    application = shutil.copy(DOCS / "notebooks" / "application.py", tmp_path)
    assert len(Path(application).read_text().splitlines()) <= 40
    printed = run_python(application, "debug", "--needs", "0", "--epsilon", "1", "8", cwd=tmp_path)
    assert printed.splitlines()[-1].startswith("epsilon 1: ")
    assert (tmp_path / "runs" / "debug-at-1" / "report.html").is_file()
    assert not (tmp_path / "runs" / "debug-at-8").exists(), "a weaker promise was not needed"
