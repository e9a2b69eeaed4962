"""Users as privacy units: the mean gradient of a user's records is clipped once, like the gradient of one example.

A user is sampled as a whole and adds one vector to a step's sum, regardless of the number of records and their
distribution over micro-batches. `dp_step` clips that vector, so adding or removing one user changes the sum by at most
the clip norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data import Batch
from fedtune.privacy.mechanism import choose_records
from fedtune.privacy.randomness import RandomStream
from fedtune.tasks.task_model import TaskModel
from fedtune.training.dp_step import UnitGradients
from fedtune.training.examples import IndexArray, SiteExamples, Told, Units, ignore_progress, select_units_on_device


@dataclass(frozen=True, eq=False)
class UserBatch:
    """A group of users with their sampled records, to be cut into one or more micro-batches."""

    contributions: Sequence[IndexArray]  # for each user, the indices of the sampled records
    examples: SiteExamples  # the site's records

    def __len__(self) -> int:
        return len(self.contributions)

    def parts(self) -> Iterator[tuple[Batch, IndexArray, npt.NDArray[np.float64]]]:
        """Yield micro-batches of n records, with each record's user (n,) and its weight in that user's mean (n,).

        Both arrays are in host memory, so that adding rows never waits for a device. The order of a user's records
        depends on these records alone.
        """
        counts = np.array([len(records) for records in self.contributions])
        records = np.concatenate(self.contributions)
        users = np.repeat(np.arange(len(self)), counts)
        order = np.argsort(records)
        for part in self.examples.parts(records):
            batch = self.examples.batch(part)
            rows = users[order[np.searchsorted(records, part.places, sorter=order)]]
            yield batch, rows, 1 / counts[rows]


class UserGradients:
    """Per-user mean gradients, each of which `dp_step.add_clipped` clips once.

    Args:
        examples: computes the gradient of each single example.
    """

    def __init__(self, examples: UnitGradients) -> None:
        self._examples = examples

    def compute_gradients(self, batch: UserBatch) -> dict[str, torch.Tensor]:
        """Compute the mean gradients: name -> (users, *parameter shape), in float64.

        Records are added one at a time, in an order that depends on the user's records alone, and each record's
        gradient depends on that record alone, bit for bit. So the mean depends on its user alone, even if the records'
        gradients cancel and only rounding error is left.

        If any record's gradient is not finite, its user's mean is not finite and counts as zero in the step. Other
        users are not affected, because rows are added one by one. (Skipping only that record would be equally private;
        skipping the user is the simpler rule, and such gradients mean that training has diverged anyway.)
        """
        means: dict[str, torch.Tensor] = {}
        for examples, users, shares in batch.parts():
            for name, gradient in self._examples.compute_gradients(examples).items():
                if name not in means:
                    means[name] = gradient.new_zeros((len(batch), *gradient.shape[1:]), dtype=torch.float64)
                for user, share, row in zip(users.tolist(), shares.tolist(), gradient, strict=False):
                    means[name][user].add_(row, alpha=share)
        return means


class UserExamples(Units):
    """A site's users as privacy units, sampled by a training step.

    Args:
        examples: the site's records.
        users: for each user, the indices of all its records, at least one.
        most_records: the maximum number of records of one user in a step.
        most_users: the number of users whose means are computed together, which limits the memory for them.
    """

    unit = "user"

    def __init__(
        self, examples: SiteExamples, users: Sequence[IndexArray], *, most_records: int, most_users: int = 64
    ) -> None:
        assert all(len(records) for records in users), "each user needs at least one record"
        assert sum(map(len, users)) == len(examples), "each record must belong to exactly one user"
        self.examples, self.most_records, self.most_users, self._users = examples, most_records, most_users, users

    def __len__(self) -> int:
        """Return the number of users, not of records."""
        return len(self._users)

    def convert_gradients(self, of_each: UnitGradients) -> UnitGradients:
        """Convert per-example gradients to mean gradients of users, for the batches of `batch_units`."""
        return UserGradients(of_each)

    def add_plain_gradient(self, model: TaskModel, batch: UserBatch) -> None:
        """Add the users' unclipped mean gradients to the parameters' `.grad`. Guarantee: none."""
        for records, _, shares in batch.parts():
            losses = model.losses(records)
            (losses * torch.from_numpy(shares).to(losses)).sum().backward()  # type: ignore[no-untyped-call]

    def cache_frozen_states(
        self, model: TaskModel, *, folder: Path | None = None, told: Told = ignore_progress
    ) -> None:
        """Cache the frozen layers' outputs (see `SiteExamples.cache_frozen_states`)."""
        self.examples.cache_frozen_states(model, folder=folder, told=told)

    def cache_reference(self, model: TaskModel) -> None:
        """Cache the base model's outputs (see `SiteExamples.cache_reference`)."""
        self.examples.cache_reference(model)

    def make_batcher(self, stream: RandomStream) -> Callable[[IndexArray], Iterator[UserBatch]]:
        """Return a function that draws the records of each sampled user from `stream`, and batches the users."""
        return lambda users: self.batch_units(self.draw_records(users, stream))

    def draw_records(self, users: IndexArray, stream: RandomStream) -> list[IndexArray]:
        """Draw the records of each user for one step, in the order of the users."""
        records_by_user = (self._users[user] for user in users)
        return [records[choose_records(len(records), self.most_records, stream)] for records in records_by_user]

    def batch_units(self, drawn: Sequence[IndexArray]) -> Iterator[UserBatch]:
        """Cut users, each represented by its sampled records, into batches.

        A user's contribution to a sum is bit-identical in every batch.
        """
        for first in range(0, len(drawn), self.most_users):
            yield UserBatch(drawn[first : first + self.most_users], self.examples)

    def select_shard(self, rank: int, num_devices: int, device: torch.device | str) -> tuple[UserExamples, IndexArray]:
        """Return the users of one of `num_devices` devices, and the indices of their records."""
        users = [self._users[place] for place in select_units_on_device(rank, num_devices, len(self))]
        records = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *users]))
        examples = self.examples.select_records(records, device)
        own = [np.searchsorted(records, places) for places in users]
        return UserExamples(examples, own, most_records=self.most_records, most_users=self.most_users), records
