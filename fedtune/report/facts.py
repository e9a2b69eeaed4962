"""The facts of a report, each stated once; everything else in a report is derived from them (`derive`).

The builders read the facts from a run's folder or from a ledger.  Facts are plans, counts, limits and days, and never
contain data of a record.  A verifier derives everything else again; only a signature shows that the facts are true.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from itertools import pairwise
from typing import Literal

from fedtune.evaluation.audit_bound import LEAST_CONFIDENCE
from fedtune.federation.drift import HeldOut
from fedtune.federation.early_stopping import Kept, count_rounds, find_kept_round, should_stop
from fedtune.federation.lead import RoundResult, Scores
from fedtune.federation.spec import FederationSpec
from fedtune.privacy.cohorts import Calendar
from fedtune.privacy.events import Charge
from fedtune.privacy.mechanism import Unit
from fedtune.privacy.release import Receipt
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import Selection
from fedtune.privacy.site_policy import ReferenceRun
from fedtune.runs.cost import Energy
from fedtune.show.budget_text import ArrivalRange
from fedtune.spec import ConfigError, check_at_least, check_fraction, spec
from fedtune.tasks.measures import Detail

Value = str | int | float | tuple[str, ...] | Mapping[str, int | float | None] | None
"""Of a fact that a cell shows; None: it is not known."""
State = Literal["within", "exceeded", "no_guarantee"]
Source = Literal["charged_by_receipts", "own_ledger", "signed_site_report", "not_released"]
NOT_RECORDED = "not_recorded"  # for a fact that was not recorded at the time
_MOST_CANARIES = 10**6  # at one place


@spec
class BudgetVerdict:
    """Whether the spent epsilon stays within the approved one; `reasons` are codes of the catalog."""

    state: State
    reasons: tuple[str, ...] = ()


@spec
class Approved:
    """The limits in the site's policy; None: no limit of that kind."""

    max_epsilon: float | None
    max_epsilon_per_run: float | None
    max_epsilon_per_period: float | None
    period: Calendar


@spec
class Cap:
    """A lifetime cap, and when it came into force."""

    time: str
    max_epsilon: float | None
    charges_before: int  # charges that the ledger had noted by then, in rounds and in backups put back


@spec
class LifetimeRun:
    """The figures of one run in a ledger."""

    run: str
    lead: str
    dataset: str
    state: str
    rounds: int
    most_rounds: int
    steps: int
    epsilon: float | None
    planned_epsilon: float | None
    seeded_noise: bool


@spec
class CohortFigures:
    """The figures of people who arrived in the same periods; the fields other than `people` are as in `Lifetime`."""

    people: ArrivalRange
    epsilon: float | None
    with_set_aside: float | None
    left: float | None


@spec
class Lifetime:
    """A ledger's figures over all its runs; if people arrive over time, those of the cohort with the largest
    figures.
    """

    order: float
    epsilon: float | None
    with_set_aside: float | None
    epsilon_pld: float | None
    epsilon_rdp: float | None
    left: float | None
    period: str
    period_epsilon: float | None
    reference_runs_left: int | None
    caps: tuple[Cap, ...]
    runs: tuple[LifetimeRun, ...]
    frozen: bool
    in_doubt: bool
    restored: int
    seeded: bool
    cohorts: tuple[CohortFigures, ...] | None = None

    @property
    def has_guarantee(self) -> bool:
        """Whether anything can be guaranteed for what was released."""
        return not self.seeded and self.epsilon is not None

    @property
    def cap_raised(self) -> bool:
        """Whether a lifetime cap was raised after a charge, and so perhaps because of what that charge released."""
        return any(
            later.charges_before > 0
            and cap.max_epsilon is not None
            and (later.max_epsilon is None or later.max_epsilon > cap.max_epsilon)
            for cap, later in pairwise(self.caps)
        )

    def has_spent_without_cap(self, charges: int) -> bool:
        """Whether any of the first `charges` charges was made while no lifetime cap was in force.  A later cap does not
        bound such a charge.
        """
        spans = zip(self.caps, [*(cap.charges_before for cap in self.caps[1:]), charges], strict=False)
        return any(cap.max_epsilon is None and cap.charges_before < end for cap, end in spans)  # () without caps


