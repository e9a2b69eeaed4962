"""Whether embeddings predict labels: compared with an explicit leave-one-out loop, and tested on random labels."""

import numpy as np
import pytest

from fedtune.evaluation.label_signal import has_enough_records, measure_label_signal


def make(count: int = 150, classes: int = 3, *, distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, classes, size=count)
    rows = draws.normal(size=(count, 24)) + distance * np.eye(24)[labels]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def test_accuracy_equals_an_explicit_leave_one_out_loop() -> None:
    rows, labels = make(60, distance=2.0)
    design = np.concatenate([rows - rows.mean(axis=0), np.ones((60, 1))], axis=1)
    penalty = np.diag([1.0] * 24 + [1e-9])
    right = 0
    for place in range(60):
        others = np.arange(60) != place
        x, y = design[others], np.eye(3)[labels[others]]
        weights = np.linalg.solve(x.T @ x + penalty, x.T @ y)
        right += int((design[place] @ weights).argmax() == labels[place])
    assert measure_label_signal(rows, labels).accuracy == pytest.approx(right / 60)


def test_signal_is_visible_only_if_labels_depend_on_embeddings() -> None:
    for seed in range(5):
        assert measure_label_signal(*make(distance=3.0, seed=seed)).is_visible
        assert not measure_label_signal(*make(distance=0.0, seed=seed)).is_visible


def test_one_frequent_label_is_not_a_signal() -> None:
    rows, labels = make(200, distance=0.0)
    signal = measure_label_signal(rows, np.where(labels == 2, 0, (labels == 1) & (np.arange(200) % 3 == 0)).astype(int))
    assert signal.baseline > 0.8
    assert signal.accuracy <= signal.baseline
    assert not signal.is_visible


def test_few_records_per_label_show_nothing() -> None:
    assert has_enough_records(50, 5)
    assert has_enough_records(770, 77)
    assert not has_enough_records(49, 2)
    assert not has_enough_records(100, 77)
