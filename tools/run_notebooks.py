"""Run the notebooks in docs/notebooks and store their outputs in them.

python tools/run_notebooks.py                       runs every notebook
python tools/run_notebooks.py first_run votes       runs the notebooks of these names
python tools/run_notebooks.py --check first_run     runs it, writes nothing; exit code 1 if an output has changed

A notebook runs in an empty folder, and its outputs are stored without what depends on the machine or the day: paths,
addresses in memory, timings and standard error.  A cell with the tag `varies` prints figures that fresh noise changes
in every run; of its outputs only the kinds are compared.  Pictures need not have equal bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
TIMEOUT_S = 1800
VARIES = "varies"
_PICTURES = ("image/svg+xml", "image/png")
_SLOW = "fedtune: loading libraries ...\n"
"""What a command prints on a slow machine only."""
_BEST_FIRST = (*_PICTURES, "text/html", "text/plain")
"""Of the forms of one output only the first is stored."""


def run_notebook(path: Path, folder: Path) -> Any:
    """Run a notebook in a folder, and return it with normalized outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    import nbformat  # not imported for what reads stored outputs alone
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=TIMEOUT_S, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return normalize_notebook(notebook, folder)


def list_environment(folder: Path) -> dict[str, str]:
    """List the environment variables of a run: Jupyter's own files in `folder`, and this Python's commands first."""
    hidden = {name: str(folder / ".jupyter") for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")}
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**hidden, "PATH": commands, "COLUMNS": "100"}


def normalize_notebook(notebook: Any, folder: Path) -> Any:
    """Remove from a notebook's outputs what depends on the machine or the day, and return the notebook."""
    notebook.metadata = {
        "fedtune": {"sources_sha256": hash_sources(notebook)},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(codes, start=1):
        cell.execution_count = number
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in ("alt", "tags")}
        cell.outputs = _join_streams(_normalize_output(one, folder) for one in cell.outputs)
        for output in cell.outputs:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
    return notebook


def hash_sources(notebook: Any) -> str:
    """Hash the source of the code cells, so that outputs of other sources can be told."""
    codes = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(codes).encode()).hexdigest()


def list_differences(stored: Any, fresh: Any) -> list[str]:
    """Compare the outputs of two runs of a notebook, and return one line for each cell that differs."""
    lines = []
    for one, other in zip(stored["cells"], fresh["cells"], strict=True):
        if one["cell_type"] != "code":
            continue
        varies = VARIES in one["metadata"].get("tags", ())
        before, after = (list_output_texts(cell, varies=varies) for cell in (one, other))
        if before != after:
            lines.append(f"cell {one['id']}: stored {before}, now {after}")
    return lines


def list_output_texts(cell: Any, *, varies: bool) -> list[tuple[str, str]]:
    """List the outputs of a cell as pairs of kind and text; a text that varies, and a picture, is empty."""
    texts = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            texts.append((output["name"], "" if varies else "".join(output["text"])))
        for kind, data in output.get("data", {}).items():
            texts.append((kind, "" if varies or kind in _PICTURES else "".join(data)))
    return texts


def _normalize_output(output: Any, folder: Path) -> Any:
    output = {key: value for key, value in output.items() if key != "transient"}
    if output["output_type"] == "stream":
        return {**output, "text": _hide_machine(output["text"], folder)}
    data = output["data"]
    kind = next(kind for kind in _BEST_FIRST if kind in data)
    text = data[kind] if kind == "image/png" else _hide_machine(data[kind], folder)
    return {**output, "data": {kind: text}, "metadata": {}}


def _hide_machine(text: str, folder: Path) -> str:
    """Replace paths of this machine and addresses in memory; remove colors, and notices of slowness."""
    text = text.replace("\r\n", "\n").replace(_SLOW, "")
    for place, name in ((folder.resolve(), "."), (folder, "."), (Path.home(), "~")):
        text = text.replace(str(place), name)
    text = re.sub(r"<style scoped>.*?</style>\n?", "", text, flags=re.DOTALL)  # pandas' own, for one table each
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colors
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", text)


def _join_streams(outputs: Iterable[Any]) -> list[Any]:
    """Join neighboring pieces of standard output, whose division depends on time, and drop standard error."""
    joined: list[Any] = []
    for output in outputs:
        if output.get("name") == "stderr" or output.get("text") == "":
            continue
        if joined and "name" in output and joined[-1].get("name") == output["name"]:
            joined[-1]["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def main() -> int:
    """Run notebooks; write their outputs, or compare them."""
    import nbformat

    parser = argparse.ArgumentParser(description="Run the notebooks in docs/notebooks and store their outputs.")
    parser.add_argument("names", nargs="*", help="names of notebooks, such as first_run (default: all)")
    parser.add_argument("--check", action="store_true", help="compare outputs with the stored ones, and write nothing")
    options = parser.parse_args()
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"unknown notebook {', '.join(unknown)}; known are {', '.join(known)}")
    failed = False
    for name in options.names or known:
        with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
            os.environ |= list_environment(Path(folder))
            fresh = run_notebook(known[name], Path(folder))
        if options.check:
            lines = list_differences(nbformat.read(known[name], as_version=4), fresh)
            failed = failed or bool(lines)
            sys.stderr.writelines(f"{name}: {line}\n" for line in lines)
        else:
            nbformat.write(nbformat.from_dict(fresh), known[name])
        print(f"{name}: ran")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
