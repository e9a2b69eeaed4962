"""A site's own limits: what may happen to its records, whoever asks.

There is one class for each table of a `site.toml` that decides something, which `policy_file` reads and the template
`conf/site.toml` explains.  A policy is checked inside the ledger's transaction, against a lead's proposal and against
earlier spending.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import lru_cache
from typing import Any, Literal

from fedtune.codec import require
from fedtune.privacy import accountant, events, filter
from fedtune.privacy.cohorts import Calendar
from fedtune.privacy.dp_library import DpEvent
from fedtune.privacy.keys import check_public_key
from fedtune.privacy.mechanism import LEAST_SAMPLING_RATE, Unit
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
AT_ONCE = "the time of a reply roughly reveals the number of records"  # where `releases.reply_after_s` is 0
_MOST_DAYS = 36525.0
_OF_ANY_RELEASE = {Reason.UNIT, Reason.DELTA, Reason.COHORTS}


@spec
class Dataset:
    """A data set that a run may name.

    Attributes:
        id: the name that runs use for it.
        declared_size: the number of units that the site publishes; a public choice, never the true count.
        path: file or folder with the records; stays at the site.
        columns: role (such as "text" or "label") -> column of the file; stays at the site.
        min_units: fewest units for which the site takes part, 0 for no minimum.  The declared size must reach it.  The
            true number is compared with it only for the site's own staff: no answer that leaves the site depends on
            it, because whether a site has enough records would tell something about each record.
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
        bound = f"must be at most declared_size = {self.declared_size}: a smaller data set takes no part"
        require("min_units", self.min_units, self.min_units <= self.declared_size, bound)


@spec
class Population:
    """The people behind the data sets, who share one budget.

    Attributes:
        name: of the population.
        unit: what one (epsilon, delta) protects, "record" or "user"; fixed when the ledger is created.
        arrivals: the calendar by which people join over time, each person charged only for runs that admit their
            cohort; fixed when the ledger is created.  "": one budget for everybody.
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
    """A typical run, as the site expects it; the filter's order is chosen for it when the ledger is created."""

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        check_fraction("sampling_rate", self.sampling_rate, one=True)
        check_at_least("sampling_rate", self.sampling_rate, LEAST_SAMPLING_RATE)
        accountant.check_noise("noise_multiplier", self.noise_multiplier)
        check_at_least("steps", self.steps, 1)

    @property
    def event(self) -> DpEvent:
        """The privacy event of the whole run."""
        return events.build_dp_sgd_event(
            sampling_rate=self.sampling_rate, noise_multiplier=self.noise_multiplier, steps=self.steps
        )


@spec
class Budget:
    """The total privacy loss that these people may ever incur.

    Attributes:
        delta: the delta of every run and of the lifetime epsilon.
        max_epsilon: cap over all runs, leads and years, by the Renyi filter.  Infinite: no promise.
        max_epsilon_per_run: cap on the whole plan of one run, by PLD; null: no such cap.
        max_epsilon_per_period: cap on one calendar period (UTC), by the Renyi filter; null: no such cap.
        period: "month", "quarter" or "year".
        reference: a typical run.
    """

    delta: float
    max_epsilon: float
    reference: ReferenceRun
    max_epsilon_per_run: float | None = None
    max_epsilon_per_period: float | None = None
    period: Calendar = "year"

    def __post_init__(self) -> None:
        check_fraction("delta", self.delta)
        require("max_epsilon", self.max_epsilon, self.max_epsilon > 0, "must be greater than 0")
        for key in ("max_epsilon_per_run", "max_epsilon_per_period"):
            if getattr(self, key) is not None:
                check_positive(key, getattr(self, key))
        self.order()

    def order(self) -> float:
        """Return the filter's order for a ledger that is created under this budget."""
        return filter.find_best_order(self.reference.event, epsilon=self.max_epsilon, delta=self.delta)


