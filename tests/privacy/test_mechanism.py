"""Poisson sampling and the Gaussian mechanism."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedtune.privacy.mechanism import PrivacySpec, add_gaussian_noise, poisson_sample
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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mechanism", "gaussian"),
        ("unit", "user"),
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
    ],
)
def test_settings_out_of_bounds_name_their_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        PrivacySpec(**{key: value})  # type: ignore[arg-type]


def test_settings_within_bounds() -> None:
    assert PrivacySpec(sampling_rate=1.0).private
    assert not PrivacySpec(mechanism="none").private
