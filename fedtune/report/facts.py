"""The source data of a report, from which every other value in the report is derived (`derive`).

The builders read these values from a run's folder or from a ledger. They are plans, counts, limits and dates, and never
contain record data. A verifier derives all other values again; only a signature vouches for the source data itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from itertools import pairwise
from typing import Any, Literal

from fedtune.codec import parse_json, require
from fedtune.federation.drift import HeldOut
from fedtune.federation.early_stopping import SelectedRound, count_rounds, select_round, should_stop
from fedtune.federation.lead import RoundResult, Scores
from fedtune.federation.spec import FederationSpec
from fedtune.formatting import convert_none_to_infinite
from fedtune.model.adapter_files import ADAPTER, combine_hashes
from fedtune.privacy.cohorts import Calendar
from fedtune.privacy.events import Charge
from fedtune.privacy.mechanism import Unit
from fedtune.privacy.release import Receipt
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import Selection
from fedtune.privacy.site_policy import ReferenceRun
from fedtune.report.attacks import RunAttacks, check_confidence
from fedtune.runs.cost import Energy
from fedtune.show.budget_text import ArrivalRange
from fedtune.spec import NOT_GIVEN, check_at_least, spec
from fedtune.tasks.measures import Detail

Value = str | int | float | tuple[str, ...] | Mapping[str, int | float | None] | None
"""The value of a fact in a cell; None: unknown."""
State = Literal["within", "exceeded", "no_guarantee"]
Source = Literal["charged_by_receipts", "own_ledger", "signed_site_report", "not_released"]
NOT_RECORDED = "not_recorded"  # for a fact that was not recorded at the time
_MAX_CANARIES = 10**6  # canaries at one site


@spec
class BudgetVerdict:
    """Whether the spent epsilon is within the approved budget; `reasons` contains codes from the catalog."""

    state: State
    reasons: tuple[str, ...] = ()


@spec
class ApprovedBudget:
    """The budget limits in a site's policy; a field is None if the policy sets no such limit."""

    max_epsilon: float | None
    max_epsilon_per_run: float | None
    max_epsilon_per_period: float | None
    period: Calendar


@spec
class Cap:
    """A lifetime cap on epsilon, and the time when it took effect."""

    time: str
    max_epsilon: float | None
    charges_before: int  # number of earlier charges in the ledger: charged rounds plus restored backups


@spec
class LifetimeRun:
    """One run in a ledger, with its charged rounds and its epsilon."""

    run: str
    lead: str
    dataset: str
    state: str
    rounds: int
    max_rounds: int
    steps: int
    epsilon: float | None
    planned_epsilon: float | None
    seeded_noise: bool


@spec
class CohortFigures:
    """The privacy budget of people who arrived in the same periods; all fields except `people` are as in `Lifetime`."""

    people: ArrivalRange
    epsilon: float | None
    with_reserved: float | None
    remaining_epsilon: float | None


@spec
class Lifetime:
    """A ledger's budget figures over all runs; with several arrival cohorts, the figures of the most exposed cohort.

    Remaining epsilon and runs are under the lifetime and period caps on the report's date;
    `reference_runs_in_lifetime` ignores the period cap.
    """

    order: float
    epsilon: float | None
    with_reserved: float | None
    epsilon_pld: float | None
    epsilon_rdp: float | None
    remaining_epsilon: float | None
    period: str
    period_epsilon: float | None
    reference_remaining_runs: int | None
    reference_runs_in_lifetime: int | None
    caps: tuple[Cap, ...]
    runs: tuple[LifetimeRun, ...]
    frozen: bool
    in_doubt: bool
    restored: int
    seeded: bool
    cohorts: tuple[CohortFigures, ...] | None = None

    @property
    def has_guarantee(self) -> bool:
        """Whether any guarantee holds for the site's releases."""
        return not self.seeded and self.epsilon is not None

    @property
    def cap_raised(self) -> bool:
        """Whether a lifetime cap was raised after a charge, possibly because of that charge's release."""
        return any(
            later.charges_before > 0
            and convert_none_to_infinite(later.max_epsilon) > convert_none_to_infinite(cap.max_epsilon)
            for cap, later in pairwise(self.caps)
        )

    def has_spent_without_cap(self, charges: int) -> bool:
        """Whether any of the first `charges` charges was made without a lifetime cap; a later cap does not bound such a
        charge.
        """
        spans = zip(self.caps, [*(cap.charges_before for cap in self.caps[1:]), charges], strict=False)
        return any(cap.max_epsilon is None and cap.charges_before < end for cap, end in spans)  # () without caps


