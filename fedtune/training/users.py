"""Users as privacy units: the mean of the gradients of a user's records, to be clipped once like one example's.

A user is sampled as a whole and adds one vector to a step's sum, however many records it has and however they are cut
into micro-batches.  `dp_step` clips that vector; so one user more or less moves the sum by at most the clip norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data import Batch, micro_batches
from fedtune.model import TaskModel
from fedtune.privacy.mechanism import choose_records
from fedtune.privacy.randomness import RandomStream
from fedtune.training.examples import SiteExamples

if TYPE_CHECKING:  # above this in a step
    from fedtune.training.dp_step import UnitGradients

Places = npt.NDArray[np.int64]
_CANCELLED = 1e-3


@dataclass(frozen=True, eq=False)
class UserBatch:
    """Whole users: a few that fit one micro-batch together, or one alone, in as many micro-batches as it takes.

    Attributes:
        contributions: for each user, the places of its records that take part.
        examples: where these records lie.
    """

    contributions: Sequence[Places]
    examples: SiteExamples

    def __len__(self) -> int:
        return len(self.contributions)

    def parts(self) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        """Micro-batches of n records with, for each record, its user (n,) and one over that user's records (n,).

        One micro-batch is made at a time, so a user of any number of records takes no more memory than one.
        """
        counts = np.array([len(records) for records in self.contributions])
        records = np.concatenate(self.contributions)
        users = np.repeat(np.arange(len(self)), counts)
        order = np.argsort(records)
        for part in micro_batches(records, self.examples.lengths, max_tokens=self.examples.max_tokens):
            batch = self.examples.batch(part)
            rows = users[order[np.searchsorted(records, part, sorter=order)]]
            device = batch.input_ids.device
            yield batch, torch.from_numpy(rows).to(device), torch.from_numpy(1 / counts[rows]).to(device)

    def add_plain_gradient(self, model: TaskModel) -> None:
        """Add the users' mean gradients to the parameters' own, unclipped.  Guarantee: none."""
        for batch, _, shares in self.parts():
            losses = model.losses(batch)
            (losses * shares.to(losses.dtype)).sum().backward()  # type: ignore[no-untyped-call]


class UserGradients:
    """The mean of each user's per-example gradients, which `dp_step.add_clipped` then clips once.

    Args:
        examples: gradients of one example each.
        max_grad_norm: the clip norm C.
    """

    def __init__(self, examples: UnitGradients, max_grad_norm: float) -> None:
        self._examples, self._max_grad_norm = examples, max_grad_norm

    def of(self, batch: UserBatch) -> dict[str, torch.Tensor]:
        """Means, name -> (users, *parameter shape), in float64; made shorter where a user's records cancel.

        Where they do, what is left of the mean is rounding, which depends on how the batch was cut, and clipping to a
        small C would not scale that down as it does with one record's.  So a mean below a thousandth of its records'
        size counts for proportionally less than C.  That depends on this user alone, and is continuous: rounding moves
        a user by at most a thousand times what it moves a record, whatever C is.

        A user of whom any record's gradient is not finite has a mean that is not finite, and counts as zero in the
        step; no other user does, since rows are added one by one.  (Leaving out that record alone would be as private;
        a user as a whole is the simpler rule, and such gradients mean that training has gone wrong anyway.)
        """
        means: dict[str, torch.Tensor] = {}
        sizes = torch.zeros(len(batch), dtype=torch.float64)
        for examples, users, shares in batch.parts():
            gradients = self._examples.of(examples)
            sizes = sizes.to(users.device).index_add_(0, users, shares * _norms(gradients))
            for name, gradient in gradients.items():
                if name not in means:
                    means[name] = gradient.new_zeros((len(batch), *gradient.shape[1:]), dtype=torch.float64)
                means[name].index_add_(0, users, gradient.double() * _along(shares, gradient))
        norms = _norms(means)
        cancelled = norms < _CANCELLED * sizes  # false where either is not finite
        shorter = (norms / (_CANCELLED * sizes)) * (self._max_grad_norm / norms.clamp(min=self._max_grad_norm))
        factors = torch.where(cancelled, shorter, 1.0)
        return {name: mean * _along(factors, mean) for name, mean in means.items()}


def _norms(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(n,) joint L2 norms over all tensors, in float64."""
    each = [torch.linalg.vector_norm(one.flatten(1), dim=1, dtype=torch.float64) for one in gradients.values()]
    norms: torch.Tensor = torch.linalg.vector_norm(torch.stack(each, dim=1), dim=1)
    return norms


def _along(values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """(n,) values in a shape that broadcasts over `gradient`, (n, *shape)."""
    return values.reshape(-1, *[1] * (gradient.dim() - 1))


class UserExamples:
    """What a training step draws its users from.

    Args:
        examples: the site's records.
        users: for each user the places of all its records, at least one.
        most_records: of one user in a step.
    """

    def __init__(self, examples: SiteExamples, users: Sequence[Places], *, most_records: int) -> None:
        assert all(len(records) for records in users), "a user without records is none"
        assert sum(map(len, users)) == len(examples), "each record has exactly one user"
        self.examples, self.most_records, self._users = examples, most_records, users

    def __len__(self) -> int:
        """Users, not records."""
        return len(self._users)

    def gradients(self, of_each: UnitGradients, *, max_grad_norm: float) -> UnitGradients:
        """What turns a micro-batch of `cut` into one gradient for each user."""
        return UserGradients(of_each, max_grad_norm)

    def keep_frozen_states(self, model: TaskModel) -> None:
        """As `SiteExamples.keep_frozen_states`."""
        self.examples.keep_frozen_states(model)

    def cut_with(self, stream: RandomStream) -> Callable[[Places], Iterator[UserBatch]]:
        """A cut that draws from `stream` which records of a user take part."""
        return lambda users: self.cut(users, choose=lambda count: choose_records(count, self.most_records, stream))

    def cut(self, users: Places, *, choose: Callable[[int], Places]) -> Iterator[UserBatch]:
        """The chosen users in micro-batches of similar length; how they are cut changes no clipped sum.

        Args:
            users: places in the list of users.
            choose: which of so many records of a user take part.
        """
        chosen = [self._users[user][choose(len(self._users[user]))] for user in users]
        lengths = self.examples.lengths
        longest = np.array([lengths[records].max() for records in chosen], dtype=np.int64)
        group: list[Places] = []
        for place in np.lexsort((users, longest)):  # ascending: each user's longest record is the longest so far
            num_records = sum(map(len, group)) + len(chosen[place])
            if group and num_records * longest[place] > self.examples.max_tokens:
                yield UserBatch(group, self.examples)
                group = []
            group.append(chosen[place])
        if group:
            yield UserBatch(group, self.examples)
