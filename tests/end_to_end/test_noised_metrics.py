"""Scores of held-out records that sites release with noise, in a whole run."""

from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedtune.privacy.ledger.verify import verify

from ..conftest import result_of, simulate

pytestmark = pytest.mark.nightly

NOISE = 2.0
NOISED = ("privacy.metrics=noised", f"privacy.metrics_noise_multiplier={NOISE}", "data.heldout_fraction=0.4")


def test_epsilon_covers_the_scores_and_keeps_below_its_target(tmp_path: Path) -> None:
    calibrated = simulate(*NOISED, "privacy.noise_multiplier=null", into=tmp_path)  # for training and scores together
    privacy, relation = result_of(calibrated)["privacy"], NeighboringRelation.ADD_OR_REMOVE_ONE
    for site, spent in privacy["sites"].items():
        assert (spent["rounds"], spent["metrics_noise_multiplier"]) == (2, NOISE)
        step = PoissonSampledDpEvent(spent["sampling_rate"], GaussianDpEvent(spent["noise_multiplier"]))
        rdp = RdpAccountant(neighboring_relation=relation)
        for key, accountant in (("epsilon", PLDAccountant(relation)), ("epsilon_rdp", rdp)):
            accountant.compose(step, spent["steps"])
            alone = accountant.get_epsilon(privacy["delta"])
            accountant.compose(GaussianDpEvent(NOISE), spent["rounds"])
            assert spent[key] == pytest.approx(accountant.get_epsilon(privacy["delta"]), abs=1e-3)
            assert spent[key] > alone + 0.1
        assert 7.9 < spent["epsilon"] <= 8.0
        expected = {step: spent["steps"], GaussianDpEvent(NOISE): 2}
        assert verify(calibrated / "sites" / site / "ledger.db").history.charged() == expected
    assert privacy["epsilon"] == max(spent["epsilon"] for spent in privacy["sites"].values())
