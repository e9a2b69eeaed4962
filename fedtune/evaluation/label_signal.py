"""Whether the frozen base's embeddings predict the labels at all, measured on records that the lead may read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedtune.tasks.measures import Floats

_MIN_RECORDS, _MIN_PER_CLASS = 50, 10
_MIN_Z = 2.0
_PENALTY = 1.0  # of ridge regression, for embeddings of L2 norm 1 (simulations/own_data)


@dataclass(frozen=True)
class LabelSignal:
    """Accuracy of a linear classifier on frozen embeddings, compared with the most frequent label.

    Attributes:
        records: the number of records.
        accuracy: the classifier's leave-one-out accuracy.
        baseline: the share of the most frequent label.
        z: the mean difference between the two, in standard errors.
    """

    records: int
    accuracy: float
    baseline: float
    z: float

    @property
    def is_visible(self) -> bool:
        """Whether the classifier is better than the most frequent label by at least two standard errors."""
        return self.z >= _MIN_Z


def has_enough_records(records: int, classes: int) -> bool:
    """Return True if a signal can be distinguished from none with this many records of this many classes."""
    return records >= max(_MIN_RECORDS, _MIN_PER_CLASS * classes)


def measure_label_signal(embeddings: Floats, classes: np.ndarray) -> LabelSignal:
    """Measure the leave-one-out accuracy of ridge regression from embeddings to one-hot labels.

    The residual that a record would have without itself in the fit follows from the hat matrix H, as
    `(y - H y)_i / (1 - H_ii)`, so a single fit is enough (Allen 1974, PRESS).

    The result is exact and has no privacy guarantee: use it for records that the lead may read.

    Args:
        embeddings: (records, h), rows with L2 norm 1.
        classes: (records,) class indices.
    """
    count, width = embeddings.shape
    counts = np.bincount(classes)
    rows = np.concatenate([embeddings - embeddings.mean(axis=0), np.ones((count, 1))], axis=1)
    targets = np.eye(len(counts))[classes]
    penalty = np.diag([_PENALTY] * width + [1e-9])  # the intercept is not shrunk
    solved = np.linalg.solve(rows.T @ rows + penalty, rows.T)
    leverage = np.einsum("ih,hi->i", rows, solved)[:, None]
    left_out = (rows @ (solved @ targets) - leverage * targets) / (1 - leverage)
    right = (left_out.argmax(axis=1) == classes).astype(np.float64)
    gains = right - (classes == counts.argmax())
    error = gains.std() / np.sqrt(count)
    z = float(gains.mean() / error) if error else 0.0
    return LabelSignal(count, float(right.mean()), float(counts.max() / count), z)
