"""Padded batches of tokenized examples, and micro-batches of a data set for scoring."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedtune.data.tokenization import UNSUPERVISED, TextDataset
from fedtune.process import torch
from fedtune.spec import translate_panics

log = logging.getLogger(__name__)

Computed = TypeVar("Computed")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Examples padded on the right to t tokens; empty rows come last, each with one attended token.

    A row holds one text.  An example with several texts has one row per text, in order, but one loss and one gradient,
    so a missing example leaves as many rows empty as it has texts.
    """

    # (n, t) int64 token ids; or (n, t, w) float32: feature vectors (t = 1) or image patches
    input_ids: torch.Tensor
    attention_mask: torch.Tensor  # (n, t) int64, 1 for a token and 0 for padding
    # (n / texts, ...) one per example, such as its int64 class; or (n, t) int64, one per token, `UNSUPERVISED`
    # for padding
    targets: torch.Tensor
    # (n, t, h) cached output of the model's frozen first layers for these texts; all zero if it cannot be computed
    prefix: torch.Tensor | None = None
    # (n / texts, ...) cached output of the base without adapters for these examples; NaN if it cannot be computed
    reference: torch.Tensor | None = None
    empty_rows: int = 0  # rows without an example, which fill a fixed shape and have no loss
    texts: int = 1  # texts per example

    def __len__(self) -> int:
        """Return the number of examples, without empty rows."""
        return (len(self.input_ids) - self.empty_rows) // self.texts

    def to(self, device: torch.device | str) -> Batch:
        prefix, reference = (None if kept is None else kept.to(device) for kept in (self.prefix, self.reference))
        tensors = (self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device))
        return Batch(*tensors, prefix, reference, empty_rows=self.empty_rows, texts=self.texts)


def collate(
    dataset: TextDataset,
    indices: Sequence[int] | NDArray[np.integer],
    *,
    pad_id: int,
    shape: tuple[int, int] | None = None,
) -> Batch:
    """Pad the selected examples into one batch.

    Padding is determined by each example's length, never by `pad_id`, which in many chat models is also the end-of-text
    token.  Empty `indices` give a batch of shape (0, 1) with the same dtypes.

    Args:
        dataset: the tokenized examples.
        indices: the indices of the examples, in the order of the rows.
        pad_id: the token id for padding.
        shape: the numbers of examples and tokens of the batch, at least the required numbers; None uses the required
            numbers.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    lengths = dataset.text_lengths[chosen].ravel()
    room, num_tokens = shape or (len(chosen), lengths.max(initial=1))
    empty = room - len(chosen)
    filled = np.append(lengths, np.ones(empty * dataset.texts, dtype=lengths.dtype))
    # An empty row attends to one token, because attention over zero tokens would divide zero by zero.
    attended = np.arange(num_tokens) < filled[:, None]  # (n, t)

    def pad_rows(rows: Sequence[NDArray[Any]], fill: int) -> torch.Tensor:
        first = rows[0] if rows else np.zeros(1, dtype=np.int64)
        kind = np.float32 if first.dtype == np.float32 else np.int64
        out = np.full((*attended.shape, *first.shape[1:]), fill, dtype=kind)
        for row, text in enumerate(dataset.find_text_indices(chosen)):
            out[row, : lengths[row]] = rows[text]
        return torch.from_numpy(out)

    if isinstance(dataset.targets, tuple):
        targets = pad_rows(dataset.targets, UNSUPERVISED)
    else:
        values = dataset.targets[chosen]
        targets = torch.from_numpy(np.concatenate([values, np.zeros((empty, *values.shape[1:]), dtype=values.dtype)]))
    input_ids, mask = pad_rows(dataset.input_ids, pad_id), torch.from_numpy(attended.astype(np.int64))
    return Batch(input_ids, mask, targets, empty_rows=empty * dataset.texts, texts=dataset.texts)


def isolate_example(batch: Batch, place: int | None) -> Batch:
    """Return a batch of equal shape with only the example at index `place`, in the first row; None: no example."""
    num_rows, taken = len(batch.input_ids), 0 if place is None else 1

    def select_example(values: torch.Tensor) -> torch.Tensor:
        of_each = values.reshape(num_rows // batch.texts, -1, *values.shape[1:])
        kept = torch.zeros_like(of_each)
        kept[:taken] = of_each[place or 0]
        return kept.flatten(0, 1)

    input_ids, mask, targets = map(select_example, (batch.input_ids, batch.attention_mask, batch.targets))
    mask[taken * batch.texts :, 0] = 1
    prefix, reference = (None if kept is None else select_example(kept) for kept in (batch.prefix, batch.reference))
    empty_rows = num_rows - taken * batch.texts
    return Batch(input_ids, mask, targets, prefix, reference, empty_rows=empty_rows, texts=batch.texts)


def compute_each_alone(
    compute: Callable[[Batch], Computed], batch: Batch
) -> tuple[Computed, Iterator[Computed | None]]:
    """Recompute a failed batch one example at a time in the batch's shape, after a trial without examples.

    An example that cannot be computed yields None and does not affect the others.  If the machine fails, as opposed to
    an example, the trial without examples fails too, and its error is raised.  All tokens of the trial's rows have a
    target, so it needs as much memory as any example (`isolate_example`).  The result of an example is in the first
    row.

    Returns:
        The result without examples, and an iterator over the results of the examples.
    """
    return compute(isolate_example(batch, None)), (
        _try_compute(compute, isolate_example(batch, row)) for row in range(len(batch))
    )


def _try_compute(compute: Callable[[Batch], Computed], batch: Batch) -> Computed | None:
    try:
        with translate_panics():
            return compute(batch)
    except Exception:
        log.exception("an example failed and counts as zero")
        return None


def cut_micro_batches(
    indices: Sequence[int] | NDArray[np.integer], lengths: NDArray[np.integer], *, max_tokens: int
) -> list[NDArray[np.int64]]:
    """Cut examples into micro-batches of similar lengths for scoring, with a limit on padded tokens.

    Training uses `fedtune.data.shapes` instead.  Every index is returned exactly once: the cut determines which
    examples are computed together, never which are sampled.  Sorting by length keeps padding to a few percent.  An
    example longer than the limit gets its own micro-batch; an empty logical batch gives no micro-batch.  `lengths`
    covers the whole data set.

    >>> cut_micro_batches([0, 1, 2, 3], np.array([5, 1, 2, 6]), max_tokens=6)
    [array([1, 2]), array([0]), array([3])]
    """
    chosen = np.asarray(indices, dtype=np.int64)
    chosen = chosen[np.lexsort((chosen, lengths[chosen]))]
    cuts, first = list[int](), 0
    for place, length in enumerate(lengths[chosen].tolist()):  # ascending: each is the longest so far
        if place > first and (place + 1 - first) * length > max_tokens:
            cuts.append(place)
            first = place
    return np.split(chosen, cuts) if len(chosen) else []
