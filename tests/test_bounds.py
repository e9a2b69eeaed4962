"""Out-of-bounds values from bounds.toml: each error names the key and the bound."""

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.federation.drift import HeldOut
from fedtune.federation.spec import FederationSpec
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.spec import ConfigError
from fedtune.training.spec import Machine, RuntimeSpec, TrainingSpec

from .federation.secure.parties import make_terms
from .privacy.builders import make_policy, make_proposal, plan
from .privacy.test_distributed_noise import FOUR

BOUNDS: dict[str, dict[str, dict[str, list[Any]]]] = tomllib.loads(Path(__file__).with_name("bounds.toml").read_text())
BUILDERS: dict[str, Callable[..., object]] = {
    "settings": PrivacySpec,
    "plan": plan,
    "shared_noise": lambda **value: replace(FOUR, **value),
    "proposal": make_proposal,
    "policy": make_policy,
    "dataset": lambda **value: replace(make_policy().dataset[0], **value),
    "reference": lambda **value: replace(make_policy().budget.reference, **value),
    "federation": lambda **value: FederationSpec(**{"num_sites": 2, **value}),
    "model": lambda **value: ModelSpec(**{"path": "m", **value}),
    "lora": LoraSpec,
    "head": HeadSpec,
    "training": TrainingSpec,
    "runtime": RuntimeSpec,
    "machine": Machine,
    "sum_terms": lambda **value: replace(make_terms(3, 2), **value),
    "held_out": lambda **value: HeldOut(**{"run": "r", "date": "", "mean": 0.5, "deviation": 0.1, **value}),
}
"""Builders of an object with the given value and valid defaults; policy tables are built by `make_policy`."""


@pytest.mark.parametrize(
    ("target", "bound", "key", "value"),
    [
        (target, bound, key, tuple(value) if isinstance(value, list) else value)
        for target, bounds in BOUNDS.items()
        for bound, keys in bounds.items()
        for key, values in keys.items()
        for value in values
    ],
)
def test_out_of_bounds_value_is_refused_with_its_key(target: str, bound: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        BUILDERS[target](**{key: value}) if target in BUILDERS else make_policy(**{target: {key: value}})
    assert (caught.value.key, caught.value.bound) == (key, bound)