@spec
class Verification:
    """The result of verifying a ledger."""

    num_events: int
    first: str  # hash of the ledger's first event, which no other ledger has
    head: str  # of its newest
    site_key: str
    key_expected: bool
    anchor_sequence: int | None

    @property
    def rollback_excluded(self) -> bool:
        """Whether an anchor covers the ledger's last event, so that no event up to the anchor can be missing."""
        return (self.anchor_sequence or 0) >= self.num_events


@spec
class Release:
    """Something that left the site, or a refusal; equal releases of one run are counted together."""

    kind: str  # "update", "own_release", "refusal", "offer", "reservation_without_update"
    run: str
    reason: str | None  # of a refusal
    count: int
    first: str | None  # when; a ledger's only to the day, since a policy may hide when exactly its site trained
    last: str | None


@spec
class StartAdapter:
    """The adapter from which the run started; None: unknown, except that an epsilon of None with a delta means
    unbounded.
    """

    digest: str
    run: str | None
    dataset: str | None
    unit: str | None
    delta: float | None
    epsilon: float | None
    public: bool = False  # the run's own public stage trained it, on records that its lead declares to be public


@spec
class Provenance:
    """The origin of the run; None: unknown, except that a `start_adapter` of None means that the run started with a
    new one.
    """

    fedtune_version: str
    config_sha256: str | None = None
    model: str | None = None
    model_sha256: str | None = None
    model_license: str | None = None
    dataset: str | None = None
    task: str | None = None
    libraries: Mapping[str, str]
    python: str | None = None
    machine: str | None = None
    start_adapter: StartAdapter | None = None
    purpose: str | None = None  # of the training, in the words of a person
    channel: str | None = None  # how the model is released, likewise
    acceptable_use: str | None = None  # what users may do with it, likewise


@spec
class SiteStatement:
    """The parts of a site's signed report of its own ledger that a run's report repeats."""

    date: str | None  # day of the report
    same_plan: bool  # whether its ledger holds the plan that the run asked for, if it knows the run
    verdict: BudgetVerdict
    approved: Approved
    lifetime: Lifetime
    charges: int  # that its ledger holds, as `Cap.charges_before` counts them
    verification: Verification | None
    releases: tuple[Release, ...]
    asserted: Mapping[str, bool]


@spec
class AuditBound:
    """An empirical lower bound on epsilon, and the best bound that `canaries` planted records could give."""

    site: str | None  # None: on the aggregated model, over all audited sites
    claimed_epsilon: float
    lower_bound: float
    best_possible: float
    canaries: int
    guesses: int
    right: int
    fdp_bound: float | None = None  # if the mechanism is about Gaussian; None: an audit from before it was computed

    def __post_init__(self) -> None:
        check_at_least("claimed_epsilon", self.claimed_epsilon, 0)
        if not 0 <= self.right <= self.guesses <= self.canaries <= _MOST_CANARIES:
            said = f"{self.right} of {self.guesses} of {self.canaries}"
            raise ConfigError("right", said, "must be at most the guesses, which must be at most the canaries")


@spec
class AuditHitRate:
    """The true positive rate of an attack at a false positive rate of `false_alarms`; None: too few records to say."""

    false_alarms: float
    found: float | None
    low: float | None
    high: float | None


@spec
class AuditMembership:
    """How well a score separates real training records from records that were not used; `site` as in `AuditBound`."""

    site: str | None
    score: str
    trained_on: int
    never_used: int
    auroc: float
    auroc_low: float
    auroc_high: float
    hit_rates: tuple[AuditHitRate, ...]

    def __post_init__(self) -> None:
        if not self.hit_rates:
            raise ConfigError("hit_rates", [], "must have at least one rate: every membership attack has one")


@spec
class Audit:
    """The findings of an attempt to break the guarantee; each figure holds with `confidence` on its own."""

    method: str
    confidence: float
    delta: float
    seeded: bool
    exceeded: bool  # a lower bound is above its claim, so that the implementation or the claim is wrong
    bounds: tuple[AuditBound, ...]
    membership: tuple[AuditMembership, ...]

    def __post_init__(self) -> None:
        check_at_least("confidence", self.confidence, LEAST_CONFIDENCE)
        check_fraction("confidence", self.confidence)


