"""Scale and shape of the noise that a real step adds, that it is independent, and that 10 % off is rejected.

It comes from the operating system: these tests fail for nothing once in a million sessions each.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedtune.model.adapter import Adapter
from fedtune.privacy.randomness import Randomness, SystemRandomness

from .conftest import build_model, plan, random_texts, release_step_round, release_sums
from .decisions import FALSE_ALARM, POWER, Scale, Shape, Unrelated

SIGMA, CLIP, STEPS = 1.3, 0.7, 200
SCALE = SIGMA * CLIP
Values = npt.NDArray[np.float64]
Arrays = dict[str, Values]


def collect_noise() -> Arrays:
    """Every value that steps on nobody's records add to each tensor."""
    sums = release_sums(build_model(), random_texts(0), plan(), steps=STEPS)
    return {name: np.concatenate([release[name].ravel() for release in sums]) for name in sums[0]}


@pytest.fixture(scope="module")
def correct_noise() -> Arrays:
    return collect_noise()


def test_every_tensor_has_noise_of_the_stated_scale(correct_noise: Arrays) -> None:
    assert len(correct_noise) == 25
    for name, values in correct_noise.items():
        test = Scale(values.size, FALSE_ALARM / len(correct_noise))
        assert min(test.power(0.9), test.power(1.1)) >= POWER, name
        assert test.accepts(values, SCALE), name


def test_every_tensor_has_noise_of_the_stated_shape(correct_noise: Arrays) -> None:
    for name, values in correct_noise.items():
        test = Shape(values.size, FALSE_ALARM / len(correct_noise))
        assert test.power(0.05) >= POWER, "of noise that one value in ten has not"
        assert test.accepts(values, SCALE), name


def test_noise_on_real_records_has_the_stated_scale() -> None:
    """Everybody joins, most gradients are clipped, and the weights stay: what differs between steps is the noise."""
    model, records = build_model(), random_texts(12)
    (exact,) = release_sums(model, records, plan(sampling_rate=1.0, noise_multiplier=0.0))
    noisy = release_sums(model, records, plan(sampling_rate=1.0), steps=8)
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


def find_related_pairs(releases: Mapping[Any, Values]) -> list[tuple[Any, Any]]:
    """The pairs of releases that are not independent."""
    pairs = list(itertools.combinations(releases, 2))
    count = min(values.size for values in releases.values())
    test = Unrelated(count, FALSE_ALARM / len(pairs))
    assert test.power(0.1) >= POWER, "a tenth that is shared is found"
    return [(one, other) for one, other in pairs if not test.accepts(releases[one][:count], releases[other][:count])]


def flatten_tensors(tensors: Mapping[str, npt.NDArray[Any]]) -> Values:
    return np.concatenate([value.ravel() for value in tensors.values()]).astype(np.float64)


def test_noise_of_different_steps_is_independent() -> None:
    steps = release_sums(build_model(), random_texts(0), plan(), steps=8)
    assert find_related_pairs({number: flatten_tensors(step) for number, step in enumerate(steps)}) == []


def test_noise_of_different_tensors_is_independent() -> None:
    # The tensors of layer 0, each with its values of 40 steps.
    steps = release_sums(build_model(), random_texts(0), plan(), steps=40)
    tensors = [name for name in steps[0] if "layer.0" in name]
    assert len(tensors) == 12
    assert find_related_pairs({name: np.concatenate([step[name].ravel() for step in steps]) for name in tensors}) == []


@pytest.fixture(scope="module")
def released_round() -> Any:
    """What a round of nobody's records moves: the noise of its one step, as it leaves the site."""
    model = build_model()
    start = Adapter.from_task_model(model)

    def make(site: str = "a", round: int = 1, attempt: int = 1, randomness: Randomness | None = None) -> Values:
        source = randomness or SystemRandomness()
        after = release_step_round(model, start, 0, "sgd", RATE, source=source, site=site, round=round, attempt=attempt)
        return flatten_tensors(
            {name: value.astype(np.float64) - start.tensors[name] for name, value in after.tensors.items()}
        )

    return make


PLACES = list(itertools.product(("a", "b", "c"), (1, 2), (1, 2)))


def test_noise_of_sites_rounds_and_attempts_is_independent(released_round: Any) -> None:
    assert find_related_pairs({purpose: released_round(*purpose) for purpose in PLACES}) == []
