"""Two notes with content of their own: what a ledger was opened as, and what a restored one was made up for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from dp_accounting import DpEvent

from fedtune.privacy import events
from fedtune.privacy.chain import DENSE, Head
from fedtune.privacy.keys import is_public_key
from fedtune.privacy.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What a ledger's first event says; none of it ever changes.

    Attributes:
        ledger: random id, in hex.
        order: of the filter.
        reference: the run that the order was chosen for, as an event's JSON.
    """

    ledger: str
    site: str
    population: str
    unit: str
    delta: float
    order: float
    reference: dict[str, Any]
    site_key: str

    @classmethod
    def under(cls, policy: Policy, *, ledger: str, site_key: str) -> Opened:
        """What a ledger that begins under `policy` says."""
        budget = policy.budget
        return cls(
            ledger=ledger,
            site=policy.site,
            population=policy.population.name,
            unit=policy.population.unit,
            delta=budget.delta,
            order=budget.order(),
            reference=events.to_json(budget.reference_event()),
            site_key=site_key,
        )

    @classmethod
    def of(cls, detail: dict[str, Any]) -> Opened:
        """Read the first event's detail; raises ValueError, TypeError or KeyError for anything else."""
        opened = cls(**{name: value for name, value in detail.items() if name != "what"})
        texts = all(isinstance(getattr(opened, name), str) for name in ("ledger", "site", "population", "unit"))
        numbers = type(opened.delta) is float and type(opened.order) is float
        if not (texts and numbers and 0 < opened.delta < 1 and opened.order > 1 and is_public_key(opened.site_key)):
            raise ValueError("it does not open a ledger")
        events.from_json(opened.reference)
        return opened

    def differences(self, policy: Policy) -> list[tuple[str, object, object]]:
        """(key, what the ledger was made for, what the policy says) where the two do not fit."""
        pairs: list[tuple[str, object, object]] = [
            ("site", self.site, policy.site),
            ("population.name", self.population, policy.population.name),
            ("population.unit", self.unit, policy.population.unit),
            ("budget.delta", self.delta, policy.budget.delta),
        ]
        return [(key, made_for, says) for key, made_for, says in pairs if made_for != says]


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """That a backup was put back, and what an anchor knew of the events that it lacks.

    Attributes:
        path: sequence -> hash, of events of the lost branch: heads and receipts on it are made up for.
        gap: what was charged there and not here.
        runs: run -> rounds that it had been charged; none of them goes on.
    """

    path: dict[int, str]
    gap: Counter[DpEvent]
    runs: dict[str, int]
    seeded: bool
    frozen: bool

    def skips(self, sequence: int) -> bool:
        """Whether the path, sparse far from its end, says nothing of this event of the lost branch."""
        return sequence not in self.path and sequence < max(self.path) - DENSE

    @classmethod
    def by(cls, anchor: Head, gap: Counter[DpEvent]) -> Restored:
        """The note for an anchor and the gap up to it."""
        return cls(path=dict(anchor.path), gap=gap, runs=dict(anchor.runs), seeded=anchor.seeded, frozen=anchor.frozen)

    def to_json(self) -> dict[str, Any]:
        """The note's detail."""
        return {
            "path": sorted(self.path.items()),
            "gap": events.counted(self.gap),
            "runs": self.runs,
            "seeded": self.seeded,
            "frozen": self.frozen,
        }

    @classmethod
    def of(cls, detail: dict[str, Any]) -> Restored:
        """Read the note's detail; raises ValueError, TypeError or KeyError for anything else."""
        if not detail["path"] or any(type(count) is not int or count < 0 for count in detail["runs"].values()):
            raise ValueError("a path, or a run's charged rounds")
        return cls(
            path={int(sequence): str(hash) for sequence, hash in detail["path"]},
            gap=Counter({events.from_json(data): int(count) for data, count in detail["gap"]}),
            runs=dict(detail["runs"]),
            seeded=bool(detail["seeded"]),
            frozen=bool(detail["frozen"]),
        )
