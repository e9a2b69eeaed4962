"""A site's own limits: what it lets happen to its records, whoever asks.

One class for each table of a `site.toml`, which `policy_file` reads and the template `conf/site.toml` explains.  A
policy is checked inside the ledger's transaction, against what a lead proposes and what was spent before.
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

from dp_accounting import DpEvent

from fedtune.codec import require
from fedtune.privacy import accountant, events, filter
from fedtune.privacy.about import AboutSpec
from fedtune.privacy.cohorts import Calendar
from fedtune.privacy.keys import check_public_key
from fedtune.privacy.mechanism import LEAST_SAMPLING_RATE, Unit
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.trust import Broken, Trust
from fedtune.spec import (
    NOT_GIVEN,
    check_at_least,
    check_at_most,
    check_fraction,
    check_name,
    check_positive,
    spec,
)

DEFAULT_MIN_GRAD_NORM = 1e-3
DEFAULT_MAX_ADAPTER_VALUE = 2.0
AT_ONCE = "the time of a reply tells roughly how many records there are"  # where `releases.reply_after_s` is 0
_MOST_DAYS = 36525.0


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
        unit: what one (epsilon, delta) protects, "record" or "user"; fixed when the ledger is made.
        arrivals: by which calendar people arrive over time, each charged only for runs that admit their cohort; fixed
            when the ledger is made.  "": one budget for everybody.
    """

    name: str
    unit: Unit = "record"
    arrivals: Literal[Calendar, ""] = ""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        bound = 'must be empty for unit = "record": only a person has an id by which the first cohort is kept'
        require("arrivals", self.arrivals, not self.arrivals or self.unit == "user", bound)


@spec
class Reference:
    """A typical run, as the site expects it; the filter's order is chosen for it when the ledger is made."""

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
        """The whole run, as an event."""
        return events.dp_sgd(sampling_rate=self.sampling_rate, noise_multiplier=self.noise_multiplier, steps=self.steps)


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
    period: Calendar = "year"

    def __post_init__(self) -> None:
        check_fraction("delta", self.delta)
        require("max_epsilon", self.max_epsilon, self.max_epsilon > 0, "must be greater than 0")
        for key in ("max_epsilon_per_run", "max_epsilon_per_period"):
            if getattr(self, key) is not None:
                check_positive(key, getattr(self, key))
        self.order()

    def order(self) -> float:
        """The filter's order for a ledger that is made under this budget."""
        return filter.best_order(self.reference.event, epsilon=self.max_epsilon, delta=self.delta)


