"""Metrics against scikit-learn, scipy and manual calculations, including degenerate data."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedtune.tasks import measures

LABELS = 4
pairs = st.lists(st.tuples(st.integers(0, LABELS - 1), st.integers(0, LABELS - 1)), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def reference() -> Any:
    return pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference here")


def draw_answers(seed: int, *, rows: int = 60, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Draw informative (rows, LABELS) probabilities and marks, in which each label both occurs and is missing."""
    draws = np.random.default_rng(seed)
    marks = draws.random((rows, LABELS)) < 0.3
    marks[0], marks[1] = True, False
    chances = np.clip(0.3 * marks + draws.random((rows, LABELS)) * 0.7, 0, 1)
    return (chances.round(1) if ties else chances), marks


def test_auroc_matches_scikit_learn(reference: Any) -> None:
    for ties in (False, True):
        chances, marks = draw_answers(1, ties=ties)
        expected = reference.roc_auc_score(marks, chances, average="macro")
        assert measures.auroc(chances, marks) == pytest.approx(expected, abs=1e-12)
        assert 0.5 < expected < 1
    single_label = measures.auroc(chances[:, :1], marks[:, :1])
    marks[:, 1], marks[:, 2], marks[:, 3] = True, False, True
    assert measures.auroc(chances, marks) == single_label, "a label that all or no records have must be ignored"
    assert measures.auroc(chances[:, 1:], marks[:, 1:]) == 0.5


@settings(deadline=None)  # the first example is slow because it imports scikit-learn
@given(pairs)
def test_quadratic_kappa_matches_scikit_learn(some: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference here")
    truth, predicted = np.array(some).T
    actual = measures.compute_quadratic_kappa(truth, predicted, num_labels=LABELS)
    if len({*truth, *predicted}) == 1:
        assert actual == 0  # scikit-learn divides zero by zero here
        return
    expected = metrics.cohen_kappa_score(truth, predicted, weights="quadratic", labels=range(LABELS))
    assert actual == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_per_label_scores_match_scikit_learn(reference: Any) -> None:
    chances, marks = draw_answers(4)
    marks[:, 3] = False
    predicted = chances > 0.5
    predicted[:, 2] = False
    found = measures.compute_class_scores(marks, predicted, labels="abcd")
    expected = reference.precision_recall_fscore_support(marks, predicted, zero_division=0)
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [getattr(one, name) for one in found] == pytest.approx(column.tolist())
    assert [one.label for one in found] == list("abcd")
    averages = [reference.f1_score(marks, predicted, average=by, zero_division=0) for by in ("micro", "macro")]
    assert [measures.micro_f1(marks, predicted), measures.multilabel_macro_f1(marks, predicted)] == pytest.approx(
        averages
    )
    none = np.zeros((3, 2), dtype=bool)
    assert (measures.micro_f1(none, none), measures.multilabel_macro_f1(none, none)) == (0, 0), "no division by 0"


def test_calibration_error_matches_a_manual_calculation() -> None:
    confidence = np.repeat([0.2, 0.9], [10, 10])
    correct = np.arange(20) % 10 < np.repeat([2, 5], 10)
    bins = measures.reliability(confidence, correct)
    assert [item.count for item in bins] == [2] * 10
    # Each half is compared with its own accuracy: 2 of the first 10 and 5 of the others are correct.
    errors = [abs(0.2 - share) for share in (1, 0, 0, 0, 0)] + [abs(0.9 - share) for share in (1, 1, 0.5, 0, 0)]
    assert measures.compute_calibration_error(bins) == pytest.approx(np.mean(errors))


def test_reliability_bins_have_equal_counts_and_are_never_empty() -> None:
    draws = np.random.default_rng(5)
    confidence = draws.random(1003) ** 8  # most values are small: bins of equal width would be almost empty
    bins = measures.reliability(confidence, draws.random(1003) < confidence)
    assert {item.count for item in bins} == {100, 101}
    assert sum(item.count for item in bins) == 1003
    assert [item.confidence for item in bins] == sorted(item.confidence for item in bins)
    assert measures.compute_calibration_error(bins) < 0.05, "a calibrated model must have a small error"
    assert measures.compute_calibration_error(measures.reliability(confidence, np.ones(1003, dtype=bool))) > 0.5
    assert len(measures.reliability(confidence[:3], np.ones(3, dtype=bool))) == 3
    unknown = measures.reliability(np.array([0.5, np.nan]), np.array([True, False]))
    assert not measures.Detail(classes=(), reliability=unknown).is_finite


def test_correlations_match_scipy_and_are_zero_for_constants() -> None:
    item = np.array([1.0, 4.0, 2.0, 2.0, 9.0])
    second = np.array([0.1, 0.2, 0.4, 0.1, 0.8])
    assert measures.correlation(item, second) == pytest.approx(stats.pearsonr(item, second).statistic)
    assert measures.rank_correlation(item, second) == pytest.approx(stats.spearmanr(item, second).statistic)
    assert measures.correlation(item, np.full(5, 0.3)) == measures.rank_correlation(np.full(5, 0.3), item) == 0
    assert np.isnan(measures.correlation(item, np.full(5, np.nan))), "a diverged model must remain visible"
