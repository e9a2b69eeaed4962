"""Run folders: creation, locking, cleanup after failed starts, and `fedtune run status`."""

import errno
import fcntl
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.cli.interruptible_run import show_run
from fedtune.config import RunConfig, format_config_yaml, read_saved_config
from fedtune.federation.run_folder import RunFolder, list_checkpoints
from fedtune.lab.studies.trials import SearchTrial
from fedtune.runs.run_paths import find_run_folder
from fedtune.spec import ConfigError, RefusedError, RunError
from tests.forked import REPOSITORY, Forked

from ..conftest import list_tiny_overrides, read_result, run_command
from . import snapshots


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return compose_run([*list_tiny_overrides(into=tmp_path / "runs", name="one"), "tracking.progress=false"])


@pytest.fixture
def folder(config: RunConfig) -> Path:
    """Path of the run's folder, which does not exist yet."""
    return find_run_folder(config)


def test_folder_of_a_run_killed_before_its_start_is_removed(config: RunConfig, folder: Path) -> None:
    assert not RunFolder(folder).has_begun()
    RunFolder(folder).create(format_config_yaml(config))
    with RunFolder(folder).hold_lock(), pytest.raises(ConfigError, match="is in use: wait until its run ends"):
        RunFolder(folder).has_begun()
    assert SearchTrial.from_config(config).state == "not begun", "a search does not end because of it"
    RunFolder(folder).create(format_config_yaml(config))
    assert find_run_folder(config) == folder, "the same command starts again"
    assert not folder.exists()
    RunFolder(folder).create(format_config_yaml(config))
    for other in (RunFolder(folder).audit_mark, folder / "weights.bin"):
        other.touch()
        assert not RunFolder(folder).has_begun()
        assert other.exists(), "audits and other programs' results are kept"
        other.unlink()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "round-0000.safetensors").touch()
    assert list_checkpoints(folder / "checkpoints")
    assert RunFolder(folder).has_begun()
    assert folder.exists()
    shutil.rmtree(folder / "checkpoints")
    (folder / "run.json").touch()
    assert RunFolder(folder).has_begun(), "a result without checkpoints is kept"


def test_run_folder_is_locked_by_a_single_process(config: RunConfig, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("thesis.txt", "config.yaml"):
        (folder / name).write_text("mine")
        assert not RunFolder(folder).has_begun()
        assert (folder / name).exists(), "the file does not belong to a run"
    shutil.rmtree(folder)
    RunFolder(folder).create(format_config_yaml(config))
    assert not RunFolder(folder).is_running
    assert not RunFolder(folder / "nowhere").is_running
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "log.txt"]
    for _ in range(2):
        with RunFolder(folder).hold_lock():
            assert RunFolder(folder).is_running
            with pytest.raises(ConfigError, match="is in use: wait until its run ends"), RunFolder(folder).hold_lock():
                pytest.fail("two processes run one folder")
        assert not RunFolder(folder).is_running
    (folder / "log.txt").chmod(0o400)
    assert not RunFolder(folder).is_running, "a read-only log can be checked"


def test_run_folder_is_created_with_its_configuration(config: RunConfig, folder: Path) -> None:
    folder.parent.write_text("no folder")
    with pytest.raises(ConfigError, match=r"tracking\.output_dir = .*: must be a folder to write one into"):
        RunFolder(folder).create(format_config_yaml(config))
    folder.parent.unlink()
    RunFolder(folder).create(format_config_yaml(config))
    assert read_saved_config(folder) == config
    RunFolder(folder).result.touch()
    with pytest.raises(ConfigError, match=rf"name = 'one': is taken.*resume={folder}"):
        find_run_folder(config)
    with pytest.raises(ConfigError, match=r"name = 'one': is taken"):
        RunFolder(folder).create(format_config_yaml(config))  # another process created it first
    # A resumed run keeps the settings that determine its result.
    resumed = compose_run([f"resume={folder}", "runtime.micro_batch_tokens=7", "tracking.log_level=debug"])
    assert find_run_folder(resumed) == folder
    with pytest.raises(ConfigError, match=r"\(training\.local_steps was 2, is 9, seed was 0, is 4\)$"):
        find_run_folder(compose_run([f"resume={folder}", "training.local_steps=9", "seed=4"]))


