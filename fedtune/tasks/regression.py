"""Regression of a number in a declared range, by a linear head on the mean hidden state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedtune.data.batching import Batch
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED, Targets, TextDataset
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.tasks.base import Draws, FirstTarget, Ids, Model, Readout, read_target_number, require_target_range
from fedtune.tasks.measures import Floats, correlation, rank_correlation
from fedtune.tasks.pooled import PooledTask, TargetOf


class Regression(PooledTask):
    """Regression of a number in `data.target_range`, predicted as middle + half width of the range * scale * W x.

    The loss is the squared error in units of half the width: targets are in [-1, 1], and a new head, all zeros,
    predicts the middle.  A Huber loss is not needed, because clipping already bounds the contribution of an outlier to
    a step.  A record with a number outside the range is skipped, like a record with an undeclared label, because a
    number clamped to the range would be a false target.
    """

    name = "regression"
    roles = ("text", "target")
    answers = frozenset({"target"})
    data_settings = PooledTask.data_settings | {"target_range"}
    target_type = np.float32

    def check_data(self, data: DataSpec) -> None:
        super().check_data(data)
        require_target_range(data)

    def target(self, data: DataSpec) -> TargetOf:
        bounds = require_target_range(data)
        middle, half = _compute_middle_and_half(bounds)
        return lambda record: (read_target_number(record, bounds) - middle) / half

    def num_outputs(self, spec: TaskModelSpec) -> int:
        return 1

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, spec: TaskModelSpec) -> torch.Tensor:
        return torch.where(targets == UNSUPERVISED, 0.0, (logits[:, 0] - targets).square())

    def predictions(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> dict[str, torch.Tensor]:
        """Compute predictions, clamped to the range of the targets."""
        return {"predicted": _to_target_units(logits[:, 0].clamp(-1, 1), spec)}

    def true_values(self, targets: torch.Tensor, *, spec: TaskModelSpec) -> torch.Tensor:
        return _to_target_units(targets, spec)

    def compute_task_scores(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute `spearman` and `pearson` in [-1, 1], and `rmse` and `mae` in the target's own unit."""
        truth, predicted = figures["truth"], figures["predicted"]
        return {
            "spearman": rank_correlation(truth, predicted),
            "pearson": correlation(truth, predicted),
            "rmse": float(np.sqrt(np.square(truth - predicted).mean())),
            "mae": float(np.abs(truth - predicted).mean()),
        }

    def majority_baseline(self, dataset: TextDataset) -> float:
        """Return the loss of always predicting the mean."""
        return float(np.var(np.asarray(dataset.targets, dtype=np.float64)))

    def score_unit(self, model: Model, batch: Batch) -> float:
        """Return 1 minus the absolute error as a fraction of the range."""
        return 1 - abs(float(model.logits(batch)[0, 0].clamp(-1, 1) - batch.targets[0])) / 2

    def answer(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> tuple[str, object]:
        """Return the predicted number, as text and as JSON."""
        number = float(self.predictions(logits[None], spec=spec)["predicted"][0])
        return f"{number:.5g}", {"number": number}

    def list_readout_layers(self, model: Model) -> Readout:
        """Return the head, with the scaling to the range folded into its last layer."""
        ((weight, _),) = super().list_readout_layers(model)
        middle, half = _compute_middle_and_half(model.spec.target_range)
        return ((half * weight, weight.new_full((1,), middle)),)

    def compute_exported_output(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> torch.Tensor:
        return _to_target_units(logits, spec)

    def dummy_targets(self, input_ids: Ids, *, spec: TaskModelSpec, draws: Draws, first: FirstTarget) -> Targets:
        return draws.uniform(-1, 1, size=len(input_ids)).astype(np.float32)


def _compute_middle_and_half(bounds: tuple[float, float] | None) -> tuple[float, float]:
    """Return the middle of the range, and half its width."""
    assert bounds is not None, "checked in the settings of the data"
    low, high = bounds
    return (low + high) / 2, (high - low) / 2


def _to_target_units(scaled: torch.Tensor, spec: TaskModelSpec) -> torch.Tensor:
    """Convert from units of half the range's width to the target's own unit."""
    middle, half = _compute_middle_and_half(spec.target_range)
    return middle + half * scaled
