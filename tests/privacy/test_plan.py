"""The plan: calibrated once for everything a site may be charged, and hashed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fedtune.privacy.accountant import epsilon_pld
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.privacy.plan import Plan
from fedtune.spec import ConfigError


def test_the_digest_is_golden(plan: Any) -> None:
    # It travels in requests and lies in ledgers: a change of it is a change of format.
    assert plan().digest() == "5acd848dd4c37ff88dbc11600a5d5cecae98aee99b0be05a37806bade692d2b3"


@pytest.mark.parametrize(
    "change",
    [
        {"delta": 1e-6},
        {"sampling_rate": 0.26},
        {"noise_multiplier": 1.0001},
        {"max_grad_norm": 0.51},
        {"local_steps": 4},
        {"num_rounds": 3},
        {"spare_rounds": 1},
    ],
)
def test_every_number_is_in_the_digest(plan: Any, change: dict[str, float]) -> None:
    assert plan(**change).digest() != plan().digest()
    assert plan(**change) != plan()


def test_every_field_is_in_its_json(plan: Any) -> None:
    assert set(plan().to_json()) == {field.name for field in dataclasses.fields(Plan)}
    assert Plan(**plan().to_json()) == plan()


def test_noise_is_calibrated_for_all_rounds_spare_ones_included() -> None:
    privacy = PrivacySpec(epsilon=2.0, sampling_rate=0.2)
    plan = Plan.of(privacy, local_steps=3, num_rounds=5, spare_rounds=2)
    assert plan.most_rounds == 7
    assert epsilon_pld([plan.event(rounds=7)], plan.delta) <= 2.0
    assert epsilon_pld([plan.event(rounds=8)], plan.delta) > 2.0
    assert plan.noise_multiplier > Plan.of(privacy, local_steps=3, num_rounds=5).noise_multiplier


def test_rounds_of_events_equal_their_steps_at_once(plan: Any) -> None:
    ten = plan(local_steps=4, num_rounds=10, noise_multiplier=2.0)
    in_rounds, at_once, one = (
        epsilon_pld(spent, 1e-5, interval=1e-3) for spent in ([ten.event()] * 10, [ten.event(rounds=10)], [ten.event()])
    )
    assert in_rounds == pytest.approx(at_once, abs=1e-6)
    assert at_once > 1.5 * one, "an accountant that forgets earlier rounds"


def test_of_takes_every_setting_over() -> None:
    privacy = PrivacySpec(delta=1e-6, noise_multiplier=2.5, max_grad_norm=0.3, sampling_rate=0.15)
    assert Plan.of(privacy, local_steps=4, num_rounds=6, spare_rounds=1) == Plan(
        unit="record",
        delta=1e-6,
        sampling_rate=0.15,
        noise_multiplier=2.5,
        max_grad_norm=0.3,
        local_steps=4,
        num_rounds=6,
        spare_rounds=1,
    )


def test_a_run_without_privacy_adds_no_noise_even_if_asked() -> None:
    plan = Plan.of(PrivacySpec(mechanism="none", noise_multiplier=3.0), local_steps=1, num_rounds=1)
    assert plan.noise_multiplier == 0
    assert not plan.private
    assert epsilon_pld([plan.event()], 1e-5) == float("inf")


def test_a_plan_with_noise_is_private(plan: Any) -> None:
    assert plan().private


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unit", "user"),  # training clips records, so a request must not have a site promise more
        ("delta", 0.0),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.5),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", float("nan")),
        ("noise_multiplier", float("inf")),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", float("inf")),
        ("local_steps", 0),
        ("local_steps", 2.5),  # no ledger could read the event of half a step
        ("local_steps", True),
        ("num_rounds", 0),
        ("num_rounds", 2.0),
        ("spare_rounds", -1),
        ("spare_rounds", 0.5),
    ],
)
def test_a_plan_out_of_bounds_is_refused(plan: Any, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        plan(**{key: value})
