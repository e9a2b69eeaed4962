"""Scoring of a task model on data that the lead may see, and on each held-out record or person at a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedtune.data.batching import Batch, collate, cut_micro_batches
from fedtune.data.tokenization import TextDataset
from fedtune.model.hf_logging import get_first_line
from fedtune.spec import ConfigError, DataError, translate_panics
from fedtune.tasks.task_model import TaskModel

_MAX_ON_CPU = 2048
"""Maximum padded tokens of a batch on a CPU: for larger batches the allocator requests new system memory each time,
which took MiniLM up to a third longer at 8192 (simulations/benchmarks).
"""
KeptBatches = dict[int, Batch]
"""Batches of a data set with cached outputs of the frozen base, on the CPU, by the index of the first example."""


def evaluate_examples(
    task_model: TaskModel, dataset: TextDataset, *, pad_id: int, max_tokens: int, kept: KeptBatches | None = None
) -> dict[str, npt.NDArray[np.float64]]:
    """Compute the inputs of `Task.scores` for every example of `dataset`: name -> (examples, ...).

    No gradients are computed, and the model's training flags are restored.  The values are exact and not covered by any
    privacy guarantee, and neither are the scores: they must not leave a site if the data is private.

    Args:
        task_model: the model; its task defines the outputs and the scores (`Task.outputs_per_example`, `Task.scores`).
        dataset: the tokenized examples, at least one.
        pad_id: any valid token id.
        max_tokens: the maximum number of padded tokens per batch.
        kept: a cache of the frozen base's outputs for `dataset`, shared between evaluations; empty before the first
            evaluation.

    Raises:
        DataError: the data set has nothing to score.
        ConfigError: for `evaluation.max_tokens`, if a batch does not fit into the device's memory.
    """
    figures = _collect(task_model, dataset, task_model.figures, pad_id=pad_id, max_tokens=max_tokens, kept=kept)
    return dict(task_model.task.postprocess_dataset(figures))


def embed_examples(
    task_model: TaskModel, dataset: TextDataset, *, pad_id: int, max_tokens: int, kept: KeptBatches | None = None
) -> npt.NDArray[np.float64]:
    """Compute the embedding of every example, (examples, h); arguments, errors and privacy as `evaluate_examples`."""

    def embed(batch: Batch) -> dict[str, torch.Tensor]:
        return {"rows": task_model.embed(batch)}

    return _collect(task_model, dataset, embed, pad_id=pad_id, max_tokens=max_tokens, kept=kept)["rows"]


def _collect(
    task_model: TaskModel,
    dataset: TextDataset,
    compute: Callable[[Batch], dict[str, torch.Tensor]],
    *,
    pad_id: int,
    max_tokens: int,
    kept: KeptBatches | None,
) -> dict[str, npt.NDArray[np.float64]]:
    figures: dict[str, npt.NDArray[np.float64]] = {}
    with enter_evaluation_mode(task_model), report_out_of_memory(max_tokens):
        batches = iter_batches_with_cache(task_model, dataset, pad_id=pad_id, max_tokens=max_tokens, kept=kept)
        for indices, batch in batches:
            for name, of_batch in compute(batch).items():
                if name not in figures:
                    figures[name] = np.zeros((len(dataset), *of_batch.shape[1:]))
                figures[name][indices] = of_batch.cpu()
    return figures


def compute_unit_scores(task_model: TaskModel, dataset: TextDataset, *, pad_id: int) -> npt.NDArray[np.float64]:
    """Score each record in [0, 1], shape (records,); see `Task.score_unit`.

    Each record passes through the model alone.  In a shared batch, the length of one record would change the others'
    logits by rounding, and a prediction at the decision boundary could flip, so one record would change more than its
    own score.  A record whose computation fails gets score 0.

    The scores themselves are exact and must not leave the site.
    """
    scores = np.zeros(len(dataset))
    with enter_evaluation_mode(task_model):
        for index in range(len(dataset)):
            batch = collate(dataset, np.array([index]), pad_id=pad_id).to(task_model.device)
            # A failed record has score 0, and the other records are not affected.
            with suppress(Exception), translate_panics():
                scores[index] = task_model.task.score_unit(task_model, batch)
    return scores


def compute_user_scores(
    scores: npt.NDArray[np.float64], users: Sequence[npt.NDArray[np.int64]]
) -> npt.NDArray[np.float64]:
    """Return each user's mean score over all of the user's records, shape (users,); a non-finite score counts as 0.

    Each user contributes one score in [0, 1] regardless of the number of records, as the noised sum of scores requires.

    Args:
        scores: one score per record.
        users: the indices of each user's records, at least one per user.
    """
    usable = np.clip(np.where(np.isfinite(scores), scores, 0.0), 0.0, 1.0)
    return np.array([usable[places].mean() for places in users], dtype=np.float64)


@contextmanager
def enter_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` into evaluation mode without gradients, and restore each module's flag on exit.

    The flags are set and restored one by one instead of by `eval()` and `train()`: the trainable leaves of a task model
    stay in training mode inside a frozen base on purpose, and those two calls would lose that state.  Hooks for
    per-example gradients ignore a module in evaluation mode.  `no_grad` is used instead of `inference_mode`: a buffer
    that a model creates in its first forward pass would be an inference tensor, and the next training step could not
    differentiate through it.
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
def report_out_of_memory(max_tokens: int) -> Iterator[None]:
    """Convert an out-of-memory error of the accelerator to a ConfigError for `evaluation.max_tokens`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        bound = f"must be smaller: the device ran out of memory on one batch ({get_first_line(error)})"
        raise ConfigError("evaluation.max_tokens", max_tokens, bound) from None


def iter_batches_by_length(dataset: TextDataset, *, pad_id: int, max_tokens: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield (indices, batch) over all of `dataset`, sorted by length, with at most `max_tokens` padded tokens per
    batch.

    Raises:
        DataError: the data set is empty.
    """
    if len(dataset) == 0:
        raise DataError("evaluation data", 0, "must contain at least one example")
    for indices in cut_micro_batches(np.arange(len(dataset)), dataset.lengths * dataset.texts, max_tokens=max_tokens):
        yield indices, collate(dataset, indices, pad_id=pad_id)


def iter_batches_with_cache(
    model: TaskModel, dataset: TextDataset, *, pad_id: int, max_tokens: int, kept: KeptBatches | None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield (indices, batch) as `iter_batches_by_length`, on the model's device and with cached outputs of the frozen
    base.

    Args:
        model: the model; a cache belongs to one model.
        dataset: the examples; a cache belongs to one data set, and to fixed values of the other arguments.
        pad_id: any valid token id.
        max_tokens: the maximum number of padded tokens per batch; a CPU uses at most 2048.
        kept: the cache, filled in the first pass; None: no cache.
    """
    most = min(max_tokens, _MAX_ON_CPU) if model.device.type == "cpu" else max_tokens
    for indices, plain in iter_batches_by_length(dataset, pad_id=pad_id, max_tokens=most):
        batch = plain.to(model.device)
        if kept is None:
            yield indices, batch
            continue
        first = int(indices[0])
        if first not in kept:
            batch = replace(batch, prefix=model.compute_frozen_states(batch))
            kept[first] = replace(batch, reference=model.reference(batch)).to("cpu")
        yield indices, kept[first].to(model.device)