@spec
class Limits:
    """Bounds on every run.

    Attributes:
        min_noise_multiplier: least noise of training and of released scores.
        max_sampling_rate: largest sampling rate.
        max_grad_norm: largest clip norm.
        min_grad_norm: smallest clip norm that a run may ask for.  With tiny ones gradients are mostly rounding by the
            time they are clipped; `training.dp_step` does not enlarge those below 0.001, whatever this says.
        max_local_steps: most noisy steps in a round.
        max_rounds: most rounds in a run, spare ones included.
        max_adapter_value: largest absolute value in an adapter, divided by the root of its scale where that is above 1.
            Larger values are brought down to it, in an adapter that is sent and after each training step; one that is
            not finite is refused.  Rounding grows with the adapter (docs/threat_model.md); trained ones stay below 1.5.
        max_lora_scale: largest factor of an adapter's product of matrices.
        max_head_scale: largest factor of a task head's scores.
        max_records_per_user: where the unit is "user", most records of one person in a step.  No epsilon depends on
            it; time does, and how much of a person's data one step may look at.
        run_expires_after_days: an accepted run holds its budget that long, unless it ends earlier.
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
        days, bound = self.run_expires_after_days, f"must be at most {_MOST_DAYS:g}, a hundred years"
        require("run_expires_after_days", days, days <= _MOST_DAYS, bound)
        for key in ("max_local_steps", "max_rounds", "max_records_per_user"):
            check_at_least(key, getattr(self, key), 1)


def adapter_bound(max_adapter_value: float, lora_scale: float) -> float:
    """The largest absolute value of an adapter; the product of its matrices is scaled, so each of them by the root."""
    return max_adapter_value / math.sqrt(max(1.0, lora_scale))


@spec
class Allow:
    """Limits on what a run may train, and on who may ask.

    Attributes:
        leads: public keys of leads, 64 hex digits each.
        tasks: such as "classification".
        base_models: SHA-256 of base models, with all files that loading reads.
        target_modules: modules that may get an adapter.
        max_rank: largest LoRA rank.
        train_head: whether a task head may be trained and released.
        adapters: kinds of adapters, such as "lora".
        dtypes: number formats that the base model may be computed in; bfloat16 rounds far more coarsely than float32,
            mixed does so only where layers multiply; nf4 is bfloat16 with weights of four bits.
        seeded_noise: accept runs whose noise comes from a seed.  For a test federation: such a run has no guarantee
            and marks the ledger for ever.
        inexact_gradients: accept runs on a machine whose per-example gradients depend on the rest of the batch by
            rounding.  Then the bound on one record's influence is measured, not proved, and reports say so.
    """

    leads: tuple[str, ...]
    tasks: tuple[str, ...]
    base_models: tuple[str, ...]
    target_modules: tuple[str, ...]
    max_rank: int
    train_head: bool
    adapters: tuple[str, ...] = ("lora",)
    dtypes: tuple[str, ...] = ("float32",)
    seeded_noise: bool = False
    inexact_gradients: bool = False

    def __post_init__(self) -> None:
        for key in self.leads:
            check_public_key("leads", key)
        check_at_least("max_rank", self.max_rank, 1)


@spec
class Releases:
    """Releases that may leave the site beside refusals and receipts.

    Attributes:
        updates: noised adapters.
        metrics: "noised": scores of held-out records with noise, where a run plans for them; "none".
        reply_after_s: an answer leaves at a whole multiple of this after its request came.  0: when it is ready, so
            that the time of a reply tells roughly how many records there are.
    """

    updates: bool = True
    metrics: Literal["none", "noised"] = "none"
    reply_after_s: float = 600.0

    def __post_init__(self) -> None:
        check_at_least("reply_after_s", self.reply_after_s, 0)


@spec
class Machine:
    """The machine of a run or, in its policy, of a site, where 0 or "" stand for null.  It decides rounding alone.

    Attributes:
        device: "auto" (an accelerator if the torch build can use one), "cpu" or "cuda".
        num_devices: the number of GPUs that share each step of a site, with one process for each; on a CPU, of
            processes.  The result is the same, bit for bit.  A run without privacy uses one.  null: one; for
            `fedtune simulate` on a CPU one for each core, at most 4, where the run has enough gradients for it to pay.
        num_threads: the number of torch threads in every process; null: one for each core, shared by the processes, or
            as many as OMP_NUM_THREADS says, if those are fewer.
        micro_batch_tokens: the most padded tokens in a micro-batch; they change no bit of a private run.  null: 512 for
            each thread of a CPU, at most 2,048, since more are no faster and take longer to try; 16,384 on a GPU.
        step_mib: the memory in MiB for a micro-batch with its examples' gradients, and for the means of users.  Before
            the run made-up examples are measured, and a micro-batch gets as many rows as fit.  null: a quarter of the
            machine's memory, shared by the processes, or four fifths of a GPU's, both less the model.
        kept_states_mib: the memory in MiB for keeping each record's output of the frozen layers below the adapters,
            for all sites of a process together, and as much for each of the lead's data sets.  If the outputs do not
            fit, `kept_states_folder` takes them; without it none are kept, which takes several times as long, and a run
            says so at its start.  null: a quarter of what the machine has available.  0 keeps none there.
        kept_states_folder: a folder on a fast disk for the outputs that do not fit in memory, at most half of what is
            free there.  Nobody can open what is written, which is gone with the process, however it ends.
        onednn: true multiplies with frozen float32 weights by oneDNN on an x86 CPU, which is twice as fast on AMD's
            and as exact; false leaves it to torch.
        gradient_checkpointing: true recomputes activations in the backward pass, for large models.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_devices: int | None = None
    num_threads: int | None = None
    micro_batch_tokens: int | None = None
    step_mib: int | None = None
    kept_states_mib: int | None = None
    kept_states_folder: str | None = None
    onednn: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("micro_batch_tokens", "step_mib", "kept_states_mib"), (0, math.inf))
        # Each device takes a process with a model of its own; a system runs out of threads somewhere above.
        for key, (least, most) in {"num_devices": (1, 64), "num_threads": (0, 1024), **sizes}.items():
            if (number := getattr(self, key)) is not None:
                check_at_least(key, number, least)
                check_at_most(key, number, most)


