"""One bounded score for each held-out unit, to be summed and noised before anything leaves a site."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from fedtune.data.batching import Batch, collate
from fedtune.data.tokenise import TextDataset
from fedtune.evaluation.forward import scoring
from fedtune.model.task import TaskModel
from fedtune.spec import panics_as_errors


def unit_scores(task_model: TaskModel, dataset: TextDataset, *, task: str, pad_id: int) -> npt.NDArray[np.float64]:
    """(records,) scores in [0, 1]: whether the predicted class is right; for a language model, exp(-loss).

    Each record goes through the model alone.  In a shared batch, one unit's length would move the others' logits by
    rounding, and a prediction on the edge could flip: one unit would then change more than its own score.

    The scores themselves are exact and must not leave the site.
    """
    scores = np.zeros(len(dataset))
    with scoring(task_model):
        for index in range(len(dataset)):
            batch = collate(dataset, np.array([index]), pad_id=pad_id).to(task_model.device)
            # Of a record that cannot be computed: 0, and the others as they are.
            with suppress(Exception), panics_as_errors():
                scores[index] = _score(task_model, batch, task)
    return scores


def _score(task_model: TaskModel, batch: Batch, task: str) -> float:
    if task == "classification":
        return float(task_model.logits(batch).argmax(dim=1)[0] == batch.targets[0])
    return float(np.exp(-float(task_model.losses(batch)[0])))


def user_scores(scores: npt.NDArray[np.float64], users: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
    """(users,) scores in [0, 1] of users as units: the mean over all of a user's records; 0 for one that is not finite.

    However many records a user has, it adds one score in [0, 1] and counts once, as `mechanism.noised_scores` needs.

    Args:
        scores: one for each record.
        users: for each user the places of its records, at least one.
    """
    usable = np.clip(np.where(np.isfinite(scores), scores, 0.0), 0.0, 1.0)
    return np.array([usable[places].mean() for places in users], dtype=np.float64)