@spec
class Limits:
    """Limits that apply to every run.

    Attributes:
        min_noise_multiplier: smallest noise multiplier of training and of released scores.
        max_sampling_rate: largest sampling rate.
        max_grad_norm: largest clip norm.
        min_grad_norm: smallest clip norm that a run may request.  With tiny clip norms, gradients are mostly rounding
            error by the time they are clipped; `training.dp_step` scales every gradient as if its norm were at least
            0.001, whatever this limit is.
        max_local_steps: most noisy steps per round.
        max_rounds: most rounds per run, spare rounds included.
        max_adapter_value: largest absolute value in an adapter, divided by the square root of its scale if that is
            above 1.  Larger values are clamped, in an adapter that the lead sends and after each training step;
            adapters with non-finite values are refused.  Rounding error grows with the adapter (docs/threat_model.md);
            trained adapters stay below 1.5.
        max_lora_scale: largest factor of an adapter's product of matrices.
        max_head_scale: largest factor of a task head's scores.
        max_records_per_user: with unit "user", most records of one person in a step.  No epsilon depends on it; run
            time does, and so does how much of a person's data one step may use.
        run_expires_after_days: an accepted run keeps its budget reserved for this long, unless it ends earlier.
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
        days, bound = self.run_expires_after_days, f"must be at most {_MOST_DAYS:g} (a hundred years)"
        require("run_expires_after_days", days, days <= _MOST_DAYS, bound)
        for key in ("max_local_steps", "max_rounds", "max_records_per_user"):
            check_at_least(key, getattr(self, key), 1)


def compute_adapter_bound(max_adapter_value: float, lora_scale: float) -> float:
    """Return the largest absolute value in an adapter of this scale.

    The scale multiplies a product of two matrices, so the limit of each is divided by the square root of the scale.
    """
    return max_adapter_value / math.sqrt(max(1.0, lora_scale))


@spec
class Allow:
    """Limits on what a run may train, and on who may request it.

    Attributes:
        leads: public keys of leads, 64 hex digits each.
        tasks: such as "classification".
        base_models: SHA-256 of base models, over all files that loading reads.
        target_modules: modules that may receive an adapter.
        max_rank: largest LoRA rank.
        train_head: whether a task head may be trained and released.
        adapters: kinds of adapters, such as "lora".
        algorithms: what a site may do around its noisy steps, such as "fedavg" or "scaffold"; empty: all algorithms of
            the installed fedtune, since none of them changes a guarantee.
        dtypes: number formats in which the base model may be computed; bfloat16 rounds far more coarsely than float32,
            mixed does so only in matrix products, and nf4 is bfloat16 with 4-bit weights.
        seeded_noise: accept runs with noise from a seed.  Only for test federations: such a run has no guarantee and
            marks the ledger for good.
        inexact_gradients: accept runs on a machine on which per-example gradients depend on the rest of the batch by
            rounding.  The bound on one record's influence is then measured, not proved, and reports say so.
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
    """Releases that may leave the site in addition to refusals and receipts.

    Attributes:
        updates: noised adapters.
        metrics: "noised": noised scores of held-out records, if a run plans for them; "none".
        reply_after_s: replies leave at a whole multiple of this many seconds after the request arrived.  0: as soon as
            they are ready, so that the response time roughly reveals the number of records.
    """

    updates: bool = True
    metrics: Literal["none", "noised"] = "none"
    reply_after_s: float = 600.0

    def __post_init__(self) -> None:
        check_at_least("reply_after_s", self.reply_after_s, 0)


@spec
class Asserted:
    """Statements of the site that no software can check; reports show them as asserted.

    Attributes:
        no_person_at_another_site: nobody of this population is among another site's records; null: not answered.  A
            real site's policy must answer; a simulation need not.
    """

    no_person_at_another_site: bool | None = None


