"""Settings of training and of the machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from fedtune.spec import ConfigError
from fedtune.training.spec import RuntimeSpec, TrainingSpec, automatic_rate


@pytest.mark.parametrize(
    ("spec", "key", "value"),
    [
        *((TrainingSpec, "local_steps", 0), (TrainingSpec, "optimizer", "adam"), (TrainingSpec, "learning_rate", 0.0)),
        *((TrainingSpec, "learning_rate", float("nan")), (TrainingSpec, "learning_rate", 1e10)),
        *((TrainingSpec, "head_learning_rate", 3.5e38), (TrainingSpec, "weight_decay", 1e10)),
        *((TrainingSpec, "head_learning_rate", -1.0), (TrainingSpec, "weight_decay", -0.1)),
        *((TrainingSpec, "momentum", 1.0), (TrainingSpec, "betas", (0.9, 1.0)), (TrainingSpec, "warmup_steps", -1)),
        *((TrainingSpec, "schedule", "exponential"), (RuntimeSpec, "device", "tpu"), (RuntimeSpec, "num_devices", 0)),
        *((RuntimeSpec, "num_devices", 65), (RuntimeSpec, "num_threads", 0), (RuntimeSpec, "micro_batch_tokens", 0)),
        (RuntimeSpec, "step_mib", 0),
    ],
)
def test_a_value_out_of_bounds_names_its_key(spec: Any, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        spec(**{key: value})


def test_noise_is_secret_unless_asked() -> None:
    assert not RuntimeSpec().seeded_noise


RATE: Callable[..., float] = partial(
    automatic_rate, steps=50, sampled=30.0, noise_multiplier=2.0, outputs=20, num_sites=4
)


@pytest.mark.parametrize(
    "less", [{"noise_multiplier": 4.0}, {"sampled": 15.0}, {"outputs": 77}, {"num_sites": 1}, {"steps": 100}]
)
def test_the_automatic_rate_falls_where_noise_counts_for_more(less: dict[str, float]) -> None:
    # Twice the steps need sqrt(2) times the noise for the same epsilon.
    longer = {"noise_multiplier": 2.0 * 2**0.5} if "steps" in less else {}
    assert RATE(**less, **longer) < RATE()


def test_where_the_signal_is_clear_the_automatic_rate_goes_by_steps_alone() -> None:
    assert RATE(sampled=1e6) == RATE(sampled=1e7) == pytest.approx(0.18 * (4 / 50) ** 0.5)
    assert RATE(noise_multiplier=0.0) == pytest.approx(0.18 * (1.5 / 50) ** 0.5)
    assert RATE(sampled=1e6, steps=200) == RATE(sampled=1e6) / 2


@pytest.mark.parametrize("other", [{"optimizer": "sgd"}, {"head_learning_rate": 0.1}, {"unclipped_learning_rate": 0.1}])
def test_an_automatic_rate_wants_adam_and_no_other_rates(other: dict[str, Any]) -> None:
    key = next(iter(other)).replace("optimizer", "learning_rate")
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        TrainingSpec(learning_rate="auto", **other)
