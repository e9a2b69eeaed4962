"""Logs contain no data of records, but the information that a site's IT needs."""

import ast
import gc
import io
import json
import logging
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.data.records import iter_records
from fedtune.data.spec import DataSpec
from fedtune.ops import logs
from fedtune.ops.logs import LEVELS, Level, configure_logs
from fedtune.privacy.release import Reason, Refused
from fedtune.spec import ConfigError, DataError, RunError
from fedtune.tasks.registry import get_task

from ..conftest import restore_logging

PACKAGE = Path(__file__).parents[2] / "fedtune"
CANARY = "CANARY-7319"
own = logging.getLogger("fedtune.tests")


class Lines(list[dict[str, Any]]):
    text = ""


@contextmanager
def capture_log(level: Level = "info") -> Iterator[Lines]:
    """Return the log lines of the block, after checking that they do not contain the canary."""
    stream, lines = io.StringIO(), Lines()
    with restore_logging(), redirect_stderr(stream):
        configure_logs(level)
        yield lines
    lines.text = stream.getvalue()
    assert CANARY not in lines.text
    lines.extend(map(json.loads, lines.text.splitlines()))


def log_failure(fails: Callable[[], None], logger: logging.Logger = own) -> None:
    try:
        fails()
    except Exception:
        logger.exception("it failed")


def raise_number_error() -> None:
    int(CANARY)


def raise_with_note(error: Exception) -> None:
    error.add_note(CANARY)
    raise error


def raise_from_number(error: Exception) -> None:
    """Raise an exception whose cause quotes a record."""
    try:
        raise_number_error()
    except ValueError as cause:
        raise error from cause


def raise_chain() -> None:
    raise_from_number(RuntimeError(f"row {CANARY}"))


def raise_while_handling() -> None:
    try:
        raise_number_error()
    except ValueError:
        {}[CANARY]


def raise_group() -> None:
    errors: list[Exception] = []
    for fails in (raise_number_error, raise_chain):
        try:
            fails()
        except Exception as error:
            errors.append(error)
    raise ExceptionGroup(CANARY, errors)


FAILURES: dict[str, Callable[[], object]] = {
    "a_number": raise_number_error,
    "an_undeclared_label": lambda: raise_with_note(
        DataError("train.csv line 3, column 'label'", CANARY, "must be one of the labels")
    ),
    "a_file": lambda: Path(f"/nowhere/{CANARY}").read_text(),
    "a_chain": raise_chain,
    "a_hidden_cause": lambda: raise_from_number(ConfigError("data.columns", "letter", "must contain numbers")),
    "while_another_was_handled": raise_while_handling,
    "a_group": raise_group,
}


@pytest.mark.parametrize("name", ["fedtune.tests", "flwr", "torch.nn", "asyncio", "root"])
@pytest.mark.parametrize("fails", FAILURES.values(), ids=FAILURES)
def test_log_contains_exception_frames_but_no_exception_text(fails: Callable[[], None], name: str) -> None:
    with capture_log() as lines:
        log_failure(fails, logging.getLogger(name))
    (line,) = lines
    assert line["level"] == "error"
    assert any(f" {fails.__name__}" in frame for frame in line["error"]["frames"])
    assert all("/" not in frame for frame in line["error"]["frames"] if "test_logs.py" in frame)


def test_log_includes_causes_and_shortens_recursion_and_cycles() -> None:
    def recurse() -> None:
        recurse()

    first, second = ValueError(CANARY), KeyError(CANARY)
    first.__cause__, second.__cause__ = second, first
    with capture_log() as lines:
        for fails in (raise_chain, raise_while_handling, raise_group, recurse):
            log_failure(fails)
        own.error("a ring", exc_info=first)
    chain, context, group, deep, ring = (line["error"] for line in lines)
    assert len(deep["frames"]) <= 40
    assert "cause" not in ring["cause"]
    assert (chain["type"], chain["cause"]["type"]) == ("RuntimeError", "ValueError")
    assert any("raise_number_error" in frame for frame in chain["cause"]["frames"])
    assert (context["type"], context["cause"]["type"]) == ("KeyError", "ValueError")
    assert [error["type"] for error in group["among"]] == ["ValueError", "RuntimeError"]


