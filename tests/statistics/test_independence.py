"""Noise of one step says nothing about that of another step, tensor, round, attempt, site or run.

Releases are compared at every shift, so that a stream that is used twice is found also where its second use begins
elsewhere.  The noise comes from the operating system: these tests fail for nothing once in a million sessions each.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedtune.model.adapter import Adapter
from fedtune.privacy.randomness import Randomness, RandomStream, SystemRandomness

from .conftest import after_a_round, model_of, plan, random_texts, sums_of
from .decisions import FALSE_ALARM, POWER, Unrelated

Values = npt.NDArray[np.float64]
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
