"""Runs pytest again and again in children of one process that has the large libraries in memory; fedtune never is.

Importing torch and its kin takes longer than most of the tests that kill a mutant.  One request a line on standard
input, one answer a line on standard output:

    {"tree": FOLDER, "arguments": [...], "environment": {...}, "output": FILE, "models": true, "limit_s": 300.0}
    ->  {"code": 1}

`code` is pytest's exit status, or null for a child that ran out of time.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from typing import Any

_LIBRARIES = ("pytest", "numpy", "scipy.stats", "hypothesis", "dp_accounting.pld")
_OF_MODELS = ("torch", "transformers", "peft", "opacus")
"""Imported for the first request with models."""


def main() -> None:
    """Answer until standard input ends."""
    _import(_LIBRARIES)
    for line in sys.stdin:
        request = json.loads(line)
        _import(_OF_MODELS if request["models"] else ())
        child = os.fork()
        if child == 0:
            _become_pytest(request)
        print(json.dumps({"code": _waited(child, limit_s=request["limit_s"])}), flush=True)


def _import(libraries: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in libraries:
            importlib.import_module(name)
    assert not any(name.split(".")[0] in ("fedtune", "tests") for name in sys.modules)


def _become_pytest(request: dict[str, Any]) -> None:
    """In the child: the environment that a new process would have, then pytest; does not return."""
    code = 3
    try:
        os.setsid()
        os.chdir(request["tree"])
        os.umask(0o022)  # a test of a service may have left another, under which a file's mode shows no fault
        os.environ.clear()
        os.environ.update(request["environment"])
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        sys.path[0] = request["tree"]  # in the place of this file's folder
        import pytest

        code = int(pytest.main(request["arguments"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _waited(child: int, *, limit_s: float) -> int | None:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with whatever the tests started
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    main()