@pytest.mark.parametrize(
    "rows", [f"letter,{CANARY}\n", f"letter,a,{CANARY}\n", f'letter,"{CANARY}\n'], ids=["label", "cells", "quote"]
)
def test_unreadable_data_leaves_no_cell_contents_in_the_log(rows: str, tmp_path: Path) -> None:
    file = tmp_path / "letters.csv"
    file.write_text("text,label\nfine,a\n" + rows)
    columns = {"text": "text", "label": "label"}
    settings: Any = {"dataset": "d", "train_file": "f", "columns": columns, "labels": ("a", "b")}
    target = get_task("classification").target(DataSpec(declared_sizes=1, max_length=8, **settings))  # type: ignore[attr-defined]
    with capture_log() as lines:
        try:
            _ = [*map(target, iter_records(file, columns))]
        except DataError as error:
            own.exception("%s failed in round %d: %s", "north", 3, error)
    assert str(tmp_path) not in lines.text
    assert lines[0]["event"] == "north failed in round 3: fedtune.spec.DataError"
    assert any(frame.startswith(("fedtune/data/", "fedtune/tasks/")) for frame in lines[0]["error"]["frames"])


def test_configuration_errors_keep_their_text_in_the_log() -> None:
    wrong, ledger = ConfigError("server", "fl.example.org", "must be host:port"), RunError("/srv/ledger.db is damaged")
    for error in (wrong, ledger, Refused(Reason.LEADS, requested="ab" * 32)):
        with capture_log() as lines:
            own.error("cannot start", exc_info=error)
            own.error("cannot start: %s", error)
        assert lines[0]["error"]["text"] == str(error)
        assert str(error) in lines[1]["event"]


def test_library_messages_about_records_are_withheld() -> None:
    with capture_log("debug") as lines:
        for library in (
            libraries := ("torch", "transformers.tokenization", "tokenizers", "peft", "opacus", "numpy", "x")
        ):
            logger = logging.getLogger(library)
            logger.warning("a long sequence: %s", CANARY)
            logger.error(f"a long sequence: {CANARY}", extra={"row": CANARY})
            logger.error(ValueError(CANARY))
            logger.info("quiet")
    assert [line["level"] for line in lines] == ["warning", "error", "error"] * len(libraries)
    for line in lines:
        assert line["event"] == logs.WITHHELD
        assert line["where"].startswith("test_logs.py:")
        assert line["where"].endswith("test_library_messages_about_records_are_withheld")


@pytest.mark.parametrize("library", sorted(logs.CARRIERS))
def test_transport_library_messages_are_logged_without_exception_texts(library: str) -> None:
    logger = logging.getLogger(library)
    with restore_logging():
        logger.setLevel(logging.DEBUG)
        with capture_log() as lines:
            logger.info("polled")
            logger.warning("lost %s after %d s: %s", "fl.example.org", 3, ValueError(CANARY))
            logger.warning(KeyError(CANARY))
            logger.warning("row %s", [CANARY])
        with capture_log("debug") as debug_log:
            logger.info("polled")
            logger.debug("headers")
    assert [line["event"] for line in lines] == ["lost fl.example.org after 3 s: ValueError", "KeyError", "row <list>"]
    assert [line["event"] for line in debug_log] == ["polled"]


@pytest.mark.parametrize("level", LEVELS)
def test_log_level_applies_to_own_messages(level: Level) -> None:
    with capture_log(level) as lines:
        for name in LEVELS:
            getattr(own, name)(name)
    assert [line["event"] for line in lines] == list(LEVELS[LEVELS.index(level) :])


def test_log_line_is_one_json_object_with_standard_and_extra_fields() -> None:
    with capture_log() as lines:
        own.info("answered round %d", 3, extra={"run": "r1", "seconds": 1.5, "rate": float("nan"), "of": object()})
        own.warning("site %s", 'a\n{"level": "info"}\u2028\u0085b')
    line, _ = lines
    assert lines.text.isascii()
    assert list(line)[:4] == ["time", "level", "logger", "event"]
    assert line["time"].endswith("+00:00")
    assert (line["level"], line["logger"], line["event"]) == ("info", "fedtune.tests", "answered round 3")
    assert (line["run"], line["seconds"], line["rate"], line["of"]) == ("r1", 1.5, "nan", "<object>")


