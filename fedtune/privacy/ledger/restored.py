"""Facts that a ledger put back from a backup takes over from an anchor: one note, which `History` follows.

The anchor's head says all that must outlast a restore.  What it says beyond the newest event that both know is in the
note, and so in the ledger for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dp_accounting import DpEvent

from fedtune.codec import decode
from fedtune.privacy import events as dp_events
from fedtune.privacy.ledger.chain import DENSE, Doubt


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """That a backup was put back, and what an anchor knew of the events that it lacks.

    Attributes:
        shared: newest event known to be on both branches; what the anchor knows beyond it was charged again.
        end: the anchor's event.
        path: (sequence, hash) of events of the lost branch, and of those that it had itself been made up for.
        gap: what was charged there beyond `shared`: mechanisms as `privacy.events` writes them, and how often they ran.
        runs: run -> rounds that it was charged there beyond `shared`; none of them goes on.
        denied: digests of proposals that a person denied there.
        caps: lifetime caps that were in force on the lost branch alone; None: no cap.
        users: which column says who a user is, by that branch's policies.
        doubts: receipts of either branch that are still not made up for.
    """

    shared: int
    end: int
    path: frozenset[tuple[int, str]]
    gap: tuple[tuple[dict[str, Any], int], ...]
    runs: dict[str, int]
    seeded: bool
    frozen: bool
    denied: frozenset[str]
    caps: tuple[float | None, ...]
    users: frozenset[tuple[str, str, str]]
    doubts: frozenset[Doubt]

    def knows(self, shown: Doubt, matches: Callable[[str], bool], *, shared_rounds: int) -> bool:
        """Whether the event of a receipt, whose hash `matches`, is on the path, or may be where the path is mute.

        Far from its end the path is sparse.  There the receipt may not say more rounds of its run than the branch had:
        `shared_rounds` up to `shared`, and `runs` beyond; and one that it was shown itself it knew to lack.
        """
        hashes = [hash for number, hash in self.path if number == shown.sequence]
        mute = not hashes and shown not in self.doubts and self.shared < shown.sequence <= self.end - DENSE
        return any(map(matches, hashes)) or (mute and shown.rounds <= shared_rounds + self.runs.get(shown.run, 0))

    def to_json(self) -> dict[str, Any]:
        """The note's detail."""
        return {key: sorted(each) if isinstance(each, frozenset) else each for key, each in asdict(self).items()}

    @classmethod
    def of(cls, detail: dict[str, Any]) -> Restored:
        """Read the note's detail; raises ValueError for anything else."""
        restored = decode(cls, {key: value for key, value in detail.items() if key != "what"})
        # Charges are never taken back, so that no entry can lower what an earlier one added.
        if min(restored.shared, restored.end, *restored.runs.values()) < 0 or any(n < 1 for _, n in restored.gap):
            raise ValueError("a count of a restored ledger")
        return restored

    def charges(self) -> Iterator[tuple[DpEvent, int]]:
        """Each mechanism of the gap, with how often it ran."""
        return ((dp_events.from_json(event), count) for event, count in self.gap)
