"""Who joins a real step: at the rate, each unit and each step by itself.  Counts are binomial, so decisions are exact.

The draws come from the operating system: these tests fail for nothing once in a million sessions each.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from fedtune.privacy.mechanism import draw_poisson_sample
from fedtune.privacy.randomness import RandomStream, SystemRandomness
from fedtune.training.dp_step import Records, take_dp_sgd_step

from .conftest import plan
from .decisions import FALSE_ALARM, POWER, Rate

UNITS, STEPS, RATE = 50, 8000, 0.3
LAGS = (1, 2, 3, 4, 5)
Joined = npt.NDArray[np.bool_]
Sampler = Callable[[int, float, RandomStream], npt.NDArray[np.int64]]


def record_participants(*, steps: int = STEPS) -> Joined:
    """(steps, units): who took part in each real step."""
    sampled = np.zeros((steps, UNITS), dtype=np.bool_)
    step = 0

    def cut(indices: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        sampled[step, indices] = True
        return [indices] if len(indices) else []

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    streams = {"sampling": SystemRandomness().stream(), "noise": SystemRandomness().stream()}
    planned, records = plan(sampling_rate=RATE), Records(count=UNITS, declared_size=UNITS, cut=cut)  # type: ignore[arg-type]
    silent: Any = SimpleNamespace(compute_gradients=lambda batch: {"a": torch.zeros(len(batch), 1)})  # whoever joins
    for step in range(steps):  # noqa: B007, `cut` reads it
        take_dp_sgd_step(silent, records, planned, parameters={"a": parameter}, optimizer=optimizer, **streams)
    return sampled


def draw_participants(sampler: Sampler) -> Joined:
    """(steps, units): whom a sampler by itself lets join."""
    stream, sampled = SystemRandomness().stream(), np.zeros((STEPS, UNITS), dtype=np.bool_)
    for row in sampled:
        row[sampler(UNITS, RATE, stream)] = True
    return sampled


ALARM = FALSE_ALARM / 5
"""Of each of the five questions below."""


def has_total_sampling_rate(sampled: Joined) -> bool:
    """All units and steps together."""
    return Rate(sampled.size, RATE, ALARM).accepts(int(sampled.sum()))


def has_unit_sampling_rates(sampled: Joined) -> bool:
    test = Rate(len(sampled), RATE, ALARM / sampled.shape[1])
    return all(test.accepts(int(count)) for count in sampled.sum(axis=0))


def has_binomial_sizes(seen: Joined) -> bool:
    """As a binomial: how often a batch's size is more than 1.3 standard deviations off."""
    return Rate(len(seen), compute_outside_probability(), ALARM).accepts(int(np.sum(is_outside(seen.sum(axis=1)))))


