"""Forward passes for scoring: no gradients, no random layers, batches by a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fedtune.data.batching import Batch, collate, micro_batches
from fedtune.data.tokenise import TextDataset
from fedtune.model.task import TaskModel
from fedtune.spec import DataError

KeptStates = dict[int, torch.Tensor | None]
"""What a model's frozen layers made of a data set, batch by batch: by the first example's place, on the CPU."""


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in evaluation mode without gradients, then restore each one's flag.

    The flags are set and restored one by one, not by `eval()` and `train()`: the trainable leaves of
    a task model stay in training mode inside a frozen base on purpose, which those two calls would
    lose.  Hooks for per-example gradients see a module in evaluation mode and keep nothing.
    `no_grad` rather than `inference_mode`: a buffer that a model makes lazily in its first forward
    pass would be an inference tensor, and the next training step could not differentiate through it.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, was_training in flags:
            module.training = was_training


def batches_by_length(dataset: TextDataset, *, pad_id: int, max_tokens: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield (indices, batch) over all of `dataset`, sorted by length, each batch within `max_tokens`.

    Raises:
        DataError: when there is nothing to score.
    """
    if len(dataset) == 0:
        raise DataError("evaluation data", 0, "must hold at least one example")
    for indices in micro_batches(np.arange(len(dataset)), dataset.lengths, max_tokens=max_tokens):
        yield indices, collate(dataset, indices, pad_id=pad_id)


def batches_to_score(
    model: TaskModel, dataset: TextDataset, *, pad_id: int, max_tokens: int, kept: KeptStates | None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The same on the model's device, and behind the frozen layers where `kept` says what these made of a batch.

    Args:
        model: the one that `kept` was filled by.
        dataset: always the same for one `kept`, as are the other arguments.
        pad_id: a valid token id.
        max_tokens: of a batch.
        kept: filled in the first pass; None keeps nothing.
    """
    for indices, plain in batches_by_length(dataset, pad_id=pad_id, max_tokens=max_tokens):
        batch = plain.to(model.device)
        if kept is None:
            yield indices, batch
            continue
        first = int(indices[0])
        if first not in kept:
            states = model.frozen_states(batch)
            kept[first] = None if states is None else states.cpu()
        yield indices, replace(plain, prefix=kept[first]).to(model.device)
