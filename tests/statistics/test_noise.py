"""Scale and shape of the noise that a real step adds, that it is independent, and that 10 % off is rejected.

It comes from the operating system: these tests fail for nothing once in a million sessions each.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from fedtune.model.adapter import Adapter
from fedtune.privacy.mechanism import add_gaussian_noise
from fedtune.privacy.randomness import Randomness, RandomStream, SystemRandomness
from fedtune.training import dp_step

from .conftest import after_a_round, model_of, plan, random_texts, sums_of
from .decisions import FALSE_ALARM, POWER, Scale, Shape, Unrelated

SIGMA, CLIP, STEPS = 1.3, 0.7, 200
SCALE = SIGMA * CLIP
Values = npt.NDArray[np.float64]
Arrays = dict[str, Values]


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
SHAPES: dict[str, tuple[Any, Callable[[Values], Values]]] = {
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


# Noise of one step says nothing about that of another step, tensor, round, attempt, site or run.  Releases are compared
# at every shift, so that a stream that is used twice is found also where its second use begins elsewhere.

RATE = 100.0


def unrelated(releases: Mapping[Any, Values]) -> list[tuple[Any, Any]]:
    """The pairs of releases that are not independent."""
    pairs = list(itertools.combinations(releases, 2))
    count = min(values.size for values in releases.values())
    test = Unrelated(count, FALSE_ALARM / len(pairs))
    assert test.power(0.1) >= POWER, "a tenth that is shared is found"
    return [(one, other) for one, other in pairs if not test.accepts(releases[one][:count], releases[other][:count])]


def flat(tensors: Mapping[str, npt.NDArray[Any]]) -> Values:
    return np.concatenate([value.ravel() for value in tensors.values()]).astype(np.float64)


def test_steps_are_independent() -> None:
    steps = sums_of(model_of(), random_texts(0), plan(), steps=8)
    assert unrelated({number: flat(step) for number, step in enumerate(steps)}) == []


def test_tensors_of_one_step_are_independent() -> None:
    # The tensors of layer 0, each with its values of 40 steps.
    steps = sums_of(model_of(), random_texts(0), plan(), steps=40)
    tensors = [name for name in steps[0] if "layer.0" in name]
    assert len(tensors) == 12
    assert unrelated({name: np.concatenate([step[name].ravel() for step in steps]) for name in tensors}) == []


@pytest.fixture(scope="module")
def released() -> Any:
    """What a round of nobody's records moves: the noise of its one step, as it leaves the site."""
    model = model_of()
    start = Adapter.of(model)

    def make(site: str = "a", round: int = 1, attempt: int = 1, randomness: Randomness | None = None) -> Values:
        source = randomness or SystemRandomness()
        after = after_a_round(model, start, 0, "sgd", RATE, source=source, site=site, round=round, attempt=attempt)
        return flat({name: value.astype(np.float64) - start.tensors[name] for name, value in after.tensors.items()})

    return make


PLACES = list(itertools.product(("a", "b", "c"), (1, 2), (1, 2)))


def test_sites_rounds_and_attempts_are_independent(released: Any) -> None:
    assert unrelated({place: released(*place) for place in PLACES}) == []


class Sharing:
    """Every stream is mixed with one that all share, so that any two of them correlate by a tenth."""

    seeded = False

    def __init__(self) -> None:
        self._key = SystemRandomness().stream().uniform64(4).tobytes()

    def stream(self, *purpose: str | int) -> RandomStream:
        common = RandomStream(self._key)

        class Mixed(RandomStream):
            def rounded_normal(self, count: int, deviation: float) -> npt.NDArray[np.int64]:
                shared = common.rounded_normal(count, np.sqrt(0.1) * deviation)
                return shared + super().rounded_normal(count, np.sqrt(0.9) * deviation)

        return Mixed(SystemRandomness().stream().uniform64(4).tobytes())


def test_sites_that_share_a_tenth_of_their_noise_are_found(released: Any) -> None:
    source = Sharing()
    places = PLACES[:4]
    found = unrelated({place: released(*place, source) for place in places})
    assert len(found) == 6, "each pair"
    assert unrelated({place: released(*place, Sharing()) for place in places}) == [], "a source for each is right"
