"""Two notes with content of their own: what a ledger was opened as, and what a restored one was made up for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dp_accounting import DpEvent

from fedtune.privacy import events
from fedtune.privacy.chain import DENSE
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


def other_users(before: Policy | None, policy: Policy) -> list[tuple[str, object, object]]:
    """(key, column that said whose a record is, column that says so now) of each data set where they differ.

    A budget of persons that another column turns into one of visits would protect nobody.
    """
    if before is None or policy.population.unit != "user":
        return []
    known = {dataset.id: dataset.columns.get("user") for dataset in before.dataset}
    pairs = [(one.id, known.get(one.id), one.columns.get("user")) for one in policy.dataset]
    return [(f"dataset {id} columns.user", was, now) for id, was, now in pairs if was is not None and was != now]


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """That a backup was put back, and what an anchor knew of the events that it lacks.

    Attributes:
        shared: newest event known to be on both branches; what the anchor knows beyond it was charged again.
        end: the anchor's event.
        path: (sequence, hash) of events of the lost branch, and of those that it had itself been made up for.
        gap: what was charged there beyond `shared`.
        runs: run -> rounds that it was charged there beyond `shared`; none of them goes on.
        clears_doubt: whether the receipt that had put the ledger in doubt is made up for.
    """

    shared: int
    end: int
    path: frozenset[tuple[int, str]]
    gap: Counter[DpEvent]
    runs: dict[str, int]
    seeded: bool
    frozen: bool
    clears_doubt: bool = True

    def knows(self, sequence: int, matches: Callable[[str], bool]) -> bool:
        """Whether an event whose hash `matches` is on the path, or where the path, sparse far from its end, is mute."""
        hashes = [hash for number, hash in self.path if number == sequence]
        return any(map(matches, hashes)) or (not hashes and self.shared < sequence <= self.end - DENSE)

    def to_json(self) -> dict[str, Any]:
        """The note's detail."""
        return {
            "shared": self.shared,
            "end": self.end,
            "path": sorted(self.path),
            "gap": events.counted(self.gap),
            "runs": self.runs,
            "seeded": self.seeded,
            "frozen": self.frozen,
            "clears_doubt": self.clears_doubt,
        }

    @classmethod
    def of(cls, detail: dict[str, Any]) -> Restored:
        """Read the note's detail; raises ValueError, TypeError or KeyError for anything else."""
        if any(type(count) is not int or count < 0 for count in detail["runs"].values()):
            raise ValueError("a run's rounds")
        return cls(
            shared=int(detail["shared"]),
            end=int(detail["end"]),
            path=frozenset((int(sequence), str(hash)) for sequence, hash in detail["path"]),
            gap=Counter({events.from_json(data): int(count) for data, count in detail["gap"]}),
            runs=dict(detail["runs"]),
            seeded=bool(detail["seeded"]),
            frozen=bool(detail["frozen"]),
            clears_doubt=bool(detail["clears_doubt"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """A genuine receipt that the ledger lacks: its event, and that event's salted hash."""

    sequence: int
    head: str
