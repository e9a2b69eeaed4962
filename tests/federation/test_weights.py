"""Weights where sites make noise of their own choice: from declared sizes and public noise alone."""

import numpy as np
import pytest

from fedtune.federation.aggregation import MOST_SHARE, weights_of

from ..conftest import run_plan

SIZES = {"a": 100, "b": 300, "c": 600}


def shares(weights: dict[str, float]) -> np.ndarray:
    each = np.array(list(weights.values()))
    return each / each.sum()


def test_weights_are_the_declared_sizes_where_all_make_the_plans_noise() -> None:
    # The very same whole numbers, so that an average keeps its bits; and close by where one makes a little more.
    weights = weights_of(SIZES, run_plan(), factors=dict.fromkeys(SIZES, 1.0), values=1000)
    assert weights == SIZES
    assert all(type(weight) is int for weight in weights.values())
    found = weights_of(SIZES, run_plan(), factors={"a": 1.0001, "b": 1.0, "c": 1.0}, values=1000)
    np.testing.assert_allclose(shares(dict(found)), shares(dict(SIZES)), rtol=5e-4)


def test_more_noise_is_less_weight_by_the_variance_of_a_mean_gradient() -> None:
    factors, values = {"a": 1.0, "b": 2.0, "c": 1.5}, 50
    found = dict(weights_of(SIZES, run_plan(), factors=factors, values=values))

    def variance(site: str, factor: float) -> float:
        batch = run_plan().sampling_rate * SIZES[site]
        return (factor * run_plan().noise_multiplier / batch) ** 2 + 1 / (values * batch)

    by_hand = {site: size * variance(site, 1.0) / variance(site, factors[site]) for site, size in SIZES.items()}
    np.testing.assert_allclose(shares(found), shares(by_hand), rtol=1e-12)
    assert sum(found.values()) == pytest.approx(1.0)


def test_no_site_has_more_than_its_share_of_the_cap() -> None:
    sizes = dict.fromkeys(names := [f"s{number}" for number in range(10)], 100)
    for loud in (1, 2):
        factors = {name: 1.0 if place < loud else 50.0 for place, name in enumerate(names)}
        found = weights_of(sizes, run_plan(), factors=factors, values=10**6)
        assert sum(found.values()) == pytest.approx(1.0)
        assert all(found[name] == pytest.approx(MOST_SHARE / 10) for name in names[:loud])
        assert len({found[name] for name in names[loud:]}) == 1, "the others share what is left"
    # A large site is above four equal shares by its size alone, and stays where it was.
    large = weights_of({"a": 9, "b": 1}, run_plan(), factors={"a": 1.0, "b": 1.1}, values=10)
    assert 0.9 < large["a"] < 1
