"""Poisson sampling and the Gaussian mechanism."""

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedtune.privacy.mechanism import GRID_BITS, PrivacySpec, add_gaussian_noise, cell, noised_scores, poisson_sample
from fedtune.privacy.randomness import RandomStream, SeededRandomness
from fedtune.spec import ConfigError

from ..conftest import has_scale


def stream(*purpose: str | int) -> RandomStream:
    return SeededRandomness(99).stream(*purpose)


def test_indices_are_ascending_and_once_each() -> None:
    chosen = poisson_sample(500, 0.4, stream("once"))
    assert (np.diff(chosen) > 0).all()
    assert 0 <= chosen.min() <= chosen.max() < 500
    assert chosen.dtype == np.int64


def test_another_record_changes_no_other_records_place() -> None:
    fewer, more = (poisson_sample(count, 0.5, stream("prefix")) for count in (200, 201))
    np.testing.assert_array_equal(more[more < 200], fewer)


def test_rate_one_takes_all_and_a_sample_may_be_empty() -> None:
    assert poisson_sample(3, 1e-12, stream("empty")).shape == poisson_sample(0, 0.5, stream("none")).shape == (0,)
    np.testing.assert_array_equal(poisson_sample(7, 1.0, stream("all")), np.arange(7))


SHAPES = {"lora_A": (40, 150), "lora_B": (6000,), "head.weight": (3, 50, 40)}


C_IN_CELLS = 2**24
"""A clip norm, in cells of the grid."""


