"""Settings of training and of the machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from fedtune.spec import ConfigError
from fedtune.training.spec import RuntimeSpec, TrainingSpec, automatic_rate


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("local_steps", 0), ("optimizer", "adam"), ("learning_rate", 0.0), ("learning_rate", float("nan"))),
        *(("learning_rate", 1e10), ("head_learning_rate", 3.5e38), ("weight_decay", 1e10)),
        *(("head_learning_rate", -1.0), ("weight_decay", -0.1), ("momentum", 1.0), ("betas", (0.9, 1.0))),
        *(("schedule", "exponential"), ("warmup_steps", -1)),
    ],
)
def test_training_out_of_bounds_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        TrainingSpec(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device", "tpu"),
        ("num_devices", 0),
        ("num_devices", 65),
        ("num_threads", 0),
        ("micro_batch_tokens", 0),
        ("step_mib", 0),
    ],
)
def test_runtime_out_of_bounds_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        RuntimeSpec(**{key: value})  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("learning_rate", {"optimizer": "sgd"}),
        ("head_learning_rate", {"head_learning_rate": 0.1}),
        ("unclipped_learning_rate", {"unclipped_learning_rate": 0.1}),
    ],
)
def test_an_automatic_rate_wants_adam_and_no_other_rates(key: str, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        TrainingSpec(learning_rate="auto", **settings)  # type: ignore[arg-type]
