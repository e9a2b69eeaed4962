"""The noise that a site really adds for a promise of its own is the noise that its ledger charged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedtune.config import RunConfig
from fedtune.federation.protocol import Invitation
from fedtune.federation.site_round import answer, consider
from fedtune.model import Adapter
from fedtune.privacy import accountant
from fedtune.privacy.ledger.site_ledger import Ledger
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.promise import Promise
from fedtune.privacy.release import Offer, Reason, Update
from fedtune.privacy.site_files import SiteFiles
from fedtune.sites.shared_settings import for_sites
from fedtune.sites.virtual_site import POLICY, Participants

from .conftest import round_request, write_records

RATE = 0.1
SGD: dict[str, Any] = {
    "training": {"local_steps": 1, "optimizer": "sgd", "learning_rate": RATE},
    "runtime": {"seeded_noise": False},
}


def noise_in(update: Update, sent: Adapter, config: RunConfig) -> npt.NDArray[np.float64]:
    """The sum of a step, in clip norms: of one record it is noise but for a norm of one among thousands of values."""
    steps = [(sent.tensors[name] - value).ravel().astype(np.float64) for name, value in update.tensors.items()]
    return np.concatenate(steps) / RATE * config.privacy.sampling_rate * 40


def charged_noise(ledger: Ledger) -> list[float]:
    """The noise multiplier of each mechanism that was charged."""
    return [event.event.noise_multiplier for event in ledger.history.charged()]


@pytest.mark.parametrize(
    ("promise", "factor"),
    [(Promise(), 1.0), (Promise(noise_factor=1.5), 1.5), (Promise(epsilon_per_run=0.5), None)],
    ids=["none", "factor", "epsilon"],
)
def test_a_real_site_adds_the_noise_that_it_is_charged_for(
    station: Callable[..., Any], has_scale: Any, promise: Promise, factor: float | None
) -> None:
    north = station(**SGD)
    north.edit(promise=promise)
    write_records(north.data, [("a letter", "praise")])
    update = north.update()
    ledger, plan = north.ledger(), north.config.plan()
    run = ledger.history.runs[update.run]
    if factor is None:
        assert accountant.epsilon_pld([run.plan.whole], run.plan.delta) <= 0.5
        factor = run.noise_factor
        assert factor > 1.2
    assert charged_noise(ledger) == [factor * plan.noise_multiplier]
    found = noise_in(update, north.first, north.config)
    assert found.size > 500
    assert has_scale(found, factor * plan.noise_multiplier)
    assert not has_scale(found, 1.2 * factor * plan.noise_multiplier)
    assert not has_scale(found, factor * plan.noise_multiplier / 1.2)


def test_a_simulated_site_does_the_same(letters: Callable[..., RunConfig], has_scale: Any, tmp_path: Path) -> None:
    rows = "\n".join(["text,label,site", "a letter,praise,north", "another,praise,south"])
    (tmp_path / "all.csv").write_text(rows + "\n")
    partition = {"kind": "column", "sites": {"north": 0, "south": 1}}
    columns = {"text": "text", "label": "label", "site": "site"}
    data = {"train_file": str(tmp_path / "all.csv"), "columns": columns}
    config = letters(**SGD | {"data": data, "runtime": {"seeded_noise": False, "kind": "simulation"}})
    config = replace(config, data=replace(config.data, partition=replace(config.data.partition, **partition)))
    everyone = Participants(config, tmp_path)
    folder = tmp_path / "sites" / "north"
    policy = everyone.sites.files("north").policy
    write_policy(replace(policy, promise=Promise(noise_factor=2.0)), folder / POLICY)
    sent = everyone.shared.initial_adapter
    request = round_request(config, everyone.sites.lead_key(), adapter_digest=sent.digest())
    reply = answer(everyone.site(0), request.signed(everyone.sites.lead_key()), sent)
    assert isinstance(reply.body, Update), reply.body
    assert reply.receipt is not None
    assert reply.receipt.noise_factor == 2.0
    assert charged_noise(SiteFiles.of(folder / POLICY).open()) == [8.0]
    assert has_scale(noise_in(reply.body, sent, config), 8.0)


def test_a_site_tells_its_factor_before_the_run_and_keeps_to_it(station: Callable[..., Any]) -> None:
    north = station(**SGD)
    north.edit(promise=Promise(noise_factor=1.5))
    asked = north.request()
    invitation = Invitation(proposal=asked.proposal, site="north", expires=1e12, nonce="ab" * 16)
    site = north.real.site(json.dumps(for_sites(north.config).to_json()))
    offer = consider(site, invitation.signed(north.lead)).body
    assert isinstance(offer, Offer)
    assert (offer.most_rounds, offer.noise_factor) == (3, 1.5)
    assert north.ask().receipt.noise_factor == 1.5
    # Less is promised from now on, and this run keeps to what it began with.
    north.edit(promise=Promise())
    assert north.ask(round=2).receipt.noise_factor == 1.5
    assert charged_noise(north.ledger()) == [6.0]
    north.edit(promise=Promise(noise_factor=3.0))
    assert north.refusal(round=3) is Reason.PROMISE
