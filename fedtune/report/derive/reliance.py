"""Whom the figures of secure sums rely on, and what no such run can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from dp_accounting import DpEvent

from fedtune.federation.secure.agreement import MOST_SITES
from fedtune.privacy.events import Spent
from fedtune.report.derive import profile
from fedtune.report.model import ByTrust, Mechanism, Problem, Report


def by_trust(rows: Sequence[Mechanism], epsilon: Callable[[Spent], float | None]) -> ByTrust | None:
    """What the charges of these runs come to, by who looks; None where no sum was secure.

    Args:
        rows: of one site.
        epsilon: of charges, as the site's own figure is computed.
    """
    if all(row.shared is None for row in rows):
        return None

    def against(colluders: int | None) -> float | None:
        total: Counter[DpEvent] = Counter()
        for row in rows:
            # Of a lost run nothing is known but its charges.
            total.update(profile.by_settings(row, colluders=colluders) if row.shared else profile.charges_of(row))
        return epsilon(total)

    lost = any(not row.run for row in rows)  # of which nobody knows whether others' noise was part of it
    others = None if lost else against(MOST_SITES)
    return ByTrust(server_alone=against(0), with_colluders=against(None), with_all_others=others)


def contradictions(report: Report) -> Iterator[Problem]:
    """Settings of secure sums that no run can have, or that the rest of the report denies."""
    survivors = [len(one.sites) for one in report.utility.rounds if one.sites] if report.utility else []
    for site in report.sites:
        for row in site.mechanisms:
            if (shared := row.shared) is None:
                continue
            where = f"sites.{site.site}.mechanisms.{row.run}.shared"
            if row.noise_multiplier != shared.noise_of_fewest:
                yield Problem(f"{where}.noise_multiplier", row.noise_multiplier, shared.noise_of_fewest)
            if row.local_steps != 1:
                yield Problem(f"{where}.local_steps", row.local_steps, 1)
            taking_part = len(report.sites) if report.kind == "run" else shared.num_sites
            if shared.num_sites != taking_part or shared.num_sites > MOST_SITES:
                yield Problem(f"{where}.num_sites", shared.num_sites, f"{taking_part}, at most {MOST_SITES}")
                continue
            if shared.threshold > (most := min(survivors, default=shared.num_sites)):
                yield Problem(f"{where}.threshold", shared.threshold, f"at most {most}")
