"""How a round's updates become the next adapter: the seam between averages of plain updates and secure sums."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedtune.federation.lead import Arrays, LeadState
from fedtune.federation.replies import RoundReplies
from fedtune.model import Adapter


@dataclass(frozen=True, slots=True)
class Made:
    """A round's result.

    Attributes:
        sites: whose updates are in it.
        failures: site -> why its update is not.
        strategy: the optimizer's state, for a checkpoint.
    """

    adapter: Adapter
    sites: tuple[str, ...]
    failures: Mapping[str, str]
    strategy: Arrays


class Aggregation(Protocol):
    """The lead's half, for one run; the site's half is `_protect` in `site_round.py`.

    Attributes:
        session: the lead's name for the session that a round is a release of; empty where there are none.
        left_out: sites that no round is asked of any more.
    """

    @property
    def session(self) -> str: ...

    @property
    def left_out(self) -> Collection[str]: ...

    def resume(self, state: LeadState) -> LeadState:
        """The state that a lead goes on from, which begins here or was interrupted after it."""

    def prepare(self) -> Sequence[str]:
        """The sites that the next round is asked of, before anybody pays; raises RunError where they are too few."""

    def combine(self, state: LeadState, replies: RoundReplies) -> Made:
        """The next adapter, of a round's valid updates; raises RunError where rounds can't go on."""

    def restore(self, strategy: Arrays) -> None:
        """Go back to an optimizer's state of before."""
