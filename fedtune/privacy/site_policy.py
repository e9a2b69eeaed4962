"""A site's policy: its limits on the use of its records, for all leads.

Each table of a `site.toml` that restricts something has a class here; `policy_file` reads them, and the template
`conf/site.toml` explains them. A ledger checks its policy inside a transaction, against a lead's proposal and earlier
spending.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

from fedtune.codec import hash_json, require
from fedtune.privacy import accountant, events, filter
from fedtune.privacy.cohorts import Calendar
from fedtune.privacy.dp_library import DpEvent
from fedtune.privacy.keys import check_public_key
from fedtune.privacy.mechanism import MIN_SAMPLING_RATE, Unit
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.trust import Broken, Trust
from fedtune.spec import (
    NOT_GIVEN,
    check_at_least,
    check_fraction,
    check_name,
    check_positive,
    spec,
)

DEFAULT_MIN_GRAD_NORM = 1e-3
DEFAULT_MAX_ADAPTER_VALUE = 2.0
IMMEDIATE_REPLY_RISK = (
    "the time of a reply roughly reveals the number of records"  # where `releases.reply_after_s` is 0
)
SHARED_RANK_FACTOR = 16
"""Largest rank of a run's shared adapter, as a multiple of the largest rank that a site trains.

A site of a smaller rank holds the whole adapter, which then takes as much memory as the gradients of 16 records.
"""
_MAX_DAYS = 36525.0
_OF_ANY_RELEASE = {Reason.UNIT, Reason.DELTA, Reason.COHORTS}


@spec
class Dataset:
    """A data set that runs may train on.

    Attributes:
        id: identifier of the data set in proposals.
        declared_size: published number of units; a public value, never the exact count.
        path: file or folder with the records; never leaves the site.
        columns: role (such as "text" or "label") -> column of the file; never leaves the site.
        min_units: minimum number of units for participation, at most the declared size; 0: no minimum. The exact number
            is compared with it only for the site's own staff: no reply depends on the comparison, because its result
            would reveal information about each record.
    """

    id: str
    declared_size: int
    path: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    min_units: int = 0

    def __post_init__(self) -> None:
        check_name("id", self.id)
        check_at_least("declared_size", self.declared_size, 1)
        check_at_least("min_units", self.min_units, 0)
        bound = f"must be at most declared_size = {self.declared_size}: a smaller data set does not participate"
        require("min_units", self.min_units, self.min_units <= self.declared_size, bound)


@spec
class Population:
    """The people whose records are in the site's data sets. They share one privacy budget.

    Attributes:
        name: name of the population.
        unit: the privacy unit, "record" or "user"; fixed when the ledger is created.
        arrivals: calendar period of arrival cohorts: people join over time, and each person is charged only for runs
            that admit their cohort; fixed when the ledger is created. "": one budget for everybody.
    """

    name: str
    unit: Unit = "record"
    arrivals: Literal[Calendar, ""] = ""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        bound = 'must be empty for unit = "record": arrivals are stored by user id'
        require("arrivals", self.arrivals, not self.arrivals or self.unit == "user", bound)


@spec
class ReferenceRun:
    """A typical run at this site. The Renyi order of a new ledger is optimized for this run."""

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        check_fraction("sampling_rate", self.sampling_rate, one=True)
        check_at_least("sampling_rate", self.sampling_rate, MIN_SAMPLING_RATE)
        accountant.check_noise("noise_multiplier", self.noise_multiplier)
        check_at_least("steps", self.steps, 1)

    @property
    def event(self) -> DpEvent:
        """Privacy event of the whole run."""
        return events.build_dp_sgd_event(
            sampling_rate=self.sampling_rate, noise_multiplier=self.noise_multiplier, steps=self.steps
        )


@spec
class Budget:
    """Caps on the population's total privacy loss.

    Attributes:
        delta: the delta of every run and of the lifetime epsilon.
        max_epsilon: lifetime cap over all runs and leads, by the Renyi filter. Infinite: no guarantee.
        max_epsilon_per_run: cap on the whole plan of one run, by PLD; null: no cap.
        max_epsilon_per_period: cap on one calendar period (UTC), by the Renyi filter; null: no cap.
        period: "month", "quarter" or "year".
        reference: a typical run, for which the Renyi order is optimized.
    """

    delta: float
    max_epsilon: float
    reference: ReferenceRun
    max_epsilon_per_run: float | None = None
    max_epsilon_per_period: float | None = None
    period: Calendar = "year"

    def __post_init__(self) -> None:
        check_fraction("delta", self.delta)
        is_positive = isinstance(self.max_epsilon, Real) and self.max_epsilon > 0  # infinite: no cap
        require("max_epsilon", self.max_epsilon, is_positive, "must be greater than 0")
        for key in ("max_epsilon_per_run", "max_epsilon_per_period"):
            if getattr(self, key) is not None:
                check_positive(key, getattr(self, key))
        self.order()

    def order(self) -> float:
        """Find the Renyi order of the filter for a ledger that is created under this budget."""
        return filter.find_best_order(self.reference.event, epsilon=self.max_epsilon, delta=self.delta)


@spec
class Limits:
    """Limits that apply to every run.

    Attributes:
        min_noise_multiplier: smallest noise multiplier of training and of released scores.
        max_sampling_rate: largest sampling rate.
        max_grad_norm: largest clip norm.
        min_grad_norm: smallest clip norm. With tiny clip norms, the clipped gradients are mostly rounding error;
            regardless of this limit, `training.dp_step` scales every gradient as if its norm were at least 0.001.
        max_local_steps: maximum number of noisy steps per round.
        max_rounds: maximum number of rounds per run, spare rounds included.
        max_adapter_value: largest absolute value in an adapter, divided by the square root of its scale if the scale is
            above 1. Larger values are clamped, in an adapter from the lead and after each training step; adapters with
            non-finite values are refused. Rounding error grows with the adapter (docs/threat_model.md); trained
            adapters stay below 1.5.
        max_lora_scale: largest scaling factor of an adapter's matrix product.
        max_head_scale: largest scaling factor of a task head's scores.
        max_records_per_user: with unit "user", the maximum number of records of one person in a step. No epsilon
            depends on it, but run time does, and the amount of one person's data in a step.
        run_expires_after_days: number of days for which the budget of an accepted run stays reserved, unless the run
            ends earlier.
    """

    min_noise_multiplier: float
    max_sampling_rate: float
    max_grad_norm: float
    max_local_steps: int
    max_rounds: int
    min_grad_norm: float = DEFAULT_MIN_GRAD_NORM
    max_adapter_value: float = DEFAULT_MAX_ADAPTER_VALUE
    max_lora_scale: float = 32.0
    max_head_scale: float = 100.0
    max_records_per_user: int = 64
    run_expires_after_days: float = 30.0

    def __post_init__(self) -> None:
        check_at_least("min_noise_multiplier", self.min_noise_multiplier, 0)
        check_fraction("max_sampling_rate", self.max_sampling_rate, one=True)
        factors = ("max_adapter_value", "max_lora_scale", "max_head_scale")
        for key in ("min_grad_norm", "max_grad_norm", *factors, "run_expires_after_days"):
            check_positive(key, getattr(self, key))
        bound = f"must be at most max_grad_norm = {self.max_grad_norm:g}, or no clip norm is allowed"
        require("min_grad_norm", self.min_grad_norm, self.min_grad_norm <= self.max_grad_norm, bound)
        days, bound = self.run_expires_after_days, f"must be at most {_MAX_DAYS:g} (a hundred years)"
        require("run_expires_after_days", days, days <= _MAX_DAYS, bound)
        for key in ("max_local_steps", "max_rounds", "max_records_per_user"):
            check_at_least(key, getattr(self, key), 1)


def compute_adapter_bound(max_adapter_value: float, lora_scale: float) -> float:
    """Compute the largest absolute value that a policy allows in an adapter.

    The scale multiplies a product of two matrices, so the limit of each matrix is divided by the square root of the
    scale.

    Args:
        max_adapter_value: the policy's limit.
        lora_scale: scaling factor of the matrix product.
    """
    return max_adapter_value / math.sqrt(max(1.0, lora_scale))


@spec
class Allow:
    """Allowed leads, and the tasks, models, adapters and algorithms that their runs may use.

    Attributes:
        leads: public keys of leads, 64 hex digits each.
        tasks: names of tasks, such as "classification".
        base_models: SHA-256 of base models, over all files that the loader reads.
        target_modules: modules that may receive an adapter.
        max_rank: largest LoRA rank that this site trains; a shared adapter of which the site trains only a part may
            have up to `SHARED_RANK_FACTOR` times this rank.
        train_head: whether a task head may be trained and released.
        adapters: types of adapters, such as "lora".
        algorithms: federated algorithms, such as "fedavg" or "scaffold"; empty: all algorithms of the installed
            fedtune, since no algorithm changes the guarantee.
        dtypes: formats of the base model's weights and computation; bfloat16 rounds far more coarsely than float32,
            mixed only in matrix products, and nf4 is bfloat16 with 4-bit weights.
        seeded_noise: accept runs with noise from a seed. Only for test federations: such a run has no guarantee and
            marks the ledger permanently.
        inexact_gradients: accept runs on hardware where per-example gradients depend on the rest of the batch by
            rounding. The bound on one record's influence is then measured, not proved, and reports say so.
    """

    leads: tuple[str, ...]
    tasks: tuple[str, ...]
    base_models: tuple[str, ...]
    target_modules: tuple[str, ...]
    max_rank: int
    train_head: bool
    adapters: tuple[str, ...] = ("lora",)
    algorithms: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    seeded_noise: bool = False
    inexact_gradients: bool = False

    def __post_init__(self) -> None:
        for key in self.leads:
            check_public_key("leads", key)
        check_at_least("max_rank", self.max_rank, 1)


@spec
class Releases:
    """Permitted releases, in addition to refusals and receipts.

    Attributes:
        updates: release noised adapters.
        metrics: "noised": release noised scores of held-out records if a run's plan includes them; "none": release no
            scores.
        reply_after_s: delay replies to a whole multiple of this many seconds after the request. 0: reply immediately,
            so that the response time roughly reveals the number of records.
    """

    updates: bool = True
    metrics: Literal["none", "noised"] = "none"
    reply_after_s: float = 600.0

    def __post_init__(self) -> None:
        check_at_least("reply_after_s", self.reply_after_s, 0)


@spec
class Asserted:
    """Statements by the site that software cannot check. Reports mark them as asserted.

    Attributes:
        no_person_at_another_site: no person of this population is in another site's records; null: not answered. A real
            site's policy must answer; a simulation need not.
    """

    no_person_at_another_site: bool | None = None


@spec
class Policy:
    """The complete policy of a site: the content of one `site.toml`.

    Attributes:
        site: name of the site.
        population: the people behind the records.
        dataset: the data sets of that population.
        budget: caps on privacy loss.
        limits: limits that apply to every run.
        allow: rules for tasks, models, adapters and leads.
        releases: permitted releases.
        asserted: statements that software cannot check.
        approval: "manual": each run needs the approval of a person at the site; "automatic": no run does.
        final_adapter: "keep" or "decline" the final adapter that the lead sends at the end of a run.
        trust: conditions for secure aggregation with other sites.
        ledger: path of the ledger, relative to the policy file unless absolute.
        site_key: path of the site's private key, relative to the policy file unless absolute.
        anchor: path of the anchor, a file with the newest signed head, preferably on another disk; empty: no anchor.
        simulated: whether the site is part of a simulation, on its user's machine; the ledger and reports of the site
            say so.
        key_command: command that prints the private key in PEM format, instead of `site_key`; empty: none. Excluded
            from digests and ledger.
        socket: Unix socket at which the app of a stock SuperNode reaches this site; empty: none. Excluded from digests
            and ledger.
    """

    site: str
    population: Population
    dataset: tuple[Dataset, ...]
    budget: Budget
    limits: Limits
    allow: Allow
    releases: Releases
    asserted: Asserted = Asserted()
    approval: Literal["automatic", "manual"] = "automatic"
    final_adapter: Literal["keep", "decline"] = "keep"
    trust: Trust = Trust()
    ledger: str = "ledger.db"
    site_key: str = "site_key.pem"
    anchor: str = ""
    simulated: bool = False
    key_command: tuple[str, ...] = field(default=(), compare=False)
    socket: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_name("site", self.site)
        ids = [dataset.id for dataset in self.dataset]
        require("dataset", ids, bool(ids), "must declare at least one data set")
        require("dataset", ids, len(set(ids)) == len(ids), "must not repeat an id")
        for dataset in self.dataset:
            for role, needed, why in (
                ("user", self.population.unit == "user", "unit is user"),
                ("arrival", self.population.arrivals, "arrivals is given"),
            ):
                bound, columns = f"must name the column for role '{role}', because population.{why}", dataset.columns
                right = not (needed and columns) or role in columns
                require(f"dataset {dataset.id} columns", dict(columns), right, bound)
        # Otherwise a mechanism that publishes one random record would satisfy delta.
        size = self.population_size
        bound = f"must be below 1 / {size:,} = {1 / size:.3g}, for the declared sizes of all data sets together"
        right = self.budget.delta < 1 / size or math.isinf(self.budget.max_epsilon)
        require("budget.delta", self.budget.delta, right, bound)

    def require_answers(self) -> None:
        """Check that the policy contains every statement that the template leaves to a person. Simulations are exempt.

        Raises:
            ConfigError: a statement is missing.
        """
        bound = "must be true (no person of this population has records at another site) or "
        bound += "false (otherwise, or if unknown)"
        answered = self.simulated or self.asserted.no_person_at_another_site is not None
        require("asserted.no_person_at_another_site", NOT_GIVEN, answered, bound)

    @property
    def population_size(self) -> int:
        """Sum of the declared sizes of all data sets, which share one budget and one delta."""
        return sum(dataset.declared_size for dataset in self.dataset)

    def check(self, proposal: Proposal) -> None:
        """Check a proposal against every rule that is independent of earlier spending.

        Raises:
            Refused: the proposal breaks a rule; names the first broken rule, the requested value and the allowed value.
        """
        for refused in self.find_broken_rules(proposal):
            raise refused

    def check_release(self, proposal: Proposal) -> None:
        """Check a site's own release against every rule, except for the rules that apply only to leads.

        Raises:
            Refused: the release breaks a rule; names the first broken rule, the requested value and the allowed value.
        """
        broken = [rule for rule in _iter_broken_rules(self, proposal) if rule[0] in _OF_ANY_RELEASE]
        for reason, requested, allowed in broken or _iter_exceeded_epsilon_caps(self, proposal.plan):
            raise Refused(reason, requested=requested, allowed=allowed)

    def find_broken_rules(self, proposal: Proposal) -> list[Refused]:
        """List every rule that a proposal breaks.

        Caps on epsilon are checked only if no other rule is broken.
        """
        broken = list(_iter_broken_rules(self, proposal)) or list(_iter_exceeded_epsilon_caps(self, proposal.plan))
        return [Refused(reason, requested=requested, allowed=allowed) for reason, requested, allowed in broken]

    def lower_rank(self, proposal: Proposal) -> Proposal:
        """Return the proposal with this site's rank within `allow.max_rank`; unchanged if the ranks do not differ."""
        rank = proposal.find_rank(self.site)
        if rank is None or rank <= self.allow.max_rank:
            return proposal
        return dataclasses.replace(proposal, ranks={**proposal.ranks, self.site: self.allow.max_rank})

    def declared_size(self, dataset: str) -> int:
        """Return the declared size of a data set."""
        return next(declared.declared_size for declared in self.dataset if declared.id == dataset)

    def compute_adapter_bound(self, lora_scale: float) -> float:
        """Compute the largest absolute value that this policy allows in an adapter of scale `lora_scale`."""
        return compute_adapter_bound(self.limits.max_adapter_value, lora_scale)

    def to_json(self) -> dict[str, Any]:
        """Return the canonical JSON object that `digest` hashes. An infinite cap becomes null."""
        fields = dataclasses.asdict(self)
        if math.isinf(self.budget.max_epsilon):
            fields["budget"]["max_epsilon"] = None
        if not self.simulated:  # omitted for real sites
            del fields["simulated"]
        del fields["socket"], fields["key_command"]
        optional = [(fields["population"], "arrivals"), (fields["allow"], "algorithms")]
        for group, key in (*optional, *((dataset, "min_units") for dataset in fields["dataset"])):
            if not group[key]:  # empty values are omitted, so that existing digests stay valid
                del group[key]
        # Tuples become lists, as after a round trip through a file, because a ledger compares both.
        return dict(json.loads(json.dumps(fields)))

    def digest(self) -> str:
        """Return the SHA-256 of the policy's canonical JSON, in hex."""
        return hash_json(self.to_json())


