"""Scores of a task model: over data that the lead may look at, and of each held-out unit at a site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedtune.data.batching import Batch, collate, micro_batches
from fedtune.data.tokenise import TextDataset
from fedtune.model.quiet import first_line
from fedtune.spec import ConfigError, DataError, panics_as_errors
from fedtune.tasks.task_model import TaskModel

_MOST_ON_CPU = 2048
"""Padded tokens of a batch on a CPU: for what is computed of more, the allocator asks the system for new memory each
time, which took MiniLM up to a third longer at 8192 (simulations/benchmarks)."""
KeptBatches = dict[int, Batch]
"""A data set in batches, with what the frozen base made of each: by the first example's place, on the CPU."""


def figures_of(
    task_model: TaskModel, dataset: TextDataset, *, pad_id: int, max_tokens: int, kept: KeptBatches | None = None
) -> dict[str, npt.NDArray[np.float64]]:
    """(examples, ...) each, by name: what `Task.scores` needs of every example of `dataset`.

    Without gradients; the model's training flags end as they were.  The figures are exact and not covered by any
    privacy guarantee, as are the scores: they must not leave a site when the data is private.

    Args:
        task_model: says itself what is scored (`Task.figures`, `Task.scores`).
        dataset: the tokenised examples, at least one.
        pad_id: a valid token id.
        max_tokens: padded tokens of a batch.
        kept: what the model's frozen base made of `dataset`, from one scoring to the next; empty before the first.

    Raises:
        DataError: when there is nothing to score.
        ConfigError: for `evaluation.max_tokens`: the device has no room for so many.
    """
    figures: dict[str, npt.NDArray[np.float64]] = {}
    with scoring(task_model), batches_within_memory(max_tokens):
        batches = batches_to_score(task_model, dataset, pad_id=pad_id, max_tokens=max_tokens, kept=kept)
        for indices, batch in batches:
            for name, of_batch in task_model.figures(batch).items():
                if name not in figures:
                    figures[name] = np.zeros((len(dataset), *of_batch.shape[1:]))
                figures[name][indices] = of_batch.cpu()
    return dict(task_model.task.completed(figures))


def unit_scores(task_model: TaskModel, dataset: TextDataset, *, pad_id: int) -> npt.NDArray[np.float64]:
    """(records,) scores in [0, 1], see `Task.unit_score`.

    Each record goes through the model alone.  In a shared batch, one unit's length would move the others' logits by
    rounding, and a prediction on the edge could flip: one unit would then change more than its own score.

    The scores themselves are exact and must not leave the site.
    """
    scores = np.zeros(len(dataset))
    with scoring(task_model):
        for index in range(len(dataset)):
            batch = collate(dataset, np.array([index]), pad_id=pad_id).to(task_model.device)
            # Of a record that cannot be computed: 0, and the others as they are.
            with suppress(Exception), panics_as_errors():
                scores[index] = task_model.task.unit_score(task_model, batch)
    return scores


def user_scores(scores: npt.NDArray[np.float64], users: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
    """(users,) scores in [0, 1] of users as units: the mean over all of a user's records; 0 for one that is not finite.

    However many records a user has, it adds one score in [0, 1] and counts once, as `mechanism.noised_scores` needs.

    Args:
        scores: one for each record.
        users: for each user the places of its records, at least one.
    """
    usable = np.clip(np.where(np.isfinite(scores), scores, 0.0), 0.0, 1.0)
    return np.array([usable[places].mean() for places in users], dtype=np.float64)


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


@contextmanager
def batches_within_memory(max_tokens: int) -> Iterator[None]:
    """A batch for which an accelerator has no room becomes a mistake in `evaluation.max_tokens`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        bound = f"must be smaller: the device has no room for what the model makes of a batch ({first_line(error)})"
        raise ConfigError("evaluation.max_tokens", max_tokens, bound) from None


def batches_by_length(dataset: TextDataset, *, pad_id: int, max_tokens: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield (indices, batch) over all of `dataset`, sorted by length, each batch within `max_tokens`.

    Raises:
        DataError: when there is nothing to score.
    """
    if len(dataset) == 0:
        raise DataError("evaluation data", 0, "must hold at least one example")
    for indices in micro_batches(np.arange(len(dataset)), dataset.lengths * dataset.texts, max_tokens=max_tokens):
        yield indices, collate(dataset, indices, pad_id=pad_id)


def batches_to_score(
    model: TaskModel, dataset: TextDataset, *, pad_id: int, max_tokens: int, kept: KeptBatches | None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The same on the model's device, with what the frozen base made of a batch where that is `kept`.

    Args:
        model: the one that `kept` was filled by.
        dataset: always the same for one `kept`, as are the other arguments.
        pad_id: a valid token id.
        max_tokens: of a batch; a CPU gets fewer at a time.
        kept: filled in the first pass; None keeps nothing.
    """
    most = min(max_tokens, _MOST_ON_CPU) if model.device.type == "cpu" else max_tokens
    for indices, plain in batches_by_length(dataset, pad_id=pad_id, max_tokens=most):
        batch = plain.to(model.device)
        if kept is None:
            yield indices, batch
            continue
        first = int(indices[0])
        if first not in kept:
            batch = replace(batch, prefix=model.frozen_states(batch))
            kept[first] = replace(batch, reference=model.reference(batch)).to("cpu")
        yield indices, kept[first].to(model.device)
