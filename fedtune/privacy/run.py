"""A run that a ledger accepted, and leave to train one of its rounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from dp_accounting import DpEvent

from fedtune.privacy import events as dp_events
from fedtune.privacy.plan import Plan
from fedtune.privacy.proposal import Proposal


@dataclass(kw_only=True, slots=True)
class Run:
    """One accepted run.

    Attributes:
        proposal: what was accepted.
        expires: until when its plan is set aside; None: it has ended.
        reserved: round -> digest of the request that it was charged for.
        attempts: round -> reservations made for it.
        replies: request digest -> SHA-256 of the committed reply.
        adapter: digest of the final adapter, once the lead sent it.
    """

    proposal: Proposal
    expires: datetime | None
    reserved: dict[int, str] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)
    replies: dict[str, str] = field(default_factory=dict)
    adapter: str = ""

    @property
    def plan(self) -> Plan:
        """What the run's releases cost."""
        return self.proposal.plan

    @property
    def charged_rounds(self) -> int:
        """Rounds charged, retries included."""
        return self.attempts.total()

    def is_open(self, now: datetime) -> bool:
        """Whether the run may still be charged."""
        return self.expires is not None and now < self.expires

    def set_aside(self, now: datetime) -> Counter[DpEvent]:
        """What the run may still spend: the rest of its plan while it is open, else nothing."""
        left = self.plan.most_rounds - self.charged_rounds
        once = dp_events.grouped([self.plan.event()]) if self.is_open(now) else Counter()
        return Counter({event: count * left for event, count in once.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Leave to train one round, already charged."""

    run: str
    round: int
    request: str
    attempt: int
