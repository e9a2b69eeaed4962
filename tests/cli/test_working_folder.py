"""A run's folder: made, held by one process, cleared away where nothing began, and what `fedtune run status` reads."""

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

import pytest
from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.api.start_and_resume import folder_of
from fedtune.cli.interruptible_run import show_run
from fedtune.config import RunConfig, config_yaml, saved_config
from fedtune.federation.run_folder import RunFolder, saved_checkpoints
from fedtune.spec import ConfigError, RefusedError, RunError
from tests.forked import REPOSITORY, Forked

from . import snapshots


@pytest.fixture
def config(tiny: Any, tmp_path: Path) -> RunConfig:
    return compose_run([*tiny(into=tmp_path / "runs", name="one"), "tracking.progress=false"])


@pytest.fixture
def folder(config: RunConfig) -> Path:
    """Where the run's folder will be."""
    return folder_of(config)


# Begun, or left behind.


def test_what_a_killed_run_left_before_it_began_is_cleared_away(config: RunConfig, folder: Path) -> None:
    assert not RunFolder(folder).has_begun()
    RunFolder(folder).create(config_yaml(config))
    (folder / "log.txt").touch()
    with RunFolder(folder).held(), pytest.raises(ConfigError, match="is running in another process"):
        RunFolder(folder).has_begun()
    assert not RunFolder(folder).has_begun()
    assert not folder.exists()
    RunFolder(folder).create(config_yaml(config))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "round-0000.safetensors").touch()
    assert saved_checkpoints(folder / "checkpoints")
    assert RunFolder(folder).has_begun()
    assert folder.exists()
    shutil.rmtree(folder / "checkpoints")
    (folder / "run.json").touch()
    assert RunFolder(folder).has_begun(), "a result without its checkpoints is no rubbish"


def test_a_folder_that_is_no_run_s_is_left_alone(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("thesis.txt", "config.yaml"):
        (folder / name).write_text("mine")
        assert not RunFolder(folder).has_begun()
        assert (folder / name).exists()


# Made, and held by one process.


def test_a_folder_is_made_with_its_configuration(config: RunConfig, folder: Path) -> None:
    RunFolder(folder).create(config_yaml(config))
    assert saved_config(folder) == config
    with pytest.raises(ConfigError, match=rf"name = 'one': is taken.*resume={folder}"):
        folder_of(config)
    with pytest.raises(ConfigError, match=r"name = 'one': is taken"):
        RunFolder(folder).create(config_yaml(config))  # somebody else was faster


def test_a_place_that_cannot_be_written_names_the_setting(config: RunConfig, folder: Path) -> None:
    folder.parent.write_text("no folder")
    with pytest.raises(ConfigError, match=r"tracking\.output_dir = .*: must be a folder to write one into"):
        RunFolder(folder).create(config_yaml(config))


def test_nobody_runs_a_folder_without_a_log_and_looking_makes_none(config: RunConfig, folder: Path) -> None:
    RunFolder(folder).create(config_yaml(config))
    assert not RunFolder(folder).is_running
    assert not RunFolder(folder / "nowhere").is_running
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    (folder / "log.txt").touch(mode=0o400)
    assert not RunFolder(folder).is_running, "one that may only be read can be looked at"


def test_one_process_runs_a_folder_until_it_dies(config: RunConfig, folder: Path) -> None:
    RunFolder(folder).create(config_yaml(config))
    code = (
        "import sys, time; from pathlib import Path; from fedtune.federation.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert RunFolder(folder).is_running
        with pytest.raises(ConfigError, match="is running in another process"), RunFolder(folder).held():
            pytest.fail("two processes run one folder")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert not RunFolder(folder).is_running
    with RunFolder(folder).held():
        assert RunFolder(folder).is_running


# Cleared away where nothing began.


def ran(config: RunConfig, folder: Path, work: Any, error: type[BaseException], match: str | None = None) -> str:
    """Run some work that ends in an error; what is printed."""
    said = io.StringIO()
    with pytest.raises(error, match=match):
        show_run(config, folder, Console(file=said, width=250), work=work, again="fedtune AGAIN", began=0.0)
    return said.getvalue()


def attempt(config: RunConfig, folder: Path, error: BaseException, *, begun: bool = False) -> str:
    """Run something that ends in `error`; what is printed."""

    def work(config: RunConfig, folder: Path, display: object) -> dict[str, Any]:
        logging.getLogger("fedtune.somewhere").info("it was here")
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "sites").mkdir(exist_ok=True)
        (folder / "answers.json").touch()
        if begun:
            (folder / "checkpoints" / "round-0000.safetensors").touch()
        raise error

    return ran(config, folder, work, type(error))


@pytest.mark.parametrize("error", [RunError("gone"), ConfigError("a", 1, "b"), OSError("disk"), KeyboardInterrupt()])
def test_what_never_began_leaves_nothing_behind(config: RunConfig, folder: Path, error: BaseException) -> None:
    said = attempt(config, folder, error)
    assert not folder.parent.exists()
    assert ("Nothing had been trained yet." in said) is isinstance(error, RunError | KeyboardInterrupt)
    assert ("Interrupted." in said) is isinstance(error, KeyboardInterrupt)


def full(where: str = "x") -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)