@spec
class Policy:
    """What one `site.toml` decides about the site's records.

    Attributes:
        site: name of the site.
        population: the people behind the records.
        dataset: the data sets of that population.
        budget: caps on the spending.
        limits: limits that apply to every run.
        allow: what may be trained, and by which leads.
        releases: what may leave the site.
        asserted: statements of the site.
        approval: "manual": a person at the site approves each run before it starts; "automatic".
        final_adapter: whether to "keep" or "decline" a run's final adapter when the lead sends it.
        trust: the other sites that this site relies on in secure aggregation.
        ledger: path of the ledger, relative to the policy file unless absolute.
        site_key: path of the site's private key, likewise.
        anchor: path of a file, best on another disk, that always holds the newest signed head; empty: no anchor.
        simulated: the site is simulated, on the machine of the person who runs the simulation; its ledger and reports
            say so.
        key_command: command that prints the private key in PEM format, instead of `site_key`; empty: none.  Part of no
            digest and no ledger.
        socket: the Unix socket at which the app of a stock SuperNode reaches this site; empty: none.  Part of no digest
            and no ledger.
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
        # Otherwise publishing one record whole would keep to delta.
        size = self.population_size
        bound = f"must be below 1 / {size:,} = {1 / size:.3g}, for the declared sizes of all data sets together"
        right = self.budget.delta < 1 / size or math.isinf(self.budget.max_epsilon)
        require("budget.delta", self.budget.delta, right, bound)

    def require_answers(self) -> None:
        """Require the statements that the template leaves open for a person; a simulation needs none.

        Raises:
            ConfigError: a statement is missing.
        """
        bound = "must be true (nobody in this population is in another site's records) or false (or unknown)"
        answered = self.simulated or self.asserted.no_person_at_another_site is not None
        require("asserted.no_person_at_another_site", NOT_GIVEN, answered, bound)

    @property
    def population_size(self) -> int:
        """The sum of the declared sizes of all data sets, which share one budget and one delta."""
        return sum(dataset.declared_size for dataset in self.dataset)

    def check(self, proposal: Proposal) -> None:
        """Check a proposal against every rule that does not depend on earlier spending.

        Raises:
            Refused: names the first broken rule, the requested value and the allowed value.
        """
        for refused in self.find_broken_rules(proposal):
            raise refused

    def check_release(self, proposal: Proposal) -> None:
        """Check a release of the site's own, which only the limits for leads do not concern.

        Raises:
            Refused: names the first broken rule, the requested value and the allowed value.
        """
        broken = [rule for rule in _iter_broken_rules(self, proposal) if rule[0] in _OF_ANY_RELEASE]
        for reason, asked, allowed in broken or _iter_exceeded_epsilon_caps(self, proposal.plan):
            raise Refused(reason, asked=asked, allowed=allowed)

    def find_broken_rules(self, proposal: Proposal) -> list[Refused]:
        """List every rule that a proposal breaks, so that a person can fix the proposal.

        Caps on epsilon are checked only if no other rule is broken.
        """
        broken = list(_iter_broken_rules(self, proposal)) or list(_iter_exceeded_epsilon_caps(self, proposal.plan))
        return [Refused(reason, asked=asked, allowed=allowed) for reason, asked, allowed in broken]

    def declared_size(self, dataset: str) -> int:
        """Return the declared size of one of the site's data sets."""
        return next(declared.declared_size for declared in self.dataset if declared.id == dataset)

    def compute_adapter_bound(self, lora_scale: float) -> float:
        """Return the largest absolute value that this site allows in an adapter."""
        return compute_adapter_bound(self.limits.max_adapter_value, lora_scale)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; an infinite cap becomes null."""
        fields = dataclasses.asdict(self)
        if math.isinf(self.budget.max_epsilon):
            fields["budget"]["max_epsilon"] = None
        if not self.simulated:  # a real site's policy says nothing of it
            del fields["simulated"]
        del fields["socket"], fields["key_command"]
        optional = [(fields["population"], "arrivals"), (fields["allow"], "algorithms")]
        for group, key in (*optional, *((dataset, "min_units") for dataset in fields["dataset"])):
            if not group[key]:  # so that other policies keep their digests
                del group[key]
        # Lists for tuples, as it comes back from a file: a ledger compares the two.
        return dict(json.loads(json.dumps(fields)))

    def digest(self) -> str:
        """Return the SHA-256 of the policy's canonical JSON, in hex."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _iter_broken_rules(policy: Policy, proposal: Proposal) -> Iterator[Broken]:
    allow, limits, plan = policy.allow, policy.limits, proposal.plan
    if proposal.lead not in allow.leads:
        yield Reason.LEADS, proposal.lead, f"{len(allow.leads)} keys"
    datasets = [dataset.id for dataset in policy.dataset]
    for reason, asked, allowed in (
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
    """Yield the per-run caps on epsilon that a plan exceeds.

    These rules are the most expensive ones, so they are checked only for plans within all other limits, for which
    epsilon can be computed in bounded time.
    """
    alone = plan.with_own_noise_only if plan.shared else None
    for reason, counted, most in (
        (Reason.MAX_EPSILON_PER_RUN, plan, policy.budget.max_epsilon_per_run),
        (Reason.MAX_EPSILON_IF_ALL_COLLUDE, alone, policy.trust.max_epsilon_if_all_collude),
    ):
        if counted and most is not None and (epsilon := _plan_epsilon_if_above(counted, most)) is not None:
            yield reason, f"{epsilon:.4g}", f"at most {most:g}"


@lru_cache(maxsize=256)
def _plan_epsilon_if_above(plan: Plan, limit: float) -> float | None:
    """Return the PLD epsilon of a whole plan if it is above `limit`, else None.

    PLD is a proof here, because a plan is fixed before any output is seen.
    """
    return accountant.compute_epsilon_if_above([plan.full_event], plan.delta, limit=limit)
