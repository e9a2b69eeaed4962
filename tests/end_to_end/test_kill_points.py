"""Twenty processes killed at named points, inside writes and at random: a sample of simulations/kill."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ..conftest import REPOSITORY
from ..forked import run_forked

pytestmark = pytest.mark.nightly

KILLS = 20


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of twenty kills, and of ledgers with a wrong write order.

    A separate process forks those that are killed, because this one has threads and unwrapped functions.
    """
    folder = tmp_path_factory.mktemp("kill")
    command = [sys.executable, "simulations/kill/run.py", "--kills", str(KILLS), "--into", str(folder)]
    process = run_forked(command, cwd=REPOSITORY, timeout_s=540)
    assert (folder / "results.json").exists(), process.stdout + process.stderr
    return json.loads((folder / "results.json").read_text())


def test_ledger_accounts_for_all_observed_rounds_after_every_kill(sample: Any) -> None:
    assert sample["problems"] == []
    assert sample["kills"] == len(sample["hits"]) == KILLS
    for hit in sample["hits"]:
        for site, charged in hit["charged"].items():
            assert charged >= hit["begun"][site] >= hit["observed"][site], hit


def test_kill_points_cover_every_write_training_and_send_phase(sample: Any) -> None:
    named = {phase for phase, counts in sample["phases"].items() if counts.get("named")}
    assert named == {
        *("open", "reserve", "commit", "refusal", "end of run", "anchor", "site files", "journal", "checkpoint"),
        *("answer", "training", "step", "reply", "lead"),
    }
    # The sample would prove nothing if every kill came before anything had left a site.
    assert sum(sum(hit["observed"].values()) for hit in sample["hits"]) >= KILLS
    assert any(hit["half_written"] for hit in sample["hits"]), "no kill was within a transaction"
    assert {hit["start"] for hit in sample["hits"]} >= {1, 2}, "no resumed process was killed"
    assert any(hit["setting"] == "arrivals" and any(hit["begun"].values()) for hit in sample["hits"]), "no arrivals"


ORDERS = tomllib.loads(Path(__file__).with_name("invalid_orders.toml").read_text())


@pytest.mark.parametrize("order", ORDERS)
def test_wrong_write_order_in_a_ledger_is_detected(sample: Any, order: str) -> None:
    findings = [broken["found"] for broken in sample["broken_orders"] if broken["order"] == order]
    assert findings
    for sentences in findings:
        for expected in ORDERS[order]:
            assert any(expected in sentence for sentence in sentences)


def test_committed_kill_study_is_large_and_reports_no_problems() -> None:
    study = json.loads((REPOSITORY / "simulations" / "kill" / "results.json").read_text())
    assert study["problems"] == []
    assert study["kills"] == len(study["hits"]) >= 200
    few = {phase: kills["all"] for phase, kills in study["phases"].items() if kills.get("named")}
    assert min(few.values()) >= 10, few
    assert all(order["found"] for order in study["broken_orders"])
