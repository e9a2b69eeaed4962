"""What a run's report says of one site: what the lead knows from receipts and rounds, and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from fedtune.federation.aggregation import BEYOND_PLAN, INVALID_UPDATE, NO_REPLY, UNSIGNED_REPLY
from fedtune.federation.lead import RoundResult
from fedtune.federation.results import charged_epsilons
from fedtune.privacy import accountant
from fedtune.privacy.plan import Plan
from fedtune.report.derive import profile, verdicts
from fedtune.report.derive.facts import RunFacts
from fedtune.report.derive.profile import charged_events, largest, mechanism_of
from fedtune.report.model import Release, SiteReport, Source, Spent, Step, Verdict
from fedtune.report.record.run_record import RunRecord
from fedtune.words import finite

_MOST_FIGURES = 64
"""Different numbers of rounds for which epsilon is computed; in between, that of the next larger one is shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Charged:
    """What was charged to a run at one site.

    Attributes:
        rounds: retries included.
        upper_bound: the site fell silent, and every round asked of it is counted.
        source: who says so.
    """

    rounds: int
    upper_bound: bool
    source: Source

    @classmethod
    def by_receipts(cls, record: RunRecord, site: str) -> Charged:
        """As the lead knows it."""
        rounds, upper_bound = record.charged(site)
        source: Source = "charged_by_receipts" if site in record.receipts else "not_released"
        return cls(rounds=rounds, upper_bound=upper_bound, source="run_record" if record.state is None else source)


def site_report(record: RunRecord, site: str, charged: Charged, *, sampling: str) -> SiteReport:
    """One site of a run.

    Args:
        record: of the run.
        site: its name.
        charged: to the run at that site.
        sampling: how units really joined its steps, or "not_recorded".
    """
    plan = record.plan
    mechanisms = charged_events(plan, charged.rounds)
    made = SiteReport(
        site=site,
        source=charged.source,
        verdict=Verdict(state="within"),
        declared_size=record.config.declared_sizes()[site],
        approved=None,
        spent=_spent(plan, charged),
        left=None,
        meaning=None,
        mechanisms=(mechanism_of(plan, run=record.run, rounds=charged.rounds, sampling=sampling),)
        if charged.rounds
        else (),
        curve=profile.curve(mechanisms, profile.curve_deltas(plan.delta)) if mechanisms else (),
        steps=tuple(steps_of(record, site, charged.rounds)),
        releases=tuple(_releases(record, site)),
    )
    reasons = verdicts.of_run(made, RunFacts.of_record(record))
    return verdicts.judged(made, reasons, charged=mechanisms, delta=plan.delta)


def epsilon_by_round(sites: Iterable[SiteReport]) -> dict[int, float | None]:
    """Round -> the worst site's epsilon after it."""
    worst: dict[int, list[float | None]] = {}
    for site in sites:
        for step in site.steps:
            worst.setdefault(step.round or 0, []).append(step.epsilon)
    return {number: largest(values) for number, values in worst.items()}


def _spent(plan: Plan, charged: Charged) -> Spent:
    mechanisms, grid = charged_events(plan, charged.rounds), profile.interval_of(charged.source)
    by_pld = profile.epsilon_pld(mechanisms, plan.delta, interval=grid)
    return Spent(
        epsilon=by_pld,
        epsilon_pld=by_pld,
        epsilon_rdp=profile.epsilon_rdp(mechanisms, plan.delta),
        planned_epsilon=profile.epsilon_pld([plan.whole], plan.delta, interval=grid),
        upper_bound=charged.upper_bound,
        rounds=charged.rounds,
        steps=charged.rounds * plan.local_steps,
    )


def steps_of(record: RunRecord, site: str, charged: int) -> Iterator[Step]:
    """Epsilon after each round: at most all that was charged, but for one round for each later update of the site."""
    took_part = [site in result.sites for result in record.rounds]
    for index, result in enumerate(record.rounds):
        so_far = max(0, charged - sum(took_part[index + 1 :]))
        yield Step(
            run=record.run,
            round=result.round,
            time=result.ended or None,
            epsilon=_epsilon_after(record.plan, so_far, charged),
        )


def _epsilon_after(plan: Plan, rounds: int, charged: int) -> float | None:
    every = math.ceil(charged / _MOST_FIGURES) or 1
    shown = min(charged, math.ceil(rounds / every) * every)
    final = charged_epsilons(plan, charged)[0]
    return finite(final if shown == charged else min(final, _coarse_epsilon(plan, shown)))


@lru_cache(maxsize=256)
def _coarse_epsilon(plan: Plan, rounds: int) -> float:
    """Never less than on the fine grid, and several times faster."""
    if rounds == 0:
        return 0.0
    return accountant.epsilon_pld([plan.event(rounds=rounds)], plan.delta, interval=accountant.COARSE)


def _releases(record: RunRecord, site: str) -> Iterator[Release]:
    """What came from a site over all rounds, by kind and reason."""
    groups: dict[tuple[str, str | None], list[RoundResult]] = {}
    for result in record.rounds:
        if (what := _what_came(result, site)) is not None:
            groups.setdefault(what, []).append(result)
    for (kind, reason), results in groups.items():
        times = [result.ended for result in results if result.ended]
        yield Release(
            kind=kind,
            run=record.run,
            reason=reason,
            count=len(results),
            first=min(times, default=None),
            last=max(times, default=None),
        )
    receipt = record.receipts.get(site)
    came = Counter({kind: len(results) for (kind, _), results in groups.items()})["update"]
    if receipt and receipt.charged_rounds > came:
        without = receipt.charged_rounds - came
        yield Release(
            kind="reservation_without_update", run=record.run, reason=None, count=without, first=None, last=None
        )


def _what_came(result: RoundResult, site: str) -> tuple[str, str | None] | None:
    """Kind and reason; None where the site was not asked."""
    if site in result.sites:
        return "update", None
    match result.failed_sites.get(site):
        case None:
            return None
        case reason if reason in (NO_REPLY, UNSIGNED_REPLY):
            return "no_answer", reason
        case reason if reason in (INVALID_UPDATE, BEYOND_PLAN):
            return "update", reason
        case reason:
            return "refusal", reason
