"""Applies a fault to a copy of the tree, runs the tests that are to find it there, and says which one did.

A kill is a test that ran and failed on what it expects.  A fault that breaks the import, a fixture or the interpreter
is none, nor is a timeout; and the same tests must pass on an unchanged copy.
"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Rotten(Exception):
    """The text that a mutant replaces is no longer there exactly once: the mutant shows nothing until it is mended."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A fault that somebody could really make."""

    name: str  # in lower case with hyphens
    fault: str  # what is wrong, in one sentence; and where it was seen, if it was
    file: str  # under the root of the repository
    old: str  # text of that file, which must occur exactly once
    new: str  # what stands there instead
    tests: tuple[str, ...]  # files, or single tests, that are run until one fails; the quickest first

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py").replace("/", ".")

    def mutate_file(self, root: Path = ROOT) -> str:
        """The file's text with the fault.

        Raises:
            Rotten: what is to be replaced does not occur exactly once.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        found = text.count(self.old)
        if found != 1:
            raise Rotten(f"mutant {self.name}: its text occurs {found} times in {self.file}, and must occur once")
        return text.replace(self.old, self.new)


MUTANTS: dict[str, Mutant] = {
    name: Mutant(name=name, **{**fault, "tests": tuple(fault["tests"])})
    for path in sorted((Path(__file__).parent / "faults").glob("*.toml"))
    for name, fault in tomllib.loads(path.read_text(encoding="utf-8")).items()
}
QUICK = ("no-noise",)
"""Found by a test of a second or two that needs no torch."""

TIME_LIMIT_S = 300.0
_LEFT_OUT = (".*", "__pycache__", "*.egg-info")
_LEFT_OUT_AT_THE_TOP = ("runs", "dist", "outputs", "multirun")
_WITHOUT_MODELS = ("tests/privacy/", "tests/test_spec_module.py", tempfile.gettempdir())
"""Tests that need no torch."""
_OPTIONS = ("-x", "-q", "-m", "nightly or not nightly", "-p", "no:cacheprovider")
# A test that ends in one of these says that the mutated code is broken, not that it is caught.
_CRASHES = {
    *("AttributeError", "ImportError", "IndentationError", "ModuleNotFoundError", "NameError", "SyntaxError"),
    *("TypeError", "UnboundLocalError"),
}


class NoResult(Exception):
    """The harness could not tell: tests that fail without a fault, a fault that breaks the code, a timeout."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a run of some tests came to."""

    code: int | None  # pytest's exit status; None: out of time
    file: str = ""  # of the module that was mutated, as the tests imported it
    passed: int = 0  # tests that passed
    test: str = ""  # node id of the first failure
    when: str = ""  # "setup", "call" or "teardown"
    exception: str = ""  # its type
    seconds: float = 0.0
    output: str = ""


def find_killer(mutant: Mutant, seen: Seen, *, tree: Path) -> str | None:
    """The test that found the fault; None for a survivor.

    Raises:
        NoResult: the run shows neither.
    """
    if seen.code is None:
        raise NoResult(f"{mutant.name}: no result within {TIME_LIMIT_S:g} s")
    if Path(seen.file) != (tree / mutant.file).resolve():
        raise NoResult(f"{mutant.name}: the tests imported {seen.file or 'nothing'}\n{seen.output}")
    if seen.code == 0 and seen.passed:
        return None
    if seen.code != 1 or not seen.test or seen.when != "call" or seen.exception in _CRASHES:
        how = f"{seen.exception} in the {seen.when} of {seen.test}" if seen.test else f"exit status {seen.code}"
        raise NoResult(f"{mutant.name}: broken instead of caught: {how}\n{seen.output}")
    return seen.test


def evaluate_mutant(mutant: Mutant) -> tuple[str | None, float]:
    """The test that kills `mutant`, or None, and the seconds that took.

    Raises:
        Rotten: its text is no longer there.
        NoResult: neither killed nor survived; or the tests up to the killing one fail without the fault, too.
    """
    with _copy() as tree:
        target = tree / mutant.file
        target.write_text(mutant.mutate_file(tree), encoding="utf-8")
        seen = _run(mutant.tests, tree, module=mutant.module)
        found = find_killer(mutant, seen, tree=tree)
    for tests in mutant.tests:
        _require_passing_tests(tests)
        if found is not None and found.startswith(tests):
            break
    return found, seen.seconds


@cache
def _require_passing_tests(tests: str) -> None:
    """Raise NoResult unless `tests` pass on an unchanged copy."""
    with _copy() as tree:
        seen = _run((tests,), tree, module="fedtune")
    if seen.code != 0 or not seen.passed:
        raise NoResult(f"{tests} must pass without a fault, and does not: {seen.test}\n{seen.output}")


@contextmanager
def _copy() -> Iterator[Path]:
    """The tree, without what git ignores, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder).resolve() / "tree"
        everywhere, at_the_top = (shutil.ignore_patterns(*names) for names in (_LEFT_OUT, _LEFT_OUT_AT_THE_TOP))

        def list_ignored(folder: str, names: list[str]) -> set[str]:
            return everywhere(folder, names) | (at_the_top(folder, names) if Path(folder) == ROOT else set())

        shutil.copytree(ROOT, tree, ignore=list_ignored)
        yield tree


def _run(tests: Sequence[str], tree: Path, *, module: str) -> Seen:
    """Run `tests` in `tree`, in a process that imports fedtune from there."""
    report, output = tree.parent / "seen.json", tree.parent / "output.txt"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
        "PYTHONPATH": str(tree),  # before the installed package, in every process that a test starts
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    request = {
        "tree": str(tree),
        # A library that the fork server has imported may be a plugin whose own assertions pytest would like to rewrite.
        "arguments": [*_OPTIONS, "-W", "ignore::pytest.PytestAssertRewriteWarning", *tests],
        "environment": environment,
        "output": str(output),
        "module": module,
        "report": str(report),
        "models": not all(test.startswith(_WITHOUT_MODELS) for test in tests),
        "limit_s": TIME_LIMIT_S,
    }
    began = time.monotonic()
    code = _ask_server(request)
    seconds, last = time.monotonic() - began, output.read_text(errors="replace")[-3000:]
    fields = json.loads(report.read_text()) if report.exists() else {}
    return Seen(code=code, seconds=seconds, output=last, **fields)


def _ask_server(request: dict[str, object]) -> int | None:
    """The fork server's answer."""
    server = _start_server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    line = server.stdout.readline()
    if not line:
        raise NoResult("the fork server ended")
    code = json.loads(line)["code"]
    assert code is None or isinstance(code, int)
    return code


@cache
def _start_server() -> subprocess.Popen[str]:
    """One for this process; it ends when its standard input does."""
    path = Path(__file__).with_name("fork_server.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    server = subprocess.Popen(
        [sys.executable, str(path)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # which closes its input
    return server