@spec
class SiteFacts:
    """One site of a run, as its lead knows it."""

    site: str
    declared_size: int | None
    receipt: Receipt | None  # its newest of this run, as it signed it; None: the lead has none
    statement: SiteStatement | None = None  # from a report that it signed

    @property
    def final(self) -> bool:
        """Whether the site's receipt says that the run has ended there and will be charged nothing more."""
        return self.receipt is not None and self.receipt.ended


@spec
class RunFacts:
    """The facts of a run."""

    kind: Literal["run"]
    name: str
    run: str  # as the sites' ledgers call it
    sent: str  # the settings that real sites were sent, of which the run's name has the digest; "" for a simulation
    plan: Plan
    target_epsilon: float | None  # that the run was given
    seeded_noise: bool
    date: str | None  # of the newest thing on record
    sampling: str | None  # how the process that trained says units joined a step; None: nobody noted it
    randomness: str | None  # where it says noise came from, likewise
    inexact_gradients: bool | None  # whether the policies of all simulated sites accept them; None: not on file
    config_file_sha256: str  # of the `config.yaml` in the folder; `provenance` has that of the run's
    primary_metric: str
    checkpoint_selection: Literal["last", "best"]
    early_stopping_patience: int | None
    settings: Mapping[str, Value]  # of the run, that its cells show
    trained_parameters: int | None  # None: not known
    provenance: Provenance
    rounds: tuple[RoundResult, ...]  # the finished ones, without the sites' noised scores
    before: Scores  # on the test file before training
    final: Scores  # after it
    seconds: float | None
    findings: tuple[str, ...]
    energy: Energy | None
    detail: Detail | None
    selection: Selection | None
    audit: Audit | None  # what an attack found
    canaries_planted: bool  # one was begun
    sites: tuple[SiteFacts, ...]
    files: Mapping[str, str]  # file of the finished model, and of each export -> its SHA-256
    held_out: tuple[HeldOut, ...] | None = None  # noised scores of runs up to this one, each begun in the one before
    constant: float | None = (
        None  # `primary_metric` of the best constant answer to the test file; None: there is no such
    )
    total_parameters: int | None = None  # the frozen ones included; None: not known
    group_scores: Mapping[str, float | None] = field(default_factory=dict)  # that `fedtune compare --by` found

    @property
    def unit(self) -> Unit:
        return self.plan.unit

    @property
    def delta(self) -> float:
        return self.plan.delta

    @property
    def declared_sizes(self) -> Mapping[str, int | None]:
        return {site.site: site.declared_size for site in self.sites}

    @property
    def _federation(self) -> FederationSpec:
        plan, kept, after = self.plan, self.checkpoint_selection, self.early_stopping_patience
        return FederationSpec(
            num_rounds=plan.num_rounds,
            spare_rounds=plan.spare_rounds,
            checkpoint_selection=kept,
            early_stopping_patience=after,
        )

    @property
    def finished(self) -> bool:
        """Whether every round was aggregated, or early stopping ended the run."""
        return should_stop(self.rounds, self._federation, primary_metric=self.primary_metric)

    @property
    def progress(self) -> str:
        return f"{len(self.rounds)} / {count_rounds(self.rounds, self._federation)}"

    @property
    def kept(self) -> Kept | None:
        """The round that validation scores selected; None if they did not decide."""
        return find_kept_round(self.rounds, self._federation, primary_metric=self.primary_metric)

    @property
    def unchanged(self) -> bool:
        """Whether `config.yaml` is still the one with which the run was made."""
        return self.config_file_sha256 == self.provenance.config_sha256

    @property
    def deployed(self) -> bool:
        return self.settings.get("runtime") == "deployment"

    @property
    def simulated(self) -> bool:
        """Whether one machine holds all keys, as the settings or any site's own signature say."""
        return not self.deployed or any(site.receipt and site.receipt.simulated for site in self.sites)

    def count_charged_rounds(self, site: SiteFacts) -> int:
        """Return the number of rounds that count as charged at a site, including retries.

        Guarantee: it is less than the whole plan only if the site signed that it charged no more and that the run has
        ended in its ledger.  What the lead repeats from a site's own report can only increase it.
        """
        told = [run.rounds for run in site.statement.lifetime.runs if run.run == self.run] if site.statement else []
        signed = site.receipt.charged_rounds if site.receipt and site.receipt.ended else self.plan.most_rounds
        return max(signed, *told, 0)

    def is_upper_bound(self, site: SiteFacts) -> bool:
        """Whether the site may have charged fewer rounds, because it did not sign that the run has ended there."""
        return not site.final and (site.receipt is None or site.receipt.charged_rounds < self.plan.most_rounds)