@pytest.mark.parametrize("error", [RunError("no server"), RefusedError("no"), KeyboardInterrupt(), full()])
def test_what_began_stays_and_says_how_to_go_on(config: RunConfig, folder: Path, error: BaseException) -> None:
    said = attempt(config, folder, error, begun=True)
    assert ("Continue with: fedtune AGAIN" in said) is not isinstance(error, RefusedError)
    assert saved_config(folder) == config
    assert "INFO fedtune.somewhere it was here" in (folder / "log.txt").read_text()


def test_a_simulated_site_that_has_no_room_is_told_of(config: RunConfig, folder: Path) -> None:
    def work(config: RunConfig, folder: Path, display: object) -> Any:
        logging.getLogger("fedtune.site").error("failed", exc_info=full("sites/ledger.db"))
        raise RunError("too few sites")

    ran(config, folder, work, RunError, r"^too few sites; the disk is full: no room for sites/ledger\.db$")


def test_a_log_without_room_ends_no_run(config: RunConfig, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def work(config: RunConfig, folder: Path, display: object) -> Any:
        (logger,) = logging.getLogger("fedtune").handlers
        assert isinstance(logger, logging.FileHandler)
        logger.setStream(open("/dev/full", "w", encoding="utf-8")).close()  # noqa: SIM115 - the handler closes it
        logging.getLogger("fedtune.site").error("failed")
        raise RunError("too few sites")

    ran(config, folder, work, RunError, "^too few sites$")
    assert capfd.readouterr() == ("", "")


def test_scores_come_before_a_report(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(config: RunConfig, folder: Path, display: object) -> Any:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "round-0000.safetensors").touch()

    def no_room(*_: object, **__: object) -> None:
        raise full()

    monkeypatch.setattr("fedtune.show.run_progress.show_result", lambda console, *_, **__: console.print("the scores"))
    monkeypatch.setattr("fedtune.report.model_card.write_report_and_card", no_room)
    said = ran(config, folder, work, OSError, "No space")
    assert said.splitlines()[-2:] == ["the scores", "Continue with: fedtune AGAIN"]


def test_what_others_have_made_stays(config: RunConfig, folder: Path) -> None:
    (folder.parent / "earlier").mkdir(parents=True)
    attempt(config, folder, RunError("no server"))
    assert [path.name for path in folder.parent.iterdir()] == ["earlier"]
    (folder.parent / "earlier").rmdir()
    attempt(config, folder, RunError("no server"))
    assert folder.parent.is_dir(), "it was there before"


def test_a_folder_of_somebody_else_or_of_a_resumed_run_stays(config: RunConfig, folder: Path) -> None:
    RunFolder(folder).create(config_yaml(config))
    ran(config, folder, lambda *_: pytest.fail("it ran"), ConfigError, "is taken")
    assert saved_config(folder) == config
    attempt(replace(config, resume=str(folder)), folder, RunError("no server"))
    assert saved_config(folder) == config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_while_it_loads_leaves_nothing(tiny: Any, tmp_path: Path, number: signal.Signals) -> None:
    # Its micro-batches have many shapes, each of which is tried: that takes seconds.
    slow = ("model=random_llama", "data=e2e_nlg", "task=causal_lm", "data.max_length=400")
    words = [sys.executable, "-m", "fedtune", "simulate", *tiny(*slow, into=tmp_path / "new" / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with Forked(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert "loading" in process.stdout.readline()
        assert (tmp_path / "new" / "runs" / "run" / "log.txt").exists()
        process.send_signal(number)
        said, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (1, "")
    assert "Interrupted. Nothing had been trained yet." in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_where_python_drops_what_is_raised_ends_a_run_too(
    config: RunConfig, folder: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def work(config: RunConfig, folder: Path, display: object) -> Any:
        Dying()
        time.sleep(20)
        raise RunError("it went on")

    ran(config, folder, work, KeyboardInterrupt)
    assert capfd.readouterr() == ("", "")


def test_signals_and_logging_are_as_before_afterwards(config: RunConfig, folder: Path) -> None:
    def state() -> list[object]:
        loggers = [logging.getLogger(name) for name in ("fedtune", "flwr")]
        handlers = [*(signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)), sys.unraisablehook]
        return [*handlers, *((logger.level, logger.handlers[:], logger.propagate) for logger in loggers)]

    before = state()
    attempt(config, folder, RunError("no server"), begun=True)
    assert state() == before


def test_a_resumed_run_keeps_what_decides_its_result(config: RunConfig, folder: Path) -> None:
    RunFolder(folder).create(config_yaml(config))
    resumed = compose_run([f"resume={folder}", "runtime.micro_batch_tokens=7", "tracking.log_level=debug"])
    assert folder_of(resumed) == folder
    with pytest.raises(ConfigError) as caught:
        folder_of(compose_run([f"resume={folder}", "training.local_steps=9", "seed=4"]))
    assert str(caught.value).endswith("another configuration (training.local_steps was 2, is 9, seed was 0, is 4)")


# How far a run is.


def status(command: Any, folder: Path) -> dict[str, Any]:
    out = command("run", "status", str(folder), "--json").printed
    fields: dict[str, Any] = json.loads(out)
    return fields


def test_the_status_of_a_finished_run(command: Any, finished: Path, result_of: Any) -> None:
    out = command("run", "status", str(finished)).printed
    assert f"{finished}: finished, 2 of 2 rounds are done" in out
    told = status(command, finished)
    settled = {**told, "metrics": sorted(told["metrics"])}  # scores of another machine differ in their last digits
    snapshots.check_json("run-status", json.dumps(settled), folder=finished)
    result = result_of(finished)
    assert told["metrics"] == result["rounds"][-1]["metrics"]
    for site, about in told["sites"].items():
        assert about["epsilon"] == result["privacy"]["sites"][site]["epsilon"] > 0
        assert f"{about['epsilon']:.2f}"[:3] in out


def test_the_status_shows_what_sites_said_and_changes_nothing(command: Any, run_folder: Path) -> None:
    (run_folder / "log.txt").unlink()
    answers = {"site-2": {"what": "awaiting_approval", "time": "2030-01-02T03:04:05+00:00"}}
    (run_folder / "answers.json").write_text(json.dumps(answers))
    before = sorted(path.name for path in run_folder.iterdir())
    told = status(command, run_folder)["sites"]["site-2"]
    assert (told["last_answer"], told["at"]) == ("awaiting_approval", "2030-01-02T03:04:05+00:00")
    assert "awaiting_approval" in command("run", "status", str(run_folder)).out
    assert sorted(path.name for path in run_folder.iterdir()) == before


def test_the_status_of_a_run_that_goes_on(command: Any, run_folder: Path) -> None:
    for newest in (run_folder / "checkpoints").glob("round-0002*"):
        newest.unlink()
    assert "stopped, 1 of 2 rounds are done" in command("run", "status", str(run_folder)).out
    with (run_folder / "log.txt").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "running, 1 of 2 rounds are done" in command("run", "status", str(run_folder)).out
    told = status(command, run_folder)
    assert (told["running"], told["finished"], told["round"]) == (False, False, 1)
    # The second round was asked for, and the checkpoint does not know its receipts.
    assert all(about["upper_bound"] for about in told["sites"].values())
    assert "at most" in command("run", "status", str(run_folder)).out


def test_a_run_that_has_not_begun_has_no_status(command: Any, config: RunConfig, folder: Path) -> None:
    RunFolder(folder).create(config_yaml(config))
    assert "must be a run folder with a checkpoint" in command("run", "status", str(folder)).failed()
