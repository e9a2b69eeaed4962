"""Accuracy, macro-F1 and loss of a classifier."""

from __future__ import annotations

import numpy as np
import torch

from fedtune.data.tokenise import TextDataset
from fedtune.evaluation.forward import KeptStates, batches_to_score, scoring
from fedtune.model.task import TaskModel


def evaluate_classification(
    task_model: TaskModel, dataset: TextDataset, *, pad_id: int, max_tokens: int, kept: KeptStates | None = None
) -> dict[str, float]:
    """Score `task_model` on every example of `dataset`.

    Returns:
        `accuracy` and `macro_f1`, both in [0, 1], and `loss`, the mean cross-entropy in nats.

    Raises:
        DataError: when `dataset` is empty.
    """
    truth, predicted = (np.zeros(len(dataset), dtype=np.int64) for _ in range(2))
    losses = np.zeros(len(dataset), dtype=np.float64)
    num_labels = 0
    batches = batches_to_score(task_model, dataset, pad_id=pad_id, max_tokens=max_tokens, kept=kept)
    with scoring(task_model):
        for indices, batch in batches:
            logits = task_model.logits(batch)  # (n, labels)
            num_labels = logits.shape[1]
            # The loss comes from the same logits: `task_model.losses` would run the base once more.
            losses[indices] = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none").cpu()
            predicted[indices] = logits.argmax(dim=1).cpu()
            truth[indices] = batch.targets.cpu()
    return {
        "accuracy": float(np.mean(truth == predicted)),
        "macro_f1": macro_f1(truth, predicted, num_labels=num_labels),
        "loss": float(np.mean(losses)),
    }


def macro_f1(truth: np.ndarray, predicted: np.ndarray, *, num_labels: int) -> float:
    """The unweighted mean of every declared class's F1 score, in [0, 1].

    F1 is 2 TP / (2 TP + FP + FN).  A declared class with no true and no predicted example has
    0 / 0 and counts as 0, which is scikit-learn's `f1_score(truth, predicted, average="macro",
    labels=range(num_labels), zero_division=0)`; without `labels`, scikit-learn would leave that
    class out, and the score's meaning would change with the sample.

    Args:
        truth: (n,) classes in [0, num_labels).
        predicted: (n,) classes in [0, num_labels).
        num_labels: size of the declared label set.

    >>> import numpy as np
    >>> macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]), num_labels=2)  # both classes have 2/3
    0.6666666666666666
    >>> macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]), num_labels=4)  # classes 2 and 3 never occur
    0.3333333333333333
    """
    true_positives = np.bincount(truth[truth == predicted], minlength=num_labels)
    # 2 TP + FP + FN is how often a class is predicted plus how often it is true.
    occurrences = np.bincount(truth, minlength=num_labels) + np.bincount(predicted, minlength=num_labels)
    scores = 2.0 * true_positives / np.maximum(occurrences, 1)
    return float(scores.mean())
