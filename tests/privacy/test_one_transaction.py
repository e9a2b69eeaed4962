"""Between a ledger's check and its charge there is no moment in which another process could charge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fedtune.privacy.ledger.site_ledger import Reservation
from fedtune.privacy.ledger.store import EventStore
from fedtune.privacy.release import Reason, Refused


def test_who_charges_whenever_a_transaction_ends_gets_no_round_too_many(
    opened: Any, proposal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_rounds = proposal(plan={"num_rounds": 2})
    one, other = opened(), opened()
    refusals: list[Reason] = []
    original = EventStore.transaction

    @contextmanager
    def then_the_other(store: EventStore) -> Iterator[None]:
        with original(store):
            yield
        if store is one._store and len(refusals) == 0:
            try:
                other.reserve(two_rounds, round=3, request="of the other")
            except Refused as refused:
                refusals.append(refused.reason)

    assert isinstance(one.reserve(two_rounds, round=1, request="first"), Reservation)
    monkeypatch.setattr(EventStore, "transaction", then_the_other)
    assert isinstance(one.reserve(two_rounds, round=2, request="last"), Reservation)
    assert refusals == [Reason.PLAN_EXHAUSTED]
    assert opened().history.charged_rounds("r") == 2
