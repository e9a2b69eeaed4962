"""Ledgers that write in a wrong order.  The checks must catch each of them, or they would not show anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.ledger.site_ledger import Reservation, SiteLedger
from fedtune.privacy.ledger.store import EventStore
from fedtune.privacy.proposal import Proposal

Late = list[Callable[[], object]]


def charged_after_training() -> Callable[[], None]:
    """A round is charged together with its commit."""
    _charge_in_commit()
    return lambda: None


def charged_after_the_reply() -> Callable[[], None]:
    """A round is charged, and its reply stored, when the reply has left."""
    _charge_in_commit()
    return _commit_late()


def stored_after_the_reply() -> Callable[[], None]:
    """A round is charged in time, and its reply stored when it has left."""
    return _commit_late()


def admitted_before_the_charge() -> Callable[[], None]:
    """People are in the register of arrivals before the round that admits them is charged."""
    admit = EventStore.admit_users

    def write_at_once(self: EventStore, own: Mapping[str, int], cohorts: Cohorts) -> tuple[frozenset[str], str]:
        admitted = admit(self, own, cohorts)
        self._file.execute("COMMIT")
        self._file.execute("BEGIN IMMEDIATE")
        return admitted

    EventStore.admit_users = write_at_once  # type: ignore[method-assign]
    return lambda: None


ORDERS = {
    "charged after training": (charged_after_training, ("step: after", "training: after", "commit: before")),
    "charged after the reply": (charged_after_the_reply, ("reply: after",)),
    "stored after the reply": (stored_after_the_reply, ("reply: after",)),
    "admitted before the charge": (admitted_before_the_charge, ("reserve: after COMMIT",)),
}
"""Wrong orders by name, each with points at which a kill shows it."""


def _charge_in_commit() -> None:
    reserve, commit = SiteLedger.reserve, SiteLedger.commit
    asked: dict[str, Proposal] = {}

    def reserve_nothing(self: SiteLedger, proposal: Proposal, *, round: int, request: str, **_: object) -> Reservation:
        asked[request] = proposal
        return Reservation(run=proposal.run, round=round, request=request, attempt=1)

    def charge_and_commit(self: SiteLedger, reservation: Reservation, reply: bytes, **kept: Any) -> None:
        reserve(self, asked[reservation.request], round=reservation.round, request=reservation.request)
        commit(self, reservation, reply, **kept)

    SiteLedger.reserve, SiteLedger.commit = reserve_nothing, charge_and_commit  # type: ignore[method-assign]


def _commit_late() -> Callable[[], None]:
    commit = SiteLedger.commit
    late: Late = []

    def later(self: SiteLedger, reservation: Reservation, reply: bytes, **kept: Any) -> None:
        late.append(lambda: commit(self, reservation, reply, **kept))

    def catch_up() -> None:
        while late:
            late.pop(0)()

    SiteLedger.commit = later  # type: ignore[method-assign]
    return catch_up
