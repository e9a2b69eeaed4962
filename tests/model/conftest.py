"""Tiny models and batches for all tests of the model layer."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.data import Batch, TextDataset, collate
from fedtune.model.base_model import load_base, load_tokenizer
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.tasks.registry import TASKS
from fedtune.tasks.task_model import TaskModel

from ..builders import build_copy, set_random_values

# In models this small, several threads only slow each other down.
torch.set_num_threads(1)

LABELS = ("card_arrival", "exchange_rate", "lost_card")
TEXTS = {"pairs": 2, "triplets": 3}
"""Test names of the embedding task, by the number of texts per record."""


def declare_labels(task: str) -> dict[str, Any]:
    labels = LABELS if task in TASKS and TASKS[task].has_labels else ()
    return {"labels": labels, "target_range": (0.0, 5.0) if task == "regression" else None}


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "model"
    bert = ModelSpec(path="random:bert")
    load_base(bert).save_pretrained(folder)
    load_tokenizer(bert).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clean, tmp_path / "model")


def is_same_beside_others(
    product: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, *, threads: int, fewest: int = 2
) -> bool:
    """Whether each row's product is bit-identical for every number of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        all_rows = product(values)
        numbers = (fewest, 12, 31, 48, 200, len(values) - 1)
        return all(torch.equal(product(values[1 : 1 + rows].clone()), all_rows[1 : 1 + rows]) for rows in numbers)
    finally:
        torch.set_num_threads(before)


def multiply_both_ways(
    layer: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the product and the gradient of its input."""
    values = values.clone().requires_grad_()
    outputs = layer(values)
    return outputs.detach(), torch.autograd.grad(outputs, values, direction)[0]


def multiply_backwards(
    layer: Callable[[torch.Tensor], torch.Tensor], size: int, gradients: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of an input of this size, in the dtype of the output gradients."""
    return multiply_both_ways(layer, torch.zeros(len(gradients), size, dtype=gradients.dtype), gradients)[1]


def multiply_exactly(layer: Any, values: torch.Tensor, direction: torch.Tensor, *, transposed: bool) -> Any:
    """Return the product and the input's gradient in float64, for a layer's weight and bias."""
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    linear = partial(nn.functional.linear, weight=weight.t() if transposed else weight, bias=bias)
    return multiply_both_ways(linear, values.double(), direction.double())


def cut_example(batch: Batch, place: int) -> Batch:
    """Return a single example, with padding only between its own texts."""
    rows = slice(place * batch.texts, (place + 1) * batch.texts)
    length = int(batch.attention_mask[rows].sum(dim=1).max())
    targets = batch.targets[place : place + 1]
    targets = targets[:, :length] if targets.shape[1:] == batch.input_ids.shape[1:] else targets
    return Batch(batch.input_ids[rows, :length], batch.attention_mask[rows, :length], targets, texts=batch.texts)


def make_spec(path: str = "random:bert", task: Any = "classification", **changes: Any) -> TaskModelSpec:
    values = {"lora": LoraSpec(rank=2, alpha=4.0), "head": HeadSpec(), "seed": 3} | declare_labels(task) | changes
    if task in TEXTS:
        task, values = "embedding", values | {"texts": TEXTS[task]}
    return TaskModelSpec(model=values.pop("model", ModelSpec(path=path)), task=task, **values)


def make_trained(*args: Any, **changes: Any) -> TaskModel:
    return set_random_values(build_copy(make_spec(*args, **changes)), 0.2)


def make_batch(task: str) -> Batch:
    """Make four examples of different lengths; the last causal example has no supervised token."""
    spec, draws = make_spec(task=task), np.random.default_rng(8)
    ids = tuple(draws.integers(5, 200, size=size).astype(np.int32) for size in (7, 3, 5, 4) * spec.texts)
    targets = TASKS[spec.task].dummy_targets(ids, spec=spec, draws=draws, first=lambda length: 2)
    batch = collate(TextDataset(ids, targets, spec.texts), range(4), pad_id=0)
    if task == "causal_lm":
        batch.targets[3] = -100
    return batch
