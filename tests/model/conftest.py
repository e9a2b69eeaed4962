"""Tiny models and batches that every test of the model layer uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedtune.model import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.tasks import TaskModel, build_task_model

# More threads than one only get in each other's way in models this small.
torch.set_num_threads(1)

LABELS = ("card_arrival", "exchange_rate", "lost_card")


@dataclass(frozen=True)
class Examples:
    """A padded batch, as the data layer makes it."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    prefix: torch.Tensor | None = None
    empty_rows: int = 0
    texts: int = 1

    def __len__(self) -> int:
        return len(self.input_ids)

    def one(self, row: int) -> Examples:
        """The example in `row` alone, without padding."""
        length = int(self.attention_mask[row].sum())
        targets = self.targets[row : row + 1]
        targets = targets[:, :length] if targets.ndim == 2 else targets
        return Examples(self.input_ids[row : row + 1, :length], self.attention_mask[row : row + 1, :length], targets)


@pytest.fixture
def spec() -> Callable[..., TaskModelSpec]:
    """Settings of a tiny model; keywords override."""

    def make(path: str = "random:bert", task: Any = "classification", **changes: Any) -> TaskModelSpec:
        values = {"lora": LoraSpec(rank=2, alpha=4.0), "head": HeadSpec(), "seed": 3} | changes
        labels = LABELS if task == "classification" else ()
        return TaskModelSpec(model=values.pop("model", ModelSpec(path=path)), task=task, labels=labels, **values)

    return make


@pytest.fixture
def trained(spec: Callable[..., TaskModelSpec]) -> Callable[..., TaskModel]:
    """A tiny model whose trainable tensors are random, as after some training (B starts at zero)."""

    def make(*args: Any, **changes: Any) -> TaskModel:
        model = build_task_model(spec(*args, **changes))
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    return make


@pytest.fixture
def examples() -> Callable[[str], Examples]:
    """Four examples of different lengths; the last causal one has no supervised token."""

    def make(task: str) -> Examples:
        lengths = torch.tensor([7, 3, 5, 4])
        token_ids = torch.randint(5, 200, (4, 7), generator=torch.Generator().manual_seed(5))
        mask = (torch.arange(7) < lengths[:, None]).long()
        token_ids = token_ids * mask + (1 - mask)  # 1 is the tiny llama's padding and end-of-text token
        if task == "classification":
            return Examples(token_ids, mask, torch.tensor([0, 2, 1, 2]))
        targets = torch.where((mask == 1) & (torch.arange(7) >= 2), token_ids, -100)
        targets[3] = -100
        return Examples(token_ids, mask, targets)

    return make