def run_until_error(
    config: RunConfig, folder: Path, work: Any, error: type[BaseException], match: str | None = None
) -> str:
    """Run work that fails, and return the output."""
    output = io.StringIO()
    with pytest.raises(error, match=match):
        show_run(config, folder, Console(file=output, width=250), work=work, again="fedtune AGAIN", began=0.0)
    return output.getvalue()


def end_with_error(config: RunConfig, folder: Path, error: BaseException, *, begun: bool = False) -> str:
    """Run work that raises `error`, and return the output."""

    def log_and_fail(*_: object) -> dict[str, Any]:
        logging.getLogger("fedtune.somewhere").info("it was here")
        for name in ("checkpoints", "sites"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "answers.json").touch()
        if begun:
            (folder / "checkpoints" / "round-0000.safetensors").touch()
        raise error

    return run_until_error(config, folder, log_and_fail, type(error))


def make_disk_full_error(where: str = "x") -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)


def read_process_state() -> list[object]:
    """Read the process state that a run changes."""
    loggers = [logging.getLogger(name) for name in ("fedtune", "flwr")]
    handlers = [*(signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)), sys.unraisablehook]
    return [*handlers, *((logger.level, logger.handlers[:], logger.propagate) for logger in loggers)]


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        *((error, True) for error in (RunError("gone"), KeyboardInterrupt(), make_disk_full_error())),
        *((error, False) for error in (RefusedError("no"), ConfigError("a", 1, "b"), OSError("disk"))),
    ],
)
def test_failed_start_leaves_no_folder_and_started_run_can_resume(
    config: RunConfig, folder: Path, error: BaseException, hint: bool
) -> None:
    before = read_process_state()
    output = end_with_error(config, folder, error)
    assert not folder.parent.exists()
    assert ("Nothing has been trained yet." in output) is hint
    assert ("Interrupted." in output) is isinstance(error, KeyboardInterrupt)
    output = end_with_error(config, folder, error, begun=True)
    assert read_process_state() == before
    assert ("Continue with: fedtune AGAIN" in output) is hint
    assert read_saved_config(folder) == config
    assert "INFO fedtune.somewhere it was here" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("log", ["log.txt", "/dev/full"])
