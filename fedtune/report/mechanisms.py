"""What rounds of a plan did to the privacy units, as a report says it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from dp_accounting import DpEvent

from fedtune.privacy import events
from fedtune.privacy.plan import Plan
from fedtune.report.site_model import Charge, Mechanism


def charged_events(plan: Plan, rounds: int) -> Mapping[DpEvent, int]:
    """The single mechanisms of so many charged rounds, counted."""
    return events.grouped([plan.event(rounds=rounds)])


def mechanism_of(plan: Plan, *, run: str, rounds: int, sampling: str) -> Mechanism:
    """What `rounds` charged rounds of a plan did.

    Args:
        plan: the run's.
        run: as the sites' ledgers call it.
        rounds: charged, retries included.
        sampling: how units really joined a step, or "not_recorded".
    """
    charges = events.counted(charged_events(plan, rounds))
    return Mechanism(
        run=run,
        sampling_assumed="poisson",
        sampling_run=sampling,
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm if plan.private else None,
        local_steps=plan.local_steps,
        rounds=rounds,
        metrics_noise_multiplier=plan.metrics_noise_multiplier,
        charges=tuple(Charge(event=event, count=count) for event, count in charges),
        records_per_user=plan.records_per_user,
    )


def bounded(epsilon: float) -> float | None:
    """JSON has no infinity: None says that nothing bounds the loss."""
    return float(epsilon) if math.isfinite(epsilon) else None


def largest(epsilons: Iterable[float | None]) -> float | None:
    """The worst of some epsilons; None, which nothing bounds, is worse than all."""
    values = list(epsilons)
    return None if None in values else max((value for value in values if value is not None), default=0.0)
