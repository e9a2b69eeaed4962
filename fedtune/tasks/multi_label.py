"""Multi-label text classification: each text has any number of declared labels, including none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from fedtune.data.batching import Batch
from fedtune.data.records import Record
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import Targets, TextDataset
from fedtune.data.values import split_labels
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.spec import ConfigError
from fedtune.tasks import measures
from fedtune.tasks.base import Draws, FirstTarget, Ids, Model
from fedtune.tasks.measures import Floats, Marks
from fedtune.tasks.pooled import LabelTask, TargetOf, find_label_index, format_labels

MAX_LABELS = 1_000
"""Maximum number of labels.  Each record takes a byte per label, so a lead could otherwise probe how many records a
site has memory for.
"""


class MultiLabel(LabelTask):
    """Multi-label classification with one output per label and the mean binary cross-entropy over the labels as loss.

    A record's labels are a JSON list, or one text with `data.label_separator` between the labels.  A label is predicted
    if its probability is above one half.  A record with an undeclared label is skipped entirely, because training on
    its declared labels would teach the model that it has no further label.
    """

    name = "multi_label"
    roles = ("text", "labels")
    answers = frozenset({"labels"})
    data_settings = LabelTask.data_settings | {"label_separator"}
    primary_metric = "micro_f1"
    target_type = np.int8

    def check_data(self, data: DataSpec) -> None:
        super().check_data(data)
        if len(data.labels) > MAX_LABELS:
            raise ConfigError("labels", len(data.labels), f"must be at most {MAX_LABELS} for task {self.name}")

    def target(self, data: DataSpec) -> TargetOf:
        places = {label: index for index, label in enumerate(data.labels)}

        def mark_labels(record: Record) -> npt.NDArray[np.int8]:
            marks = np.zeros(len(places), dtype=np.int8)
            for label in split_labels(record.fields["labels"], separator=data.label_separator):
                marks[find_label_index(label, places, record, role="labels")] = 1
            return marks

        return mark_labels

    def get_target_shape(self, data: DataSpec) -> tuple[int, ...]:
        return (len(data.labels),)

    def predictions(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> dict[str, torch.Tensor]:
        return {"probabilities": logits.sigmoid()}

    def label_indicators(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> tuple[Marks, Marks]:
        return figures["truth"] > 0, figures["probabilities"] > 0.5

    def confidence(self, figures: Mapping[str, Floats], truth: Marks, predicted: Marks) -> tuple[Floats, Marks]:
        """Return the predicted probability of each record-label pair, and whether the record has the label."""
        return figures["probabilities"].ravel(), truth.ravel()

    def compute_task_scores(self, figures: Mapping[str, Floats], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute `micro_f1`, `macro_f1` and `exact`, the share of records with exactly the right labels, all in [0,
        1].
        """
        truth, predicted = self.label_indicators(figures, spec=spec)
        return {
            "micro_f1": measures.micro_f1(truth, predicted),
            "macro_f1": measures.multilabel_macro_f1(truth, predicted),
            "exact": float((truth == predicted).all(axis=1).mean()),
        }

    def majority_baseline(self, dataset: TextDataset) -> float:
        """Return the micro F1 of the best constant prediction."""
        truth = np.asarray(dataset.targets, dtype=np.float64) > 0
        # correct pairs with the most frequent label, with two labels, ...
        correct = np.cumsum(np.sort(truth.sum(axis=0))[::-1])
        predicted = len(dataset) * np.arange(1, len(correct) + 1)
        return float((2.0 * correct / (predicted + truth.sum())).max())

    def score_unit(self, model: Model, batch: Batch) -> float:
        """Return the F1 of the record's labels; 1 if it has no label and none is predicted."""
        truth, predicted = batch.targets[0] > 0, model.logits(batch)[0] > 0
        named = int(truth.sum() + predicted.sum())
        return 2 * int((truth & predicted).sum()) / named if named else 1.0

    def answer(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> tuple[str, object]:
        """Return the labels with a probability above one half, the likeliest first, or "none" with the likeliest
        label.
        """
        chances = logits.sigmoid()
        ranked = [(spec.labels[place], float(chances[place])) for place in (-chances).argsort(stable=True).tolist()]
        predicted = [pair for pair in ranked if pair[1] > 0.5]
        listed = ", ".join(f"{label} {chance:.3f}" for label, chance in predicted or ranked[:1])
        return listed if predicted else f"none ({listed})", format_labels(predicted)

    def dummy_field(self, role: str, data: DataSpec, *, draw: Callable[[int], int]) -> str | None:
        return json.dumps([data.labels[draw(len(data.labels))]]) if role == "labels" else None

    def dummy_targets(self, input_ids: Ids, *, spec: TaskModelSpec, draws: Draws, first: FirstTarget) -> Targets:
        return draws.integers(0, 2, size=(len(input_ids), len(spec.labels))).astype(np.int8)
