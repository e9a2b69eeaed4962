"""The white-box attack: plants gradient canaries at sites, and guesses from noisy steps, or from the average alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedtune.audit.gradient_canaries import Canaries, CanaryExamples, CanaryUsers, Observer, Tally, Vector
from fedtune.audit.guesses import Coins, Count, by_likelihood, counted
from fedtune.audit.result import Place
from fedtune.audit.spec import AuditSpec
from fedtune.model import Adapter
from fedtune.sites.participants import Participants
from fedtune.sites.work import randomness_of
from fedtune.spec import ConfigError
from fedtune.training.examples import Places
from fedtune.training.optimizer import learning_rate_factor
from fedtune.training.users import UserExamples

_LEAST_CONTROLS = 100
"""Coordinates without a canary, which show what noise alone does."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One site's canaries.

    Attributes:
        coordinates: (canaries,) of each, whether in or not.
        inserted: (canaries,) the coins.
        tally: of the site's steps.
    """

    coordinates: Places
    inserted: Coins
    tally: Tally


class GradientAttack:
    """Plants its canaries when it is made.

    Args:
        everyone: the participants of the run, whose data nobody has read yet.
        spec: the audit's settings.
        sites: those that get canaries.

    Raises:
        ConfigError: the adapter has not enough coordinates for so many canaries.
    """

    method = "gradient_canaries"

    def __init__(self, everyone: Participants, spec: AuditSpec, sites: Sequence[str]) -> None:
        self._everyone, self._spec = everyone, spec
        parameters = everyone.shared.model.trainable()
        size = sum(parameter.numel() for parameter in parameters.values())
        fitting = (size - _LEAST_CONTROLS) // len(sites)
        if spec.canaries > fitting:
            bound = f"must be at most {fitting}: each of them at {len(sites)} sites needs one of {size:,} coordinates"
            raise ConfigError("audit.canaries", spec.canaries, bound)
        self._observer = Observer(parameters)
        # Where canaries lie is no secret, so an ordinary generator will do.
        order = np.random.default_rng(everyone.config.seed).permutation(size).astype(np.int64)
        self.planted = {
            site: self._plant(site, order[number * spec.canaries : (number + 1) * spec.canaries], size=size)
            for number, site in enumerate(sites)
        }

    def _plant(self, site: str, coordinates: Places, *, size: int) -> Planted:
        everyone, work = self._everyone, self._everyone.work[site]
        randomness = randomness_of(everyone.config.runtime.seeded_noise, everyone.config.seed)
        inserted = randomness.stream(site, "audit", "coins").bernoulli(len(coordinates), 0.5)
        tally = Tally(
            max_grad_norm=everyone.plan.max_grad_norm,
            denominator=everyone.plan.sampling_rate * work.declared_size,
            total=np.zeros(size),
        )
        units, canaries = work.examples, Canaries(coordinates[inserted], self._observer, tally)
        # `examples` is a cached property: what lies under its name is what the site trains on.
        vars(work)["examples"] = (
            CanaryUsers(units, canaries) if isinstance(units, UserExamples) else CanaryExamples(units, canaries)
        )
        return Planted(coordinates=coordinates, inserted=inserted, tally=tally)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See every step meanwhile."""
        with self._observer.watching():
            yield

    def counts(self, adapters: Sequence[Adapter]) -> Mapping[Place, Count]:
        """How the guesses went, by site, and on the average of all sites.

        Args:
            adapters: the initial one, and the aggregated one after each round.
        """
        counts: dict[Place, Count] = {
            site: self._count([planted], planted.tally.total, least=1.0) for site, planted in self.planted.items()
        }
        together = list(self.planted.values())
        return {**counts, None: self._count(together, self._moves(adapters), least=0.0)}

    def _count(self, planted: Sequence[Planted], vector: Vector, *, least: float) -> Count:
        coordinates = np.concatenate([one.coordinates for one in planted])
        evidence = by_likelihood(
            vector[coordinates],
            np.delete(vector, coordinates),
            steps=planted[0].tally.steps,
            sampling_rate=self._everyone.plan.sampling_rate,
            least=least,
        )
        inserted = np.concatenate([one.inserted for one in planted])
        guesses = (self._spec.guesses or self._spec.canaries) * len(planted)
        return counted(evidence, inserted, guesses=guesses)

    def _moves(self, adapters: Sequence[Adapter]) -> Vector:
        """How far each round moved the average down each coordinate, in units of its learning rates, over all rounds.

        That is what everybody sees who is sent each round's adapter: another site, or the server of a federation that
        hides the updates.
        """
        training, plan = self._everyone.config.training, self._everyone.plan
        lora_rate, head_rate = training.peak_rates(clipped=True)
        steps = plan.local_steps
        factors = [
            learning_rate_factor(training, step=step, total_steps=plan.num_rounds * steps)
            for step in range(plan.num_rounds * steps)
        ]
        total = np.zeros(sum(value.size for value in adapters[0].tensors.values()))
        for number, (before, after) in enumerate(pairwise(adapters)):
            rate = sum(factors[number * steps : (number + 1) * steps])
            total += np.concatenate(
                [
                    (value.astype(np.float64) - after.tensors[name]).ravel()
                    / (rate * (head_rate if name.startswith("head.") else lora_rate))
                    for name, value in before.tensors.items()
                ]
            )
        return total
