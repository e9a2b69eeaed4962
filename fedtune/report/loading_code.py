"""Python code that loads a run's model without fedtune, for model cards and exports.

The code is in `page/templates/loading.py.j2`. For a task without its own code, it only loads the base model and the
adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedtune.data.spec import DataSpec
from fedtune.data.values import NO_NAME, NUMBER
from fedtune.report.page.render import create_template_environment
from fedtune.tasks.base import Task
from fedtune.tasks.classification import Classification
from fedtune.tasks.embedding import Embedding
from fedtune.tasks.multi_label import MultiLabel
from fedtune.tasks.ordinal import Ordinal
from fedtune.tasks.pooled import PooledTask
from fedtune.tasks.regression import Regression
from fedtune.tasks.survival import Survival
from fedtune.tasks.token_classification import TokenClassification

_ANSWERS: Mapping[type, str] = {
    Classification: "labels[scores.argmax()]",
    MultiLabel: "[label for label, score in zip(labels, scores) if score > 0]",
    Ordinal: "labels[int((scores > 0).sum())]",
    Regression: "float(scores[0])",
    Survival: "[float(one) for one in (1 / (1 + 2.718281828459045 ** scores)).cumprod(0)]",
    PooledTask: "scores",
}
"""Task class or a base class of it -> expression for the prediction from the vector `scores` and from `labels`."""


def build_loading_code(task: Task, data: DataSpec, *, base: str, folder: str, graph: bool = False) -> str:
    """Return code that loads a saved model and prints the prediction for an example.

    Args:
        task: the run's task.
        data: the run's data settings.
        base: the base model's path or Hub id; the folder itself if the adapter was merged.
        folder: the folder of the saved adapter or model.
        graph: whether the folder contains an ONNX graph instead, for features.
    """
    # For Python, where autoescape would escape for HTML.
    templates = create_template_environment().overlay(autoescape=False, keep_trailing_newline=True)
    return templates.get_template("loading.py.j2").render(
        input=data.input,
        base=base,
        folder=folder,
        graph=graph,
        auto=task.auto_class if task.predicts_tokens else "AutoModel",
        head="pooled" if isinstance(task, PooledTask) else "tokens" if isinstance(task, TokenClassification) else "",
        embeds=isinstance(task, Embedding),
        scales_to_range=isinstance(task, Regression) and not graph,
        answer=build_prediction_expression(task),
        repr=repr,
        **(_describe_features(data) if data.input == "features" else {}),
    )


def build_prediction_expression(task: Task) -> str:
    """Return the expression for a task's prediction from `scores` and `labels`; "" for a task whose code computes no
    scores.
    """
    return next((answer for cls, answer in _ANSWERS.items() if isinstance(task, cls)), "")


def _describe_features(data: DataSpec) -> Mapping[str, Any]:
    """Return the template values that only code for a row of features needs."""
    row = {name: one.generate_dummies(lambda _: 0) for one in data.features for name in one.columns}
    shown = {
        name: None if one.missing == "indicator" else row[name] if one.categories else json.loads(row[name])
        for one in data.features
        for name in one.columns
    }
    return {
        "features": json.dumps([asdict(one) for one in data.features]),
        "labels": list(data.labels),
        "number": NUMBER.pattern,
        "missing": sorted(NO_NAME),
        "row": shown,
    }
