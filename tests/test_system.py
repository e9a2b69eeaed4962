"""fedtune on systems without Linux features, as far as they can be simulated on Linux."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.api.compose import compose_run

from .conftest import REPOSITORY, run_python

MODULES = ("fcntl", "grp", "pwd", "resource")
NAMES = (
    *("geteuid", "getuid", "getegid", "fchmod", "fchown", "O_NOFOLLOW", "sched_getaffinity", "getgrouplist"),
    *("setgroups", "setregid", "setreuid"),
)
OF_ROOT = {"getgrouplist", "setgroups", "setregid", "setreuid", "getuid"}
"""What `fedtune/ops/files.py` uses to act as another account, which requires root."""

WINDOWS = f"""
import asyncio, fcntl, os, socket, subprocess, sys, tempfile, types
flags = {{"LK_LOCK": fcntl.LOCK_EX, "LK_NBLCK": fcntl.LOCK_EX | fcntl.LOCK_NB}}
sys.modules["msvcrt"] = types.SimpleNamespace(locking=lambda at, flag, size, lock=fcntl.flock: lock(at, flag), **flags)
for name in {MODULES}:
    sys.modules[name] = None
kept = {{name: getattr(os, name) for name in {NAMES}}}
for name in kept:
    delattr(os, name)
known, sys.platform = sys.platform, "win32"
import fedtune.system
sys.platform = known
assert fedtune.system.effective_user() == -1
"""
"""The start of a program that simulates Python on Windows; other libraries still see Linux."""


def test_platform_checks_are_confined_to_the_system_module() -> None:
    pattern = re.compile(
        r"^ *(import|from) (fcntl|grp|pwd|resource|msvcrt)\b|sys\.platform|os\.name\b|AF_UNIX|SO_PEERCRED", re.MULTILINE
    )
    for path in (REPOSITORY / "fedtune").rglob("*.py"):
        if path.name == "system.py":
            continue
        source = path.read_text()
        assert not pattern.search(source), path
        used = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
        missing = {name for name in NAMES if f"os.{name}" in used}
        assert missing <= (OF_ROOT if path.name == "files.py" else set()), path


def test_text_files_are_opened_with_an_encoding() -> None:
    for path in (REPOSITORY / "fedtune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr="write_text"), args=[_], keywords=[]):
                    pytest.fail(f"{path}:{node.lineno}: write_text() takes the machine's encoding")


def test_python_without_assertions_is_refused() -> None:
    done = subprocess.run([sys.executable, "-O", "-c", "import fedtune"], capture_output=True, text=True, check=False)
    assert (done.returncode, "cannot run with python -O" in done.stderr) == (1, True)


def test_commands_and_ledger_work_without_linux_modules(tmp_path: Path) -> None:
    code = f"""{WINDOWS}
from pathlib import Path
from fedtune.cli.main import main
from fedtune.federation.run_folder import RunFolder
from fedtune.ops.files import get_account_name
from fedtune.ops.services.lead_and_server import find_running_process
from fedtune.privacy.durable import lock_folder
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.spec import ConfigError
from tests.privacy.builders import make_key, make_policy, make_proposal, train

assert main(["--help"]) == 0
assert main(["simulate", "experiment=debug", "--cfg", "job"]) == 0
train(SiteLedger(Path("ledger.db"), make_policy(), make_key(1), create=True), make_proposal(), 1, 2)
assert len(verify(Path("ledger.db")).history.count_total_charges()) == 1
folder = RunFolder(Path.cwd())
with folder.hold_lock():
    assert folder.is_running
    try:
        with folder.hold_lock():
            raise AssertionError("two processes hold one folder")
    except ConfigError as error:
        assert "is in use: wait until its run ends" in str(error)
assert not folder.is_running
with lock_folder(Path.cwd()):
    assert Path(".lock").exists()
Path("running.json").write_text('{{"pid": 1}}')
assert find_running_process(Path.cwd()) is None
print(get_account_name(7))
"""
    printed = run_python("-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert "Usage: fedtune" in printed
    assert "experiment" in printed
    assert printed.endswith("\n7\n")


@pytest.mark.nightly
def test_run_finishes_without_linux_modules(tmp_path: Path) -> None:
    # torch and transformers need the removed functions on Linux; fedtune.system has already read them.
    code = f"""{WINDOWS}
for name, value in kept.items():
    setattr(os, name, value)
for name in {MODULES}:
    del sys.modules[name]
from fedtune.cli.main import main
sys.exit(main(["simulate", "experiment=debug", "name=one"]))
"""
    printed = run_python("-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert "peak memory" not in printed
    assert (tmp_path / "runs/one/run.json").is_file()


@pytest.mark.nightly
@pytest.mark.parametrize(("system", "missing"), [("darwin", set()), ("win32", OF_ROOT - {"getuid"})])
def test_type_checks_pass_on_other_platforms(system: str, missing: set[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--platform", system, "--cache-dir", str(tmp_path)]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    errors = [line for line in output.splitlines() if ": error: " in line]
    assert {name for line in errors for name in re.findall(r'no attribute "(\w+)"', line)} == missing
    assert all(line.startswith("fedtune/ops/files.py") for line in errors)


@pytest.mark.parametrize("path", [r"C:\data\train.csv", "C:/data/train.csv", r"\\server\share\train.csv"])
def test_windows_paths_are_valid_settings(path: str) -> None:
    config = compose_run(["experiment=debug", f"data.train_file={path}", f"tracking.output_dir={path}"])
    assert (config.data.train_file, config.tracking.output_dir) == (path, path)
