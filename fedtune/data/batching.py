"""Padded batches of tokenised examples, and how a logical batch is cut into micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedtune.data.tokenise import UNSUPERVISED, TextDataset
from fedtune.spec import panics_as_errors

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)

Computed = TypeVar("Computed")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Examples padded on the right to t tokens, one a row; rows of no example come last, with one attended token.

    Attributes:
        input_ids: (n, t) int64.
        attention_mask: (n, t) int64, 1 for a token and 0 for padding.
        targets: (n, ...) one of each example, such as its int64 class; or (n, t) int64, one a token, `UNSUPERVISED` for
            padding.
        prefix: (n, t, h) output of a model's frozen first layers for these examples, where it was kept; all zero for
            an example that these cannot compute.
        empty_rows: of no example: they fill a fixed shape, and have no loss.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    prefix: torch.Tensor | None = None
    empty_rows: int = 0

    def __len__(self) -> int:
        """Examples, without the empty rows."""
        return len(self.input_ids) - self.empty_rows

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        prefix = None if self.prefix is None else self.prefix.to(device)
        tensors = (self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device), prefix)
        return Batch(*tensors, empty_rows=self.empty_rows)


def collate(
    dataset: TextDataset,
    indices: Sequence[int] | NDArray[np.integer],
    *,
    pad_id: int,
    shape: tuple[int, int] | None = None,
) -> Batch:
    """Pad the chosen examples into one batch.

    Padding is known by each example's length, never by `pad_id`, which in many chat models is also
    the end-of-text token.  No indices give a batch of shape (0, 1) with the same dtypes.

    Args:
        dataset: tokenised examples.
        indices: n places in `dataset`.
        pad_id: a valid token id to fill with.
        shape: (rows, tokens) of the batch, at least what the examples need; None: exactly that.
    """
    import torch  # here, so that reading settings and records does not wait for it

    chosen = np.asarray(indices, dtype=np.int64)
    lengths = dataset.lengths[chosen]
    num_rows, num_tokens = shape or (len(chosen), lengths.max(initial=1))
    empty_rows = num_rows - len(chosen)
    # Attention over no token at all would be a division of zero by zero.
    attended = np.arange(num_tokens) < np.append(lengths, np.ones(empty_rows, dtype=lengths.dtype))[:, None]  # (n, t)

    def padded(rows: Sequence[NDArray[np.integer]], fill: int) -> torch.Tensor:
        out = np.full(attended.shape, fill, dtype=np.int64)
        for row, index in enumerate(chosen):
            out[row, : lengths[row]] = rows[index]
        return torch.from_numpy(out)

    if isinstance(dataset.targets, tuple):
        targets = padded(dataset.targets, UNSUPERVISED)
    else:
        own = dataset.targets[chosen]
        empty = np.zeros((empty_rows, *own.shape[1:]), dtype=own.dtype)
        targets = torch.from_numpy(np.concatenate([own, empty]))
    input_ids, mask = padded(dataset.input_ids, pad_id), torch.from_numpy(attended.astype(np.int64))
    return Batch(input_ids, mask, targets, empty_rows=empty_rows)


def alone(batch: Batch, row: int | None) -> Batch:
    """A batch of the same shape with one example of `batch` in its first row, or none; all other rows are empty."""
    import torch

    num_rows = len(batch.input_ids)
    chosen = torch.full((num_rows,), row or 0, device=batch.input_ids.device)
    input_ids, mask, targets = (one[chosen] for one in (batch.input_ids, batch.attention_mask, batch.targets))
    prefix = None if batch.prefix is None else batch.prefix[chosen]
    empty = slice(0 if row is None else 1, None)
    input_ids[empty], mask[empty], targets[empty] = 0, 0, 0
    mask[empty, 0] = 1
    if prefix is not None:
        prefix[empty] = 0
    return Batch(input_ids, mask, targets, prefix, empty_rows=num_rows - (row is not None))


def one_at_a_time(
    compute: Callable[[Batch], Computed], batch: Batch, *, after_failure: Callable[[], None] = lambda: None
) -> tuple[Computed, Iterator[Computed | None]]:
    """What `compute` makes of no example, and of each example of a batch on which it failed, all in the batch's shape.

    None stands for an example that cannot be computed, so that the others are as they would be beside any other one.
    Where the machine fails, and not an example, the empty batch fails as well, and that is raised.  So that it needs as
    much as any example, every token of its rows has a target (`alone`).

    Args:
        compute: works on a whole batch; what it makes of an example stands in the first row.
        batch: as `compute` got it.
        after_failure: drops what a failed call left behind.
    """
    after_failure()
    return compute(alone(batch, None)), (
        _computed(compute, alone(batch, row), after_failure) for row in range(len(batch))
    )


def _computed(compute: Callable[[Batch], Computed], batch: Batch, after_failure: Callable[[], None]) -> Computed | None:
    try:
        with panics_as_errors():
            return compute(batch)
    except Exception:
        log.exception("an example cannot be computed, and counts as zero")
        after_failure()
        return None


def micro_batches(
    indices: Sequence[int] | NDArray[np.integer], lengths: NDArray[np.integer], *, max_tokens: int
) -> list[NDArray[np.int64]]:
    """Cut what is only scored into micro-batches of similar lengths, within a budget of padded tokens.

    Training goes by `fedtune.data.shapes`.  Every index comes back exactly once: cutting changes what is computed
    together, never what is sampled.  Sorting keeps padding to a few per cent.  An example longer than the budget gets
    a micro-batch of its own; an empty logical batch gives none.

    Args:
        indices: places in the dataset.
        lengths: length of every example of the dataset, so that `lengths[indices]` are those meant.
        max_tokens: most tokens of a micro-batch, padding included.

    >>> micro_batches([0, 1, 2, 3], np.array([5, 1, 2, 6]), max_tokens=6)
    [array([1, 2]), array([0]), array([3])]
    """
    chosen = np.asarray(indices, dtype=np.int64)
    chosen = chosen[np.lexsort((chosen, lengths[chosen]))]
    cuts: list[int] = []
    first = 0
    for place, length in enumerate(lengths[chosen].tolist()):  # ascending: each is the longest so far
        if place > first and (place + 1 - first) * length > max_tokens:
            cuts.append(place)
            first = place
    return np.split(chosen, cuts) if len(chosen) else []
