"""Scores of held-out records that sites release with noise, in a whole run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

import fedtune.sites.work as site_work
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.mechanism import noised_scores

from ..conftest import result_of, simulate

pytestmark = pytest.mark.nightly

NOISE = 2.0
NOISED = ("privacy.metrics=noised", f"privacy.metrics_noise_multiplier={NOISE}", "data.heldout_fraction=0.4")
SITES = ("site-1", "site-2")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Each site's exact scores, before noise; they stay with the test."""
    seen: list[np.ndarray] = []

    def spy(scores: np.ndarray, **rest: Any) -> tuple[float, float]:
        seen.append(scores)
        return noised_scores(scores, **rest)

    monkeypatch.setattr(site_work, "noised_scores", spy)
    return seen


def test_by_default_no_score_leaves_a_site(tmp_path: Path, exact: Any, everything_sent: list[bytes]) -> None:
    result = result_of(simulate("data.heldout_fraction=0.4", into=tmp_path))
    assert exact == []
    assert [entry["site_scores"] for entry in result["rounds"]] == [{}, {}]
    assert b'"scores": null' in b"".join(everything_sent)
    assert b'"scores": [' not in b"".join(everything_sent)


def test_epsilon_covers_the_scores_and_keeps_below_its_target(tmp_path: Path) -> None:
    calibrated = simulate(*NOISED, "privacy.noise_multiplier=null", into=tmp_path)  # for training and scores together
    privacy = result_of(calibrated)["privacy"]
    for site, spent in privacy["sites"].items():
        assert (spent["rounds"], spent["metrics_noise_multiplier"]) == (2, NOISE)
        step = PoissonSampledDpEvent(spent["sampling_rate"], GaussianDpEvent(spent["noise_multiplier"]))
        for key, accountant in (
            ("epsilon", PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)),
            ("epsilon_rdp", RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)),
        ):
            accountant.compose(step, spent["steps"])
            alone = accountant.get_epsilon(privacy["delta"])
            accountant.compose(GaussianDpEvent(NOISE), spent["rounds"])
            assert spent[key] == pytest.approx(accountant.get_epsilon(privacy["delta"]), abs=1e-3)
            assert spent[key] > alone + 0.1
        assert 7.9 < spent["epsilon"] <= 8.0
        expected = {step: spent["steps"], GaussianDpEvent(NOISE): 2}
        assert verify(calibrated / "sites" / site / "ledger.db").history.charged() == expected
    assert privacy["epsilon"] == max(spent["epsilon"] for spent in privacy["sites"].values())
