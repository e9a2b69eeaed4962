"""What a report says of one site, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from fedtune.privacy.proposal import UNVERIFIED
from fedtune.spec import spec

State = Literal["within", "exceeded", "no_guarantee"]
Source = Literal["charged_by_receipts", "run_record", "own_ledger", "signed_site_report", "not_released"]


@spec
class Verdict:
    """Whether what was spent stays within what was approved; `reasons` are codes of the catalogue."""

    state: State
    reasons: tuple[str, ...] = ()


@spec
class Approved:
    """What the site's policy allows; None: no bound of that kind.

    Attributes:
        since: when the newest lifetime cap was noted; None: it stands in the policy, and the ledger has not noted it.
    """

    max_epsilon: float | None
    max_epsilon_per_run: float | None
    max_epsilon_per_period: float | None
    period: str
    since: str | None


@spec
class Spent:
    """What was charged.

    Attributes:
        epsilon: the figure that the verdict uses: of a run by PLD, of a ledger by the filter.
        epsilon_pld: the same charges by PLD, and `epsilon_rdp` by RDP.
        planned_epsilon: of the whole plan by PLD; None for a ledger.
        upper_bound: a site fell silent, or its receipts are missing, and every round that may be charged is counted.
    """

    epsilon: float | None
    epsilon_pld: float | None
    epsilon_rdp: float | None
    planned_epsilon: float | None
    upper_bound: bool
    rounds: int
    steps: int


@spec
class Posterior:
    """How sure an attacker can become that a record was used, from epsilon alone.

    No bound for every single outcome: `ceiling` is passed with a small chance, which can be many times delta.
    """

    prior: float
    ceiling: float


@spec
class HitRate:
    """Share of used records that an attacker finds at a share of false alarms: at most."""

    false_alarms: float
    ceiling: float
    mechanism: float | None


@spec
class Meaning:
    """What (epsilon, delta) means as frequencies.

    Attributes:
        right_of_100_ceiling: of 100 guesses whether a record was used, half of which were, at most so many are right,
            from (epsilon, delta) alone; `right_of_100_mechanism` by the mechanism's own curve.
        expected_failures: declared size times delta.
    """

    right_of_100_ceiling: float
    right_of_100_mechanism: float | None
    posterior: tuple[Posterior, ...]
    hit_rates: tuple[HitRate, ...]
    expected_failures: float | None


@spec
class Charge:
    """A mechanism as `privacy.events` writes it, and how often it ran."""

    event: Mapping[str, Any]
    count: int


@spec
class Mechanism:
    """What one run did at one site, and the events from which its epsilon can be computed again.

    Attributes:
        records_per_user: most records of one unit in a step; 1 where the unit is a record.
    """

    run: str
    sampling_assumed: str
    sampling_run: str
    sampling_rate: float
    noise_multiplier: float
    max_grad_norm: float | None
    local_steps: int
    rounds: int
    metrics_noise_multiplier: float
    charges: tuple[Charge, ...]
    records_per_user: int = 1


@spec
class CurvePoint:
    """Epsilon at a delta."""

    delta: float
    epsilon_pld: float | None
    epsilon_rdp: float | None


@spec
class Step:
    """Epsilon after a round, or after a run, in order."""

    run: str
    round: int | None
    time: str | None
    epsilon: float | None


@spec
class LifetimeRun:
    """One run in a ledger.

    Attributes:
        base_model: SHA-256 of the weights that the run named, or "unverified".
        adapter_sha256: of the final adapter, where the lead gave it to the site.
    """

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
    base_model: str = UNVERIFIED
    adapter_sha256: str | None = None


@spec
class Cap:
    """A lifetime cap, and from when on."""

    time: str
    max_epsilon: float | None


@spec
class Lifetime:
    """A ledger's figures over all its runs."""

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


@spec
class Verification:
    """What checking a ledger found."""

    num_events: int
    head: str
    site_key: str
    key_expected: bool
    rollback_excluded: bool
    anchor_sequence: int | None


@spec
class Release:
    """Something that left the site, or was refused; equal ones of one run are counted together.

    Attributes:
        kind: "update", "refusal", "offer", "reservation_without_update".
        reason: of a refusal.
        first: when; a ledger's only to the day, since a policy may hide when exactly its site trained.
    """

    kind: str
    run: str
    reason: str | None
    count: int
    first: str | None
    last: str | None


@spec
class SiteReport:
    """One site.

    Attributes:
        source: where the figures come from.
        reported: day of the site's own report, where the figures over all runs come from one.
        left: epsilon that the lifetime cap leaves for new runs.
        asserted: what the site states and no software can check.
    """

    site: str
    source: Source
    verdict: Verdict
    declared_size: int | None
    approved: Approved | None
    spent: Spent | None
    left: float | None
    meaning: Meaning | None
    mechanisms: tuple[Mechanism, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    steps: tuple[Step, ...] = ()
    lifetime: Lifetime | None = None
    verification: Verification | None = None
    releases: tuple[Release, ...] = ()
    asserted: Mapping[str, bool] = field(default_factory=dict)
    reported: str | None = None
