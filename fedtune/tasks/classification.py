"""Single-label classification by a linear head on the mean hidden state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedtune.data.batching import Batch
from fedtune.data.tokenization import TextDataset
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.tasks.base import Model
from fedtune.tasks.measures import Floats, macro_f1
from fedtune.tasks.pooled import OneLabelTask


class Classification(OneLabelTask):
    """Single-label classification with one output per label and the softmax cross-entropy as loss."""

    name = "classification"
    primary_metric = "accuracy"
    studied = {36: "nine tenths", 17: "three quarters", 6.7: "two fifths", 2.4: "a quarter to nearly all"}  # noqa: RUF012

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, spec: TaskModelSpec) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    def predictions(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> dict[str, torch.Tensor]:
        return {"predicted": logits.argmax(dim=1), "probabilities": logits.softmax(dim=1)}

    def compute_task_scores(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute `accuracy` and `macro_f1`, both in [0, 1]."""
        truth, predicted = (figures[name].astype(np.int64) for name in ("truth", "predicted"))
        return {
            "accuracy": float(np.mean(truth == predicted)),
            "macro_f1": macro_f1(truth, predicted, num_labels=len(spec.labels)),
        }

    def majority_baseline(self, dataset: TextDataset) -> float:
        """Return the share of the most frequent label."""
        return float(np.bincount(np.asarray(dataset.targets)).max() / len(dataset))

    def score_unit(self, model: Model, batch: Batch) -> float:
        """Return 1 if the predicted class is correct, and 0 otherwise."""
        return float(model.logits(batch).argmax(dim=1)[0] == batch.targets[0])
