"""What tests of a site's ledger do again and again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedtune.privacy.ledger.site_ledger import Ledger, Reservation
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused


def reserve(ledger: Ledger, proposal: Proposal, round: int = 1, request: str = "") -> Reservation:
    """Have a round charged."""
    granted = ledger.reserve(proposal, round=round, request=request or f"digest {proposal.run} {round}")
    assert isinstance(granted, Reservation)
    return granted


def train(ledger: Ledger, proposal: Proposal, *rounds: int, reply: bytes = b"reply") -> None:
    """Have rounds charged, one after the other, and commit a reply to each."""
    for round in rounds:
        ledger.commit(reserve(ledger, proposal, round), reply)


def reason_of(work: Callable[..., object], *arguments: object, **rest: object) -> Reason:
    """Why a call is refused."""
    with pytest.raises(Refused) as caught:
        work(*arguments, **rest)
    return caught.value.reason