@spec
class Verification:
    """The result of verifying a ledger's hash chain and signatures."""

    num_events: int
    first: str  # hash of the ledger's first event, which identifies the ledger
    head: str  # hash of the ledger's newest event
    site_key: str
    key_expected: bool
    anchor_sequence: int | None

    @property
    def rollback_excluded(self) -> bool:
        """Whether an anchor covers the ledger's last event, so that no earlier event can be missing."""
        return (self.anchor_sequence or 0) >= self.num_events


@spec
class Release:
    """A release from the site, or a refusal; equal releases of one run share an entry with a count."""

    kind: str  # "update", "own_release", "refusal", "offer", "reservation_without_update"
    run: str
    reason: str | None  # reason for a refusal
    count: int
    first: str | None  # time of the first release; only the day for a ledger, since a policy may hide training times
    last: str | None  # time of the last release


@spec
class StartAdapter:
    """The adapter from which the run started; a field is None if unknown, but an `epsilon` of None with a `delta` is
    unbounded.
    """

    digest: str
    run: str | None
    dataset: str | None
    unit: str | None
    delta: float | None
    epsilon: float | None
    public: bool = False  # whether the run's public stage trained it, on records that the lead declares to be public


@spec
class Provenance:
    """The origin of the run's code, model and data; a field is None if unknown.

    A `start_adapter` of None means that the run started with a new adapter.
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
    purpose: str | None = None  # purpose of the training, as stated in report.about
    channel: str | None = None  # release channel of the model, as stated in report.about
    acceptable_use: str | None = None  # permitted uses of the model, as stated in report.about


@spec
class SiteStatement:
    """The excerpt of a site's signed ledger report that a run's report includes."""

    date: str | None  # date of the site's report
    same_plan: bool  # whether the ledger contains the run with the requested plan, or does not contain the run
    verdict: BudgetVerdict
    approved: ApprovedBudget
    lifetime: Lifetime
    charges: int  # number of charges in the ledger, counted as in `Cap.charges_before`
    verification: Verification | None
    releases: tuple[Release, ...]
    asserted: Mapping[str, bool]


@spec
class AuditBound:
    """An empirical lower bound on epsilon, and the largest bound that an audit with `canaries` planted records can
    prove.
    """

    site: str | None  # None: a bound for the aggregated model over all audited sites
    claimed_epsilon: float
    lower_bound: float
    best_possible: float
    canaries: int
    guesses: int
    correct: int
    fdp_bound: float | None = None  # bound for an approximately Gaussian mechanism; None: an older audit without it

    def __post_init__(self) -> None:
        check_at_least("claimed_epsilon", self.claimed_epsilon, 0)
        ordered = 0 <= self.correct <= self.guesses <= self.canaries <= _MAX_CANARIES
        said = f"{self.correct} of {self.guesses} of {self.canaries}"
        bound = "must not exceed the guesses, and the guesses must not exceed the canaries"
        require("correct", said, ordered, bound)


@spec
class AuditHitRate:
    """The true positive rate of an attack at a false positive rate; None: too few records to estimate it."""

    false_positive_rate: float
    true_positive_rate: float | None
    low: float | None
    high: float | None


@spec
class AuditMembership:
    """How well an attack score separates training records from unused records; `site` is as in `AuditBound`."""

    site: str | None
    score: str
    members: int
    non_members: int
    auroc: float
    auroc_low: float
    auroc_high: float
    hit_rates: tuple[AuditHitRate, ...]

    def __post_init__(self) -> None:
        require("hit_rates", [], bool(self.hit_rates), "must contain at least one rate")


@spec
class Audit:
    """The results of a privacy audit; each figure holds with the given `confidence` on its own."""

    method: str
    confidence: float
    delta: float
    seeded: bool
    exceeded: bool  # whether a lower bound exceeds the claimed epsilon, so that the implementation or claim is wrong
    bounds: tuple[AuditBound, ...]
    membership: tuple[AuditMembership, ...]

    def __post_init__(self) -> None:
        check_confidence(self.confidence)


@spec
class SiteFacts:
    """The lead's data about one site of a run: declared size, newest receipt, and the site's own statement."""

    site: str
    declared_size: int | None
    receipt: Receipt | None  # newest signed receipt for this run; None: the lead has received no receipt
    statement: SiteStatement | None = None  # excerpt of the site's signed ledger report

    @property
    def final(self) -> bool:
        """Whether the site's receipt confirms that the run has ended and that no further round will be charged."""
        return self.receipt is not None and self.receipt.ended


