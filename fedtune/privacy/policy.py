"""A site's own limits: what it lets happen to its records, whoever asks.

`site.toml` is read by `fedtune.privacy.policy_file`; `conf/site.toml` is a template that explains every key.  A policy
is checked inside the ledger's transaction, against what a lead proposes and what was spent before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import field
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from dp_accounting import DpEvent

from fedtune.privacy import accountant, events, filter
from fedtune.privacy.keys import is_public_key
from fedtune.privacy.plan import Plan
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.spec import ConfigError, check_at_least, check_fraction, check_name, check_one_of, check_positive, spec

PERIODS = ("month", "quarter", "year")


@spec
class Dataset:
    """Records that a run may name.

    Attributes:
        id: what a run calls them.
        declared_size: units that the site publishes as their number; a public choice, never the true count.
        path: file or folder with the records; stays at the site.
        columns: role (such as "text" or "label") -> column of the file; stays at the site.
    """

    id: str
    declared_size: int
    path: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("id", self.id)
        check_at_least("declared_size", self.declared_size, 1)


@spec
class Population:
    """The people behind the data sets: all of these share one budget.

    Attributes:
        name: of the population.
        unit: what one (epsilon, delta) protects; fixed when the ledger is made.
    """

    name: str
    unit: Literal["record", "user"] = "record"

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_one_of("unit", self.unit, ("record",))


@spec
class Reference:
    """What the site expects a typical run to look like; the filter's order is chosen for it when the ledger is made."""

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        check_fraction("sampling_rate", self.sampling_rate, one=True)
        check_positive("noise_multiplier", self.noise_multiplier)
        check_at_least("steps", self.steps, 1)


@spec
class Budget:
    """How much these people may ever lose.

    Attributes:
        delta: of every run and of the lifetime figure.
        max_epsilon: over all runs, leads and years, by the Renyi filter.  Infinite: nothing is promised.
        max_epsilon_per_run: of one run's whole plan, by PLD; null: no bound of its own.
        max_epsilon_per_period: in one calendar period (UTC), by the filter; null: no bound of its own.
        period: "month", "quarter" or "year".
        reference: a typical run.
    """

    delta: float
    max_epsilon: float
    reference: Reference
    max_epsilon_per_run: float | None = None
    max_epsilon_per_period: float | None = None
    period: Literal["month", "quarter", "year"] = "year"

    def __post_init__(self) -> None:
        check_fraction("delta", self.delta)
        if not self.max_epsilon > 0:
            raise ConfigError("max_epsilon", self.max_epsilon, "must be greater than 0")
        for key in ("max_epsilon_per_run", "max_epsilon_per_period"):
            if getattr(self, key) is not None:
                check_positive(key, getattr(self, key))
        check_one_of("period", self.period, PERIODS)
        filter.best_order(self.reference_event(), epsilon=self.max_epsilon, delta=self.delta)

    def reference_event(self) -> DpEvent:
        """One typical run, as an event."""
        r = self.reference
        return events.dp_sgd(sampling_rate=r.sampling_rate, noise_multiplier=r.noise_multiplier, steps=r.steps)


@spec
class Limits:
    """Bounds on every run.

    Attributes:
        min_noise_multiplier: least noise of training and of released scores.
        max_sampling_rate: largest sampling rate.
        max_grad_norm: largest clip norm.
        max_local_steps: most noisy steps in a round.
        max_rounds: most rounds in a run, spare ones included.
        max_adapter_value: largest absolute value of an adapter to train from.  Rounding grows with the adapter, and one
            record can move the others' terms by rounding (docs/threat_model.md); trained adapters stay far below 50.
        run_expires_after_days: an accepted run holds its budget that long, unless it ends earlier.
    """

    min_noise_multiplier: float
    max_sampling_rate: float
    max_grad_norm: float
    max_local_steps: int
    max_rounds: int
    max_adapter_value: float = 50.0
    run_expires_after_days: float = 30.0

    def __post_init__(self) -> None:
        check_at_least("min_noise_multiplier", self.min_noise_multiplier, 0)
        check_fraction("max_sampling_rate", self.max_sampling_rate, one=True)
        for key in ("max_grad_norm", "max_adapter_value", "run_expires_after_days"):
            check_positive(key, getattr(self, key))
        for key in ("max_local_steps", "max_rounds"):
            check_at_least(key, getattr(self, key), 1)


