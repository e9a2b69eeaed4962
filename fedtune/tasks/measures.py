"""Quality metrics, computed from predictions and true values, without running a model.

Each metric is defined for any predictions: a constant prediction, or a bootstrap sample without one of the classes,
must not abort an evaluation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.spec import spec

Floats = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]  # (n,) indices into the declared labels, below `num_labels`
Marks = npt.NDArray[np.bool_]  # (n, labels) multi-hot true or predicted labels of each record
Entity: TypeAlias = tuple[int, int, int]
"""Start and end of an entity, in words or characters, and the index of its label."""
BINS = 10  # bins of the calibration error


@spec
class ClassScores:
    """Precision, recall and F1 of one label.

    Attributes:
        label: the declared label.
        precision: the share of correct predictions of the label; 0 if it is never predicted.
        recall: the share of the label's records for which it is predicted; 0 if no record has it.
        f1: the harmonic mean of precision and recall.
        support: the number of records (for token labels: entities) with the label.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@spec
class ReliabilityBin:
    """A bin of a reliability diagram: predictions with similar confidence.

    Attributes:
        confidence: the mean predicted probability.
        accuracy: the share of correct predictions.
        count: the number of predictions.
    """

    confidence: float
    accuracy: float
    count: int


@spec
class Detail:
    """Per-label scores and reliability bins of a task with labels; without probabilities, there are no bins."""

    classes: tuple[ClassScores, ...]
    reliability: tuple[ReliabilityBin, ...]

    @property
    def is_finite(self) -> bool:
        """Whether the confidence of every bin is finite; a diverged model produces NaN, which JSON cannot represent."""
        return all(math.isfinite(entry.confidence) for entry in self.reliability)


def macro_f1(truth: Classes, predicted: Classes, *, num_labels: int) -> float:
    """Compute the unweighted mean of the F1 scores of all declared classes, in [0, 1].

    F1 is 2 TP / (2 TP + FP + FN).  A declared class with no true and no predicted example has 0 / 0 and counts as 0, as
    in scikit-learn's `f1_score(truth, predicted, average="macro", labels=range(num_labels), zero_division=0)`.  Without
    `labels`, scikit-learn would leave that class out, and the meaning of the score would change with the sample.

    >>> macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]), num_labels=2)  # both classes have 2/3
    0.6666666666666666
    >>> macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]), num_labels=4)  # classes 2 and 3 never occur
    0.3333333333333333
    """
    counts = (np.bincount(classes, minlength=num_labels) for classes in (truth[truth == predicted], truth, predicted))
    return float(_compute_f1(*counts).mean())


def multilabel_macro_f1(truth: Marks, predicted: Marks) -> float:
    """Compute the macro F1 of multi-label predictions."""
    return float(_compute_f1((truth & predicted).sum(axis=0), truth.sum(axis=0), predicted.sum(axis=0)).mean())


def micro_f1(truth: Marks, predicted: Marks) -> float:
    """Compute F1 over all record-label pairs, in [0, 1]; 0 if there is neither a true nor a predicted label."""
    return float(_compute_f1((truth & predicted).sum(), truth.sum(), predicted.sum()))


def _compute_f1(correct: npt.ArrayLike, actual: npt.ArrayLike, predicted: npt.ArrayLike) -> Floats:
    # 2 TP + FP + FN is the number of predictions of a class plus the number of its true records.
    f1: Floats = 2.0 * np.asarray(correct) / np.maximum(np.asarray(actual) + np.asarray(predicted), 1)
    return f1


def compute_class_scores(truth: Marks, predicted: Marks, *, labels: Sequence[str]) -> tuple[ClassScores, ...]:
    """Compute precision, recall and F1 of each label, in the order of the labels."""
    num_correct, num_true, num_predicted = (marks.sum(axis=0) for marks in (truth & predicted, truth, predicted))
    precision, recall = num_correct / np.maximum(num_predicted, 1), num_correct / np.maximum(num_true, 1)
    figures = zip(labels, precision, recall, _compute_f1(num_correct, num_true, num_predicted), num_true, strict=True)
    return tuple(
        ClassScores(label=label, precision=float(p), recall=float(r), f1=float(f), support=int(count))
        for label, p, r, f, count in figures
    )


def count_entities(truth: Sequence[Entity], predicted: Sequence[Entity], *, num_labels: int) -> Floats:
    """Count one record's entities per label, and in the last row for all labels merged, as (num_labels + 1, 5).

    The columns are: true entities, predicted entities, exact matches, true entities that overlap with a predicted
    entity of the same label, and predicted entities that overlap with a true entity of the same label.
    """
    counts = np.zeros((num_labels + 1, 5))
    for label in range(num_labels + 1):
        real, guess = ([span[:2] for span in side if label in (span[2], num_labels)] for side in (truth, predicted))
        both = (Counter(real) & Counter(guess)).total()
        counts[label] = len(real), len(guess), both, _count_overlapping(real, guess), _count_overlapping(guess, real)
    return counts