@spec
class RunFacts:
    """The source data of a run's report."""

    kind: Literal["run"]
    name: str
    run: str  # name of the run in the sites' ledgers
    sent: str  # settings sent to real sites as JSON, whose digest is part of the run's name; "" for a simulation
    plan: Plan
    target_epsilon: float | None  # epsilon in the run's settings
    seeded_noise: bool
    date: str | None  # time of the newest entry in the run folder
    sampling: str | None  # sampling scheme recorded by the training process; None: not recorded
    randomness: str | None  # source of the noise recorded by the training process; None: not recorded
    inexact_gradients: bool | None  # whether all simulated sites' policies accept them; None: the policies are missing
    config_file_sha256: str  # digest of the folder's `config.yaml`; `provenance` has the digest of the run's settings
    primary_metric: str
    checkpoint_selection: Literal["last", "best"]
    early_stopping_patience: int | None
    settings: Mapping[str, Value]  # settings that the cells show
    trained_parameters: int | None  # None: unknown
    provenance: Provenance
    rounds: tuple[RoundResult, ...]  # finished rounds, without the sites' noised scores
    before: Scores  # scores on the test file before training
    final: Scores  # scores on the test file after training
    seconds: float | None
    findings: tuple[str, ...]
    energy: Energy | None
    detail: Detail | None
    selection: Selection | None
    audit: Audit | None  # results of a finished privacy audit
    canaries_planted: bool  # whether an audit has planted canaries in the run's records
    sites: tuple[SiteFacts, ...]
    files: Mapping[str, str]  # file of the finished model or of an export -> SHA-256
    held_out: tuple[HeldOut, ...] | None = None  # noised held-out scores of this run and of its predecessors in order
    constant: float | None = None  # `primary_metric` of the best constant prediction on the test file; None: undefined
    total_parameters: int | None = None  # including frozen parameters; None: unknown
    group_scores: Mapping[str, float | None] = field(default_factory=dict)  # by group, from `fedtune compare --by`
    attacks: RunAttacks | None = None  # results of `fedtune attack` on this model; exact scores of real records

    def parse_sent_settings(self) -> Mapping[str, Any]:
        """Parse the settings that real sites received, by group.

        Raises:
            ConfigError: `sent` is not a JSON object, or a group or a list of names that the checks read has another
                type.
        """
        bound = "must be the settings that the sites received"
        sent = parse_json(self.sent, key="sent", bound=bound)
        for name in ("data", "federation", "model", "privacy"):
            require("sent", NOT_GIVEN, isinstance(sent.get(name), dict), bound)
        federation, signers = sent["federation"], sent["privacy"].get("start_keys")
        for names in (federation.get("site_names"), federation.get("participants"), signers or []):
            right = isinstance(names, list) and all(isinstance(one, str) for one in names)
            require("sent", NOT_GIVEN, right, bound)
        return sent

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
    def selected_round(self) -> SelectedRound | None:
        """The round that validation scores selected; None: no round was selected by its scores."""
        return select_round(self.rounds, self._federation, primary_metric=self.primary_metric)

    @property
    def unchanged(self) -> bool:
        """Whether `config.yaml` still contains the settings of the run."""
        return self.config_file_sha256 == self.provenance.config_sha256

    @property
    def adapter_digest(self) -> str:
        """The digest of the run's own adapter, computed from `files`; "" before the run has finished."""
        own = {name: sha256 for name, sha256 in self.files.items() if name.startswith(f"{ADAPTER}/")}
        return combine_hashes(own) if own else ""

    def find_signed_adapter(self) -> tuple[str, tuple[str, ...]]:
        """Return the digest of the final adapter that the charged sites signed, and the sites that did not sign it.

        Guarantee: if the second value is empty and the first is not, the final receipt of each charged site signs this
        digest (`Adapter.digest` of the trained tensors). Other receipts sign the digest of another answer.
        """
        charged = [site for site in self.sites if self.count_charged_rounds(site)]
        signed = {site.site: site.receipt.reply if site.receipt and site.final else "" for site in charged}
        digest = next(filter(None, signed.values()), "")
        return digest, tuple(name for name, reply in signed.items() if not reply or reply != digest)

    @property
    def deployed(self) -> bool:
        return self.settings.get("runtime") == "deployment"

    @property
    def simulated(self) -> bool:
        """Whether one machine holds all sites' keys, according to the settings or to any site's signed receipt."""
        return not self.deployed or any(site.receipt and site.receipt.simulated for site in self.sites)

    def count_charged_rounds(self, site: SiteFacts) -> int:
        """Return the number of rounds that count as charged at a site, including retries.

        Guarantee: the number is below that of the whole plan only if the site signed a final receipt with fewer charged
        rounds. Figures from a site's own report can only increase the number.
        """
        told = [run.rounds for run in site.statement.lifetime.runs if run.run == self.run] if site.statement else []
        signed = site.receipt.charged_rounds if site.receipt and site.receipt.ended else self.plan.max_rounds
        return max(signed, *told, 0)

    def is_upper_bound(self, site: SiteFacts) -> bool:
        """Whether the number of charged rounds is only an upper bound, since the site has signed no final receipt."""
        return not site.final and (site.receipt is None or site.receipt.charged_rounds < self.plan.max_rounds)


