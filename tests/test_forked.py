"""Forked processes are processes like any other."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .forked import Forked

ABOUT = """
import json, os, sys, threading, numpy
print(json.dumps({
    "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "folder": os.getcwd(), "name": __name__,
    "arguments": sys.argv, "path": sys.path[0], "environment": dict(os.environ), "torch": "torch" in sys.modules,
    "threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd")), "random": numpy.random.random(),
}))
"""


def told(*words: str, **options: Any) -> Any:
    with Forked([sys.executable, *words], stdout=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout is not None
        about = json.loads(process.stdout.read())
    assert process.returncode == 0
    assert about["pid"] == process.pid
    return about


def test_it_is_a_new_process_with_its_own_folder_environment_and_arguments(tmp_path: Path) -> None:
    about = told("-c", ABOUT, "one", "two", cwd=tmp_path, env={"ONE": "1"}, start_new_session=True)
    assert (about["parent"], about["session"]) == (os.getpid(), about["pid"])
    assert (about["folder"], about["arguments"], about["name"]) == (str(tmp_path), ["-c", "one", "two"], "__main__")
    assert about["environment"]["ONE"] == "1"
    assert "HOME" not in about["environment"]
    assert about["torch"]
    assert about["threads"] == 1
    assert about["files"] <= 4, "its three streams, and the folder that it reads"
    script = tmp_path / "script.py"
    script.write_text(ABOUT)
    other = told(str(script), "one")
    assert (other["session"], other["folder"]) == (os.getsid(0), os.getcwd())
    assert (other["arguments"], other["path"]) == ([str(script), "one"], str(tmp_path))
    assert other["environment"]["HOME"] == os.environ["HOME"]
    assert other["random"] != about["random"]


@pytest.mark.parametrize(
    ("code", "expected", "error"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(print, 'bye', file=sys.stderr)", 0, "bye\n"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
    ],
)
def test_it_ends_as_python_does(code: str, expected: int, error: str) -> None:
    with Forked([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == expected
    assert said.endswith(error)


def test_it_takes_signals() -> None:
    code = """
import time
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(5)
"""
    for number, expected in ((signal.SIGINT, 5), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
        with Forked([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            process.send_signal(number)
        assert process.returncode == expected


def test_fedtune_and_other_commands() -> None:
    with Forked([sys.executable, "-m", "fedtune", "run", "nowhere"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 2, said
    with Forked(["sh", "-c", "exit 7"]) as process:
        pass
    assert process.returncode == 7