def test_mismatched_log_arguments_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with capture_log() as lines:
        own.warning("%d of %d", CANARY)
        logging.getLogger("torch").warning("%d", CANARY)
        own.warning("after it")
    assert CANARY not in "".join(capsys.readouterr())
    assert [line["event"] for line in lines][::2] == ["%d of %d (the arguments do not match the format)", "after it"]


def test_log_text_is_discarded_if_the_disk_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    full = Mock(write=Mock(side_effect=OSError(28, "No space left on device")))
    with restore_logging(), redirect_stderr(full):
        configure_logs("info")
        own.warning("row %s", CANARY)
    assert capsys.readouterr() == ("", "")


def test_handlers_added_by_libraries_are_bypassed(capsys: pytest.CaptureFixture[str]) -> None:
    logger, other_stream = logging.getLogger("transformers.test_logs"), io.StringIO()
    with capture_log() as lines:
        # As transformers and flwr do on import.
        logger.addHandler(logging.StreamHandler(other_stream))
        logger.propagate = False
        logging.getLogger().addHandler(logging.StreamHandler(other_stream))
        logger.error(f"row {CANARY}")
        logging.getLogger("torch").error(f"row {CANARY}")
    assert other_stream.getvalue() == ""
    assert len(lines) == 2
    assert CANARY not in "".join(capsys.readouterr())


def test_warnings_thread_failures_and_cleanup_errors_are_logged() -> None:
    with capture_log() as lines, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"cell {CANARY}", RuntimeWarning, stacklevel=1)
        for target in (raise_chain, lambda: sys.exit(1)):
            thread = threading.Thread(target=target, name="worker")
            thread.start()
            thread.join()
        type(CANARY, (), {"__del__": lambda self: raise_number_error()})()
        gc.collect()
    warned, end_line, cleaned = lines
    assert warned["event"] == f"RuntimeWarning: {logs.WITHHELD}"
    assert warned["where"].startswith("test_logs.py:")
    assert (end_line["level"], end_line["in_thread"]) == ("critical", "worker")
    assert any("raise_chain" in frame for frame in end_line["error"]["frames"])
    assert cleaned["error"]["type"] == "ValueError"


def test_system_and_tls_error_names_are_logged() -> None:
    refused = ConnectionRefusedError(111, f"refused {CANARY}")
    with capture_log() as lines:
        own.warning("no server", exc_info=refused)
        try:
            not_tls = ssl.MemoryBIO()
            not_tls.write(CANARY.encode())
            context = ssl.create_default_context()
            context.wrap_bio(not_tls, ssl.MemoryBIO(), server_hostname="fl.example.org").do_handshake()
        except ssl.SSLError:
            own.warning("no server", exc_info=True)
    assert lines[0]["error"]["errno"] == "ECONNREFUSED"
    assert lines[1]["error"]["reason"] == "WRONG_VERSION_NUMBER"


PROCESS = f"""
import logging, threading, warnings
from fedtune.ops.logs import configure_logs
configure_logs("warning")
import transformers
transformers.utils.logging.get_logger("transformers.x").warning("row {CANARY}")
warnings.warn("row {CANARY}")
thread = threading.Thread(target=lambda: int("{CANARY}"))
thread.start()
thread.join()
def last():
    raise KeyError("{CANARY}")
last()
"""


def test_whole_process_logs_only_json() -> None:
    process = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 1
    assert CANARY not in process.stdout + process.stderr
    lines = [json.loads(line) for line in process.stderr.splitlines()]
    assert [line["logger"].partition(".")[0] for line in lines] == ["transformers", "fedtune", "fedtune", "fedtune"]
    assert lines[-1]["error"]["type"] == "KeyError"
    assert lines[-1]["error"]["frames"][-1].endswith(" last")


def test_invalid_log_level_is_refused_without_side_effects() -> None:
    hook = sys.excepthook
    with pytest.raises(ConfigError, match=r"must be"):
        configure_logs("loud")  # type: ignore[arg-type]
    assert sys.excepthook is hook


def test_own_log_messages_are_constant_texts_with_arguments() -> None:
    """A preformatted message could contain an exception's text, which arguments cannot."""
    calls = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in {"log", "_log", "logger"}
                and node.func.attr in {"debug", "info", "warning", "error", "exception", "critical"}
            ):
                calls += 1
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"
                assert not any(isinstance(part, ast.JoinedStr) for part in node.args), f"{path}:{node.lineno}"
    assert calls > 5
