"""A small adapter, a plan and what a site says about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtune.model import Adapter
from fedtune.privacy.plan import Plan
from fedtune.privacy.release import Receipt, Update


@pytest.fixture
def adapter() -> Adapter:
    return Adapter({"b.lora_A": np.arange(6, dtype=np.float32).reshape(2, 3), "head": np.ones(4, np.float32)})


@pytest.fixture
def plan() -> Plan:
    return Plan(
        unit="record",
        delta=1e-5,
        sampling_rate=0.2,
        noise_multiplier=4.0,
        max_grad_norm=1.0,
        local_steps=2,
        num_rounds=3,
        spare_rounds=1,
    )


@pytest.fixture
def update(adapter: Adapter) -> Callable[..., Update]:
    def make(**changes: Any) -> Update:
        return Update(**({"site": "a", "run": "r", "round": 1, "tensors": dict(adapter.tensors)} | changes))

    return make


@pytest.fixture
def receipt() -> Callable[..., Receipt]:
    def make(site: str = "a", *, charged: int = 1, run: str = "r") -> Receipt:
        return Receipt(site=site, run=run, charged_rounds=charged, charged_steps=2 * charged, sequence=3 * charged)

    return make
