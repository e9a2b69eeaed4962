"""A site's work in a round, which must be the same at a real and at a simulated site."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedtune.config import RunConfig
from fedtune.data import Record
from fedtune.data.load import SiteRecords
from fedtune.federation.site_round import TrainingResult
from fedtune.model.adapter import Adapter
from fedtune.privacy import events
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.randomness import SeededRandomness, SystemRandomness
from fedtune.privacy.release import Reason, Update
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.sites.work import SiteWork, make_randomness
from fedtune.training.devices import _Device

from .conftest import make_first_request, make_letters, simulate_same_run, write_records

LETTERS = [(f"letter {n} of {n % 7}", ("invoice", "complaint", "praise")[n % 3]) for n in range(40)]
"""The records of a station, in file order."""


@pytest.mark.by_day("fixed noise")
@pytest.mark.parametrize(
    "groups",
    [{}, {"privacy": {"noise_multiplier": None, "max_grad_norm": 0.3}}, {"runtime": {"kept_states_mib": 0}, "seed": 3}],
    ids=["fixed noise", "calibrated noise", "no cached states"],
)
def test_real_and_simulated_sites_train_identically(station: Any, tmp_path: Path, groups: Any) -> None:
    site = station(**groups)
    site.first = LoadedModel(site.config).initial_adapter
    rows = [*((*letter, "north") for letter in LETTERS), ("elsewhere", "praise", "south")]
    participants, noise = simulate_same_run(site.config, tmp_path, rows), set[str]()
    for round in (1, 2):
        request = make_first_request(participants.config, participants.sites.lead_key(), round=round)
        trained = participants.site(0).train(request, participants.shared.initial_adapter, 1).adapter
        assert Adapter(site.update(round=round).tensors).digest() == trained.digest()
        noise.add(trained.digest())
    assert len(noise) == 2


@pytest.mark.nightly
def test_update_is_independent_of_the_number_of_devices(station: Any, tmp_path: Path) -> None:
    site = station()
    first = Adapter(site.update().tensors)
    # A new ledger has no stored reply, so the same round is trained again.
    site.edit(ledger="another.db", machine={"num_devices": 2})
    assert Adapter(site.update().tensors).digest() == first.digest()
    workers = site.real._model.devices._workers
    ((process, _),) = workers._members
    site.edit(ledger="third.db")
    ask = workers.ask

    def kill_device(rank: int, what: Callable[..., Any], *args: Any) -> None:
        if what is _Device.sum_contributions:
            process.kill()
        ask(rank, what, *args)

    workers.ask = kill_device
    assert site.refusal() is Reason.SITE_ERROR, "a round with a failed device must release nothing"
    (run,) = site.ledger().history.runs.values()
    assert run.charged_rounds == 1, "it must be charged before training"
    # The next round uses its devices again, even if one ended meanwhile.
    second = Adapter(site.update(round=2).tensors).digest()
    ((worker, _),) = site.real._model.devices._workers._members
    worker.kill()
    worker.join()
    site.edit(ledger="fourth.db")
    assert Adapter(site.update(round=2).tensors).digest() == second


def measure_noise(update: Update, sent: Adapter, config: RunConfig) -> npt.NDArray[np.float64]:
    """Measure a step's noise in clip norms; one record adds a norm of at most one, spread over thousands of values."""
    steps = [(sent.tensors[name] - value).ravel().astype(np.float64) for name, value in update.tensors.items()]
    return np.concatenate(steps) / config.training.learning_rate * config.privacy.sampling_rate * 40


SGD = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.1}


def test_real_site_adds_exactly_the_charged_noise(station: Any, has_scale: Any) -> None:
    north = station(training=SGD, runtime={"seeded_noise": False})
    write_records(north.data, [("a letter", "praise")])
    update, plan = north.update(), north.config.plan()
    assert north.ledger().history.count_total_charges() == events.count_mechanisms([plan.event()])
    noise = measure_noise(update, north.first, north.config) / plan.noise_multiplier
    assert [has_scale(noise, off) for off in (1 / 1.2, 1.0, 1.2)] == [False, True, False]


@pytest.mark.parametrize("seeded", [True, False])
def test_noise_repeats_only_with_a_seed(station: Any, seeded: bool) -> None:
    site = station(runtime={"seeded_noise": seeded})
    first = Adapter(site.update().tensors)
    # A new ledger has no stored reply, so the same round is trained again.
    site.edit(ledger="another.db")
    assert (Adapter(site.update().tensors).digest() == first.digest()) is seeded
    assert isinstance(make_randomness(seeded, 7), SeededRandomness if seeded else SystemRandomness)


@pytest.fixture(scope="module")
def shared_model() -> RunModel:
    """The model of a run with held-out records and noised scores."""
    config = make_letters(data={"heldout_fraction": 0.5}, privacy={"metrics": "noised"})
    return RunModel(LoadedModel(config), config)


def train_at_north(shared: RunModel, lead: SigningKey, records: SiteRecords, *, key: bytes = b"k") -> TrainingResult:
    """Train a round at the site north."""
    work = SiteWork("north", shared, records, declared_size=40, max_adapter_value=2.0)
    request = make_first_request(shared.config, lead)
    return work.run_round(request, shared.initial_adapter, 1, fingerprint_key=key)


def read(letters: list[tuple[str, str]]) -> list[Record]:
    return [Record({"text": text, "label": label}) for text, label in letters]


RECORDS = SiteRecords(training=read(LETTERS[:20]), heldout=read(LETTERS[20:]))


def test_scores_use_held_out_records_and_updates_use_training_records(
    shared_model: RunModel, lead_key: SigningKey
) -> None:
    fingerprint_all = train_at_north(shared_model, lead_key, RECORDS)
    others_held_out = train_at_north(shared_model, lead_key, replace(RECORDS, heldout=RECORDS.heldout[:5]))
    assert others_held_out.adapter.digest() == fingerprint_all.adapter.digest()
    assert others_held_out.scores != fingerprint_all.scores
    fewer_trained = train_at_north(shared_model, lead_key, replace(RECORDS, training=RECORDS.training[:5]))
    assert fewer_trained.scores == fingerprint_all.scores
    assert fewer_trained.adapter.digest() != fingerprint_all.adapter.digest()


def test_fingerprint_covers_training_records_under_its_key(shared_model: RunModel, lead_key: Any) -> None:
    one = train_at_north(shared_model, lead_key, RECORDS).fingerprint
    without = train_at_north(shared_model, lead_key, replace(RECORDS, heldout=[]))
    assert without.fingerprint == one
    assert all(without.scores), "noise must be released anyway"
    assert train_at_north(shared_model, lead_key, replace(RECORDS, training=RECORDS.training[1:])).fingerprint != one
    assert train_at_north(shared_model, lead_key, RECORDS, key=b"another").fingerprint != one
