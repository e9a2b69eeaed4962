import contextlib
import errno
import gc
import importlib
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import pytest

from fedtune.cli.command import SETTINGS_OPTIONS, pause_garbage_collection
from fedtune.cli.main import fedtune, main
from fedtune.spec import RefusedError, RunError
from fedtune.version import __version__

from ..conftest import REPOSITORY, parse_command, run_command, run_python
from . import snapshots


def test_version_includes_a_digest_of_the_source_code(tmp_path: Path) -> None:
    assert re.fullmatch(rf"fedtune {re.escape(__version__)}\+[0-9a-f]{{12}}\n", run_command("--version").printed)
    package = shutil.copytree(REPOSITORY / "fedtune", tmp_path / "fedtune")
    script = "from fedtune.version import build; print(build())"

    def print_build() -> str:
        return run_python("-c", script, cwd=tmp_path).strip()

    same = print_build()
    assert run_command("--version").printed == f"fedtune {same}\n"
    with (package / "formatting.py").open("a") as file:
        file.write("# another build\n")
    assert print_build() != same


@snapshots.parametrize_mistakes("mistakes-words")
def test_invalid_command_line_prints_one_line_and_exits_with_code_two(typed: str) -> None:
    message = run_command(*typed.split()).failed()
    snapshots.check_message("mistakes-words", typed, message)
    assert message.endswith(" --help)")


@pytest.mark.parametrize("words", ["-m a=1 b=2", "a=1 -m b=2", "a=1 b=2 -m", "a=1 --multirun b=2"])
def test_overrides_are_accepted_before_and_after_a_flag(words: str) -> None:
    parsed = parse_command("simulate", *words.split())
    assert (parsed["overrides"], parsed["multirun"]) == (("a=1", "b=2"), True)


@pytest.mark.parametrize("name", ["simulate", "plan", "run", "search", "audit"])
def test_experiment_file_and_epsilon_have_short_forms(name: str) -> None:
    parsed = parse_command(name, "own/tickets.yaml", "seed=1", "--epsilon", "3")
    words = parsed.get("overrides", parsed.get("words"))
    assert words == ("experiment=own/tickets.yaml", "seed=1", "privacy.epsilon=3")


def test_short_form_expands_to_its_settings(tmp_path: Path) -> None:
    (tmp_path / "tickets.yaml").write_text("defaults: [debug]\nname: tickets\n")
    short = run_command("simulate", str(tmp_path / "tickets.yaml"), "--epsilon", "3", "--cfg", "job").printed
    long = run_command("simulate", f"experiment={tmp_path}/tickets.yaml", "privacy.epsilon=3", "--cfg", "job").printed
    assert short == long
    assert "epsilon: 3" in short


@snapshots.parametrize_mistakes("mistakes-short-forms")
def test_short_form_conflicts_with_its_long_form(typed: str) -> None:
    snapshots.check_message("mistakes-short-forms", typed, run_command(*typed.split()).failed())


def test_command_parameters_match_their_function_signatures() -> None:
    context = click.Context(fedtune)
    for name in fedtune.list_commands(context):
        group = fedtune.get_command(context, name)
        for command in group.commands.values() if isinstance(group, click.Group) else [group]:
            signature = inspect.signature(command.callback).parameters
            params = [each.name for each in command.params if each not in SETTINGS_OPTIONS]
            names = [name for name, each in signature.items() if each.kind is not each.VAR_KEYWORD]
            assert params[: len(names)] == names
            assert len(params) == len(names) or len(names) < len(signature), "the others are passed by keyword"


@pytest.mark.parametrize(("error", "code"), [(RunError("few"), 1), (RefusedError("no"), 3), (KeyboardInterrupt(), 1)])
def test_error_types_have_distinct_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.api.compose.compose_run", Mock(side_effect=error))
    assert run_command("simulate").failed(code) == (str(error) or "interrupted")


def start_python(*words: str, to: Any = subprocess.PIPE, closed: str = "", **variables: str) -> tuple[int, str, str]:
    """Run Python in a subprocess with the stream `closed` closed; return its exit code and output."""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    pipes = {"stdout": to, "stderr": subprocess.PIPE, "timeout": 300, "cwd": REPOSITORY}
    process = subprocess.run(command, env=environment, check=False, encoding="latin-1", **pipes)
    return process.returncode, process.stdout or "", process.stderr


