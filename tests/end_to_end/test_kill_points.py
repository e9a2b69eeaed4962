"""Twenty processes killed at named points, inside writes and at random moments: a sample of simulations/kill."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ..forked import run_forked

pytestmark = pytest.mark.nightly

REPOSITORY = Path(__file__).parents[2]
KILLS = 20


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of twenty kills, and of ledgers that write in a wrong order.

    A process of its own forks the ones that die: this one has threads, and no place for wrapped functions.
    """
    folder = tmp_path_factory.mktemp("kill")
    command = [sys.executable, "simulations/kill/run.py", "--kills", str(KILLS), "--into", str(folder)]
    done = run_forked(command, cwd=REPOSITORY, timeout_s=540)
    assert (folder / "results.json").exists(), done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text())


def test_after_every_kill_the_ledger_accounts_for_all_that_was_seen(sample: Any) -> None:
    assert sample["problems"] == []
    assert sample["kills"] == len(sample["hits"]) == KILLS
    for hit in sample["hits"]:
        for site, charged in hit["charged"].items():
            assert charged >= hit["begun"][site] >= hit["observed"][site], hit


def test_the_kills_are_spread_over_everything_that_is_written_trained_and_sent(sample: Any) -> None:
    named = {phase for phase, counts in sample["phases"].items() if counts.get("named")}
    assert named == {
        "open", "reserve", "commit", "refusal", "end of run", "anchor", "site files", "journal", "checkpoint",
        "answer", "training", "step", "reply", "lead",
    }  # fmt: skip
    # The sample would show nothing if it were over before anything had left.
    assert sum(sum(hit["observed"].values()) for hit in sample["hits"]) >= KILLS
    assert any(hit["half_written"] for hit in sample["hits"]), "no transaction was cut in two"
    assert {hit["start"] for hit in sample["hits"]} >= {1, 2}, "no resumed process was killed"
    assert any(hit["setting"] == "arrivals" and any(hit["begun"].values()) for hit in sample["hits"]), (
        "nobody had arrived"
    )


def test_a_ledger_that_charges_after_training_is_found_out(sample: Any) -> None:
    found = [order["found"] for order in sample["broken_orders"] if order["order"] == "charged after training"]
    assert found
    for sentences in found:
        assert any("records were read for 1 rounds, 0 are charged" in sentence for sentence in sentences)


def test_a_ledger_that_charges_after_the_reply_is_found_out_by_an_observer(sample: Any) -> None:
    (found,) = [order["found"] for order in sample["broken_orders"] if order["order"] == "charged after the reply"]
    assert any("an observer has 1 different updates, 0 rounds are charged" in sentence for sentence in found)
    assert any("epsilon spent by PLD is below" in sentence for sentence in found)


def test_a_ledger_that_stores_a_reply_after_sending_it_is_found_out(sample: Any) -> None:
    (found,) = [order["found"] for order in sample["broken_orders"] if order["order"] == "stored after the reply"]
    assert any("does not know as committed" in sentence for sentence in found)


def test_a_ledger_that_admits_people_before_the_charge_is_found_out(sample: Any) -> None:
    (found,) = [order["found"] for order in sample["broken_orders"] if order["order"] == "admitted before the charge"]
    assert any("it has rows that no event knows" in sentence for sentence in found)


def test_the_committed_study_is_large_enough_and_found_nothing() -> None:
    study = json.loads((REPOSITORY / "simulations" / "kill" / "results.json").read_text())
    assert study["problems"] == []
    assert study["kills"] == len(study["hits"]) >= 200
    few = {phase: counts["all"] for phase, counts in study["phases"].items() if counts.get("named")}
    assert min(few.values()) >= 10, few
    assert all(order["found"] for order in study["broken_orders"])