@spec
class Allow:
    """What a run may train, and who may ask.

    Attributes:
        leads: public keys of leads, 64 hex digits each.
        tasks: such as "classification".
        base_models: SHA-256 of base models' weights.
        target_modules: modules that may get LoRA matrices.
        max_rank: largest LoRA rank.
        train_head: whether a task head may be trained and released.
        seeded_noise: accept runs whose noise comes from a seed.  For a test federation: such a run has no guarantee
            and marks the ledger for ever.
    """

    leads: tuple[str, ...]
    tasks: tuple[str, ...]
    base_models: tuple[str, ...]
    target_modules: tuple[str, ...]
    max_rank: int
    train_head: bool
    seeded_noise: bool = False

    def __post_init__(self) -> None:
        for key in self.leads:
            if not is_public_key(key):
                raise ConfigError("leads", key, "must be a public key of 64 lower-case hex digits")
        check_at_least("max_rank", self.max_rank, 1)


@spec
class Releases:
    """What may leave the site beside refusals and receipts.

    Attributes:
        updates: noised adapters.
        metrics: "noised": scores of held-out records with noise, where a run plans for them; "none".
        reply_after_s: an answer leaves at a whole multiple of this after its request came; 0: at once.  Otherwise the
            time of a reply grows with the true number of records.
    """

    updates: bool = True
    metrics: Literal["none", "noised"] = "none"
    reply_after_s: float = 0.0

    def __post_init__(self) -> None:
        check_one_of("metrics", self.metrics, ("none", "noised"))
        check_at_least("reply_after_s", self.reply_after_s, 0)


@spec
class Asserted:
    """What the site states and no software can check; reports show it as asserted.

    Attributes:
        no_person_at_another_site: nobody of this population is among another site's records.
    """

    no_person_at_another_site: bool


@spec
class Policy:
    """One `site.toml`.

    Attributes:
        site: name of the site.
        population: whose records these are.
        dataset: the data sets of that population.
        budget: how much may be spent.
        limits: bounds on every run.
        allow: what may be trained, and for whom.
        releases: what may leave.
        asserted: what the site states.
        ledger: path of the ledger, beside the policy file unless absolute.
        site_key: path of the site's private key, likewise.
        anchor: path of a file, best on another disk, that always holds the newest signed head; empty: none is kept.
    """

    site: str
    population: Population
    dataset: tuple[Dataset, ...]
    budget: Budget
    limits: Limits
    allow: Allow
    releases: Releases
    asserted: Asserted
    ledger: str = "ledger.db"
    site_key: str = "site_key.pem"
    anchor: str = ""

    def __post_init__(self) -> None:
        check_name("site", self.site)
        if not self.dataset:
            raise ConfigError("dataset", [], "must declare at least one data set")
        ids = [dataset.id for dataset in self.dataset]
        if len(set(ids)) != len(ids):
            raise ConfigError("dataset", ids, "must not repeat an id")
        largest = max(dataset.declared_size for dataset in self.dataset)
        if self.budget.delta >= 1 / largest and math.isfinite(self.budget.max_epsilon):
            bound = f"must be below 1 / declared_size = {1 / largest:.3g} of the largest data set"
            raise ConfigError("budget.delta", self.budget.delta, bound)

    def check(self, proposal: Proposal) -> None:
        """Check everything about a proposal that does not depend on what was spent.

        Raises:
            Refused: names the rule, what was asked and what is allowed.
        """
        for refused in self.broken_rules(proposal):
            raise refused

    def broken_rules(self, proposal: Proposal) -> list[Refused]:
        """Every rule that a proposal breaks, for a person who wants to mend it."""
        broken = list(_broken_rules(self, proposal)) or list(_over_per_run(self, proposal.plan))
        return [Refused(reason, asked=asked, allowed=allowed) for reason, asked, allowed in broken]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; an infinite cap becomes null."""
        fields = dataclasses.asdict(self)
        if math.isinf(self.budget.max_epsilon):
            fields["budget"]["max_epsilon"] = None
        return fields

    def digest(self) -> str:
        """SHA-256 of the policy's canonical JSON, in hex."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