@spec
class ChargedRounds:
    """The charges of one or more ledger entries: consecutive rounds of one run, or the charges of a lost branch."""

    run: str  # "" for a lost branch
    rounds: int
    round: int | None  # of one round that the report shows by itself; None: several, or a run that it shows as a whole
    day: str  # of the last of them
    lost: tuple[Charge, ...] = ()  # mechanisms of the lost branch
    entry: int | None = None  # that made up for it
    lost_cohorts: tuple[str, ...] | None = None  # of each of these, whom it was charged to; None: everybody
    lost_rows: bool | None = None  # the register of arrivals may lack rows: the oldest cohort owes all charged so far

    def __post_init__(self) -> None:
        check_at_least("rounds", self.rounds, 1 if self.run else 0)


@spec
class RunInLedger:
    """A run that a ledger accepted."""

    run: str
    lead: str
    dataset: str
    state: Literal["open", "ended", "expired"]
    plan: Plan
    lost_rounds: int  # that it was charged on lost branches
    max_epsilon: float | None  # the cap on one run that was in force when it was accepted; None: there was none
    seeded_noise: bool
    base_model: str
    release: str = ""  # what kind of release of the site's own it is; "": it is a lead's run
    approvals: tuple[Mapping[str, str | None], ...] = ()  # when, by whom, by which ticket and why; None: not on record

    def __post_init__(self) -> None:
        check_at_least("lost_rounds", self.lost_rounds, 0)
        if any({*one} != {"what", "day", "by", "ticket", "why"} for one in self.approvals):
            raise ConfigError(
                "approvals", list(self.approvals), "must each have the keys what, day, by, ticket and why"
            )


@spec
class LedgerFacts:
    """The facts of a ledger."""

    kind: Literal["ledger"]
    site: str
    population: str
    date: str  # of its newest entry
    unit: Unit
    delta: float
    order: float  # of the filter, fixed when the ledger was made
    declared_size: int
    approved: Approved  # of each cap the smaller of the noted one and the policy's
    reference: ReferenceRun  # a typical run
    caps: tuple[Cap, ...]
    runs: tuple[RunInLedger, ...]
    charges: tuple[ChargedRounds, ...]  # in order
    lost_seed: bool  # whether noise on a lost branch came from a seed
    frozen: bool
    in_doubt: bool
    simulated: bool  # whether the site was ever one of a simulation's
    inexact_gradients: bool  # whether one of its policies accepted them
    policy_noted: bool | None  # the ledger has noted the policy in force, with its digest; None: it was not given
    policy_digest: str
    verification: Verification | None
    problem: str  # why the ledger does not verify; "": it does
    releases: tuple[Release, ...]
    asserted: Mapping[str, bool]
    settings: Mapping[str, Value] = field(default_factory=dict)  # of its runs, that its cells show
    limits_loosened: tuple[str, ...] = ()  # days on which a limit for a run or a period was loosened, after a charge
    provenance: Provenance
    arrivals: Calendar | None = None  # the calendar by which its people arrive; None: one budget for everybody

    @property
    def name(self) -> str:
        return f"{self.site} {self.population}"

    @property
    def declared_sizes(self) -> Mapping[str, int | None]:
        return {self.site: self.declared_size}

    @property
    def seeded_noise(self) -> bool:
        return self.lost_seed or any(run.seeded_noise for run in self.runs)


Facts = RunFacts | LedgerFacts