@spec
class Asserted:
    """Statements of the site that no software can check; reports show them as asserted.

    Attributes:
        no_person_at_another_site: nobody of this population is among another site's records; null: nobody said so or
            denied it.  A real site's policy has an answer; a simulation asks nobody.
    """

    no_person_at_another_site: bool | None = None


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
        trust: whom it relies on in a secure sum.
        ledger: path of the ledger, beside the policy file unless absolute.
        site_key: path of the site's private key, likewise.
        anchor: path of a file, best on another disk, that always holds the newest signed head; empty: none is kept.
        simulated: the site is made up, on the machine of the person who simulates it; its ledger and reports say so.
        about: what persons say of the site's records, for a public registry; in no digest, and in no ledger.
        key_command: command that prints the private key in PEM, in place of `site_key`; empty: none.  Likewise in none.
        socket: the Unix socket at which a stock SuperNode's app asks this site; empty: none.  In no digest or ledger.
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
    machine: Machine = Machine(
        num_devices=1, num_threads=0, micro_batch_tokens=0, step_mib=0, kept_states_mib=1024, kept_states_folder=""
    )
    trust: Trust = Trust()
    ledger: str = "ledger.db"
    site_key: str = "site_key.pem"
    anchor: str = ""
    simulated: bool = False
    about: AboutSpec = field(default=AboutSpec(), compare=False)  # words for a register, which decide nothing
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
                bound, columns = f"must name the column for role '{role}', as population.{why}", dataset.columns
                right = not (needed and columns) or role in columns
                require(f"dataset {dataset.id} columns", dict(columns), right, bound)
        # Otherwise publishing one record whole would keep to delta.
        size = self.population_size
        bound = f"must be below 1 / {size:,} = {1 / size:.3g}, with the declared sizes of all data sets added up"
        right = self.budget.delta < 1 / size or math.isinf(self.budget.max_epsilon)
        require("budget.delta", self.budget.delta, right, bound)

    def require_answers(self) -> None:
        """Require what a person has to state, which the template leaves open; a simulation has nobody to ask."""
        bound = "must be true (nobody of this population is among another site's records) or false (or not known)"
        answered = self.simulated or self.asserted.no_person_at_another_site is not None
        require("asserted.no_person_at_another_site", NOT_GIVEN, answered, bound)

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
        """List every rule that a proposal breaks, for a person who wants to mend it."""
        broken = list(_broken_rules(self, proposal)) or list(_epsilons_above(self, proposal.plan))
        return [Refused(reason, asked=asked, allowed=allowed) for reason, asked, allowed in broken]

    def declared_size(self, dataset: str) -> int:
        """The size that the site publishes for one of its data sets."""
        return next(declared.declared_size for declared in self.dataset if declared.id == dataset)

    def adapter_bound(self, lora_scale: float) -> float:
        """The largest absolute value of an adapter at this site."""
        return adapter_bound(self.limits.max_adapter_value, lora_scale)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; an infinite cap becomes null."""
        fields = dataclasses.asdict(self)
        if math.isinf(self.budget.max_epsilon):
            fields["budget"]["max_epsilon"] = None
        if not self.simulated:  # a real site's policy says nothing of it
            del fields["simulated"]
        del fields["about"], fields["socket"], fields["key_command"]
        if not self.population.arrivals:  # so that other policies keep their digests
            del fields["population"]["arrivals"]
        # Lists for tuples, as it comes back from a file: a ledger compares the two.
        return dict(json.loads(json.dumps(fields)))

    def digest(self) -> str:
        """SHA-256 of the policy's canonical JSON, in hex."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _broken_rules(policy: Policy, proposal: Proposal) -> Iterator[Broken]:
    allow, limits, plan = policy.allow, policy.limits, proposal.plan
    if proposal.lead not in allow.leads:
        yield Reason.LEADS, proposal.lead, f"{len(allow.leads)} keys"
    datasets = [dataset.id for dataset in policy.dataset]
    for reason, asked, allowed in (
        (Reason.DATASET, proposal.dataset, datasets),
        (Reason.TASKS, proposal.task, allow.tasks),
        (Reason.BASE_MODELS, proposal.base_model, allow.base_models),
        (Reason.ADAPTERS, proposal.adapter, allow.adapters),
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
        (Reason.MIN_NOISE_MULTIPLIER, min(plan.noises), limits.min_noise_multiplier),
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
        yield from policy.trust.broken_by(plan.shared)


def _epsilons_above(policy: Policy, plan: Plan) -> Iterator[Broken]:
    """Caps on the epsilon of one run that a plan exceeds.

    These are the dearest rules: they are for a plan within all other limits, whose epsilon is computed in bounded time.
    """
    alone = plan.by_own_noise_alone if plan.shared else None
    for reason, counted, most in (
        (Reason.MAX_EPSILON_PER_RUN, plan, policy.budget.max_epsilon_per_run),
        (Reason.MAX_EPSILON_IF_ALL_COLLUDE, alone, policy.trust.max_epsilon_if_all_collude),
    ):
        if counted and most is not None and (epsilon := _plan_epsilon_above(counted, most)) is not None:
            yield reason, f"{epsilon:.4g}", f"at most {most:g}"


@lru_cache(maxsize=256)
def _plan_epsilon_above(plan: Plan, limit: float) -> float | None:
    """Epsilon of a whole plan by PLD, which is a proof since a plan is fixed before anything is seen; None: within."""
    return accountant.epsilon_above([plan.whole], plan.delta, limit=limit)
