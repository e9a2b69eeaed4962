"""A site's own limits: what it lets happen to its records, whoever asks.

`site.toml` is read by `fedtune.privacy.policy_file`; `conf/site.toml` is a template that explains every key.  A policy
is checked inside the ledger's transaction, against what a lead proposes and what was spent before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from fedtune.privacy import accountant
from fedtune.privacy.plan import Plan
from fedtune.privacy.policy_tables import (
    Allow,
    Asserted,
    Budget,
    Dataset,
    Limits,
    Machine,
    Population,
    Releases,
    adapter_bound,
)
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.spec import ConfigError, check_name, check_one_of, spec


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
        approval: "manual": a person at the site approves each run before anything is done for it; "automatic".
        final_adapter: whether to "keep" a run's final adapter when the lead sends it, or "decline" it.
        machine: what the site trains on.
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
    approval: Literal["automatic", "manual"] = "automatic"
    final_adapter: Literal["keep", "decline"] = "keep"
    machine: Machine = Machine()
    ledger: str = "ledger.db"
    site_key: str = "site_key.pem"
    anchor: str = ""

    def __post_init__(self) -> None:
        check_name("site", self.site)
        check_one_of("approval", self.approval, ("automatic", "manual"))
        check_one_of("final_adapter", self.final_adapter, ("keep", "decline"))
        if not self.dataset:
            raise ConfigError("dataset", [], "must declare at least one data set")
        ids = [dataset.id for dataset in self.dataset]
        if len(set(ids)) != len(ids):
            raise ConfigError("dataset", ids, "must not repeat an id")
        for dataset in self.dataset:
            if self.population.unit == "user" and dataset.columns and "user" not in dataset.columns:
                bound = "must name the column for role 'user', as population.unit is user"
                raise ConfigError(f"dataset {dataset.id} columns", dict(dataset.columns), bound)

    def check_delta(self) -> None:
        """Check that delta is below one over the population's size, or publishing one record whole would keep to it.

        Apart from the other checks, since a ledger's notes hold policies of versions that compared delta with the
        largest data set alone, and stay readable.

        Raises:
            ConfigError: it is not, and the policy promises something.
        """
        size = self.population_size
        if self.budget.delta >= 1 / size and math.isfinite(self.budget.max_epsilon):
            bound = f"must be below 1 / {size:,} = {1 / size:.3g}, with the declared sizes of all data sets added up"
            raise ConfigError("budget.delta", self.budget.delta, bound)

    @property
    def population_size(self) -> int:
        """The declared sizes of all data sets added up; they share one budget, and one delta."""
        return sum(dataset.declared_size for dataset in self.dataset)

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

    def declared_size(self, dataset: str) -> int:
        """The size that the site publishes for one of its data sets."""
        return next(one.declared_size for one in self.dataset if one.id == dataset)

    def adapter_bound(self, lora_scale: float) -> float:
        """The largest absolute value of an adapter at this site."""
        return adapter_bound(self.limits.max_adapter_value, lora_scale)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; an infinite cap becomes null."""
        fields = dataclasses.asdict(self)
        if math.isinf(self.budget.max_epsilon):
            fields["budget"]["max_epsilon"] = None
        # Lists for tuples, as it comes back from a file: a ledger compares the two.
        return dict(json.loads(json.dumps(fields)))

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
        (Reason.DTYPES, proposal.dtype, allow.dtypes),
        (Reason.UNIT, plan.unit, [policy.population.unit]),
        (Reason.DELTA, plan.delta, [policy.budget.delta]),
    ):
        if asked not in allowed:
            yield reason, asked, ", ".join(map(str, allowed))
    if others := [name for name in proposal.target_modules if name not in allow.target_modules]:
        yield Reason.TARGET_MODULES, ", ".join(others), ", ".join(allow.target_modules)
    for reason, number, most in (
        (Reason.MAX_RANK, proposal.rank, allow.max_rank),
        (Reason.MAX_LORA_SCALE, proposal.lora_scale, limits.max_lora_scale),
        (Reason.MAX_HEAD_SCALE, proposal.head_scale, limits.max_head_scale),
        (Reason.MAX_SAMPLING_RATE, plan.sampling_rate, limits.max_sampling_rate),
        (Reason.MAX_GRAD_NORM, plan.max_grad_norm, limits.max_grad_norm),
        (Reason.MAX_LOCAL_STEPS, plan.local_steps, limits.max_local_steps),
        (Reason.MAX_ROUNDS, plan.most_rounds, limits.max_rounds),
        (Reason.MAX_RECORDS_PER_USER, plan.records_per_user, limits.max_records_per_user),
    ):
        if number > most:
            yield reason, number, f"at most {most:g}"
    for reason, number, least in (
        (Reason.MIN_NOISE_MULTIPLIER, min(plan.noises), limits.min_noise_multiplier),
        (Reason.MIN_GRAD_NORM, plan.max_grad_norm, limits.min_grad_norm),
    ):
        if number < least:
            yield reason, number, f"at least {least:g}"
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
    if most_a_run is not None and (epsilon := _plan_epsilon_above(plan, most_a_run)) is not None:
        yield Reason.MAX_EPSILON_PER_RUN, f"{epsilon:.4g}", f"at most {most_a_run:g}"


@lru_cache(maxsize=256)
def _plan_epsilon_above(plan: Plan, limit: float) -> float | None:
    """Epsilon of a whole plan by PLD, which is a proof since a plan is fixed before anything is seen; None: within."""
    return accountant.epsilon_above([plan.whole], plan.delta, limit=limit)


def period_of(moment: datetime, period: str) -> tuple[int, int]:
    """The calendar period that a UTC `moment` lies in, as (year, number within the year)."""
    months = {"month": 1, "quarter": 3, "year": 12}[period]
    return moment.year, (moment.month - 1) // months