def test_full_disk_at_a_simulated_site_is_named_in_the_error(
    config: RunConfig, folder: Path, log: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail_at_site(*_: object) -> Any:
        (logger,) = logging.getLogger("fedtune").handlers
        assert isinstance(logger, logging.FileHandler)
        logger.setStream(open(folder / log, "a", encoding="utf-8")).close()  # noqa: SIM115 - the handler closes it
        logging.getLogger("fedtune.site").error("failed", exc_info=make_disk_full_error("sites/ledger.db"))
        raise RunError("too few sites")

    run_until_error(
        config, folder, fail_at_site, RunError, r"^too few sites; the disk is full: no room for sites/ledger\.db$"
    )
    assert capfd.readouterr() == ("", "")


def test_scores_are_printed_before_the_report_is_written(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_checkpoint(*_: object) -> None:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "round-0000.safetensors").touch()

    monkeypatch.setattr("fedtune.show.run_progress.show_result", lambda console, *_, **__: console.print("the scores"))
    monkeypatch.setattr("fedtune.report.model_card.write_report_and_card", Mock(side_effect=make_disk_full_error()))
    output = run_until_error(config, folder, write_checkpoint, OSError, "No space")
    assert output.splitlines()[-2:] == ["the scores", "Continue with: fedtune AGAIN"]


def test_existing_folders_survive_a_failed_start(config: RunConfig, folder: Path) -> None:
    for earlier in (folder.parent / "earlier", folder.parent):
        earlier.mkdir(parents=True, exist_ok=True)
        end_with_error(config, folder, RunError("no server"))
        assert earlier.is_dir(), "it was there before"
        assert not folder.exists()
        for remaining in folder.parent.iterdir():
            remaining.rmdir()
    RunFolder(folder).create(format_config_yaml(config))
    run_until_error(config, folder, lambda *_: pytest.fail("it ran"), ConfigError, "is taken")
    assert read_saved_config(folder) == config
    end_with_error(replace(config, resume=str(folder)), folder, RunError("no server"))
    assert read_saved_config(folder) == config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_stopped_while_loading_leaves_no_folder(tmp_path: Path, number: signal.Signals) -> None:
    # The preflight tries each of the many micro-batch shapes, which takes seconds.
    slow = ("model=random_llama", "data=e2e_nlg", "task=causal_lm", "data.max_length=400")
    words = [sys.executable, "-m", "fedtune", "simulate", *list_tiny_overrides(*slow, into=tmp_path / "new" / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with Forked(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert "loading" in process.stdout.readline()
        assert (tmp_path / "new" / "runs" / "run" / "log.txt").exists()
        process.send_signal(number)
        output, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (1, "")
    assert "Interrupted. Nothing has been trained yet." in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupt_in_a_destructor_ends_the_run(
    config: RunConfig, folder: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def wait_for_signal(*_: object) -> Any:
        Dying()
        time.sleep(20)
        raise RunError("the run continued")

    run_until_error(config, folder, wait_for_signal, KeyboardInterrupt)
    assert capfd.readouterr() == ("", "")


def read_status(folder: Path) -> Any:
    return json.loads(run_command("run", "status", str(folder), "--json").printed)


def test_status_of_a_finished_run_matches_its_result(finished_run: Path) -> None:
    out = run_command("run", "status", str(finished_run)).printed
    assert f"{finished_run}: finished, 2 of 2 rounds are done" in out
    status = read_status(finished_run)
    masked = {**status, "metrics": sorted(status["metrics"])}  # scores of another machine differ in their last digits
    snapshots.check_json("run-status", json.dumps(masked), folder=finished_run)
    result = read_result(finished_run)
    assert status["metrics"] == result["rounds"][-1]["metrics"]
    for site, entry in status["sites"].items():
        assert entry["epsilon"] == result["privacy"]["sites"][site]["epsilon"] > 0
        assert f"{entry['epsilon']:.2f}"[:3] in out


def test_status_of_a_running_run_shows_site_answers(run_folder: Path) -> None:
    def print_status() -> str:
        return str(run_command("run", "status", str(run_folder)).printed)

    (run_folder / "log.txt").unlink()
    answers = {"site-2": {"what": "awaiting_approval", "time": "2030-01-02T03:04:05+00:00"}}
    (run_folder / "answers.json").write_text(json.dumps(answers))
    before = sorted(path.name for path in run_folder.iterdir())
    status = read_status(run_folder)["sites"]["site-2"]
    assert (status["last_answer"], status["at"]) == ("awaiting_approval", "2030-01-02T03:04:05+00:00")
    assert "awaiting_approval" in print_status()
    assert sorted(path.name for path in run_folder.iterdir()) == before, "the status command writes nothing"
    for checkpoint in (run_folder / "checkpoints").glob("round-0002*"):
        checkpoint.unlink()
    assert "stopped, 1 of 2 rounds are done" in print_status()
    with (run_folder / "log.txt").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "running, 1 of 2 rounds are done" in print_status()
    status = read_status(run_folder)
    assert (status["running"], status["finished"], status["round"]) == (False, False, 1)
    # The second round was requested, but its receipts are not in the checkpoint.
    assert all(entry["upper_bound"] for entry in status["sites"].values())
    assert "at most" in print_status()
    shutil.rmtree(run_folder / "checkpoints")
    assert "has no checkpoint: start a new run" in run_command("run", "status", str(run_folder)).failed()
