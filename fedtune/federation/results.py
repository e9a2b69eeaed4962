"""`run.json`: what a run came to, as one value that the lead writes and every reader reads.

Others rely on its keys, which are the fields below.  None stands for what is not finite: JSON has no word for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedtune import __version__
from fedtune.federation.lead import LeadState, RoundResult, Scores, site_charge
from fedtune.privacy.accountant import NEIGHBOURING_RELATION
from fedtune.privacy.plan import Plan
from fedtune.words import finite, finite_scores

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalResult:
    """The finished run: scores on the test file before and after, whole wall time, peak memory of this process."""

    metrics: Scores
    metrics_before: Scores = field(default_factory=dict)
    seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteResult:
    """What one site was charged, as `lead.SiteCharge`, and the plan's numbers; nothing bounds an epsilon of None."""

    epsilon: float | None = None
    epsilon_rdp: float | None = None
    rounds: int
    planned_epsilon: float | None = None
    steps: int
    sampling_rate: float
    noise_multiplier: float
    metrics_noise_multiplier: float
    upper_bound: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyResult:
    """What the run promises: `epsilon` is the largest of its sites'."""

    unit: str = "record"
    records_per_user: int = 1
    neighbouring_relation: str = NEIGHBOURING_RELATION.name.lower()
    delta: float
    epsilon: float | None = None
    seeded_noise: bool
    sites: Mapping[str, SiteResult]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """The content of `run.json`."""

    schema_version: int = SCHEMA_VERSION
    fedtune_version: str = ""
    config_sha256: str = ""
    task: str = ""
    rounds: tuple[RoundResult, ...]
    final: FinalResult
    privacy: PrivacyResult

    @classmethod
    def of(
        cls,
        state: LeadState,
        final: FinalResult,
        plan: Plan,
        *,
        sites: tuple[str, ...],
        task: str,
        config_sha256: str,
        seeded_noise: bool,
    ) -> RunResult:
        """What the run in `state` came to; every epsilon is derived here from charged rounds and the plan."""
        charges = {site: site_charge(state, site, plan) for site in sites}
        before, after = finite_scores(final.metrics_before), finite_scores(final.metrics)
        return cls(
            fedtune_version=__version__,
            config_sha256=config_sha256,
            task=task,
            rounds=tuple(replace(result, metrics=finite_scores(result.metrics)) for result in state.rounds),
            final=replace(final, metrics=after, metrics_before=before),
            privacy=PrivacyResult(
                unit=plan.unit,
                records_per_user=plan.records_per_user,
                delta=plan.delta,
                epsilon=finite(max(charge.epsilon for charge in charges.values())),
                seeded_noise=seeded_noise,
                sites={
                    site: SiteResult(
                        epsilon=finite(charge.epsilon),
                        epsilon_rdp=finite(charge.epsilon_rdp),
                        rounds=charge.rounds,
                        planned_epsilon=finite(charge.planned_epsilon),
                        steps=charge.steps,
                        sampling_rate=plan.sampling_rate,
                        noise_multiplier=plan.noise_multiplier,
                        metrics_noise_multiplier=plan.metrics_noise_multiplier,
                        upper_bound=charge.upper_bound,
                    )
                    for site, charge in charges.items()
                },
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, in the order of the fields."""
        return asdict(self)
