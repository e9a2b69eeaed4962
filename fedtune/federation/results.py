"""`run.json`: what a run came to, in the keys that others rely on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedtune import __version__
from fedtune.federation.lead import LeadState, site_charge
from fedtune.privacy.accountant import NEIGHBOURING_RELATION
from fedtune.privacy.plan import Plan

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalResult:
    """The finished run: scores on the test file before and after, whole wall time, peak memory of this process."""

    metrics: Mapping[str, float]
    metrics_before: Mapping[str, float]
    seconds: float
    peak_memory_bytes: int


def run_json(
    state: LeadState,
    final: FinalResult,
    plan: Plan,
    *,
    sites: tuple[str, ...],
    task: str,
    config_sha256: str,
    seeded_noise: bool,
) -> dict[str, object]:
    """The content of `run.json`.  Every epsilon is derived here from charged rounds and the plan."""
    charges = {site: site_charge(state, site, plan) for site in sites}
    epsilons = [charge.epsilon for charge in charges.values()]
    return {
        "schema_version": SCHEMA_VERSION,
        "fedtune_version": __version__,
        "config_sha256": config_sha256,
        "task": task,
        "rounds": [_jsonable(asdict(result)) for result in state.rounds],
        "final": _jsonable(asdict(final)),
        "privacy": {
            "unit": plan.unit,
            "records_per_user": plan.records_per_user,
            "neighbouring_relation": NEIGHBOURING_RELATION.name.lower(),
            "delta": plan.delta,
            "epsilon": _finite(max(epsilons)),
            "seeded_noise": seeded_noise,
            "sites": {
                site: {
                    "epsilon": _finite(charge.epsilon),
                    "epsilon_rdp": _finite(charge.epsilon_rdp),
                    "rounds": charge.rounds,
                    "planned_epsilon": _finite(charge.planned_epsilon),
                    "steps": charge.steps,
                    "sampling_rate": plan.sampling_rate,
                    "noise_multiplier": plan.noise_multiplier,
                    "metrics_noise_multiplier": plan.metrics_noise_multiplier,
                    "upper_bound": charge.upper_bound,
                }
                for site, charge in charges.items()
            },
        },
    }


def _jsonable(result: dict[str, Any]) -> dict[str, Any]:
    """A diverged model's loss may not be finite; JSON has no word for that but null."""
    return {
        key: {name: _finite(score) for name, score in value.items()} if key.startswith("metrics") else value
        for key, value in result.items()
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: for an epsilon, null says that nothing bounds the loss."""
    return value if math.isfinite(value) else None
