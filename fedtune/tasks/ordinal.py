"""Ordinal regression: each text has one of several declared, ordered labels, such as grades or stars.

The head has K - 1 outputs for K labels: is the true label above the first, above the second, ...?  Their logits are
those of the cumulative probabilities P(class > k), and the loss is the mean binary cross-entropy of the K - 1 answers
(ordinal regression by extended binary classification, Li and Lin 2006).  The predicted class is the number of
positive answers.

- The loss respects the order: a prediction that is three steps off gives three wrong answers, one step off gives one.
  The absolute error is at most the number of wrong answers, even if the answers contradict each other.
- Only a linear head is trained.  The thresholds of a proportional-odds model would be additional tensors, with other
  gradients to clip and no place in an export.  Each threshold has its own output instead, so that labels need not be
  equally spaced, or lie along one direction.
- The K - 1 probabilities are not forced to decrease.  They are sorted when class probabilities are needed, which does
  not change the number above one half and never makes an estimate worse (Chernozhukov et al. 2010).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedtune.data.batching import Batch
from fedtune.data.tokenization import UNSUPERVISED
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.tasks.base import Model
from fedtune.tasks.measures import Floats, compute_quadratic_kappa
from fedtune.tasks.pooled import OneLabelTask, compute_binary_losses


class Ordinal(OneLabelTask):
    """Ordinal regression by cumulative logits; `data.labels` are in ascending order."""

    name = "ordinal"
    primary_metric = "quadratic_kappa"
    baseline = 0.0

    def num_outputs(self, spec: TaskModelSpec) -> int:
        return len(spec.labels) - 1

    def compute_initial_head_rows(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute each threshold's row: the direction from the mean of the labels below it to the mean of the labels
        above it.
        """
        rows = [embeddings[k:].mean(dim=0) - embeddings[:k].mean(dim=0) for k in range(1, len(embeddings))]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, spec: TaskModelSpec) -> torch.Tensor:
        questions = torch.arange(logits.shape[1], device=logits.device)
        above = (targets[:, None] > questions).long()  # (rows, K - 1)
        return compute_binary_losses(logits, torch.where(targets[:, None] == UNSUPERVISED, UNSUPERVISED, above))

    def predictions(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> dict[str, torch.Tensor]:
        above = logits.sigmoid().sort(dim=1, descending=True).values
        ends = torch.ones_like(above[:, :1]), torch.zeros_like(above[:, :1])
        falling = torch.cat([ends[0], above, ends[1]], dim=1)  # (rows, K + 1) from 1 to 0
        return {"predicted": _predict_classes(logits), "probabilities": falling[:, :-1] - falling[:, 1:]}

    def compute_task_scores(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute `quadratic_kappa`, at most 1, `accuracy` in [0, 1], and `mae` in steps between labels."""
        truth, predicted = (figures[name].astype(np.int64) for name in ("truth", "predicted"))
        return {
            "quadratic_kappa": compute_quadratic_kappa(truth, predicted, num_labels=len(spec.labels)),
            "accuracy": float(np.mean(truth == predicted)),
            "mae": float(np.mean(np.abs(truth - predicted))),
        }

    def score_unit(self, model: Model, batch: Batch) -> float:
        """Return 1 minus the error in steps, as a fraction of the largest possible error."""
        steps = abs(int(_predict_classes(model.logits(batch))[0]) - int(batch.targets[0]))
        return 1 - steps / self.num_outputs(model.spec)


def _predict_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return the class of each row, (rows,): the number of positive logits, from (rows, K - 1)."""
    return (logits > 0).sum(dim=1)
