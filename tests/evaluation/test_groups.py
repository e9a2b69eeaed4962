from collections.abc import Mapping

import numpy as np
import pytest

from fedtune.evaluation.bootstrap import drawn
from fedtune.evaluation.groups import OTHERS, by_group, merged

MANY = [*["ward a"] * 60, *["ward b"] * 30, *["c"] * 12, *["d"] * 9, *["e"] * 4]


def mean(figures: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {"accuracy": float(figures["right"].mean())}


def test_small_groups_are_merged_and_the_next_smallest_joins_until_they_are_enough() -> None:
    found = merged(MANY, smallest=20)
    assert (found.names, found.sizes, found.merged) == (("ward a", "ward b", OTHERS), (60, 30, 25), ("c", "d", "e"))
    assert found.codes.tolist() == [0] * 60 + [1] * 30 + [2] * 25
    joined = merged([*["a"] * 60, *["b"] * 30, *["c"] * 12, "d"], smallest=20)
    assert (joined.names, joined.sizes, joined.merged) == (("a", OTHERS), (60, 43), ("b", "c", "d"))
    assert found.smallest == OTHERS


def test_the_sizes_alone_decide() -> None:
    assert merged([value[::-1] for value in MANY], smallest=20).sizes == merged(MANY, smallest=20).sizes
    assert merged(["a", "b"], smallest=20).names == (OTHERS,)
    assert merged([*["a"] * 20, *[OTHERS] * 25], smallest=20).names == ("a", OTHERS), "whatever a value is called"


def test_users_count_once_in_a_group() -> None:
    units = [np.arange(first, first + 10) for first in range(0, 400, 10)]
    values = ["north" if place < 350 else "south" for place in range(400)]
    by_user = merged(values, smallest=10, units=units)
    assert by_user.names == (OTHERS,), "five users are too few, whatever they wrote, and the others join them"
    values[0] = "south"
    assert merged(values, smallest=6, units=units).sizes == (35, 6), "a user with records in both counts in both"


def test_scores_gaps_and_changes_are_those_of_the_records_in_the_group() -> None:
    groups = merged([*["a"] * 50, *["b"] * 50], smallest=20)
    base = {"right": np.r_[np.ones(25), np.zeros(25), np.ones(40), np.zeros(10)]}
    tuned = {"right": np.r_[np.ones(25), np.zeros(25), np.ones(50)]}
    found = by_group({"base": base, "tuned": tuned}, groups, score="accuracy", scores=mean, pairs=[("base", "tuned")])
    assert {name: one["tuned"].value for name, one in found.scores.items()} == {"b": 1.0, "a": 0.5}
    assert found.gaps["a"]["base"].value == pytest.approx(-0.3)
    assert found.gaps["a"]["tuned"].value == pytest.approx(-0.5)
    assert found.gaps["b"]["tuned"].high > found.gaps["b"]["tuned"].value == pytest.approx(0.5)
    pair = ("base", "tuned")
    assert found.changes["b"][pair].verdict == "better"
    assert found.changes["a"][pair].verdict == "cannot be told apart"
    assert found.changes["a"][pair].difference.high == 0.0, "paired: in the group nothing changed"


def test_a_group_of_few_proves_nothing() -> None:
    values = [*["a"] * 50, *["b"] * 9]
    groups = merged(values, smallest=5)
    zeros, ones = ({"right": np.full(59, value)} for value in (0.0, 1.0))
    found = by_group({"x": zeros, "y": ones}, groups, score="accuracy", scores=mean, pairs=[("x", "y")])
    assert found.changes["a"]["x", "y"].verdict == "better"
    assert found.changes["b"]["x", "y"].verdict == "cannot be told apart", "9 are too few"


def test_models_share_the_draws_and_a_mean_is_one_more() -> None:
    common = np.random.default_rng(3).normal(size=200)
    found = drawn({"one": {"right": common}, "other": {"right": common + 2.0}}, scores=mean)
    found = found.with_mean("both", ["one", "other"])
    assert found.values["both"]["accuracy"] == pytest.approx(common.mean() + 1.0)
    beside = found.comparison("one", "both", "accuracy").difference
    assert (beside.low, beside.high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found.comparison("one", "both", "accuracy", judged="loss").verdict == "worse"
