"""The plan: calibrated once for everything that a site may be charged for, and hashed."""

import dataclasses
import json
import math
from collections import Counter
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent

from fedtune.privacy import events
from fedtune.privacy.accountant import epsilon_pld
from fedtune.privacy.distributed_noise import DistributedNoise
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.privacy.run_plan import Plan
from fedtune.spec import ConfigError

from .builders import make_proposal, plan


def test_plan_and_proposal_digests_match_golden_values() -> None:
    # Requests, ledgers and refusals contain these digests, so changing one changes a format.
    assert plan().digest() == "a261a1fd7452c273457760a02c814571cada399f305eb9012b3eefeebabebd26"
    assert make_proposal(lead="1" * 64).digest() == "9fe65ef37203d6d13194fbdf13d39e9ec9a6a5a7bfc720d482e8c9b10ece0fd8"


@pytest.mark.parametrize(
    ("name", "notation"),
    [("max_grad_norm", 1), ("noise_multiplier", 2), ("sampling_rate", 1), ("metrics_noise_multiplier", -0.0)],
)
def test_plan_digest_is_independent_of_number_notation(name: str, notation: float) -> None:
    """A proposal denied as 1.0 must be denied as 1, too."""
    expected = plan(**{name: abs(float(notation))})
    assert Plan.from_json(expected.to_json() | {name: notation}).digest() == expected.digest()


def test_every_plan_field_is_in_its_json() -> None:
    by_user = plan(unit="user", records_per_user=8, metrics_noise_multiplier=20.0)
    only_with = {"shared", "cohorts", "runs", "noise"}  # tested separately
    assert set(by_user.to_json()) == {field.name for field in dataclasses.fields(Plan)} - only_with
    laplace = plan(sampling_rate=1.0, noise="laplace")
    assert laplace.to_json()["noise"] == "laplace"
    assert Plan.from_json(laplace.to_json()) == laplace
    shared = DistributedNoise(num_sites=4, threshold=3, colluders=0, noise_multiplier=1.0, cell_bits=3, bound=9)
    of_sums = plan(local_steps=1, noise_multiplier=1.0, shared=shared)
    assert of_sums.to_json()["shared"] == dataclasses.asdict(shared)
    assert Plan.from_json(json.loads(json.dumps(of_sums.to_json()))) == of_sums
    for bad in (None, {}, {**dataclasses.asdict(shared), "threshold": True}):
        with pytest.raises(ConfigError):
            Plan.from_json({**of_sums.to_json(), "shared": bad})
    for changes, bound in (({"local_steps": 2}, "must be 1"), ({"noise_multiplier": 2.0}, "must equal")):
        with pytest.raises(ConfigError, match=bound):
            plan(**{"local_steps": 1, "noise_multiplier": 1.0, "shared": shared} | changes)
    assert Plan.from_json(json.loads(json.dumps(by_user.to_json()))) == by_user
    for run_plan in (plan(), by_user):
        assert Plan.from_json(run_plan.to_json()) == run_plan
    assert len({plan(unit="user", records_per_user=limit).digest() for limit in (1, 8)} | {plan().digest()}) == 3
    assert "records_per_user" not in plan().to_json(), "a record-level plan must not have user fields"
    assert Plan.from_json({**plan().to_json(), "records_per_user": 1}) == plan()
    assert "runs" not in plan().to_json(), "only more than one run is serialized"
    assert Plan.from_json(plan(runs=3).to_json()) == plan(runs=3)


@pytest.mark.parametrize("metrics", ["none", "noised"])
def test_planned_runs_compose_to_the_target_epsilon(metrics: Any) -> None:
    privacy = PrivacySpec(
        epsilon=4.0, planned_runs=5, sampling_rate=0.1, metrics=metrics, metrics_noise_multiplier=10.0
    )
    made = Plan.from_privacy(privacy, local_steps=4, num_rounds=3, spare_rounds=1)
    assert 3.98 < epsilon_pld([made.full_event] * 5, made.delta) <= 4.0 < epsilon_pld([made.full_event] * 6, made.delta)
    assert events.count_mechanisms([made.full_event] * 5) == events.count_mechanisms([made.all_runs_event])
    with pytest.raises(ConfigError, match=r"runs = 121: must be at most 120"):
        PrivacySpec(planned_runs=121)


def test_user_level_event_equals_the_record_level_event() -> None:
    # The unit is whom the guarantee protects. Both are Poisson-sampled and clipped once, so the mechanism is the same.
    for max_records in (1, 8):
        assert plan(unit="user", records_per_user=max_records).event(rounds=2) == plan().event(rounds=2)


def test_invalid_plan_json_raises_a_config_error() -> None:
    invalid = [{"epsilon": 1.0}, {"noise_multiplier": True}, *({"local_steps": n} for n in (True, 0, 10**308))]
    for change in (*invalid, *({"runs": n} for n in (1, 0, 2.0, True, None, 121))):
        with pytest.raises(ConfigError):
            Plan.from_json(plan().to_json() | change)


def test_plan_copies_every_privacy_setting() -> None:
    changes = {"delta": 1e-6, "noise_multiplier": 2.5, "max_grad_norm": 0.3, "sampling_rate": 0.15}
    rounds = {"local_steps": 4, "num_rounds": 6, "spare_rounds": 1}
    privacy = PrivacySpec(**changes, records_per_user=5)
    assert Plan.from_privacy(privacy, **rounds) == plan(**changes, **rounds), "records have no such limit"
    by_user = Plan.from_privacy(dataclasses.replace(privacy, unit="user"), **rounds)
    assert by_user == plan(**changes, **rounds, unit="user", records_per_user=5)
    silent = Plan.from_privacy(dataclasses.replace(privacy, mechanism="none"), **rounds)
    assert (silent.noise_multiplier, silent.private) == (0, False), "noise must be ignored"
    assert epsilon_pld([silent.event()], 1e-5) == math.inf


def test_released_scores_are_accounted_as_separate_events() -> None:
    with_scores = plan(metrics_noise_multiplier=20.0)
    assert (plan().releases_metrics, with_scores.releases_metrics) == (False, True)
    for rounds in (1, 4):
        # Held-out records are charged like training records: both parts, one after the other.
        expected = events.count_mechanisms([plan().event(rounds=rounds)]) + Counter({GaussianDpEvent(20.0): rounds})
        assert events.count_mechanisms([with_scores.event(rounds=rounds)]) == expected
    assert events.from_json(events.to_json(with_scores.event(rounds=4))) == with_scores.event(rounds=4)


def test_scores_that_spend_the_whole_epsilon_are_refused() -> None:
    privacy = PrivacySpec(epsilon=0.5, metrics="noised", metrics_noise_multiplier=1.0)
    with pytest.raises(ConfigError, match=r"privacy\.epsilon = 0\.5: is used up by the released metrics alone"):
        Plan.from_privacy(privacy, local_steps=1, num_rounds=5)
