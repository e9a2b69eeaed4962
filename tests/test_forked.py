"""Forked processes behave like ordinary processes."""

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


def run_forked(*words: str, **options: Any) -> Any:
    with Forked([sys.executable, *words], stdout=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout is not None
        report = json.loads(process.stdout.read())
    assert process.returncode == 0
    assert report["pid"] == process.pid
    return report


def test_forked_command_has_a_separate_folder_environment_and_arguments(tmp_path: Path) -> None:
    about = run_forked("-c", ABOUT, "one", "two", cwd=tmp_path, env={"ONE": "1"}, start_new_session=True)
    assert (about["parent"], about["session"]) == (os.getpid(), about["pid"])
    assert (about["folder"], about["arguments"], about["name"]) == (str(tmp_path), ["-c", "one", "two"], "__main__")
    assert about["environment"]["ONE"] == "1"
    assert "HOME" not in about["environment"]
    assert about["torch"]
    assert about["threads"] == 1
    assert about["files"] <= 4, "the process must have its own streams and folder"
    script = tmp_path / "script.py"
    script.write_text(ABOUT)
    other = run_forked(str(script), "one")
    assert (other["session"], other["folder"]) == (os.getsid(0), os.getcwd())
    assert (other["arguments"], other["path"]) == ([str(script), "one"], str(tmp_path))
    assert other["environment"]["HOME"] == os.environ["HOME"]
    assert other["random"] != about["random"]


WAITS = """
import time
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(5)
"""


@pytest.mark.parametrize(
    ("command", "number", "expected", "output"),
    [
        ((sys.executable, "-c", "raise SystemExit(3)"), None, 3, ""),
        ((sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), None, -signal.SIGKILL, ""),
        ((sys.executable, "-c", "import atexit; atexit.register(print, 'bye')"), None, 0, "bye\n"),
        ((sys.executable, "-c", "raise ValueError('wrong')"), None, 1, "ValueError: wrong\n"),
        ((sys.executable, "-m", "fedtune", "run", "nowhere"), None, 2, "\n"),
        (("sh", "-c", "exit 7"), None, 7, ""),
        ((sys.executable, "-c", WAITS), signal.SIGINT, 5, ""),
        ((sys.executable, "-c", WAITS), signal.SIGTERM, -signal.SIGTERM, ""),
        ((sys.executable, "-c", WAITS), signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_forked_command_exits_and_handles_signals_like_python(
    command: tuple[str, ...], number: Any, expected: int, output: str
) -> None:
    with Forked(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        if number is not None:
            assert process.stdout.readline() == "up\n"
            process.send_signal(number)
        assert process.stdout.read().endswith(output)
    assert process.returncode == expected
