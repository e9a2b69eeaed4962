"""What the statistical tests of the privacy core share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from fedtune.privacy.plan import Plan

Scales = Callable[[npt.NDArray[np.float64], float], bool]


@pytest.fixture
def has_scale() -> Scales:
    """Whether values look like independent N(0, scale^2), by a two-sided chi-square test of their variance.

    It rejects a right scale once in a million; with 5,000 values it misses one that is 10 % off less often than that.
    """

    def test(values: npt.NDArray[np.float64], scale: float) -> bool:
        below = stats.chi2.cdf(np.sum((values / scale) ** 2), df=values.size)
        return bool(2 * min(below, 1 - below) > 1e-6)

    return test


@pytest.fixture
def plan() -> Callable[..., Plan]:
    """A small private plan; keywords override."""

    def make(**changes: object) -> Plan:
        values: dict[str, object] = {
            "unit": "record",
            "delta": 1e-5,
            "sampling_rate": 0.25,
            "noise_multiplier": 1.0,
            "max_grad_norm": 0.5,
            "local_steps": 3,
            "num_rounds": 2,
        }
        return Plan(**(values | changes))  # type: ignore[arg-type]

    return make