def nothing(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.zeros(shape, dtype=np.int64)


def note_deviations(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The standard deviation of each noise that streams are asked for, which is nothing."""
    asked: list[float] = []
    monkeypatch.setattr(
        RandomStream, "rounded_normal", lambda _, count, deviation: asked.append(deviation) or nothing((count,))
    )
    return asked


@pytest.mark.parametrize(("noise_multiplier", "sensitivity"), [(1.5, 1.0), (0.4, 1.0), (1.5, 7.0), (0.4, 0.3)])
def test_noise_has_the_scale_of_sigma_times_the_sensitivity(noise_multiplier: float, sensitivity: float) -> None:
    zeros = {name: nothing(shape) for name, shape in SHAPES.items()}
    given = {} if sensitivity == 1 else {"sensitivity": sensitivity}  # a clip norm unless it is told otherwise
    noisy = add_gaussian_noise(zeros, noise_multiplier=noise_multiplier, stream=stream("noise"), **given)
    assert {name: value.shape for name, value in noisy.items()} == SHAPES
    for value in noisy.values():
        scale = noise_multiplier * sensitivity * C_IN_CELLS
        assert has_scale(value, scale)
        for wrong in (0.9 * scale, 1.1 * scale, scale / noise_multiplier, scale * np.sqrt(3), scale / 2):
            assert not has_scale(value, wrong)
        if sensitivity != 1:
            assert not has_scale(value, scale / sensitivity)


def test_the_noise_of_a_clip_norm_has_exactly_the_stated_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    for noise_multiplier in (0.3, 1.0, 1.3, 17.1):
        asked = note_deviations(monkeypatch)
        sums = {"a": nothing((3,)), "b": nothing((2, 2))}
        add_gaussian_noise(sums, noise_multiplier=noise_multiplier, stream=stream("exactly"))
        assert [Fraction(one) for one in asked] == [Fraction(noise_multiplier) * C_IN_CELLS] * 2


def test_the_grid_has_so_many_cells_in_a_clip_norm() -> None:
    assert GRID_BITS == 24
    for clip in (1.0, 0.1, 3e-5, 1e4):
        assert Fraction(cell(clip)) * C_IN_CELLS == Fraction(clip), "exact: a power of two"


def test_each_tensor_has_noise_of_its_own() -> None:
    zeros = {"a": nothing((100,)), "b": nothing((100,))}
    noisy = add_gaussian_noise(zeros, noise_multiplier=1.0, stream=stream("own"))
    assert stats.pearsonr(noisy["a"], noisy["b"]).pvalue > 1e-6
    assert not (noisy["a"] == noisy["b"]).any()


def test_noise_is_added_to_the_sum_and_leaves_it_alone() -> None:
    # Beyond what float64 tells apart: the sum is never made a float.
    sums = {"a": 2**55 + 1 - np.arange(6).reshape(2, 3) * 2**54}
    kept = sums["a"].copy()
    silent = add_gaussian_noise(sums, noise_multiplier=0.0, stream=stream("sum"))
    noise = add_gaussian_noise({"a": nothing((2, 3))}, noise_multiplier=2.0, stream=stream("sum"))
    noisy = add_gaussian_noise(sums, noise_multiplier=2.0, stream=stream("sum"))
    np.testing.assert_array_equal(silent["a"], sums["a"])
    np.testing.assert_array_equal(noisy["a"], sums["a"] + noise["a"])
    assert silent["a"].dtype == noisy["a"].dtype == np.int64
    np.testing.assert_array_equal(sums["a"], kept)


def before_noise(scores: npt.NDArray[np.float64], declared_size: float = 1.0) -> npt.NDArray[np.float64]:
    return np.array(noised_scores(scores, declared_size=declared_size, noise_multiplier=0.0, stream=stream("scores")))


unit_scores = (
    st.floats(0, 1) | st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([np.nan, np.inf, -np.inf])
)


def cells_of(scores: list[float]) -> tuple[int, int]:
    """The two whole numbers that noise is added to."""
    pair = before_noise(np.array(scores)) * C_IN_CELLS
    assert (pair == np.rint(pair)).all()
    return int(pair[0]), int(pair[1])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(others=st.lists(unit_scores, max_size=8), one=unit_scores)
def test_one_unit_moves_the_scores_by_at_most_root_two_exactly(others: list[float], one: float) -> None:
    fewer, more = cells_of(others), cells_of([*others, one])
    moved = more[0] - fewer[0], more[1] - fewer[1]
    assert moved[1] == C_IN_CELLS
    assert 0 <= moved[0] <= C_IN_CELLS
    assert moved[0] ** 2 + moved[1] ** 2 <= 2 * C_IN_CELLS**2, "in whole numbers"


def test_a_score_is_rounded_down_to_the_grid() -> None:
    for score in (0.3, 1 - 2**-25, 2**-24, 2**-25, np.nextafter(1.0, 0.0)):
        assert cells_of([score])[0] == int(Fraction(score) * C_IN_CELLS)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(noise_multiplier=st.floats(1e-6, 1e9))
def test_the_noise_of_scores_is_not_smaller_than_stated(noise_multiplier: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked = note_deviations(patch)
        noised_scores(np.ones(2), declared_size=3.0, noise_multiplier=noise_multiplier, stream=stream("stated"))
    (deviation,) = asked
    stated = 2 * (Fraction(noise_multiplier) * C_IN_CELLS) ** 2  # squared, so that it is exact
    assert stated <= Fraction(deviation) ** 2 <= stated * (1 + Fraction(1, 2**50))


def test_scores_are_clamped_and_what_is_no_number_counts_as_zero() -> None:
    scores = np.array([0.25, 3.0, -2.0, np.nan, np.inf, -np.inf])
    np.testing.assert_allclose(before_noise(scores), [1.25, 6.0])
    np.testing.assert_allclose(before_noise(scores, declared_size=8.0), [1.25 / 8, 6.0 / 8])
    assert np.isnan(scores[3]), "the caller's array is left alone"


@pytest.mark.parametrize(("noise_multiplier", "declared_size"), [(20.0, 1.0), (0.5, 40.0)])
def test_noise_of_scores_has_the_scale_of_sigma_times_root_two(noise_multiplier: float, declared_size: float) -> None:
    one = stream("score noise")
    pairs = np.array(
        [
            noised_scores(np.ones(3), declared_size=declared_size, noise_multiplier=noise_multiplier, stream=one)
            for _ in range(6000)
        ]
    )
    scale = noise_multiplier * np.sqrt(2.0) / declared_size
    for noise in (pairs - 3 / declared_size).T:
        assert has_scale(noise, scale)
        for wrong in (0.9 * scale, 1.1 * scale, scale / np.sqrt(2.0), scale * np.sqrt(2.0)):
            assert not has_scale(noise, wrong)
    assert stats.pearsonr(*pairs.T).pvalue > 1e-6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("records_per_user", value) for value in (0, 2.5)),
        *(("epsilon", value) for value in (0.0, -1.0, np.nan)),
        *(("delta", value) for value in (0.0, 1.0)),
        *(("sampling_rate", value) for value in (0.0, 9e-7, 1.01)),
        *((key, value) for key in ("noise_multiplier", "metrics_noise_multiplier") for value in (0.0, np.inf)),
        ("max_grad_norm", 0.0),
    ],
)
def test_settings_out_of_bounds_name_their_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        PrivacySpec(**{key: value})


def test_scores_are_released_only_where_they_are_asked_for_and_noised() -> None:
    assert PrivacySpec(sampling_rate=1.0).private
    assert not PrivacySpec(mechanism="none").private
    assert PrivacySpec().metrics_noise == 0
    assert PrivacySpec(metrics="noised").metrics_noise == 20.0
    with pytest.raises(ConfigError, match=r"^metrics = 'noised': needs a run with privacy"):
        PrivacySpec(mechanism="none", metrics="noised")
