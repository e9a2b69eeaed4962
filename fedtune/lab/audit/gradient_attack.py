"""White-box attack: canaries with one-hot gradients, and guesses from the noisy steps or the average.

Each canary has its own coordinate in the concatenated vector of all trainable tensors.  Its raw gradient is 1,000
times the clip norm along this coordinate, so that missing clipping becomes visible.  Otherwise a canary is an ordinary
unit, a record or a user with several records: it is sampled with the real units, passes through
`dp_step.add_clipped`, the noise and the optimizer, and its site is charged as usual.

Only the `examples` of simulated sites are replaced, and only by this module.  No module that a real site runs imports
this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedtune.data import Batch
from fedtune.lab.audit.guesses import Coins, Count, Place, compute_likelihood_ratios, count_right_guesses
from fedtune.lab.audit.spec import AuditSpec
from fedtune.model.adapter import Adapter
from fedtune.privacy.mechanism import compute_cell_width
from fedtune.privacy.randomness import RandomStream
from fedtune.sites.virtual_site import Participants
from fedtune.sites.work import TrainingUnits, make_randomness
from fedtune.spec import ConfigError
from fedtune.tasks.task_model import TaskModel
from fedtune.training import dp_step
from fedtune.training.dp_step import UnitGradients
from fedtune.training.examples import IndexArray, SiteExamples
from fedtune.training.optimizer import compute_learning_rate_factor
from fedtune.training.users import UserBatch, UserExamples

RAW_SIZE = 1000.0  # norm of a canary's gradient before clipping, in clip norms
_MAX_VALUES = 2**23  # size of the dense gradients of a micro-batch of canaries: 32 MiB in float32
_MIN_CONTROLS = 100  # number of coordinates without a canary, which measure the noise

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class CanaryBatch(Batch):
    """A micro-batch of canaries with placeholder tokens."""

    # (n,) coordinate of each canary in the concatenated vector
    coordinates: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @classmethod
    def build(cls, coordinates: IndexArray) -> CanaryBatch:
        """Build a micro-batch of the canaries with these coordinates."""
        nothing = torch.zeros(len(coordinates), 1, dtype=torch.int64)
        return cls(nothing, nothing, nothing, coordinates=torch.from_numpy(coordinates))


@dataclass
class Tally:
    """The attacker's running total over a site's steps, in clip norms: noisy sums minus the clean sums of known
    records.

    The attacker knows the model, the plan, all records except the canaries, and the sampled records of each step; the
    guarantee holds against this attacker. The clean sums are recomputed with the function that training uses.
    """

    max_grad_norm: float  # clip norm of the plan
    denominator: float  # denominator of the mean gradient in the site's steps
    total: Vector  # (parameters,) sum over all steps so far
    steps: int = 0  # number of steps so far
    records: dp_step.TensorSums = field(default_factory=dict)  # clean sum of the records in the current step

    def add_records(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Add the clipped gradients of a micro-batch of records to the known sum."""
        if not self.records:
            self.records = {name: g.new_zeros(g.shape[1:], dtype=torch.int64) for name, g in gradients.items()}
        dp_step.add_clipped(self.records, gradients, self.max_grad_norm)

    def finish_step(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Add a step to the total; called with the noisy mean gradient, before the optimizer step."""
        parts = []
        for name, parameter in parameters.items():
            assert parameter.grad is not None, "a step comes with a gradient for every trainable tensor"
            noisy = parameter.grad.double() * (self.denominator / self.max_grad_norm)
            known = self.records[name] * compute_cell_width(1.0) if self.records else 0.0
            parts.append((noisy - known).flatten().cpu())
        self.total += torch.cat(parts).numpy()
        self.steps += 1


class Observer:
    """Observer of all optimizer steps in the process, which updates the tally of the training site.

    Args:
        parameters: the trainable tensors, in the order of the concatenated vector.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.training: Tally | None = None  # tally of the site that has sampled a step

    @contextmanager
    def observe_steps(self) -> Iterator[None]:
        """Observe the optimizer steps within the `with` block."""

        def observe_step(*_: object) -> None:
            if self.training is not None:  # a site without canaries has no tally
                self.training.finish_step(self.parameters)
                self.training = None

        handle = register_optimizer_step_pre_hook(observe_step)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Canaries:
    """A site's canaries, of which only the inserted canaries are in the training data."""

    coordinates: IndexArray  # (canaries,) coordinate in the concatenated vector
    inserted: Coins  # (canaries,) whether the canary is in the training data
    observer: Observer
    tally: Tally

    def __len__(self) -> int:
        return int(self.inserted.sum())

    def parts(self, places: IndexArray) -> Iterator[IndexArray]:
        """Split the coordinates of canaries into micro-batches that are small enough for dense gradients."""
        size = max(1, _MAX_VALUES // sum(parameter.numel() for parameter in self.observer.parameters.values()))
        for first in range(0, len(places), size):
            yield self.coordinates[self.inserted][places[first : first + size]]

    def compute_raw_gradients(self, batch: CanaryBatch) -> dict[str, torch.Tensor]:
        """Build the raw gradients of canaries: `RAW_SIZE` clip norms along each canary's coordinate."""
        parameters = self.observer.parameters
        sizes = [parameter.numel() for parameter in parameters.values()]
        dense = torch.zeros(len(batch), sum(sizes))
        dense[torch.arange(len(batch)), batch.coordinates.cpu()] = RAW_SIZE * self.tally.max_grad_norm
        return {
            name: part.reshape(len(batch), *parameter.shape).to(parameter.device)
            for (name, parameter), part in zip(parameters.items(), torch.split(dense, sizes, dim=1), strict=True)
        }

    def convert_gradients(self, units: TrainingUnits, of_each: UnitGradients) -> UnitGradients:
        """Return a per-unit gradient function for units and canaries.

        Gradients of real units are also added to the tally; gradients of canaries are artificial and dense.
        """
        canaries, tally = self, self.tally

        class WithCanaries:
            def compute_gradients(self, batch: Batch) -> dict[str, torch.Tensor]:
                if isinstance(batch, CanaryBatch):
                    return canaries.compute_raw_gradients(batch)
                return of_each.compute_gradients(batch)

        of_units = units.convert_gradients(WithCanaries())

        class Watched:
            def compute_gradients(self, batch: Any) -> dict[str, torch.Tensor]:
                gradients = of_units.compute_gradients(batch)
                if not isinstance(batch, CanaryBatch | CanaryUserBatch):
                    tally.add_records(gradients)
                return gradients

        return Watched()

    def register_step(self, indices: IndexArray, num_real: int) -> tuple[IndexArray, Iterator[IndexArray]]:
        """Register a sampled step, and split its indices into real units and micro-batches of canary coordinates."""
        self.observer.training, self.tally.records = self.tally, {}
        return indices[indices < num_real], self.parts(indices[indices >= num_real] - num_real)


class _Behind:
    """A site's real units, followed by its inserted canaries."""

    def __init__(self, real: Any, canaries: Canaries) -> None:
        # Does not call super().__init__(): the real units keep their state, and are not copied.
        self._real, self._canaries = real, canaries

    def __len__(self) -> int:
        return len(self._real) + len(self._canaries)

    def convert_gradients(self, of_each: UnitGradients) -> UnitGradients:
        """Return the per-unit gradient function for real units and canaries."""
        return self._canaries.convert_gradients(self._real, of_each)

    def cache_frozen_states(self, model: TaskModel, **how: Any) -> None:
        """Cache the frozen hidden states of the records; canaries have no hidden states."""
        self._real.cache_frozen_states(model, **how)

    def cache_reference(self, model: TaskModel, **how: Any) -> None:
        """Cache the reference outputs of the records; canaries have no reference outputs."""
        self._real.cache_reference(model, **how)


class CanaryExamples(_Behind, SiteExamples):
    """A site's records, followed by its canaries."""

    def cut(self, indices: IndexArray) -> Iterator[Batch]:
        """Yield micro-batches of the sampled records, then of the sampled canaries."""
        real, parts = self._canaries.register_step(indices, len(self._real))
        yield from self._real.cut(real)
        yield from map(CanaryBatch.build, parts)


@dataclass(frozen=True, eq=False)
class CanaryUserBatch(UserBatch):
    """A micro-batch of canary users; `contributions` repeats a canary's coordinate once per record.

    Each record of a canary user has the full gradient, so that their mean has the norm of a single gradient.  If
    records were wrongly clipped individually and summed, the sum would have a norm of several clip norms.
    """

    def parts(self) -> Iterator[tuple[Batch, IndexArray, npt.NDArray[np.float64]]]:
        """Yield micro-batches with one record of every canary, like users with records in several micro-batches."""
        num_records = len(self.contributions[0])
        for coordinates in np.stack(self.contributions, axis=1):
            yield CanaryBatch.build(coordinates), np.arange(len(self)), np.full(len(self), 1 / num_records)


class CanaryUsers(_Behind, UserExamples):
    """A site's users, followed by its canary users, each with the maximum number of records per user."""

    def make_batcher(self, stream: RandomStream) -> Callable[[IndexArray], Iterator[UserBatch]]:
        """Return a function that splits a batch into micro-batches of sampled users, then of sampled canaries."""
        cut = self._real.make_batcher(stream)

        def with_canaries(indices: IndexArray) -> Iterator[UserBatch]:
            real, parts = self._canaries.register_step(indices, len(self._real))
            yield from cut(real)
            for coordinates in parts:
                records = [np.full(self._real.most_records, one) for one in coordinates]
                yield CanaryUserBatch(records, self._real.examples)

        return with_canaries


class GradientAttack:
    """White-box attack, which plants its canaries on construction.

    Args:
        everyone: the participants of the run, before their data is read.
        spec: the audit's settings.
        sites: the sites that receive canaries.

    Raises:
        ConfigError: the adapter has fewer coordinates than canaries.
    """

    def __init__(self, everyone: Participants, spec: AuditSpec, sites: Sequence[str]) -> None:
        self._everyone, self._spec = everyone, spec
        parameters = everyone.shared.model.trainable()
        size = sum(parameter.numel() for parameter in parameters.values())
        fitting = (size - _MIN_CONTROLS) // len(sites)
        if spec.canaries > fitting:
            bound = f"must be at most {fitting}: each canary of {len(sites)} sites needs one of {size:,} coordinates"
            raise ConfigError("audit.canaries", spec.canaries, bound)
        self._observer = Observer(parameters)
        # The coordinates are public, so a non-cryptographic generator is sufficient.
        order = np.random.default_rng(everyone.config.seed).permutation(size).astype(np.int64)
        self.planted = {
            site: self._plant_canaries(site, order[number * spec.canaries : (number + 1) * spec.canaries], size=size)
            for number, site in enumerate(sites)
        }

    def _plant_canaries(self, site: str, coordinates: IndexArray, *, size: int) -> Canaries:
        everyone, plan, work = self._everyone, self._everyone.plan, self._everyone.work[site]
        randomness = make_randomness(everyone.config.runtime.seeded_noise, everyone.config.seed)
        inserted = randomness.stream(site, "audit", "coins").bernoulli(len(coordinates), 0.5)
        denominator = plan.sampling_rate * work.declared_size
        tally = Tally(max_grad_norm=plan.max_grad_norm, denominator=denominator, total=np.zeros(size))
        canaries = Canaries(coordinates, inserted, self._observer, tally)

        def add_canaries(units: TrainingUnits) -> TrainingUnits:
            return (CanaryUsers if isinstance(units, UserExamples) else CanaryExamples)(units, canaries)

        everyone.work[site] = replace(work, around=add_canaries)
        return canaries

    def observe_steps(self) -> AbstractContextManager[None]:
        """Observe the optimizer steps of training within the `with` block."""
        return self._observer.observe_steps()

    def count_guesses(self, adapters: Sequence[Adapter]) -> Mapping[Place, Count]:
        """Count correct guesses per site, from its noisy steps, and for the average of all sites.

        Args:
            adapters: the initial adapter, and the aggregated adapter after each round.
        """
        counts: dict[Place, Count] = {}
        for site, one in self.planted.items():
            counts[site] = self._count_right([one], one.tally.total, least=1.0)
        moves = self._measure_adapter_moves(adapters)
        return counts | {None: self._count_right([*self.planted.values()], moves, least=0.0)}

    def _count_right(self, planted: Sequence[Canaries], vector: Vector, *, least: float) -> Count:
        coordinates = np.concatenate([one.coordinates for one in planted])
        scores, controls = vector[coordinates], np.delete(vector, coordinates)
        steps, rate = planted[0].tally.steps, self._everyone.plan.sampling_rate
        evidence = compute_likelihood_ratios(scores, controls, steps=steps, sampling_rate=rate, least=least)
        inserted = np.concatenate([one.inserted for one in planted])
        guesses = (self._spec.guesses or self._spec.canaries) * len(planted)
        return count_right_guesses(evidence, inserted, guesses=guesses)

    def _measure_adapter_moves(self, adapters: Sequence[Adapter]) -> Vector:
        """Compute the average's total descent along each coordinate over all rounds, in units of the learning rates.

        This is visible to all recipients of the adapters: other sites, or a server without access to single updates.
        """
        training, plan = self._everyone.config.training, self._everyone.plan
        lora_rate, head_rate = training.compute_peak_rates(clipped=True)
        steps, all_steps = plan.local_steps, plan.num_rounds * plan.local_steps
        factor_of_step = partial(compute_learning_rate_factor, training, total_steps=all_steps)
        factors = [factor_of_step(step=step) for step in range(all_steps)]
        total = np.zeros(adapters[0].num_values)
        for number, (before, after) in enumerate(pairwise(adapters)):
            factor = sum(factors[number * steps : (number + 1) * steps])
            moves = []
            for name, value in before.tensors.items():
                rate = factor * (head_rate if name.startswith("head.") else lora_rate)
                moves.append((value.astype(np.float64) - after.tensors[name]).ravel() / rate)
            total += np.concatenate(moves)
        return total
