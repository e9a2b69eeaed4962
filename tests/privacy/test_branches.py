"""Backups put back more than once, and copies that went their own ways: each branch counts, and nobody is stuck."""

from datetime import timedelta
from typing import Any

import pytest

from fedtune.privacy import events
from fedtune.privacy.ledger.site_ledger import Ledger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Reason, Refused
from fedtune.spec import RunError

from .builders import proposal, reason_of, train
from .conftest import Backups, Clock


def rounds_charged(ledger: Ledger, proposal: Any) -> float:
    one = events.grouped([proposal().plan.event()])
    return ledger.history.charged().total() / one.total()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_branches_of_one_backup_are_both_charged(backups: Backups, order: tuple[int, int]) -> None:
    lost = [backups.branch(proposal(run="long"), 1, 2, 3, 4), backups.branch(proposal(run="short"), 1, 2)]
    ledger = backups.put_back()
    for number in order:
        assert ledger.charge_gap(lost[number][0]), "beyond the backup, each has charges of its own"
    assert rounds_charged(ledger, proposal) == 1 + 4 + 2
    for head, receipt in lost:
        ledger.require_contains(receipt)
        assert verify(backups.path, anchor=head).anchor_sequence is not None
        assert not ledger.charge_gap(head), "nothing is charged twice"


def test_the_same_backup_put_back_again_is_charged_for_everything_and_goes_on(backups: Backups) -> None:
    first, receipt_a = backups.branch(proposal(run="a"), 1, 2)
    ledger = backups.put_back(anchor=first)
    train(ledger, proposal(run="c"), 1)
    second, receipt_c = ledger.head(), ledger.receipt("c")
    again = backups.put_back(anchor=second)
    assert rounds_charged(again, proposal) == 1 + 2 + 1
    for receipt in (receipt_a, receipt_c):
        again.require_contains(receipt)
    train(again, proposal(run="d"), 1)


def test_two_copies_that_charge_one_request_at_one_time_are_two(clock: Clock, backups: Backups) -> None:
    """A clock that is behind the newest event, as where a machine was put back with its ledger, gives both one time."""
    clock.time -= timedelta(days=1)
    lost, receipt = backups.branch(proposal(), 2)
    ledger = backups.put_back()
    train(ledger, proposal(), 2)
    assert reason_of(ledger.require_contains, receipt) is Reason.LEDGER_BEHIND_RECEIPT
    assert ledger.charge_gap(lost)
    assert rounds_charged(ledger, proposal) == 1 + 1 + 1


WRONG = [*(("gap", count) for count in (-1, 0, True, 1.0)), *(("shared", count) for count in (-1, True))]


@pytest.mark.parametrize(("key", "value"), [*WRONG, ("end", 1.5), ("runs", -1)])
def test_no_entry_of_the_sites_own_lowers_what_was_charged(backups: Backups, key: str, value: Any) -> None:
    """Whoever has the site's key may write an entry that breaks no hash and no earlier receipt."""
    ledger = backups.open()
    ((one, _),) = ledger.history.charged().items()
    detail = {"shared": 1, "end": 1, "path": [], "gap": [[events.to_json(one), 1]], "runs": {"s": 1}}
    detail |= {"seeded": False, "frozen": False, "denied": [], "caps": [], "users": [], "doubts": []}
    forged = {"gap": [[events.to_json(one), value]], "runs": {"s": value}}.get(key, value)
    with ledger._store.transaction():
        ledger._store.note("restored", **detail)
    assert verify(backups.path).history.charged().total() > 0, "an entry of this form is read"
    with pytest.raises(RunError), ledger._store.transaction():
        ledger._store.note("restored", **detail | {key: forged})


def test_another_process_that_is_ahead_puts_nothing_in_doubt(backups: Backups) -> None:
    idle, busy = backups.open(), backups.open()
    train(busy, proposal(), 2)
    idle.require_contains(busy.receipt("r"))
    assert backups.open().history.in_doubt is None


def test_every_distance_of_a_receipt_from_the_end_of_a_lost_branch_is_made_up_for(backups: Backups) -> None:
    ledger = backups.put_back()
    receipts = []
    for number in range(140):
        ledger.refuse(Refused(Reason.TASKS, asked=str(number)), run="x", round=1, request="q")
        receipts.append(ledger.receipt("r"))
    lost = ledger.head()
    restored = backups.put_back(anchor=lost)
    for receipt in receipts:
        restored.require_contains(receipt)