def is_outside(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return np.abs(sizes - UNITS * RATE) > 1.3 * np.sqrt(UNITS * RATE * (1 - RATE))


def compute_outside_probability() -> float:
    sizes = np.arange(UNITS + 1)
    return float(stats.binom.pmf(sizes, UNITS, RATE)[is_outside(sizes)].sum())


def has_independent_neighbors(sampled: Joined) -> bool:
    """Whether neighbors join together at the square of the rate; each unit is in one pair."""
    both_sampled = sampled[:, 0::2] & sampled[:, 1::2]
    return Rate(both_sampled.size, RATE**2, ALARM).accepts(int(both_sampled.sum()))


def has_independent_steps(sampled: Joined) -> bool:
    """Whether a unit's joining says anything about its joining some steps later; each step is in one pair."""
    for lag in LAGS:
        rows = np.arange(len(sampled) // (2 * lag) * (2 * lag)).reshape(-1, 2, lag)
        both_sampled = sampled[rows[:, 0].ravel()] & sampled[rows[:, 1].ravel()]
        if not Rate(both_sampled.size, RATE**2, ALARM / len(LAGS)).accepts(int(both_sampled.sum())):
            return False
    return True


QUESTIONS = (
    has_total_sampling_rate,
    has_unit_sampling_rates,
    has_binomial_sizes,
    has_independent_neighbors,
    has_independent_steps,
)


def list_failed_checks(sampled: Joined) -> set[str]:
    return {question.__name__ for question in QUESTIONS if not question(sampled)}


@pytest.fixture(scope="module")
def real_participants() -> Joined:
    return record_participants()


def test_sampled_units_form_a_poisson_sample(real_participants: Joined) -> None:
    assert list_failed_checks(real_participants) == set()


def test_ten_percent_deviations_would_be_detected() -> None:
    """The power of each question, from its own distribution."""
    trials = STEPS * UNITS
    tenth = RATE**2 + 0.1 * RATE * (1 - RATE)
    assert min(Rate(trials, RATE, ALARM).power(factor * RATE) for factor in (0.9, 1.1)) >= POWER
    assert Rate(trials // 2, RATE**2, ALARM).power(tenth) >= POWER
    pairs = min(UNITS * lag * (STEPS // (2 * lag)) for lag in LAGS)
    assert Rate(pairs, RATE**2, ALARM / len(LAGS)).power(tenth) >= POWER
    # One unit alone: 17 % off at this many steps, 10 % off in the test of the sampler by itself below.
    assert Rate(STEPS, RATE, ALARM / UNITS).power(1.17 * RATE) >= POWER
    # How often the size is off where ten units come in a fixed number and the others by Poisson sampling.
    sizes = np.arange(UNITS + 1)
    off = float(stats.binom.pmf(sizes - round(10 * RATE), UNITS - 10, RATE)[is_outside(sizes)].sum())
    assert Rate(STEPS, compute_outside_probability(), ALARM).power(off) >= POWER


def copy_participants(lag_steps: int) -> Sampler:
    """A tenth of the units do what the unit in front of them did: in this step, or some steps ago."""
    generator = np.random.default_rng(6)
    before: list[npt.NDArray[np.bool_]] = []

    def sample(count: int, rate: float, stream: RandomStream) -> npt.NDArray[np.int64]:
        drawn = stream.bernoulli(count, rate)
        model = before[-lag_steps] if lag_steps and len(before) >= lag_steps else drawn
        shift = 0 if lag_steps else 1
        copies = (generator.random(count) < 0.1) & ((np.arange(count) % 2 == 1) | (lag_steps > 0))
        result = np.where(copies, np.roll(model, shift), drawn)
        before.append(result)
        return np.flatnonzero(result)

    return sample


WRONG: dict[str, tuple[Sampler, set[str]]] = {
    "neighbors a tenth alike": (copy_participants(0), {"has_independent_neighbors"}),
    "steps a tenth alike": (copy_participants(1), {"has_independent_steps"}),
    "steps a tenth alike, three apart": (copy_participants(3), {"has_independent_steps"}),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_sampler_is_rejected(fault: str) -> None:
    sampler, questions = WRONG[fault]
    assert list_failed_checks(draw_participants(sampler)) >= questions


@pytest.fixture(scope="module")
def long_participants() -> Joined:
    """The sampler by itself, long enough to judge each unit and each pair of units alone."""
    stream = SystemRandomness().stream()
    sampled = np.zeros((30_000, 20), dtype=np.bool_)
    for row in sampled:
        row[draw_poisson_sample(20, RATE, stream)] = True
    return sampled


def test_each_unit_is_sampled_at_the_stated_rate(long_participants: Joined) -> None:
    steps, units = long_participants.shape
    test = Rate(steps, RATE, FALSE_ALARM / units)
    assert min(test.power(factor * RATE) for factor in (0.9, 1.1)) >= POWER
    assert all(test.accepts(int(count)) for count in long_participants.sum(axis=0))
    one_off = long_participants.copy()
    one_off[:, 7] &= np.arange(steps) % 10 != 0
    assert [test.accepts(int(count)) for count in one_off.sum(axis=0)].count(False) == 1


def test_each_pair_of_units_is_sampled_independently(long_participants: Joined) -> None:
    steps, units = long_participants.shape
    test = Rate(steps, RATE**2, FALSE_ALARM / (units * (units - 1) / 2))
    assert test.power(RATE**2 + 0.1 * RATE * (1 - RATE)) >= POWER, "a correlation of a tenth"

    def list_related_pairs(sampled: Joined) -> list[tuple[int, int]]:
        both_sampled = sampled.astype(np.int64).T @ sampled
        return [(i, j) for i in range(units) for j in range(i) if not test.accepts(int(both_sampled[i, j]))]

    assert list_related_pairs(long_participants) == []
    a_tenth = long_participants.copy()
    a_tenth[::10, 4] = long_participants[::10, 9]
    assert list_related_pairs(a_tenth) == [(9, 4)]
