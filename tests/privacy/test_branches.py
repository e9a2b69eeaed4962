"""Backups put back more than once, and copies that went their own ways: each branch counts, and nobody is stuck."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy import events
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.site_ledger import Ledger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Reason, Receipt, Refused
from fedtune.spec import RunError

from .builders import train
from .conftest import Clock


def branch(opened: Any, path: Path, backup: Path, asked: Any, rounds: range) -> tuple[Head, Receipt]:
    """Put the backup back, train on it as if nothing had happened, and lose it again."""
    shutil.copy(backup, path)
    ledger = opened()
    train(ledger, asked, *rounds)
    return ledger.head(), ledger.receipt(asked.run)


def rounds_charged(ledger: Ledger, proposal: Any) -> float:
    one = events.grouped([proposal().plan.event()])
    return ledger.history.charged().total() / one.total()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_branches_of_one_backup_are_both_charged(
    opened: Any, proposal: Any, path: Path, backup: Path, order: tuple[int, int]
) -> None:
    lost = [
        branch(opened, path, backup, proposal(run="long"), range(1, 5)),
        branch(opened, path, backup, proposal(run="short"), range(1, 3)),
    ]
    shutil.copy(backup, path)
    ledger = opened()
    for number in order:
        assert ledger.charge_gap(lost[number][0]), "beyond the backup, each has charges of its own"
    assert rounds_charged(ledger, proposal) == 1 + 4 + 2
    for head, receipt in lost:
        ledger.require_contains(receipt)
        assert verify(path, anchor=head).anchor_sequence is not None
        assert not ledger.charge_gap(head), "nothing is charged twice"


def test_the_same_backup_put_back_again_is_charged_for_everything_and_goes_on(
    opened: Any, proposal: Any, path: Path, backup: Path
) -> None:
    first, receipt_a = branch(opened, path, backup, proposal(run="a"), range(1, 3))
    shutil.copy(backup, path)
    ledger = opened()
    ledger.charge_gap(first)
    train(ledger, proposal(run="c"), 1)
    second, receipt_c = ledger.head(), ledger.receipt("c")
    shutil.copy(backup, path)
    again = opened()
    again.charge_gap(second)
    assert rounds_charged(again, proposal) == 1 + 2 + 1
    for receipt in (receipt_a, receipt_c):
        again.require_contains(receipt)
    train(again, proposal(run="d"), 1)


def test_a_run_on_two_branches_is_charged_for_the_rounds_of_both(
    opened: Any, proposal: Any, path: Path, backup: Path
) -> None:
    lost, _ = branch(opened, path, backup, proposal(), range(2, 4))
    shutil.copy(backup, path)
    ledger = opened()
    train(ledger, proposal(), 2)  # before anybody noticed
    ledger.charge_gap(lost)
    assert ledger.receipt("r").charged_rounds == 1 + 2 + 1
    assert rounds_charged(ledger, proposal) == 4


def test_two_copies_that_charge_one_request_at_one_time_are_two(
    opened: Any, proposal: Any, path: Path, clock: Clock, copied: Any
) -> None:
    """A clock that is behind the newest event, as where a machine was put back with its ledger, gives both one time."""
    train(opened(), proposal(), 1)
    backup = copied(path)
    clock.time -= timedelta(days=1)
    lost, receipt = branch(opened, path, backup, proposal(), range(2, 3))
    shutil.copy(backup, path)
    ledger = opened()
    train(ledger, proposal(), 2)
    with pytest.raises(Refused):
        ledger.require_contains(receipt)
    assert ledger.charge_gap(lost)
    assert rounds_charged(ledger, proposal) == 1 + 1 + 1


@pytest.mark.parametrize(
    "forged",
    [
        *({"gap": -1}, {"gap": 0}, {"gap": True}, {"gap": 1.0}, {"shared": -1}, {"shared": True}, {"end": 1.5}),
        {"runs": -1},
    ],
    ids=str,
)
def test_no_entry_of_the_sites_own_lowers_what_was_charged(
    opened: Any, proposal: Any, path: Path, forged: dict[str, Any]
) -> None:
    """Whoever has the site's key may write an entry that breaks no hash and no earlier receipt."""
    ledger = opened()
    train(ledger, proposal(), 1)
    ((one, _),) = ledger.history.charged().items()
    detail = {"shared": 1, "end": 1, "path": [], "gap": [[events.to_json(one), 1]], "runs": {"s": 1}}
    detail |= {"seeded": False, "frozen": False, "denied": [], "caps": [], "users": [], "doubts": []}
    if "gap" in forged:
        forged = {"gap": [[events.to_json(one), forged["gap"]]]}
    elif "runs" in forged:
        forged = {"runs": {"s": forged["runs"]}}
    with ledger._store.transaction():
        ledger._store.note("restored", **detail)
    assert verify(path).history.charged().total() > 0, "an entry of this form is read"
    with pytest.raises(RunError), ledger._store.transaction():
        ledger._store.note("restored", **detail | forged)


def test_an_anchor_older_than_the_receipt_leaves_the_doubt(
    opened: Any, proposal: Any, path: Path, backup: Path
) -> None:
    shutil.copy(backup, path)
    ledger = opened()
    train(ledger, proposal(run="lost"), 1)
    older = ledger.head()
    train(ledger, proposal(run="lost"), 2, 3)
    newest, receipt = ledger.head(), ledger.receipt("lost")
    shutil.copy(backup, path)
    behind = opened()
    with pytest.raises(Refused):
        behind.require_contains(receipt)
    behind.charge_gap(older)
    with pytest.raises(Refused) as refused:
        train(behind, proposal(run="new"), 1)
    assert refused.value.reason is Reason.LEDGER_BEHIND_RECEIPT
    behind.charge_gap(newest)
    train(behind, proposal(run="new"), 1)


def test_a_receipt_of_another_branch_passes_nowhere_after_a_restore(
    opened: Any, proposal: Any, path: Path, backup: Path
) -> None:
    _, unseen = branch(opened, path, backup, proposal(run="unseen"), range(1, 3))
    lost, _ = branch(opened, path, backup, proposal(run="seen", plan={"num_rounds": 5}), range(1, 4))
    shutil.copy(backup, path)
    ledger = opened()
    ledger.charge_gap(lost)
    with pytest.raises(Refused):
        ledger.require_contains(unseen)


def test_another_process_that_is_ahead_puts_nothing_in_doubt(opened: Any, proposal: Any, path: Path) -> None:
    idle, busy = opened(), opened()
    train(busy, proposal(), 1)
    idle.require_contains(busy.receipt("r"))
    assert opened().history.in_doubt is None


def test_every_distance_of_a_receipt_from_the_end_of_a_lost_branch_is_made_up_for(
    opened: Any, proposal: Any, path: Path, backup: Path
) -> None:
    shutil.copy(backup, path)
    ledger = opened()
    receipts = []
    for number in range(140):
        ledger.refuse(Refused(Reason.TASKS, asked=str(number)), run="x", round=1, request="q")
        receipts.append(ledger.receipt("r"))
    lost = ledger.head()
    shutil.copy(backup, path)
    restored = opened()
    restored.charge_gap(lost)
    for receipt in receipts:
        restored.require_contains(receipt)
