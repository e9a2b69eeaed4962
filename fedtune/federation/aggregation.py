"""How a round's updates become the next adapter: the interface of plain averages and of secure sums."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedtune.federation.lead import Arrays, LeadState
from fedtune.federation.replies import RoundReplies
from fedtune.model.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Made:
    """The result of one round.

    Attributes:
        sites: the sites whose updates it combines.
        failures: site -> why its update was left out.
        strategy: the server optimizer's state, for a checkpoint.
    """

    adapter: Adapter
    sites: tuple[str, ...]
    failures: Mapping[str, str]
    strategy: Arrays


class Aggregation(Protocol):
    """The lead's half, for one run; the site's half is `_protect` in `site_round.py`.

    Attributes:
        session: name of the secure-sum session that the next round belongs to; empty for plain averages.
        left_out: sites that are not asked any more.
    """

    @property
    def session(self) -> str: ...

    @property
    def left_out(self) -> Collection[str]: ...

    def resume(self, state: LeadState) -> LeadState:
        """Start, or resume after an interruption, at `state`; returns the state to continue from."""

    def prepare(self) -> Sequence[str]:
        """Choose the sites of the next round, before any is charged; raises RunError if they are too few."""

    def combine(self, state: LeadState, replies: RoundReplies) -> Made:
        """Combine a round's valid updates into the next adapter; raises RunError if rounds cannot go on."""

    def restore(self, strategy: Arrays) -> None:
        """Restore an earlier state of the server optimizer."""
