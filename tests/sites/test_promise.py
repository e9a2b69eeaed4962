"""The noise that a site really adds for a promise of its own is the noise that its ledger charged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedtune.config import RunConfig
from fedtune.federation.protocol import Invitation
from fedtune.federation.site_round import answer, consider
from fedtune.model.adapter import Adapter
from fedtune.privacy import accountant, events
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.promise import Promise
from fedtune.privacy.release import Offer, Update
from fedtune.sites.shared_settings import for_sites
from fedtune.sites.virtual_site import POLICY

from .conftest import first_request, letters, simulated, write_records

RATE = 0.1
TRAINING = {"local_steps": 1, "optimizer": "sgd", "learning_rate": RATE}
SGD: dict[str, Any] = {"training": TRAINING, "runtime": {"seeded_noise": False}}


def noise_in(update: Update, sent: Adapter, config: RunConfig) -> npt.NDArray[np.float64]:
    """The sum of a step, in clip norms: of one record it is noise but for a norm of one among thousands of values."""
    steps = [(sent.tensors[name] - value).ravel().astype(np.float64) for name, value in update.tensors.items()]
    return np.concatenate(steps) / RATE * config.privacy.sampling_rate * 40


@pytest.mark.parametrize(
    ("promise", "factor"),
    [(Promise(), 1.0), (Promise(noise_factor=1.5), 1.5), (Promise(epsilon_per_run=0.5), None)],
    ids=["none", "factor", "epsilon"],
)
def test_a_real_site_adds_the_noise_that_it_is_charged_for(
    station: Any, has_scale: Any, promise: Promise, factor: Any
) -> None:
    north = station(**SGD)
    north.edit(promise=promise)
    write_records(north.data, [("a letter", "praise")])
    update = north.update()
    history, plan = north.ledger().history, north.config.plan()
    run = history.runs[update.run]
    if factor is None:
        assert accountant.epsilon_pld([run.plan.whole], run.plan.delta) <= 0.5
        factor = run.noise_factor
        assert factor > 1.2
    assert history.charged() == events.grouped([plan.stronger(factor).event()])
    found = noise_in(update, north.first, north.config)
    assert [has_scale(found / run.plan.noise_multiplier, off) for off in (1 / 1.2, 1.0, 1.2)] == [False, True, False]


def test_a_simulated_site_does_the_same(has_scale: Any, tmp_path: Path) -> None:
    everyone = simulated(letters(**SGD), tmp_path, [("a letter", "praise", "north"), ("another", "praise", "south")])
    config = everyone.config
    policy = everyone.sites.files("north").policy
    write_policy(replace(policy, promise=Promise(noise_factor=2.0)), tmp_path / "sites" / "north" / POLICY)
    sent = everyone.shared.initial_adapter
    request = first_request(config, everyone.sites.lead_key(), adapter_digest=sent.digest())
    reply = answer(everyone.site(0), request.signed(everyone.sites.lead_key()), sent)
    assert isinstance(reply.body, Update), reply.body
    assert everyone.site(0).ledger.history.charged() == events.grouped([config.plan().stronger(2.0).event()])
    assert has_scale(noise_in(reply.body, sent, config), 8.0)


def test_a_site_tells_its_factor_before_the_run_and_keeps_to_it(station: Any) -> None:
    north = station(**SGD)
    north.edit(promise=Promise(noise_factor=1.5))
    invitation = Invitation(proposal=north.request().proposal, site="north", expires=1e12, nonce="ab" * 16)
    site = north.real.site(json.dumps(for_sites(north.config).to_json()))
    offer = consider(site, invitation.signed(north.lead)).body
    assert isinstance(offer, Offer)
    assert (offer.most_rounds, offer.noise_factor) == (3, 1.5)
    assert north.ask().receipt.noise_factor == 1.5
