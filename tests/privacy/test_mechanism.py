"""Poisson sampling and the Gaussian mechanism."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedtune.privacy.mechanism import PrivacySpec, add_gaussian_noise, noised_scores, poisson_sample
from fedtune.privacy.randomness import RandomStream, SeededRandomness
from fedtune.spec import ConfigError


def stream(*purpose: str | int) -> RandomStream:
    return SeededRandomness(99).stream(*purpose)


def test_each_unit_joins_at_the_rate() -> None:
    one = stream("rate")
    joined = np.zeros(50, dtype=int)
    for _ in range(2000):
        joined[poisson_sample(50, 0.3, one)] += 1
    # 50 units at 1e-6 each, and all together; a rate 10 % off is rejected.
    assert all(stats.binomtest(int(count), 2000, 0.3).pvalue > 1e-6 for count in joined)
    assert stats.binomtest(int(joined.sum()), 100_000, 0.3).pvalue > 1e-6
    assert stats.binomtest(int(joined.sum()), 100_000, 0.27).pvalue < 1e-6


def test_the_size_of_a_sample_is_random_as_a_binomial() -> None:
    one = stream("size")
    sizes = np.array([len(poisson_sample(100, 0.2, one)) for _ in range(4000)])
    # Variance 16: a sampler of fixed size, as of shuffled batches, has none.  Relative error of it: sqrt(2 / 4000).
    assert sizes.var() == pytest.approx(16, rel=5 * np.sqrt(2 / 4000))


def test_indices_are_ascending_and_once_each() -> None:
    chosen = poisson_sample(500, 0.4, stream("once"))
    assert (np.diff(chosen) > 0).all()
    assert 0 <= chosen.min() <= chosen.max() < 500
    assert chosen.dtype == np.int64


def test_another_record_changes_no_other_records_place() -> None:
    fewer, more = (poisson_sample(count, 0.5, stream("prefix")) for count in (200, 201))
    np.testing.assert_array_equal(more[more < 200], fewer)


def test_a_sample_may_be_empty() -> None:
    assert poisson_sample(3, 1e-12, stream("empty")).shape == (0,)
    assert poisson_sample(0, 0.5, stream("none")).shape == (0,)


def test_rate_one_takes_all() -> None:
    np.testing.assert_array_equal(poisson_sample(7, 1.0, stream("all")), np.arange(7))


SHAPES = {"lora_A": (40, 150), "lora_B": (6000,), "head.weight": (3, 50, 40)}


@pytest.mark.parametrize(("noise_multiplier", "max_grad_norm"), [(1.5, 0.2), (0.4, 10.0)])
def test_noise_has_the_scale_of_sigma_times_clip_norm(
    has_scale: Any, noise_multiplier: float, max_grad_norm: float
) -> None:
    zeros = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    noisy = add_gaussian_noise(
        zeros, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, stream=stream("noise")
    )
    assert {name: value.shape for name, value in noisy.items()} == SHAPES
    for value in noisy.values():
        scale = noise_multiplier * max_grad_norm
        assert has_scale(value, scale)
        for wrong in (0.9 * scale, 1.1 * scale, noise_multiplier, max_grad_norm, scale * np.sqrt(3)):
            assert not has_scale(value, wrong)


def test_each_tensor_has_noise_of_its_own() -> None:
    zeros = {"a": np.zeros(100), "b": np.zeros(100)}
    noisy = add_gaussian_noise(zeros, noise_multiplier=1.0, max_grad_norm=1.0, stream=stream("own"))
    assert stats.pearsonr(noisy["a"], noisy["b"]).pvalue > 1e-6
    assert not (noisy["a"] == noisy["b"]).any()


def test_noise_is_added_to_the_sum_and_leaves_it_alone() -> None:
    sums = {"a": np.arange(6.0).reshape(2, 3)}
    silent = add_gaussian_noise(sums, noise_multiplier=0.0, max_grad_norm=1.0, stream=stream("sum"))
    noise = add_gaussian_noise({"a": np.zeros((2, 3))}, noise_multiplier=2.0, max_grad_norm=1.0, stream=stream("sum"))
    noisy = add_gaussian_noise(sums, noise_multiplier=2.0, max_grad_norm=1.0, stream=stream("sum"))
    np.testing.assert_array_equal(silent["a"], sums["a"])
    np.testing.assert_array_equal(noisy["a"], sums["a"] + noise["a"])
    np.testing.assert_array_equal(sums["a"], np.arange(6.0).reshape(2, 3))


def test_noise_stays_float64() -> None:
    noisy = add_gaussian_noise({"a": np.zeros(3)}, noise_multiplier=1.0, max_grad_norm=1.0, stream=stream("type"))
    assert noisy["a"].dtype == np.float64


def before_noise(scores: npt.NDArray[np.float64], declared_size: float = 1.0) -> npt.NDArray[np.float64]:
    return np.array(noised_scores(scores, declared_size=declared_size, noise_multiplier=0.0, stream=stream("scores")))


unit_scores = (
    st.floats(0, 1) | st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([np.nan, np.inf, -np.inf])
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(others=st.lists(unit_scores, max_size=8), one=unit_scores)
def test_one_unit_moves_the_scores_by_at_most_root_two(others: list[float], one: float) -> None:
    fewer, more = before_noise(np.array(others)), before_noise(np.array([*others, one]))
    assert np.linalg.norm(more - fewer) <= np.sqrt(2.0) * (1 + 1e-12)
    assert more[1] - fewer[1] == 1


def test_a_unit_can_move_the_scores_by_root_two() -> None:
    # The stated sensitivity is not more than there is.
    assert np.linalg.norm(before_noise(np.array([1.0])) - before_noise(np.array([]))) == pytest.approx(np.sqrt(2.0))


def test_scores_are_clamped_and_what_is_no_number_counts_as_zero() -> None:
    scores = np.array([0.25, 3.0, -2.0, np.nan, np.inf, -np.inf])
    np.testing.assert_allclose(before_noise(scores), [1.25, 6.0])
    assert np.isnan(scores[3]), "the caller's array is left alone"


def test_scores_are_shares_of_the_declared_size() -> None:
    np.testing.assert_allclose(before_noise(np.array([0.5, 1.0]), declared_size=8.0), [1.5 / 8, 2 / 8])


@pytest.mark.parametrize(("noise_multiplier", "declared_size"), [(20.0, 1.0), (0.5, 40.0)])
def test_noise_of_scores_has_the_scale_of_sigma_times_root_two(
    has_scale: Any, noise_multiplier: float, declared_size: float
) -> None:
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


def test_scores_of_nobody_are_noise_alone() -> None:
    score, count = noised_scores(np.array([]), declared_size=5.0, noise_multiplier=1.0, stream=stream("nobody"))
    assert score != 0
    assert count != 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mechanism", "gaussian"),
        ("unit", "household"),
        ("records_per_user", 0),
        ("records_per_user", 2.5),
        ("epsilon", 0.0),
        ("epsilon", -1.0),
        ("epsilon", float("nan")),
        ("delta", 0.0),
        ("delta", 1.0),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", float("inf")),
        ("max_grad_norm", 0.0),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.01),
        ("metrics", "exact"),
        ("metrics_noise_multiplier", 0.0),
        ("metrics_noise_multiplier", float("inf")),
    ],
)
def test_settings_out_of_bounds_name_their_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        PrivacySpec(**{key: value})  # type: ignore[arg-type]


def test_settings_within_bounds() -> None:
    assert PrivacySpec(sampling_rate=1.0).private
    assert not PrivacySpec(mechanism="none").private


def test_scores_are_released_only_where_they_are_asked_for_and_noised() -> None:
    assert PrivacySpec().metrics_noise == 0
    assert PrivacySpec(metrics="noised").metrics_noise == 20.0
    with pytest.raises(ConfigError, match=r"^metrics = 'noised': needs a run with privacy"):
        PrivacySpec(mechanism="none", metrics="noised")
