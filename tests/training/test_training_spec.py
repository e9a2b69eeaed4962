"""Settings of training and of the machine."""

from __future__ import annotations

import pytest

from fedtune.spec import ConfigError
from fedtune.training.spec import RuntimeSpec, TrainingSpec


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("local_steps", 0),
        ("optimizer", "adam"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", 1e10),
        ("head_learning_rate", 3.5e38),
        ("weight_decay", 1e10),
        ("head_learning_rate", -1.0),
        ("weight_decay", -0.1),
        ("momentum", 1.0),
        ("betas", (0.9, 1.0)),
        ("schedule", "exponential"),
        ("warmup_steps", -1),
    ],
)
def test_training_out_of_bounds_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        TrainingSpec(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [("device", "tpu"), ("num_threads", 0), ("micro_batch_tokens", 0)],
)
def test_runtime_out_of_bounds_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        RuntimeSpec(**{key: value})  # type: ignore[arg-type]


def test_noise_is_secret_unless_asked() -> None:
    assert not RuntimeSpec().seeded_noise