@spec
class ChargedRounds:
    """The charges of one or more ledger entries: consecutive rounds of one run, or the charges of a lost branch."""

    run: str  # "" for a lost branch
    rounds: int
    round: int | None  # round number if the entry covers a single round; None: several rounds, or a whole run
    day: str  # date of the last charge
    lost: tuple[Charge, ...] = ()  # mechanisms of the lost branch
    entry: int | None = None  # number of the ledger entry that charged for the lost branch
    lost_cohorts: tuple[str, ...] | None = None  # charged cohorts of each mechanism in `lost`; None: all people
    lost_rows: bool | None = None  # whether arrival rows were lost, so that the oldest cohort owes all charges so far

    def __post_init__(self) -> None:
        check_at_least("rounds", self.rounds, 1 if self.run else 0)


@spec
class RunInLedger:
    """A run that a ledger has accepted."""

    run: str
    lead: str
    dataset: str
    state: Literal["open", "ended", "expired"]
    plan: Plan
    lost_rounds: int  # rounds charged on lost branches
    max_epsilon: float | None  # per-run cap in force when the run was accepted; None: no cap
    seeded_noise: bool
    base_model: str
    release: str = ""  # kind of the site's own release; "" for a lead's run
    approvals: tuple[Mapping[str, str | None], ...] = ()  # day, approver, ticket and reason; None: not recorded

    def __post_init__(self) -> None:
        check_at_least("lost_rounds", self.lost_rounds, 0)
        right = all({*one} == {"what", "day", "by", "ticket", "why"} for one in self.approvals)
        bound = 'must each have exactly the keys "what", "day", "by", "ticket" and "why"'
        require("approvals", list(self.approvals), right, bound)


@spec
class LedgerFacts:
    """The source data of a ledger's report."""

    kind: Literal["ledger"]
    site: str
    population: str
    date: str  # date of the ledger's newest entry
    unit: Unit
    delta: float
    order: float  # Renyi order of the privacy filter, fixed when the ledger was created
    declared_size: int
    approved: ApprovedBudget  # for each cap, the smaller of the ledger's and the current policy's value
    reference: ReferenceRun  # typical run for estimating the number of runs left
    caps: tuple[Cap, ...]
    runs: tuple[RunInLedger, ...]
    charges: tuple[ChargedRounds, ...]  # in ledger order
    lost_seed: bool  # whether noise on a lost branch came from a seed
    frozen: bool
    in_doubt: bool
    simulated: bool  # whether the site was ever part of a simulation
    inexact_gradients: bool  # whether any of the site's policies accepted inexact gradients
    policy_noted: bool | None  # whether the ledger has recorded the current policy; None: no policy was given
    policy_digest: str
    verification: Verification | None
    problem: str  # reason why the ledger does not verify; "" if it verifies
    releases: tuple[Release, ...]
    asserted: Mapping[str, bool]
    settings: Mapping[str, Value] = field(default_factory=dict)  # settings of the runs that the cells show
    limits_loosened: tuple[str, ...] = ()  # dates on which a limit per run or period was loosened after a charge
    provenance: Provenance
    arrivals: Calendar | None = None  # arrival calendar of the site's people; None: one budget for all people

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
