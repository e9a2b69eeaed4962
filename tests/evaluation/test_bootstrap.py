import math
from collections.abc import Mapping

import numpy as np
import pytest

from fedtune.evaluation.bootstrap import (
    MIN_UNITS,
    Drawn,
    Estimate,
    compare_by_scores,
    describe_against_constant,
    score_draws,
)
from fedtune.evaluation.groups import OTHERS, merge_values, score_groups
from fedtune.spec import DataError
from fedtune.tasks.measures import macro_f1


def compute_mean(figures: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {"accuracy": float(figures["right"].mean())}


def compute_loss(figures: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {"loss": compute_mean(figures)["accuracy"]}


def make_figures(values: np.ndarray) -> dict[str, np.ndarray]:
    return {"right": np.asarray(values, dtype=np.float64)}


def test_scores_use_all_records_and_lower_losses_are_better() -> None:
    base, tuned = np.arange(20) < 5, np.arange(20) < 15
    result = compare_by_scores(make_figures(base), make_figures(tuned), scores=compute_mean)["accuracy"]
    assert (result.base.value, result.tuned.value, result.difference.value) == (0.25, 0.75, 0.5)
    assert result.base.low < 0.25 < result.base.high
    assert result.verdict == "better"
    low, high = make_figures(np.linspace(1, 1.1, 50)), make_figures(np.linspace(2, 2.1, 50))
    assert compare_by_scores(high, low, scores=compute_loss)["loss"].verdict == "better"
    assert compare_by_scores(low, high, scores=compute_loss)["loss"].verdict == "worse"
    assert compare_by_scores(low, high, scores=compute_mean)["accuracy"].verdict == "better"
    assert compare_by_scores(low, low, scores=compute_loss)["loss"].verdict == "cannot be told apart"


def test_bootstrap_is_paired_across_models() -> None:
    """Variation that all models share does not widen the interval of a paired difference."""
    common = np.random.default_rng(1).normal(0.0, 10.0, size=100)
    result = compare_by_scores(make_figures(common), make_figures(common + 1.0), scores=compute_mean)["accuracy"]
    assert result.difference.low == pytest.approx(1.0)
    assert result.difference.high == pytest.approx(1.0)
    assert result.tuned.high - result.tuned.low > 1.0
    assert (
        result == compare_by_scores(make_figures(common), make_figures(common + 1.0), scores=compute_mean)["accuracy"]
    ), "draws must repeat"
    # Several models share the draws, and so does their mean.
    several = score_draws({"one": make_figures(common), "other": make_figures(common + 2.0)}, scores=compute_mean)
    several = several.with_mean("both", ["one", "other"])
    assert several.values["both"]["accuracy"] == pytest.approx(common.mean() + 1.0)
    paired = several.compare_scores("one", "both", "accuracy").difference
    assert (paired.low, paired.high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert several.compare_scores("one", "both", "accuracy", judged="loss").verdict == "worse"


def test_bootstrap_resamples_whole_users() -> None:
    """Agreeing records of a user are not independent evidence; resampling records would give far too narrow an
    interval.
    """
    users = [np.arange(first, first + 10) for first in range(0, 200, 10)]
    values = make_figures(np.repeat(np.random.default_rng(2).normal(size=20), 10))
    zero = make_figures(np.zeros(200))
    by_user = compare_by_scores(zero, values, scores=compute_mean, units=users)["accuracy"].difference
    by_record = compare_by_scores(zero, values, scores=compute_mean)["accuracy"].difference
    assert by_user.value == by_record.value
    ratio = (by_user.high - by_user.low) / (by_record.high - by_record.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.2)


@pytest.mark.parametrize(
    ("score", "constant", "num_units", "verdict"),
    [
        ("accuracy", 0.55, 40, "is better than"),
        ("accuracy", 0.75, 40, "cannot be told apart from"),
        ("accuracy", 0.95, 40, "is worse than"),
        ("loss", 0.95, 40, "is better than"),
        ("accuracy", 0.55, 9, "cannot be told apart from"),
    ],
)
def test_model_is_compared_with_the_best_constant_prediction(
    score: str, constant: float, num_units: int, verdict: str
) -> None:
    text = describe_against_constant("the run", Estimate(0.8, 0.7, 0.9), constant, score=score, num_units=num_units)
    expected = f"{score} 0.8000 (0.7000 to 0.9000) against {constant:.4f}."
    assert text == f"The run {verdict} the best constant answer: {expected}"


def test_comparison_of_too_few_units_has_no_verdict() -> None:
    zeros, ones = make_figures(np.zeros(MIN_UNITS)), make_figures(np.ones(MIN_UNITS))
    assert compare_by_scores(zeros, ones, scores=compute_mean)["accuracy"].verdict == "better"
    fewer = ({"right": one["right"][1:]} for one in (zeros, ones))
    assert compare_by_scores(*fewer, scores=compute_mean)["accuracy"].verdict == "cannot be told apart"
    groups = merge_values([*["a"] * 50, *["b"] * 9], smallest=5)
    models = {name: make_figures(np.full(59, value)) for name, value in (("x", 0.0), ("y", 1.0))}
    found = score_groups(models, groups, score="accuracy", scores=compute_mean, pairs=[("x", "y")])
    assert found.changes["a"]["x", "y"].verdict == "better"
    assert found.changes["b"]["x", "y"].verdict == "cannot be told apart", "9 units are too few"


def test_diverged_model_is_worse_and_unscorable_resamples_are_skipped() -> None:
    fine, diverged, infinite = (make_figures(np.full(30, value)) for value in (1.0, np.nan, np.inf))
    found = compare_by_scores(fine, diverged, scores=compute_loss)["loss"]
    assert found.verdict == "worse"
    assert math.isnan(found.difference.low)
    assert compare_by_scores(infinite, infinite, scores=compute_loss)["loss"].verdict == "cannot be told apart"

    def score_or_fail(drawn: Mapping[str, np.ndarray]) -> dict[str, float]:
        if not drawn["right"].any():
            raise DataError("evaluation data", "no token to predict", "needs one")
        return compute_mean(drawn)

    rare = make_figures(np.arange(12) == 3)
    assert compare_by_scores(rare, rare, scores=score_or_fail)["accuracy"].base.low == pytest.approx(1 / 12)


@pytest.mark.nightly
def test_confidence_intervals_have_their_nominal_coverage() -> None:
    """Two dependent models are right on 60 % and 70 % of all records; coverage is 95 % within 4 standard deviations."""
    draws, number, held = np.random.default_rng(5), 400, 0
    for _ in range(number):
        hard = draws.random(100)
        base, tuned = hard + draws.normal(0, 0.05, 100) < 0.6, hard + draws.normal(0, 0.05, 100) < 0.7
        found = compare_by_scores(make_figures(base), make_figures(tuned), scores=compute_mean, resamples=300)[
            "accuracy"
        ].difference
        held += found.low <= 0.1 <= found.high
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / number) < held / number < 0.95 + 4 * math.sqrt(0.95 * 0.05 / number)


def test_intervals_are_corrected_for_bootstrap_bias() -> None:
    """With few records per class, draws lack some classes, so their macro F1 is biased downwards like the sample's."""
    draws, held, plain = np.random.default_rng(4), 0, 0
    for _ in range(200):
        found = score_draws({"base": draw_answers(draws, draws.integers(0, 40, 400))}, scores=compute_f1, resamples=200)
        estimate, of_draws = found.estimate("base", "macro_f1"), found.draws["base"]["macro_f1"]
        held += estimate.low <= 0.7 <= estimate.high
        low, high = np.quantile(of_draws, [0.025, 0.975])
        plain += low <= 0.7 <= high
        assert of_draws.mean() < estimate.value
        assert low < estimate.low <= estimate.value <= estimate.high
    assert plain < 0.9 * 200, "plain quantiles must cover less than 95 % here"
    assert held > 0.9 * 200
    # Intervals of other scores are plain quantiles of the draws.
    found = score_draws({"base": make_figures(draws.random(60))}, scores=compute_mean)
    estimate, of_draws = found.estimate("base", "accuracy"), found.draws["base"]["accuracy"]
    assert of_draws.mean() != estimate.value
    assert (estimate.low, estimate.high) == tuple(np.quantile(of_draws, [0.025, 0.975]))


def test_interval_that_cannot_be_computed_stays_without_ends() -> None:
    drawn = Drawn({"base": {"macro_f1": 0.5}}, {"base": {"macro_f1": np.array([0.5, np.nan])}}, num_units=40)
    estimate = drawn.estimate("base", "macro_f1")
    assert estimate.value == 0.5
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_group_intervals_are_corrected_for_bootstrap_bias() -> None:
    rng = np.random.default_rng(4)
    answers = draw_answers(rng, rng.integers(0, 40, 800))
    groups = merge_values([*["a"] * 400, *["b"] * 400], smallest=20)
    result = score_groups(
        {"base": answers, "tuned": answers}, groups, score="macro_f1", scores=compute_f1, pairs=[("base", "tuned")]
    )
    subset = {name: values[:400] for name, values in answers.items()}
    alone = score_draws({"base": subset}, scores=compute_f1).estimate("base", "macro_f1")
    for estimate in (result.scores["a"]["base"], result.changes["a"]["base", "tuned"].base):
        assert estimate.value == alone.value
        assert (estimate.low, estimate.high) == pytest.approx((alone.low, alone.high), abs=0.01), "corrects 0.03"


def compute_f1(drawn: Mapping[str, np.ndarray]) -> dict[str, float]:
    truth, predicted = (drawn[name].astype(np.int64) for name in ("truth", "predicted"))
    return {"macro_f1": macro_f1(truth, predicted, num_labels=40)}


def draw_answers(draws: np.random.Generator, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Draw the answers of a model that is right on 70 % of records."""
    wrong = (truth + draws.integers(1, 40, len(truth))) % 40
    predicted = np.where(draws.random(len(truth)) < 0.7, truth, wrong)
    return {"truth": truth.astype(np.float64), "predicted": predicted.astype(np.float64)}


@pytest.mark.by_day("100")
@pytest.mark.parametrize("number", [20, 100, 400])
def test_equivalent_models_rarely_get_a_verdict(number: int) -> None:
    """With few records in 40 classes the bias exceeds the interval, and must not give a verdict."""
    generator, different = np.random.default_rng(6), 0
    for _ in range(100):
        truth = generator.integers(0, 40, number)
        models = {name: draw_answers(generator, truth) for name in ("base", "tuned")}
        result = score_draws(models, scores=compute_f1, resamples=200).compare_scores("base", "tuned", "macro_f1")
        different += result.verdict != "cannot be told apart"
        for estimate in (result.base, result.tuned):
            assert estimate.low <= estimate.value <= estimate.high <= 1
            assert estimate.high - estimate.low > 0.01
    assert different < 20, "at most 20 of 100 may differ"


MANY = [*["ward a"] * 60, *["ward b"] * 30, *["c"] * 12, *["d"] * 9, *["e"] * 4]


def test_small_groups_are_merged_up_to_the_minimum_size() -> None:
    groups = merge_values(MANY, smallest=20)
    assert (groups.names, groups.sizes, groups.merged) == (("ward a", "ward b", OTHERS), (60, 30, 25), ("c", "d", "e"))
    assert groups.codes.tolist() == [0] * 60 + [1] * 30 + [2] * 25
    joined = merge_values([*["a"] * 60, *["b"] * 30, *["c"] * 12, "d"], smallest=20)
    assert (joined.names, joined.sizes, joined.merged) == (("a", OTHERS), (60, 43), ("b", "c", "d"))
    assert groups.smallest == OTHERS
    # Only the sizes count.
    assert merge_values([value[::-1] for value in MANY], smallest=20).sizes == groups.sizes
    assert merge_values(["a", "b"], smallest=20).names == (OTHERS,)
    assert merge_values([*["a"] * 20, *[OTHERS] * 25], smallest=20).names == ("a", OTHERS), "a value may have any name"
    # A user counts once per group.
    units = [np.arange(first, first + 10) for first in range(0, 400, 10)]
    values = ["north" if place < 350 else "south" for place in range(400)]
    by_user = merge_values(values, smallest=10, units=units)
    assert by_user.names == (OTHERS,), "five users are too few, so the others join them"
    values[0] = "south"
    assert merge_values(values, smallest=6, units=units).sizes == (35, 6), "a user of both must count in both"


def test_group_scores_and_changes_use_only_their_records() -> None:
    groups = merge_values([*["a"] * 50, *["b"] * 50], smallest=20)
    base = {"right": np.r_[np.ones(25), np.zeros(25), np.ones(40), np.zeros(10)]}
    tuned = {"right": np.r_[np.ones(25), np.zeros(25), np.ones(50)]}
    result = score_groups(
        {"base": base, "tuned": tuned}, groups, score="accuracy", scores=compute_mean, pairs=[("base", "tuned")]
    )
    assert {name: scores["tuned"].value for name, scores in result.scores.items()} == {"b": 1.0, "a": 0.5}
    assert result.gaps["a"]["base"].value == pytest.approx(-0.3)
    assert result.gaps["a"]["tuned"].value == pytest.approx(-0.5)
    assert result.gaps["b"]["tuned"].high > result.gaps["b"]["tuned"].value == pytest.approx(0.5)
    pair = ("base", "tuned")
    assert result.changes["b"][pair].verdict == "better"
    assert result.changes["a"][pair].verdict == "cannot be told apart"
    assert result.changes["a"][pair].difference.high == 0.0, "within the group nothing changed"