def _count_overlapping(some: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> int:
    """Count the intervals (start, end) in `some` that overlap with at least one of `others`."""
    if not some or not others:
        return 0
    (first, end), (firsts, ends) = (np.array(intervals).T for intervals in (some, others))
    # An interval overlaps if fewer of the others end before its start than start before its end.
    met = np.searchsorted(np.sort(ends), first, side="right") < np.searchsorted(np.sort(firsts), end)
    return int(met.sum())


def compute_recall_precision_f1(counts: Floats, found: int, right: int) -> tuple[float, float, float]:
    """Compute recall, precision and F1 from (5,) counts of `count_entities`; a division by zero returns 0.

    `found` and `right` are column indices: `found` counts the true entities that were predicted, and `right` the
    predicted entities that are correct.
    """
    recall, precision = counts[found] / max(counts[0], 1), counts[right] / max(counts[1], 1)
    return float(recall), float(precision), float(2 * recall * precision / max(recall + precision, 1e-12))


def auroc(probabilities: Floats, truth: Marks) -> float:
    """Compute the macro-averaged one-vs-rest AUROC: the probability that a record with a label ranks above a record
    without it.

    Labels that all records or no records have are excluded from the mean; without any other label, the result is 0.5,
    the value of a random ranking.  A tie counts as one half (Mann and Whitney).  `probabilities` (n, labels) may be any
    increasing function of probabilities.

    >>> auroc(np.array([[0.9], [0.4], [0.3]]), np.array([[True], [False], [True]]))
    0.5
    """
    positive = truth.sum(axis=0)
    mixed = np.flatnonzero((positive > 0) & (positive < len(truth)))
    if not len(mixed):
        return 0.5
    # A bootstrap calls this a thousand times: sorting once and looking up the records with the label is five times
    # as fast as ranking all of them.
    sorted_scores = np.sort(np.ascontiguousarray(probabilities.T[mixed]), axis=1)
    areas = []
    for in_order, label in zip(sorted_scores, mixed, strict=True):
        scores, count = probabilities[truth[:, label], label], int(positive[label])
        below = (np.searchsorted(in_order, scores, side) for side in ("left", "right"))
        # Pairs among these records themselves add count * count / 2: ties count one half, including self-pairs.
        pairs = sum(float(ranks.sum()) for ranks in below) / 2 - count * count / 2
        areas.append(pairs / (count * (len(truth) - count)))
    return float(np.mean(areas))


def reliability(confidence: Floats, right: Marks) -> tuple[ReliabilityBin, ...]:
    """Group predictions by confidence, (predictions,), into `BINS` bins of equal count, and compute each bin's
    accuracy.

    The bins have equal mass (Nguyen and O'Connor 2015): with bins of equal width, nearly all predictions of a confident
    model would be in one bin, and the other bins would be too small to measure.
    """
    order = np.argsort(confidence, kind="stable")
    bins = (some for some in np.array_split(order, BINS) if len(some))
    return tuple(
        ReliabilityBin(confidence=float(confidence[some].mean()), accuracy=float(right[some].mean()), count=len(some))
        for some in bins
    )


def compute_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Compute the expected calibration error (ECE) in [0, 1]: the mean gap between a bin's confidence and its
    accuracy.
    """
    apart = [entry.count * abs(entry.confidence - entry.accuracy) for entry in bins]
    return sum(apart) / sum(entry.count for entry in bins)


def compute_quadratic_kappa(truth: Classes, predicted: Classes, *, num_labels: int) -> float:
    """Compute Cohen's kappa with quadratic weights: 1 minus the squared error divided by the squared error of chance.

    Chance pairs the same predictions with the true classes at random.  The result is 0 if all records have one class,
    or if the prediction is constant.

    >>> compute_quadratic_kappa(np.array([0, 1, 2]), np.array([0, 1, 1]), num_labels=3)
    0.6666666666666667
    """
    steps = np.arange(num_labels)
    squares = np.square(steps[:, None] - steps)
    true_counts, predicted_counts = (np.bincount(classes, minlength=num_labels) for classes in (truth, predicted))
    # in integers, so that a constant prediction has exactly 0
    by_chance = int(true_counts @ squares @ predicted_counts)
    return 1 - len(truth) * int(np.square(truth - predicted).sum()) / by_chance if by_chance else 0.0


def correlation(one: Floats, other: Floats) -> float:
    """Compute the Pearson correlation of two (n,) arrays, in [-1, 1]; 0 if either array is constant."""
    left, right = one - one.mean(), other - other.mean()
    size = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / size if size != 0 else 0.0


def rank_correlation(one: Floats, other: Floats) -> float:
    """Compute the Spearman correlation: the Pearson correlation of the ranks."""
    from scipy.stats import rankdata  # imported late, because reading settings should not wait for it

    return correlation(rankdata(one), rankdata(other))
