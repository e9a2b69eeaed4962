"""One bounded score for each held-out unit, to be summed and noised before anything leaves a site."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedtune.data.batching import collate
from fedtune.data.tokenise import TextDataset
from fedtune.evaluation.forward import scoring
from fedtune.model.task import TaskModel


def unit_scores(task_model: TaskModel, dataset: TextDataset, *, task: str, pad_id: int) -> npt.NDArray[np.float64]:
    """(units,) scores in [0, 1]: whether the predicted class is right; for a language model, exp(-loss).

    Each unit goes through the model alone.  In a shared batch, one unit's length would move the others' logits by
    rounding, and a prediction on the edge could flip: one unit would then change more than its own score.

    The scores themselves are exact and must not leave the site.
    """
    scores = np.zeros(len(dataset))
    with scoring(task_model):
        for index in range(len(dataset)):
            batch = collate(dataset, np.array([index]), pad_id=pad_id).to(task_model.device)
            if task == "classification":
                scores[index] = float(task_model.logits(batch).argmax(dim=1)[0] == batch.targets[0])
            else:
                scores[index] = float(np.exp(-float(task_model.losses(batch)[0])))
    return scores
