"""Runs pytest again and again in children of one process that has the large libraries in memory; fedtune never is.

Importing torch and its kin takes longer than most of the tests that kill a mutant.  One request a line on standard
input, one answer a line on standard output:

    {"tree": FOLDER, "arguments": [...], "environment": {...}, "output": FILE, "module": MODULE, "report": FILE,
     "models": true, "limit_s": 300.0}
    ->  {"code": 1}

`code` is pytest's exit status, or null for a child that ran out of time.  The report says of which file the module is,
and what failed first, and how.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_LIBRARIES = ("numpy", "scipy.stats", "hypothesis", "dp_accounting.pld")
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
            _run_pytest(request)
        print(json.dumps({"code": _wait_for_child(child, limit_s=request["limit_s"])}), flush=True)


def _import(libraries: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in libraries:
            importlib.import_module(name)
    assert not any(name.split(".")[0] in ("fedtune", "tests") for name in sys.modules)


class Witness:
    """A plugin of pytest that writes down what the harness needs."""

    def __init__(self, *, module: str, report: str) -> None:
        self.module, self.report, self.passed = module, Path(report), 0
        self.failed: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed and not self.failed:
            # A strict xfail that passes fails without an exception.
            kind = call.excinfo.typename if call.excinfo else "Failed"
            self.failed = {"test": report.nodeid, "when": report.when, "exception": kind}
        self.passed += report.passed and report.when == "call"
        return report

    def pytest_sessionfinish(self) -> None:
        file = importlib.import_module(self.module).__file__
        self.report.write_text(json.dumps({"file": file, "passed": self.passed, **self.failed}))


def _run_pytest(request: dict[str, Any]) -> None:
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
        witness = Witness(module=request["module"], report=request["report"])
        code = int(pytest.main(request["arguments"], plugins=[witness]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait_for_child(child: int, *, limit_s: float) -> int | None:
    ended, _, _ = select.select([handle := os.pidfd_open(child)], [], [], limit_s)
    os.close(handle)
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with whatever the tests started
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    main()
