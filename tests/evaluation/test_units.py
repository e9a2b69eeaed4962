"""Scores of held-out units: bounded, and each of them a matter of its own unit alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtune.data.batching import collate
from fedtune.data.tokenise import TextDataset
from fedtune.evaluation.scoring import unit_scores, user_scores
from fedtune.tasks import TaskModel

PAD = 2


@pytest.fixture(params=["classification", "causal_lm"])
def scored(request: pytest.FixtureRequest) -> tuple[Callable[[TextDataset], np.ndarray], TextDataset]:
    """A model's scoring, and a dataset to score."""
    task = request.param
    names = {"classification": ("classifier", "labelled"), "causal_lm": ("language_model", "completions")}[task]
    model, dataset = (request.getfixturevalue(name) for name in names)
    return lambda given: unit_scores(model, given, pad_id=PAD), dataset


def test_every_unit_has_one_score_between_zero_and_one(scored: Any) -> None:
    score, dataset = scored
    scores = score(dataset)
    assert scores.shape == (len(dataset),)
    assert scores.dtype == np.float64
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert len(set(scores.tolist())) > 1, "a constant would show nothing"


def test_a_unit_more_changes_no_others_score_by_a_single_bit(scored: Any) -> None:
    score, dataset = scored
    whole = score(dataset)
    for left_out in (0, 7, len(dataset) - 1):
        others = [index for index in range(len(dataset)) if index != left_out]
        assert score(dataset.chosen(others)).tobytes() == whole[others].tobytes()
    order = np.random.default_rng(3).permutation(len(dataset))
    assert score(dataset.chosen(order)).tobytes() == whole[order].tobytes()


def test_without_units_there_are_no_scores(scored: Any) -> None:
    score, dataset = scored
    assert score(dataset.chosen([])).shape == (0,)


def test_a_user_scores_the_mean_over_its_records_and_counts_once() -> None:
    users = [np.array([0, 3]), np.array([1]), np.array([2, 4, 5])]
    scores = user_scores(np.array([1.0, 0.25, 0.0, 0.5, 1.0, 0.5]), users)
    assert scores.tolist() == [0.75, 0.25, 0.5]
    assert user_scores(np.zeros(0), []).shape == (0,)


def test_no_records_of_one_user_move_more_than_one_score_within_its_bounds() -> None:
    # However many they are and whatever came out: noised_scores adds (score, 1) for one unit.
    wild = np.array([np.nan, np.inf, -5.0, 7.0, 1.0])
    users = [np.array([0]), np.array([1, 2, 3, 4])]
    assert user_scores(wild, users).tolist() == [0.0, 0.5]
    for count in (1, 10, 1000):
        (score,) = user_scores(np.full(count, 1e9), [np.arange(count)])
        assert score == 1.0


def test_a_class_is_right_or_wrong(classifier: TaskModel, labelled: TextDataset) -> None:
    scores = unit_scores(classifier, labelled, pad_id=PAD)
    classifier.eval()
    for index, score in enumerate(scores):
        logits = classifier.logits(collate(labelled, np.array([index]), pad_id=PAD)).detach()
        assert score == float(int(logits.argmax()) == labelled.targets[index])


def test_a_text_scores_by_its_mean_loss(language_model: TaskModel, completions: TextDataset) -> None:
    scores = unit_scores(language_model, completions, pad_id=PAD)
    language_model.eval()
    for index, score in enumerate(scores):
        loss = language_model.losses(collate(completions, np.array([index]), pad_id=PAD)).detach()
        assert score == pytest.approx(np.exp(-float(loss[0])), rel=1e-5)
    assert scores[-1] == 1.0, "without a supervised token there is nothing to lose"
