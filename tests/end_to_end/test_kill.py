"""A process that dies inside a round: what it began stays charged, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy.ledger.chain import Event
from fedtune.privacy.ledger.verify import verify

from ..forked import Forked

pytestmark = pytest.mark.nightly

REPOSITORY = Path(__file__).parents[2]
# `fedtune`, but training at one site in one round does not come back before it is killed.
_HANGING = """
import sys, time
import fedtune.sites.work as site_work
from fedtune.cli.main import main
train_round = site_work.train_round
def train(model, adapter, examples, work, **rest):
    trained = train_round(model, adapter, examples, work, **rest)
    if [work.site, str(work.round)] == sys.argv[1:3]:
        time.sleep(300)
    return trained
site_work.train_round = train
raise SystemExit(main(sys.argv[3:]))
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `fedtune` as a process that hangs at a site in round 2; what is left of it at the end is killed."""
    begun: list[subprocess.Popen[str]] = []

    def run(site: str, *arguments: str) -> subprocess.Popen[str]:
        process = Forked(
            [sys.executable, "-c", _HANGING, site, "2", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        return process

    yield run
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def ledger_events(folder: Path, site: str) -> tuple[Event, ...]:
    """What is in a site's ledger, verified; also while another process writes it."""
    path = folder / "sites" / site / "ledger.db"
    if not path.exists() or path.stat().st_size == 0:
        return ()
    return verify(path).events


def kinds(folder: Path, site: str, round: int) -> list[str]:
    return [event.kind.value for event in ledger_events(folder, site) if event.round == round]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate(timeout=30)
        assert time.monotonic() < deadline, "the round never began"
        time.sleep(0.005)


@pytest.fixture
def kill_in_last_round(start: Any, tiny: Any, tmp_path: Path) -> Callable[..., Path]:
    """Run until site-2 has begun round 2 and site-1 has finished it, then send SIGKILL."""

    def run(*overrides: str) -> Path:
        process = start("site-2", "simulate", *tiny(*overrides, into=tmp_path))
        folder = tmp_path / "run"
        wait_for(lambda: "reserve" in kinds(folder, "site-2", 2), process)
        process.kill()
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL
        assert kinds(folder, "site-1", 2) == ["reserve", "commit"]
        assert kinds(folder, "site-2", 2) == ["reserve"], "it should have hung"
        assert not (folder / "run.json").exists()
        return folder

    return run


def test_with_a_spare_round_an_interrupted_round_is_charged_and_tried_again(
    kill_in_last_round: Callable[..., Path], command: Any, result_of: Any
) -> None:
    folder = kill_in_last_round("federation.spare_rounds=1", "privacy.noise_multiplier=null", "privacy.epsilon=2")
    first_site = ledger_events(folder, "site-1")
    outcome = command("simulate", f"resume={folder}")
    assert (outcome.code, outcome.err) == (0, "")
    # What site-1 had committed is sent again as it was stored: only that the run is over is new in its ledger.
    (*before, end) = ledger_events(folder, "site-1")
    assert tuple(before) == first_site
    assert end.detail == {"what": "run_ended", "adapter_sha256": ""}
    assert kinds(folder, "site-2", 2) == ["reserve", "reserve", "commit"]
    assert [event.attempt for event in ledger_events(folder, "site-2") if event.round == 2] == [1, 2, 2]
    result = result_of(folder)
    assert [entry["sites"] for entry in result["rounds"]] == [["site-1", "site-2"]] * 2
    assert [entry["failed_sites"] for entry in result["rounds"]] == [{}, {}]
    sites = result["privacy"]["sites"]
    assert (sites["site-1"]["steps"], sites["site-1"]["upper_bound"]) == (4, False)
    assert (sites["site-2"]["steps"], sites["site-2"]["upper_bound"]) == (6, False)
    assert sites["site-1"]["epsilon"] < sites["site-2"]["epsilon"] == result["privacy"]["epsilon"] <= 2
    report = json.loads((folder / "report.json").read_text())["derived"]
    spent = {site["site"]: site["spent"] for site in report["sites"]}
    assert (spent["site-2"]["steps"], spent["site-2"]["rounds"]) == (6, 3)
    assert report["verdict"]["state"] == "within"


def test_without_a_spare_round_the_site_leaves_early_and_the_run_goes_on(
    kill_in_last_round: Callable[..., Path], command: Any, result_of: Any
) -> None:
    folder = kill_in_last_round()
    outcome = command("simulate", f"resume={folder}")
    assert (outcome.code, outcome.err) == (0, "")
    assert kinds(folder, "site-2", 2) == ["reserve", "refusal"]
    result = result_of(folder)
    assert result["rounds"][1]["sites"] == ["site-1"]
    assert result["rounds"][1]["failed_sites"] == {"site-2": "plan_exhausted"}
    for site in result["privacy"]["sites"].values():
        assert (site["steps"], site["upper_bound"]) == (4, False)
    assert "site-2: plan_exhausted" in outcome.out


def test_ctrl_c_inside_a_round_leaves_a_checkpoint_and_a_hint(
    start: Any, tiny: Any, tmp_path: Path, command: Any, result_of: Any
) -> None:
    process = start("site-1", "simulate", *tiny("federation.spare_rounds=1", into=tmp_path))
    folder = tmp_path / "run"
    wait_for(lambda: "reserve" in kinds(folder, "site-1", 2), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err == ""
    assert f"Interrupted. Continue with: fedtune simulate resume={folder}\n" in out
    assert kinds(folder, "site-1", 2) == ["reserve"]
    outcome = command("simulate", f"resume={folder}")
    assert (outcome.code, outcome.err) == (0, "")
    steps = {site: spent["steps"] for site, spent in result_of(folder)["privacy"]["sites"].items()}
    assert steps == {"site-1": 6, "site-2": 4}