Broken = tuple[Reason, object, object]
"""A rule that a proposal breaks, what it asks for, and what is allowed."""


def _broken_rules(policy: Policy, proposal: Proposal) -> Iterator[Broken]:
    allow, limits, plan = policy.allow, policy.limits, proposal.plan
    if proposal.lead not in allow.leads:
        yield Reason.LEADS, proposal.lead, f"{len(allow.leads)} keys"
    datasets = [dataset.id for dataset in policy.dataset]
    for reason, asked, allowed in (
        (Reason.DATASET, proposal.dataset, datasets),
        (Reason.TASKS, proposal.task, allow.tasks),
        (Reason.BASE_MODELS, proposal.base_model, allow.base_models),
        (Reason.UNIT, plan.unit, [policy.population.unit]),
        (Reason.DELTA, plan.delta, [policy.budget.delta]),
    ):
        if asked not in allowed:
            yield reason, asked, ", ".join(map(str, allowed))
    if others := [name for name in proposal.target_modules if name not in allow.target_modules]:
        yield Reason.TARGET_MODULES, ", ".join(others), ", ".join(allow.target_modules)
    for reason, number, most in (
        (Reason.MAX_RANK, proposal.rank, allow.max_rank),
        (Reason.MAX_SAMPLING_RATE, plan.sampling_rate, limits.max_sampling_rate),
        (Reason.MAX_GRAD_NORM, plan.max_grad_norm, limits.max_grad_norm),
        (Reason.MAX_LOCAL_STEPS, plan.local_steps, limits.max_local_steps),
        (Reason.MAX_ROUNDS, plan.most_rounds, limits.max_rounds),
    ):
        if number > most:
            yield reason, number, f"at most {most:g}"
    noises = [plan.noise_multiplier, *([plan.metrics_noise_multiplier] if plan.releases_metrics else [])]
    if min(noises) < limits.min_noise_multiplier:
        yield Reason.MIN_NOISE_MULTIPLIER, min(noises), f"at least {limits.min_noise_multiplier:g}"
    for reason, wanted, granted in (
        (Reason.TRAIN_HEAD, proposal.train_head, allow.train_head),
        (Reason.SEEDED_NOISE, proposal.seeded_noise, allow.seeded_noise),
        (Reason.UPDATES, True, policy.releases.updates),
        (Reason.METRICS, plan.releases_metrics, policy.releases.metrics == "noised"),
    ):
        if wanted and not granted:
            yield reason, "yes", "no"


def _over_per_run(policy: Policy, plan: Plan) -> Iterator[Broken]:
    """The dearest rule; only for a plan within all other limits, whose epsilon can be computed in bounded time."""
    most_a_run = policy.budget.max_epsilon_per_run
    if most_a_run is not None and (epsilon := plan_epsilon(plan)) > most_a_run:
        yield Reason.MAX_EPSILON_PER_RUN, f"{epsilon:.4g}", f"at most {most_a_run:g}"


@lru_cache(maxsize=64)
def plan_epsilon(plan: Plan) -> float:
    """Epsilon of a whole plan by PLD, which is a proof since a plan is fixed before anything is seen."""
    return accountant.epsilon_pld([plan.event(rounds=plan.most_rounds)], plan.delta)


def period_of(moment: datetime, period: str) -> tuple[int, int]:
    """The calendar period that a UTC `moment` lies in, as (year, number within the year)."""
    months = {"month": 1, "quarter": 3, "year": 12}[period]
    return moment.year, (moment.month - 1) // months
