"""Poisson sampling and the Gaussian mechanism."""

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.privacy.mechanism import (
    GRID_BITS,
    PrivacySpec,
    add_gaussian_noise,
    compute_cell_width,
    draw_poisson_sample,
    release_scores,
)
from fedtune.privacy.randomness import RandomStream, SeededRandomness
from fedtune.spec import ConfigError


def stream(*purpose: str | int) -> RandomStream:
    return SeededRandomness(99).stream(*purpose)


def test_poisson_sample_is_sorted_and_stable_when_a_record_is_added() -> None:
    fewer, with_record = (draw_poisson_sample(count, 0.4, stream("prefix")) for count in (500, 501))
    assert (np.diff(fewer) > 0).all()
    assert 0 <= fewer.min() <= fewer.max() < 500
    assert fewer.dtype == np.int64
    np.testing.assert_array_equal(with_record[with_record < 500], fewer)
    assert (
        draw_poisson_sample(3, 1e-12, stream("empty")).shape
        == draw_poisson_sample(0, 0.5, stream("none")).shape
        == (0,)
    )
    np.testing.assert_array_equal(draw_poisson_sample(7, 1.0, stream("all")), np.arange(7))


SHAPES = {"lora_A": (4, 15), "lora_B": (60,), "head.weight": (3, 5, 4)}
C_IN_CELLS = 2**24
"""A clip norm in grid cells."""


def make_zero_noise(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.zeros(shape, dtype=np.int64)


@pytest.mark.parametrize("sensitivity", [None, 8.0, 0.25])
def test_noise_has_exactly_the_configured_standard_deviation(
    monkeypatch: pytest.MonkeyPatch, sensitivity: float | None
) -> None:
    options = {} if sensitivity is None else {"sensitivity": sensitivity}  # the default is one clip norm
    zeros, draws = {name: make_zero_noise(shape) for name, shape in SHAPES.items()}, list[tuple[int, Fraction]]()

    def record_deviation(self: RandomStream, count: int, deviation: float) -> npt.NDArray[np.int64]:
        draws.append((count, Fraction(deviation)))
        return make_zero_noise((count,))

    monkeypatch.setattr(RandomStream, "draw_rounded_normal", record_deviation)
    for noise_multiplier in (0.3, 1.0, 1.3, 17.1):
        noisy = add_gaussian_noise(zeros, noise_multiplier=noise_multiplier, stream=stream("exactly"), **options)
        assert {name: value.shape for name, value in noisy.items()} == SHAPES
        exact = Fraction(noise_multiplier) * Fraction(sensitivity or 1) * C_IN_CELLS
        assert draws[-3:] == [(60, exact)] * 3, "each tensor must have separate noise"
    assert len(draws) == 3 * 4


def test_grid_has_two_to_the_24_cells_per_clip_norm() -> None:
    assert GRID_BITS == 24
    for clip in (1.0, 0.1, 3e-5, 1e4):
        assert Fraction(compute_cell_width(clip)) * C_IN_CELLS == Fraction(clip), "it must be an exact power of 2"


def test_noise_is_added_without_modifying_the_input_sum() -> None:
    # Larger than float64 can distinguish: the sum must never be converted to a float.
    sums = {"a": 2**55 + 1 - np.arange(6).reshape(2, 3) * 2**54}
    original = sums["a"].copy()
    silent = add_gaussian_noise(sums, noise_multiplier=0.0, stream=stream("sum"))
    noise = add_gaussian_noise({"a": make_zero_noise((2, 3))}, noise_multiplier=2.0, stream=stream("sum"))
    noisy = add_gaussian_noise(sums, noise_multiplier=2.0, stream=stream("sum"))
    np.testing.assert_array_equal(silent["a"], sums["a"])
    np.testing.assert_array_equal(noisy["a"], sums["a"] + noise["a"])
    assert silent["a"].dtype == noisy["a"].dtype == np.int64
    np.testing.assert_array_equal(sums["a"], original)


def release_without_noise(scores: npt.NDArray[np.float64], declared_size: float = 1.0) -> npt.NDArray[np.float64]:
    return np.array(release_scores(scores, declared_size=declared_size, noise_multiplier=0.0, stream=stream("scores")))


compute_unit_scores = st.floats(0, 1) | st.floats() | st.sampled_from([np.nan, np.inf, -np.inf])


def capture_cells(scores: list[float]) -> tuple[int, int]:
    """Capture the two integers to which noise is added."""
    pair = release_without_noise(np.array(scores)) * C_IN_CELLS
    assert (pair == np.rint(pair)).all()
    return int(pair[0]), int(pair[1])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(others=st.lists(compute_unit_scores, max_size=8), one=compute_unit_scores)
def test_one_unit_changes_score_and_count_by_at_most_root_two(others: list[float], one: float) -> None:
    fewer, with_record = capture_cells(others), capture_cells([*others, one])
    shift = with_record[0] - fewer[0], with_record[1] - fewer[1]
    assert shift[1] == C_IN_CELLS
    assert 0 <= shift[0] <= C_IN_CELLS
    assert shift[0] ** 2 + shift[1] ** 2 <= 2 * C_IN_CELLS**2, "the change must be bounded in integers, too"


def test_scores_are_rounded_down_to_the_grid() -> None:
    for score in (0.3, 1 - 2**-25, 2**-24, 2**-25, np.nextafter(1.0, 0.0)):
        assert capture_cells([score])[0] == int(Fraction(score) * C_IN_CELLS)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(noise_multiplier=st.floats(1e-6, 1e9))
def test_score_and_count_receive_independent_noise_of_the_stated_size(noise_multiplier: float) -> None:
    scales, noise = list[float](), np.array([5, 7]) * C_IN_CELLS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RandomStream, "draw_rounded_normal", lambda _, count, deviation: scales.append(deviation) or noise
        )
        found = release_scores(
            np.ones(2), declared_size=3.0, noise_multiplier=noise_multiplier, stream=stream("stated")
        )
    assert found == pytest.approx(((2 + 5) / 3, (2 + 7) / 3))
    (deviation,) = scales
    stated = 2 * (Fraction(noise_multiplier) * C_IN_CELLS) ** 2  # squared, to stay exact
    assert stated <= Fraction(deviation) ** 2 <= stated * (1 + Fraction(1, 2**50))


def test_scores_are_clamped_and_non_finite_values_count_as_zero() -> None:
    scores = np.array([0.25, 3.0, -2.0, np.nan, np.inf, -np.inf])
    np.testing.assert_allclose(release_without_noise(scores), [1.25, 6.0])
    np.testing.assert_allclose(release_without_noise(scores, declared_size=8.0), [1.25 / 8, 6.0 / 8])
    assert np.isnan(scores[3]), "the caller's array must not be modified"


def test_scores_are_released_only_with_noise_and_on_request() -> None:
    assert PrivacySpec(sampling_rate=1.0).private
    assert not PrivacySpec(mechanism="none").private
    assert PrivacySpec().metrics_noise == 0
    assert PrivacySpec(metrics="noised").metrics_noise == 20.0
    with pytest.raises(ConfigError, match=r"^metrics = 'noised': requires a run with privacy"):
        PrivacySpec(mechanism="none", metrics="noised")
