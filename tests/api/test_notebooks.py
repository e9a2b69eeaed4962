"""Notebooks in docs/notebooks with their stored outputs, and an application that uses fedtune as a library."""

import ast
import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ..conftest import REPOSITORY, run_python
from ..test_site import load_tool

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
MAX_BYTES = 1_500_000
"""Of all notebooks together, so that a clone stays small."""
PICTURES = ("image/svg+xml", "image/png")
LOCAL_PATHS = ("/tmp/", "/root", "/home/", "/Users/", str(REPOSITORY))

tool = load_tool("run_notebooks")
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read_notebook(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def list_code_cells(path: Path) -> list[Any]:
    return [cell for cell in read_notebook(path)["cells"] if cell["cell_type"] == "code"]


@by_name
def test_stored_outputs_belong_to_the_code_and_show_pictures(path: Path) -> None:
    notebook, cells = read_notebook(path), list_code_cells(path)
    assert any(cell["outputs"] for cell in cells), f"run python tools/run_notebooks.py {path.stem}"
    assert notebook["metadata"]["fedtune"]["sources_sha256"] == tool.hash_sources(notebook), (
        f"run python tools/run_notebooks.py {path.stem}"
    )
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    kinds = [kind for output in outputs for kind in output.get("data", ["stream"])]
    assert any(kind in PICTURES for kind in kinds), "a notebook shows at least one picture"
    assert any(kind in ("text/html", "text/plain", "stream") for kind in kinds)


@by_name
def test_stored_pictures_can_be_read_and_have_a_description(path: Path) -> None:
    for cell in list_code_cells(path):
        for kind, data in ((k, d) for output in cell["outputs"] for k, d in output.get("data", {}).items()):
            if kind in PICTURES:
                assert len(cell["metadata"]["alt"]) > 20, cell["id"]
            if kind == "image/png":
                assert base64.b64decode("".join(data)).startswith(b"\x89PNG"), cell["id"]
            if kind == "image/svg+xml":
                assert "<svg" in "".join(data), cell["id"]


@by_name
def test_notebooks_contain_no_local_paths(path: Path) -> None:
    assert [prefix for prefix in LOCAL_PATHS if prefix in path.read_text(encoding="utf-8")] == []


@by_name
def test_notebooks_import_existing_names(path: Path) -> None:
    for cell in list_code_cells(path):
        lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith("!")]
        for node in ast.parse("\n".join(lines)).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedtune"):
                exec(compile(ast.Module([node], []), str(path), "exec"), {})


def test_notebooks_are_small() -> None:
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MAX_BYTES


def make_notebook(*outputs: Any, tags: tuple[str, ...] = ()) -> Any:
    import nbformat

    cell = nbformat.v4.new_code_cell("1 + 1", id="one", outputs=[nbformat.from_dict(output) for output in outputs])
    cell.metadata = {"tags": list(tags), "execution": {"iopub.status.busy": "2026-01-01T00:00:00Z"}}
    return nbformat.v4.new_notebook(cells=[cell])


def make_stream(text: str, name: str = "stdout") -> dict[str, str]:
    return {"output_type": "stream", "name": name, "text": text}


def make_result(**data: str) -> dict[str, Any]:
    by_type = {kind.replace("_", "/", 1): text for kind, text in data.items()}
    return {"output_type": "execute_result", "execution_count": 9, "data": by_type, "metadata": {}}


def test_normalized_outputs_have_no_paths_colors_times_or_standard_error(tmp_path: Path) -> None:
    outputs = [
        make_stream(f"in {tmp_path}/runs: "),
        make_stream("slow", "stderr"),
        make_stream("fedtune: loading libraries ...\r\n"),
        make_stream("\x1b[1mbold\x1b[0m <object at 0x7f00c0ffee00>"),
        make_result(text_html="<style scoped>\n\n</style>\n<table></table>", text_plain="a table"),
    ]
    (cell,) = tool.normalize_notebook(make_notebook(*outputs), tmp_path).cells
    assert cell.metadata == {"tags": []}
    assert [output.get("text") for output in cell.outputs] == ["in ./runs: bold <object at 0x...>", None]
    assert (cell.outputs[1]["data"], cell.outputs[1]["execution_count"]) == ({"text/html": "<table></table>"}, 1)


@pytest.mark.parametrize(
    ("before", "after", "tags", "differs"),
    [
        (make_stream("epsilon 8"), make_stream("epsilon 9"), (), True),
        (make_stream("accuracy 8"), make_stream("accuracy 9"), ("varies",), False),
        (make_stream("accuracy 8"), make_result(text_plain="9"), ("varies",), True),
        (make_result(image_png="one"), make_result(image_png="other"), (), False),
        (make_result(image_png="one"), make_result(text_plain="no picture"), (), True),
    ],
    ids=["text", "text-that-varies", "kind-that-varies", "bytes-of-a-picture", "missing-picture"],
)
def test_outputs_are_compared_by_text_or_kind(
    before: Any, after: Any, tags: tuple[str, ...], differs: bool, tmp_path: Path
) -> None:
    stored, fresh = (tool.normalize_notebook(make_notebook(output, tags=tags), tmp_path) for output in (before, after))
    assert bool(tool.list_differences(stored, fresh)) is differs


@pytest.mark.nightly
@by_name
def test_notebook_prints_its_stored_outputs_again(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "stock_flower" and shutil.which("ssh-keygen") is None:
        pytest.skip("Flower's keys need ssh-keygen")
    for name, value in tool.list_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    fresh = tool.run_notebook(path, tmp_path)
    assert tool.list_differences(read_notebook(path), fresh) == []


@pytest.mark.nightly
def test_example_application_selects_the_smallest_sufficient_epsilon(tmp_path: Path) -> None:
    application = shutil.copy(DOCS / "notebooks" / "application.py", tmp_path)
    assert len(Path(application).read_text().splitlines()) <= 40
    output = run_python(application, "debug", "--needs", "0", "--epsilon", "1", "8", cwd=tmp_path)
    assert output.splitlines()[-1].startswith("epsilon 1: ")
    assert (tmp_path / "runs" / "debug-at-1" / "report.html").is_file()
    assert not (tmp_path / "runs" / "debug-at-8").exists(), "a weaker guarantee was not needed"
