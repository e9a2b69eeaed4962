from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.batching import collate
from fedtune.data.tokenise import TextDataset
from fedtune.tasks import TaskModel
from fedtune.tasks.measures import macro_f1

from .conftest import scores_of


def test_macro_f1_by_hand() -> None:
    truth, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 0])
    # Class 0: TP 2, FP 1, FN 1; class 1: TP 1, FP 1, FN 1; class 2: TP 0, FP 1, FN 1.
    assert macro_f1(truth, predicted, num_labels=3) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # A declared class that occurs nowhere counts as 0.
    assert macro_f1(truth, predicted, num_labels=4) == pytest.approx((2 / 3 + 1 / 2 + 0 + 0) / 4)


def test_macro_f1_of_a_perfect_and_of_a_wholly_wrong_answer() -> None:
    truth = np.array([0, 1, 2])
    assert macro_f1(truth, truth, num_labels=3) == 1.0
    assert macro_f1(truth, np.array([1, 2, 0]), num_labels=3) == 0.0


@settings(deadline=None)  # importing scikit-learn takes the first example long
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_is_scikit_learns_over_the_declared_labels(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference here")
    truth, predicted = np.array(pairs).T
    expected = metrics.f1_score(truth, predicted, average="macro", labels=range(5), zero_division=0)
    assert macro_f1(truth, predicted, num_labels=5) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_scores_equal_one_example_at_a_time(classifier: TaskModel, labelled: TextDataset, max_tokens: int) -> None:
    scores = scores_of(classifier, labelled, pad_id=0, max_tokens=max_tokens)
    predicted, losses = [], []
    with torch.no_grad():
        for index in range(len(labelled)):
            batch = collate(labelled, np.array([index]), pad_id=0)
            predicted.append(int(classifier.logits(batch).argmax()))
            losses.append(float(classifier.losses(batch)))
    truth = np.array(labelled.targets)
    assert list(scores) == ["accuracy", "macro_f1", "loss"]
    assert scores["accuracy"] == np.mean(truth == predicted)
    assert scores["macro_f1"] == macro_f1(truth, np.array(predicted), num_labels=4)
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_model_that_is_right_scores_one(classifier: TaskModel, labelled: TextDataset) -> None:
    with torch.no_grad():
        predicted = [
            int(classifier.logits(collate(labelled, np.array([index]), pad_id=0)).argmax())
            for index in range(len(labelled))
        ]
    answered = TextDataset(input_ids=labelled.input_ids, targets=np.array(predicted))
    assert scores_of(classifier, answered, pad_id=0, max_tokens=64)["accuracy"] == 1.0