def test_help_and_errors_avoid_slow_imports() -> None:
    slow = ("torch", "hydra", "dp_accounting", "numpy", "pydantic", "rich", "cryptography", "jinja2")
    _, out, err = start_python(
        "-c",
        "import sys; from fedtune.cli.main import main\n"
        "for words in ([], ['site'], ['site', 'doctor'], ['server', 'start'], ['model-hash'], ['simulate']):\n"
        "    assert main([*words, '--help']) == 0\n"
        f"imported = [name for name in {slow} if name in sys.modules]\n"
        "for name in 'plan audit evaluate ledger report provision run'.split(): assert main([name, '--help']) == 0\n"
        "assert main(['plan', 'experiment=debug', 'privacy.noise_multiplier=4.0', 'name=x']) == 0\n"
        "model_libs = [name for name in ('torch', 'transformers', 'peft', 'flwr', 'opacus') if name in sys.modules]\n"
        "print(main(['simulate', 'privacy.epsilon=0']), imported, model_libs, 'flwr' in sys.modules)",
    )
    assert out.endswith("\n2 [] [] False\n"), err
    assert err == "fedtune: privacy.epsilon = 0.0: must be a finite number greater than 0\n"


class Terminal(io.StringIO):
    """Stub of a terminal stream."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


def test_slow_import_prints_a_message_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_slowly(name: str) -> Any:
        assert screen.written.wait(60), "the message is printed during the import"
        return importlib.import_module(name)

    monkeypatch.setattr("sys.stderr", screen := Terminal())
    monkeypatch.setattr("fedtune.cli.main._LOADING_S", 0.0)
    monkeypatch.setattr("fedtune.cli.main.import_module", import_slowly)
    assert fedtune.get_command(click.Context(fedtune), "ledger") is not None
    assert screen.getvalue() == "fedtune: loading libraries ...\n"


def test_closed_output_stream_causes_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    result = start_python("-m", "fedtune", "site", "template", to=write)
    os.close(write)
    assert result == (1, "", "")
    for closed in (">&-", "2>&-"):
        assert start_python("-m", "fedtune", "model-hash", "--help", closed=closed)[0] == 0


def test_flower_telemetry_is_disabled_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    code = "import os; import fedtune.flower; print(os.environ['FLWR_TELEMETRY_ENABLED'])"
    assert start_python("-c", code)[1] == "0\n"
    assert start_python("-c", code, FLWR_TELEMETRY_ENABLED="1")[1] == "1\n"


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_collection_is_paused_during_imports(was_on: bool) -> None:
    before = gc.isenabled()
    (gc.enable if was_on else gc.disable)()
    try:
        with contextlib.suppress(ImportError), pause_garbage_collection():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is was_on
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize(("new", "frozen"), [(0, False), (200, True)])
def test_imported_library_objects_are_frozen_for_garbage_collection(
    new: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen_at: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen_at.append(len(sys.modules)))
    with pause_garbage_collection():
        for number in range(new):
            monkeypatch.setitem(sys.modules, f"library_module_{number}", sys)
    assert bool(frozen_at) is frozen


@pytest.mark.nightly
@pytest.mark.by_day("ascii")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_unencodable_characters_are_printed_as_question_marks(encoding: str) -> None:
    code, out, err = start_python("-m", "fedtune", "data", "check", "experiment=debug", PYTHONIOENCODING=encoding)
    assert (code, err) == (0, "")
    assert "??????" in out, "a bar"
    code, out, err = start_python("-m", "fedtune", "d\u0101nce", PYTHONIOENCODING=encoding)
    assert (code, out, err) == (2, "", "fedtune: No such command 'd?nce' (see fedtune --help)\n")


def test_full_disk_is_named_in_the_error_message(
    site_with_history: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hint = "free some space and run the command again"
    with open("/dev/full", "wb") as full:
        assert start_python("-m", "fedtune", "--version", to=full) == (1, "", f"fedtune: the disk is full: {hint}\n")
    folder = tmp_path / "disk"
    folder.mkdir()
    target = folder / "ledger.json"
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "nobody")
    monkeypatch.setattr("fedtune.privacy.durable.os.fsync", Mock(side_effect=error))
    message = run_command("ledger", "export", str(site_with_history.ledger), "--output", str(target)).failed(1)
    assert message == f"the disk is full: no room for {target}: {hint}"
    assert list(folder.iterdir()) == []


def test_errors_are_wrapped_on_a_terminal_and_one_line_in_logs(narrow_terminal: None) -> None:
    for words in (["simulate", "privacy.epsilon=0", "--surely"], ["report", "none"], ["simulate", "privacy.epsilon=0"]):
        with contextlib.redirect_stderr(terminal := Terminal()):
            assert main(words) == 2
        assert snapshots.find_wide_lines(terminal.getvalue()) == []
        assert terminal.getvalue().split() == f"fedtune: {run_command(*words).failed()}".split()


@pytest.mark.parametrize("command", ["ledger spent", "ledger verify", "report", "report verify", "gate"])
def test_path_with_a_name_that_no_file_system_has_is_invalid_input(command: str) -> None:
    assert "xxx" in run_command(*command.split(), "x" * 300).failed(2)
