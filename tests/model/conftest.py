"""Tiny models and batches that every test of the model layer uses."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.data import Batch
from fedtune.model.base_model import load_base, load_tokenizer
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.tasks.registry import TASKS
from fedtune.tasks.task_model import TaskModel

from ..builders import built, with_random_values

# More threads than one only get in each other's way in models this small.
torch.set_num_threads(1)

LABELS = ("card_arrival", "exchange_rate", "lost_card")
TEXTS = {"pairs": 2, "triplets": 3}
"""What stands for task embedding with so many texts a record."""


def declared(task: str) -> dict[str, Any]:
    """What a tiny model of a task declares of its answers."""
    labels = LABELS if task in TASKS and TASKS[task].has_labels else ()
    return {"labels": labels, "target_range": (0.0, 5.0) if task == "regression" else None}


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bert and its tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("clean") / "model"
    bert = ModelSpec(path="random:bert")
    load_base(bert).save_pretrained(folder)
    load_tokenizer(bert).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clean, tmp_path / "model")


def same_beside_others(
    product: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, *, threads: int, fewest: int = 2
) -> bool:
    """Whether each row's product has the same bits in every number of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = product(values)
        numbers = (fewest, 12, 31, 48, 200, len(values) - 1)
        return all(torch.equal(product(values[1 : 1 + rows].clone()), whole[1 : 1 + rows]) for rows in numbers)
    finally:
        torch.set_num_threads(before)


def both_ways(
    layer: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product, and the gradient of what came in."""
    values = values.clone().requires_grad_()
    found = layer(values)
    return found.detach(), torch.autograd.grad(found, values, direction)[0]


def exactly(layer: Any, values: torch.Tensor, direction: torch.Tensor, *, transposed: bool) -> Any:
    """The same in float64, of a layer's weight and bias."""
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    linear = partial(nn.functional.linear, weight=weight.t() if transposed else weight, bias=bias)
    return both_ways(linear, values.double(), direction.double())


def one_of(batch: Batch, place: int) -> Batch:
    """An example alone, without padding but what its own texts need."""
    rows = slice(place * batch.texts, (place + 1) * batch.texts)
    length = int(batch.attention_mask[rows].sum(dim=1).max())
    targets = batch.targets[place : place + 1]
    targets = targets[:, :length] if targets.shape[1:] == batch.input_ids.shape[1:] else targets
    return Batch(batch.input_ids[rows, :length], batch.attention_mask[rows, :length], targets, texts=batch.texts)


def spec_of(path: str = "random:bert", task: Any = "classification", **changes: Any) -> TaskModelSpec:
    values = {"lora": LoraSpec(rank=2, alpha=4.0), "head": HeadSpec(), "seed": 3} | declared(task) | changes
    if task in TEXTS:
        task, values = "embedding", values | {"texts": TEXTS[task]}
    return TaskModelSpec(model=values.pop("model", ModelSpec(path=path)), task=task, **values)


def trained(*given: Any, **changes: Any) -> TaskModel:
    return with_random_values(built(spec_of(*given, **changes)), 0.2)


def batch_of(task: str) -> Batch:
    """Four examples of different lengths; the last causal one has no supervised token."""
    texts = TEXTS.get(task, 1)
    lengths = torch.tensor([7, 3, 5, 4] * texts).reshape(-1, texts).T.flatten()
    token_ids = torch.randint(5, 200, (4 * texts, 7), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(7) < lengths[:, None]).long()
    token_ids = token_ids * mask + (1 - mask)  # 1 is the tiny llama's padding and end-of-text token
    if task in TEXTS:
        return Batch(token_ids, mask, torch.tensor([0.1, 0.9, 0.4, 0.6]) + texts - 2, texts=texts)
    if task == "classification":
        return Batch(token_ids, mask, torch.tensor([0, 2, 1, 2]))
    if TASKS[task].has_head:
        spec = TaskModelSpec(model=ModelSpec(path="random:bert"), lora=LoraSpec(), task=task, **declared(task))
        draws = np.random.default_rng(8)
        made = TASKS[task].made_up_targets(list(token_ids.numpy()), spec=spec, draws=draws, first=lambda length: 1)
        targets = torch.from_numpy(np.asarray(made))
        by_token = targets.shape == mask.shape
        return Batch(token_ids, mask, torch.where(mask == 1, targets, -100) if by_token else targets)
    targets = torch.where((mask == 1) & (torch.arange(7) >= 2), token_ids, -100)
    targets[3] = -100
    return Batch(token_ids, mask, targets)
