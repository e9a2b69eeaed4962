"""A site's tokenised records as training reads them: in micro-batches, with what frozen layers make of them kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data import Batch, TextDataset, collate, micro_batches
from fedtune.model import TaskModel

if TYPE_CHECKING:  # above this in a step
    from fedtune.training.dp_step import UnitGradients


class SiteExamples:
    """What a training step draws its batches from.

    Args:
        dataset: the site's records.
        pad_id: a valid token id.
        max_tokens: padded tokens in a micro-batch.
        device: where batches go.
    """

    def __init__(self, dataset: TextDataset, *, pad_id: int, max_tokens: int, device: torch.device | str) -> None:
        self._dataset, self._pad_id, self._max_tokens, self.device = dataset, pad_id, max_tokens, device
        self._states: torch.Tensor | None = None  # (tokens of all records, h), on the CPU
        ends = np.cumsum(dataset.lengths, dtype=np.int64)
        self._starts = ends - dataset.lengths

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(records,) tokens of each."""
        return self._dataset.lengths

    @property
    def max_tokens(self) -> int:
        """Padded tokens in a micro-batch."""
        return self._max_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all records together."""
        return int(self._dataset.lengths.sum())

    def cut(self, indices: npt.NDArray[np.int64]) -> Iterator[Batch]:
        """The chosen records in micro-batches of similar length; how they are cut changes no clipped sum."""
        for part in micro_batches(indices, self._dataset.lengths, max_tokens=self._max_tokens):
            yield self.batch(part)

    def batch(self, part: npt.NDArray[np.int64]) -> Batch:
        """The chosen records as one micro-batch, in the order given."""
        batch = collate(self._dataset, part, pad_id=self._pad_id)
        kept = batch if self._states is None else replace(batch, prefix=self._kept(part, batch))
        return kept.to(self.device)

    def gradients(self, of_each: UnitGradients, *, max_grad_norm: float) -> UnitGradients:
        """What turns a micro-batch of `cut` into one gradient for each unit: here a unit is an example."""
        return of_each

    def keep_frozen_states(self, model: TaskModel) -> None:
        """Run the layers below the first trained one over every record, once, and start later passes behind them.

        Speed for memory: `num_tokens` times the hidden size.  Each record's states depend on that record alone.
        Does nothing when they are kept already, or when there are no such layers.
        """
        if self._states is not None:
            return
        kept: torch.Tensor | None = None
        everything = np.arange(len(self), dtype=np.int64)
        for part in micro_batches(everything, self._dataset.lengths, max_tokens=self._max_tokens):
            batch = collate(self._dataset, part, pad_id=self._pad_id).to(self.device)
            states = model.frozen_states(batch)
            if states is None:
                return
            if kept is None:
                kept = torch.empty(self.num_tokens, states.shape[-1], dtype=states.dtype)
            rows, columns = batch.attention_mask.cpu().nonzero(as_tuple=True)
            places = torch.from_numpy(self._starts[part])[rows] + columns
            kept[places] = states.cpu()[rows, columns]
        self._states = kept

    def _kept(self, part: npt.NDArray[np.int64], batch: Batch) -> torch.Tensor:
        """Kept states as (n, t, h), zero where there is padding."""
        assert self._states is not None
        rows, columns = batch.attention_mask.nonzero(as_tuple=True)
        states = self._states.new_zeros(*batch.input_ids.shape, self._states.shape[1])
        states[rows, columns] = self._states[torch.from_numpy(self._starts[part])[rows] + columns]
        return states
