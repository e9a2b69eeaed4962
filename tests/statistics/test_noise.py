"""Scale and shape of the noise that a real step adds, tensor by tensor, and that 10 % off is rejected.

The noise comes from the operating system, so these tests fail for nothing once in a million sessions each.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from fedtune.privacy.mechanism import add_gaussian_noise
from fedtune.training import dp_step

from .conftest import model_of, plan, random_texts, sums_of
from .decisions import FALSE_ALARM, POWER, Scale, Shape

SIGMA, CLIP, STEPS = 1.3, 0.7, 200
SCALE = SIGMA * CLIP
Arrays = dict[str, npt.NDArray[np.float64]]


def noise_by_tensor() -> Arrays:
    """Every value that steps on nobody's records add to each tensor."""
    sums = sums_of(model_of(), random_texts(0), plan(), steps=STEPS)
    return {name: np.concatenate([one[name].ravel() for one in sums]) for name in sums[0]}


@pytest.fixture(scope="module")
def right() -> Arrays:
    return noise_by_tensor()


def test_every_tensor_has_noise_of_the_stated_scale(right: Arrays) -> None:
    assert len(right) == 25
    for name, values in right.items():
        test = Scale(values.size, FALSE_ALARM / len(right))
        assert min(test.power(0.9), test.power(1.1)) >= POWER, name
        assert test.accepts(values, SCALE), name


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_scale_that_is_ten_percent_off_is_rejected_in_every_tensor(
    right: Arrays, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def off(sums: Any, *, noise_multiplier: float, **rest: Any) -> Any:
        return add_gaussian_noise(sums, noise_multiplier=factor * noise_multiplier, **rest)

    monkeypatch.setattr(dp_step, "add_gaussian_noise", off)
    for name, values in noise_by_tensor().items():
        assert not Scale(values.size, FALSE_ALARM / len(right)).accepts(values, SCALE), name


def test_every_tensor_has_noise_of_the_stated_shape(right: Arrays) -> None:
    for name, values in right.items():
        assert Shape(values.size, FALSE_ALARM / len(right)).accepts(values, SCALE), name


# Each has the right standard deviation, or all but a tenth of it, and another shape.
LAPLACE = stats.laplace(scale=1 / np.sqrt(2.0))
SHAPES: dict[str, tuple[Any, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]]] = {
    # One value in ten gets no noise.
    "one in ten silent": (
        lambda z: np.where(np.arange(z.size) % 10, z, 0.0),
        lambda x: 0.9 * stats.norm.cdf(x) + 0.1 * (x >= 0),
    ),
    "Laplace": (lambda z: LAPLACE.ppf(stats.norm.cdf(z)), LAPLACE.cdf),
    # Rounded to a tenth of the clip norm's noise: what is left of it is a grid.
    "a grid": (lambda z: np.round(z * 5) / 5, lambda x: stats.norm.cdf((np.floor(x * 5 + 1e-9) + 0.5) / 5)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_another_shape_is_rejected_in_every_tensor(right: Arrays, shape: str) -> None:
    (transform, cdf), places = SHAPES[shape], np.linspace(-6, 6, 100_001)
    distance = float(np.max(np.abs(cdf(places) - stats.norm.cdf(places))))
    for name, values in right.items():
        test = Shape(values.size, FALSE_ALARM / len(right))
        assert test.power(distance) >= POWER, name
        assert not test.accepts(SCALE * transform(values / SCALE), SCALE), name


def test_the_noise_is_the_same_on_real_records() -> None:
    """Everybody joins, most gradients are clipped, and the weights stay: what differs between steps is the noise."""
    model, everyone = model_of(), random_texts(12)
    (exact,) = sums_of(model, everyone, plan(sampling_rate=1.0, noise_multiplier=0.0))
    noisy = sums_of(model, everyone, plan(sampling_rate=1.0), steps=8)
    assert any(total.any() for total in exact.values())
    for part in ("lora_A", "lora_B"):
        noise = np.concatenate([(one[name] - exact[name]).ravel() for one in noisy for name in exact if part in name])
        test = Scale(noise.size, FALSE_ALARM / 4)
        assert min(test.power(0.9), test.power(1.1)) >= POWER
        assert test.accepts(noise, SCALE)
        assert Shape(noise.size, FALSE_ALARM / 4).accepts(noise, SCALE)