def _iter_broken_rules(policy: Policy, proposal: Proposal) -> Iterator[Broken]:
    allow, limits, plan = policy.allow, policy.limits, proposal.plan
    if proposal.lead not in allow.leads:
        yield Reason.LEADS, proposal.lead, f"{len(allow.leads)} keys"
    datasets = [dataset.id for dataset in policy.dataset]
    for reason, requested, allowed in (
        (Reason.DATASET, proposal.dataset, datasets),
        (Reason.TASKS, proposal.task, allow.tasks),
        (Reason.BASE_MODELS, proposal.base_model, allow.base_models),
        (Reason.ADAPTERS, proposal.adapter, allow.adapters),
        (Reason.ALGORITHMS, proposal.algorithm, allow.algorithms or [proposal.algorithm]),
        (Reason.DTYPES, proposal.dtype, allow.dtypes),
        (Reason.UNIT, plan.unit, [policy.population.unit]),
        (Reason.DELTA, plan.delta, [policy.budget.delta]),
        (Reason.COHORTS, plan.cohorts.period if plan.cohorts else "none", [policy.population.arrivals or "none"]),
    ):
        if requested not in allowed:
            yield reason, requested, ", ".join(map(str, allowed))
    if others := [name for name in proposal.target_modules if name not in allow.target_modules]:
        yield Reason.TARGET_MODULES, ", ".join(others), ", ".join(allow.target_modules)
    for reason, number, most in (
        (Reason.MAX_RANK, proposal.find_rank(policy.site) or proposal.rank, allow.max_rank),
        (Reason.MAX_LORA_SCALE, proposal.lora_scale, limits.max_lora_scale),
        (Reason.MAX_HEAD_SCALE, proposal.head_scale, limits.max_head_scale),
        (Reason.MAX_SAMPLING_RATE, plan.sampling_rate, limits.max_sampling_rate),
        (Reason.MAX_GRAD_NORM, plan.max_grad_norm, limits.max_grad_norm),
        (Reason.MAX_LOCAL_STEPS, plan.local_steps, limits.max_local_steps),
        (Reason.MAX_ROUNDS, plan.max_rounds, limits.max_rounds),
        (Reason.MAX_RECORDS_PER_USER, plan.records_per_user, limits.max_records_per_user),
    ):
        if number > most:
            yield reason, number, f"at most {most:g}"
    most_shared = SHARED_RANK_FACTOR * allow.max_rank
    if proposal.find_rank(policy.site) is not None and proposal.rank > most_shared:
        yield Reason.MAX_RANK, f"a shared adapter of rank {proposal.rank}", f"at most {most_shared}"
    for reason, number, least in (
        (Reason.MIN_NOISE_MULTIPLIER, min(plan.noise_multipliers), limits.min_noise_multiplier),
        (Reason.MIN_GRAD_NORM, plan.max_grad_norm, limits.min_grad_norm),
    ):
        if number < least:
            yield reason, number, f"at least {least:g}"
    for reason, wanted, granted in (
        (Reason.TRAIN_HEAD, proposal.train_head, allow.train_head),
        (Reason.SEEDED_NOISE, proposal.seeded_noise, allow.seeded_noise),
        (Reason.UPDATES, True, policy.releases.updates),
    ):
        if wanted and not granted:
            yield reason, "yes", "no"
    if plan.releases_metrics and policy.releases.metrics == "none":
        yield Reason.METRICS, "noised", "none"
    if plan.shared is not None:
        yield from policy.trust.iter_violated_rules(plan.shared)


def _iter_exceeded_epsilon_caps(policy: Policy, plan: Plan) -> Iterator[Broken]:
    """Yield the per-run caps on epsilon that a plan exceeds, as broken rules.

    These are the most expensive rules, so they are checked only for plans within all other limits, for which the
    computation has a bounded run time.
    """
    alone = plan.with_own_noise_only if plan.shared else None
    for reason, counted, most in (
        (Reason.MAX_EPSILON_PER_RUN, plan, policy.budget.max_epsilon_per_run),
        (Reason.MAX_EPSILON_IF_ALL_COLLUDE, alone, policy.trust.max_epsilon_if_all_collude),
    ):
        if counted and most is not None and (epsilon := _compute_epsilon_above_limit(counted, most)) is not None:
            yield reason, f"{epsilon:.4g}", f"at most {most:g}"


@lru_cache(maxsize=256)
def _compute_epsilon_above_limit(plan: Plan, limit: float) -> float | None:
    """Compute the PLD epsilon of a whole plan, and return it only if it exceeds `limit`, else None.

    PLD is valid here, because a plan is fixed before any output is seen.
    """
    return accountant.compute_epsilon_above_limit([plan.full_event], plan.delta, limit=limit)
