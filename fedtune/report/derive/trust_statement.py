"""Whom the figures of secure sums rely on, and what no such run can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from dp_accounting import DpEvent

from fedtune.federation.secure.agreement import MOST_SITES
from fedtune.privacy.distributed_noise import Epsilons
from fedtune.privacy.events import Spent
from fedtune.report.derive import profile
from fedtune.report.model import Meaning, Mechanism, SiteReport


def by_trust(rows: Sequence[Mechanism], epsilon: Callable[[Spent], float | None]) -> Epsilons | None:
    """What the charges of these runs come to, by who looks; None where no sum was secure.

    Args:
        rows: of one site.
        epsilon: of charges, as the site's own figure is computed.
    """
    if all(row.shared is None for row in rows):
        return None

    lost = any(not row.run for row in rows)  # of which nobody knows whether others' noise was part of it
    return Epsilons(
        server_alone=epsilon(charged_against(rows, colluders=0)),
        with_colluders=epsilon(charged_against(rows, colluders=None)),
        with_all_others=None if lost else epsilon(charged_against(rows, colluders=MOST_SITES)),
    )


def charged_against(rows: Sequence[Mechanism], *, colluders: int | None) -> Counter[DpEvent]:
    """What the charges come to where so many sites tell what they added; None: as many as each run was charged for."""
    total: Counter[DpEvent] = Counter()
    for row in rows:
        # Of a lost run nothing is known but its charges.
        total.update(profile.by_settings(row, colluders=colluders) if row.shared else profile.charges_of(row.charges))
    return total


def means(site: SiteReport, charged: Spent, *, delta: float, fixed: bool) -> Meaning:
    """What the site's epsilon, and everything `charged`, means; `fixed`: as in `profile.meaning`."""
    assert site.spent is not None
    trust = site.by_trust
    return profile.meaning(
        charged,
        epsilon=profile.claimed(site.spent),
        delta=delta,
        declared_size=site.declared_size,
        fixed=fixed,
        others=None
        if trust is None
        else (charged_against(site.mechanisms, colluders=MOST_SITES), trust.with_all_others),
    )
