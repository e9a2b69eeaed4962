"""A site's tokenized records for training: micro-batches, and cached outputs of the frozen layers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data import Batch, MicroBatch, Shapes, TextDataset, collate
from fedtune.data.batching import compute_each_alone
from fedtune.privacy.mechanism import Unit
from fedtune.privacy.randomness import RandomStream
from fedtune.spec import translate_panics
from fedtune.tasks.task_model import TaskModel
from fedtune.training.dp_step import TensorSums, UnitGradients, add_nothing
from fedtune.training.machine import allocate_states

log = logging.getLogger(__name__)


IndexArray = npt.NDArray[np.int64]


Told = Callable[[int, int], None]  # called with the number of finished steps of a long task, and their total


def ignore_progress(done: int, total: int) -> None:
    """Ignore progress reports."""


def assign_device(unit: int, num_devices: int) -> int:
    """Return the index of the device that computes a unit's gradient. It depends only on the unit's index."""
    return unit % num_devices


def select_units_on_device(rank: int, num_devices: int, count: int) -> IndexArray:
    """Return the indices of the units on device `rank`, if `count` units are distributed over all devices."""
    return np.array([unit for unit in range(count) if assign_device(unit, num_devices) == rank], dtype=np.int64)


class Units(ABC):
    """Interface of a site's privacy units, which a training step samples and cuts into micro-batches."""

    unit: Unit  # the privacy unit

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of units."""

    @abstractmethod
    def make_batcher(self, stream: RandomStream) -> Callable[[IndexArray], Iterable[Any]]:
        """Return a function that cuts the sampled units of a step into micro-batches.

        `stream` draws the records of each unit.
        """

    def convert_gradients(self, of_each: UnitGradients) -> UnitGradients:
        """Convert per-example gradients to per-unit gradients.

        The default, for record units, returns them unchanged.
        """
        return of_each

    def add_other_devices(self, sums: TensorSums, max_grad_norm: float) -> int:
        """Add the sums of other devices (`Records.add_others`). The default, for one device, adds nothing."""
        return add_nothing(sums, max_grad_norm)

    @abstractmethod
    def add_plain_gradient(self, model: TaskModel, batch: Any) -> None:
        """Add the units' unclipped gradients to the parameters' `.grad`. Guarantee: none."""


class SiteExamples(Units):
    """A site's examples as privacy units, one per record.

    Args:
        dataset: the site's records.
        pad_id: a valid token id, used as padding.
        shapes: the allowed shapes of a micro-batch.
        device: the device of the batches.
    """

    unit = "record"

    def __init__(self, dataset: TextDataset, *, pad_id: int, shapes: Shapes, device: torch.device | str) -> None:
        self._dataset, self._pad_id, self._shapes, self.device = dataset, pad_id, shapes, device
        self._states: torch.Tensor | None = None  # (tokens of all records, h), on the CPU
        self._reference: torch.Tensor | None = None  # (records, ...), on the CPU
        ends = np.cumsum(dataset.text_lengths, dtype=np.int64).reshape(dataset.text_lengths.shape)
        self._starts = ends - dataset.text_lengths  # (records, texts)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def num_tokens(self) -> int:
        """Total number of tokens in all records."""
        return self._dataset.num_tokens

    def parts(self, indices: npt.NDArray[np.int64]) -> Iterator[MicroBatch]:
        """Group the selected records into micro-batches of fixed shapes.

        Records of the same padded length stay in order.
        """
        return self._shapes.cut(indices, self._dataset.lengths)

    def cut(self, indices: npt.NDArray[np.int64]) -> Iterator[Batch]:
        """Cut the selected records into micro-batches.

        A record's contribution to a sum is bit-identical in every micro-batch.
        """
        return map(self.batch, self.parts(indices))

    def batch(self, part: MicroBatch) -> Batch:
        """Collate the records of `part` into one micro-batch, in order."""
        batch = collate(self._dataset, part.places, pad_id=self._pad_id, shape=(part.rows, part.length))
        if self._states is not None:
            rows, columns, places = self._list_token_positions(part, batch)
            states = self._states.new_zeros(*batch.attention_mask.shape, self._states.shape[1])  # padding stays zero
            states[rows, columns] = self._states[places]
            batch = replace(batch, prefix=states)
        if self._reference is not None:
            reference = self._reference.new_zeros(part.rows, *self._reference.shape[1:])
            reference[: len(part.places)] = self._reference[part.places]
            batch = replace(batch, reference=reference)
        return batch.to(self.device)

    def make_batcher(self, stream: RandomStream) -> Callable[[IndexArray], Iterator[Batch]]:
        """Return `cut`, because record units use no random draws."""
        return self.cut

    def draw_records(self, records: IndexArray, stream: RandomStream) -> Sequence[IndexArray]:
        """Return each record as a group of its own, for the interface of `UserExamples.draw_records`."""
        return list(records[:, None])

    def batch_units(self, drawn: Sequence[IndexArray]) -> Iterator[Batch]:
        """Cut the records that `draw_records` returned into micro-batches."""
        return self.cut(np.concatenate([np.empty(0, dtype=np.int64), *drawn]))

    def select_shard(self, rank: int, num_devices: int, device: torch.device | str) -> tuple[SiteExamples, IndexArray]:
        """Return the records of one of `num_devices` devices, and their indices."""
        records = select_units_on_device(rank, num_devices, len(self))
        return self.select_records(records, device), records

    def select_records(self, records: IndexArray, device: torch.device | str) -> SiteExamples:
        """Select records for another device, without cached outputs."""
        return SiteExamples(
            self._dataset.select_examples(records), pad_id=self._pad_id, shapes=self._shapes, device=device
        )

    def add_plain_gradient(self, model: TaskModel, batch: Batch) -> None:
        """Add the examples' unclipped gradients to the parameters' `.grad`. Guarantee: none."""
        model.losses(batch).sum().backward()  # type: ignore[no-untyped-call]

    def cache_frozen_states(
        self,
        model: TaskModel,
        *,
        folder: Path | None = None,
        parts: Iterable[MicroBatch] | None = None,
        lenient: bool = True,
        told: Told = ignore_progress,
    ) -> None:
        """Cache the frozen layers' output for every record, so that later passes skip all layers below the first
        trained one.

        The cache trades memory (`num_tokens` times the hidden size) for speed. Each record's states depend on that
        record alone; they are zero if they cannot be computed or are not finite. Such a record adds nothing to a step,
        just as without the cache (`per_example`). In a micro-batch it looks like an empty row, whose states are zero
        too and which the batch-invariance test covers. The method does nothing if the states are already cached, if no
        layer is frozen, or if the disk is full.

        Args:
            model: must not change below its first trained layer for the rest of the run.
            folder: the folder of the cache, an unnamed file; None caches in memory.
            parts: a partition of all records into micro-batches for the computation; None uses `self.parts`.
            lenient: False, for dummy examples, raises on an example that cannot be computed.
            told: called with the number of finished records, which stays at the site.

        Raises:
            Exception: the machine failed; a record never causes an exception.
        """
        if self._states is not None:
            return
        kept: torch.Tensor | None = None
        done = 0
        for part in self._iter_all_parts() if parts is None else parts:
            batch = self.batch(part)
            # Zero for a record that cannot be computed.
            if lenient:
                states = _compute_each(model.compute_frozen_states, batch, missing=0.0)
            else:
                states = model.compute_frozen_states(batch)
            if states is None:
                return
            if kept is None:
                try:
                    kept = allocate_states(self.num_tokens, states.shape[-1], dtype=states.dtype, folder=folder)
                except OSError:
                    log.warning("the disk is full; outputs of the frozen layers are not cached", exc_info=True)
                    return
            rows, columns, places = self._list_token_positions(part, batch)
            usable = (states.isfinite().all(dim=-1) | (batch.attention_mask == 0)).all(dim=1)
            kept[places] = torch.where(usable[:, None, None], states, 0.0).cpu()[rows, columns]
            done += len(part.places)
            told(done, len(self))
        self._states = kept

    def cache_reference(
        self, model: TaskModel, *, parts: Iterable[MicroBatch] | None = None, lenient: bool = True
    ) -> None:
        """Cache the outputs of the base model without adapters for every record, if the task compares against them.

        A record's reference depends only on that record and the public base model. It is NaN if it cannot be computed:
        then the record's loss is NaN, and the record adds nothing to a step. The method does nothing if the reference
        is already cached.

        Args:
            model: must not change for the rest of the run, except for its adapter.
            parts: a partition of all records into micro-batches for the computation; None uses `self.parts`.
            lenient: False, for dummy examples, raises on an example that cannot be computed.

        Raises:
            Exception: the machine failed; a record never causes an exception.
        """
        if self._reference is not None or not model.task.has_reference:
            return
        kept: torch.Tensor | None = None
        for part in self._iter_all_parts() if parts is None else parts:
            batch = self.batch(part)
            outputs = _compute_each(model.reference, batch, missing=torch.nan) if lenient else model.reference(batch)
            assert outputs is not None, "the task returned no reference outputs"
            if kept is None:
                kept = torch.empty(len(self), *outputs.shape[1:], dtype=outputs.dtype)
            kept[part.places] = outputs[: len(part.places)].cpu()
        self._reference = kept

    def _iter_all_parts(self) -> Iterator[MicroBatch]:
        return self.parts(np.arange(len(self), dtype=np.int64))

    def _list_token_positions(self, part: MicroBatch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return each token's row and column in the micro-batch, and its index in the cached states."""
        starts = torch.from_numpy(self._starts[part.places].ravel())
        rows, columns = batch.attention_mask[: len(starts)].cpu().nonzero(as_tuple=True)
        return rows, columns, starts[rows] + columns


def _compute_each(
    compute: Callable[[Batch], torch.Tensor | None], batch: Batch, *, missing: float
) -> torch.Tensor | None:
    """Run `compute` on a batch, with the value `missing` for examples that cannot be computed.

    Returns:
        (rows or examples, ...), or None if `compute` returns None.
    """
    try:
        with translate_panics():
            return compute(batch)
    except Exception:
        log.exception("the frozen model failed on a micro-batch; retrying its examples one at a time")
    nothing, results = compute_each_alone(compute, batch)
    if nothing is None:
        return None
    values = torch.full_like(nothing, missing)
    share = len(nothing) * batch.texts // len(batch.input_ids)  # rows per example: one per text, or 1
    for place, result in enumerate(results):
        if result is not None:
            values[place * share : (place + 1) * share] = result[:share]
    return values
