"""What a restore must preserve: lost events known from receipts, diverged branches, denials, and caps."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy import events
from fedtune.privacy.ledger import site_ledger
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Reason, Receipt
from fedtune.privacy.site_policy import Dataset
from fedtune.spec import RunError

from .builders import advance_head, make_policy, make_proposal, make_user_policy, read_refusal_reason, train
from .conftest import Backups, Clock


def require_missing_events(ledger: SiteLedger, *receipts: Receipt) -> None:
    """Check that each receipt is genuine and that the ledger lacks its event."""
    for receipt in receipts:
        assert read_refusal_reason(ledger.require_receipt, receipt) is Reason.LEDGER_BEHIND_RECEIPT


def require_in_doubt(ledger: SiteLedger, proposal: Any) -> None:
    assert read_refusal_reason(ledger.reserve, proposal, round=1, request="q") is Reason.LEDGER_BEHIND_RECEIPT


def test_restored_ledger_inherits_the_doubts_of_the_replaced_ledger(backups: Backups) -> None:
    lost_head, receipt = backups.branch(make_proposal(), 2, 3, 4)
    doubting = backups.put_back()
    require_missing_events(doubting, receipt)
    restored_again = backups.put_back(anchor=doubting.head())
    require_in_doubt(restored_again, make_proposal(run="new"))
    assert restored_again.history.furthest_doubt == (receipt.sequence, receipt.head, "r", 4)
    restored_again.charge_gap(lost_head)
    assert restored_again.history.charged_rounds("r") == 4
    train(restored_again, make_proposal(run="new"), 1)


def test_doubt_about_an_event_in_the_backup_is_not_inherited(backups: Backups) -> None:
    _, receipt = backups.branch(make_proposal(), 2, 3, 4)
    newer, doubting = backups.path.read_bytes(), backups.put_back()
    require_missing_events(doubting, receipt)
    backups.path.write_bytes(newer)
    restored_again = backups.open()
    restored_again.charge_gap(doubting.head())
    train(restored_again, make_proposal(run="new"), 1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_anchor_clears_only_doubts_about_its_own_events(backups: Backups, order: tuple[int, int]) -> None:
    ledger = backups.put_back()
    train(ledger, make_proposal(), 2)
    train(ledger, make_proposal(run="other"), 1)
    older_head, receipts = ledger.head(), [ledger.sign_receipt("r")]
    train(ledger, make_proposal(run="other"), 2)
    newest_head, receipts = ledger.head(), [*receipts, ledger.sign_receipt("other")]
    rolled_back = backups.put_back()
    for _ in range(3):
        require_missing_events(rolled_back, *(receipts[number] for number in order))
    assert len(rolled_back.history.doubts) == 2, "each doubt must be recorded once"
    rolled_back.charge_gap(older_head)
    assert {doubt.run for doubt in rolled_back.history.doubts} == {"other"}
    require_in_doubt(rolled_back, make_proposal(run="new"))
    rolled_back.charge_gap(newest_head)
    train(rolled_back, make_proposal(run="new", plan={"num_rounds": 4}), 1)


def test_no_doubt_is_cleared_after_the_list_of_doubts_overflowed(backups: Backups, monkeypatch: Any) -> None:
    monkeypatch.setattr(site_ledger, "_MAX_DOUBTS", 2)
    ledger, receipts = backups.put_back(), []
    for round in (2, 3, 4):
        train(ledger, make_proposal(plan={"num_rounds": 4}, run="s"), round)
        receipts.append(ledger.sign_receipt("s"))
    rolled_back = backups.put_back()
    require_missing_events(rolled_back, *receipts)
    assert len(rolled_back.history.doubts) == 2
    rolled_back.charge_gap(ledger.head())
    require_in_doubt(rolled_back, make_proposal(run="new"))


@pytest.mark.parametrize("doubted", [True, False], ids=["shown before", "shown afterwards"])
@pytest.mark.parametrize("rounds", [2, 3])
def test_rounds_of_an_unanchored_branch_do_not_count_for_another(backups: Backups, rounds: int, doubted: bool) -> None:
    """Two copies of a backup charge the same number of rounds of a run; one continues, and the other is lost."""
    unseen, receipt = backups.branch(make_proposal(), *range(2, rounds + 1))
    train(backups.put_back(), make_proposal(), *range(2, rounds + 1))
    lost_head = advance_head(backups.open())
    restored = backups.put_back()
    if doubted:
        require_missing_events(restored, receipt)
    restored.charge_gap(lost_head)
    assert restored.history.charged_rounds("r") == rounds, "each round must be charged once"
    require_missing_events(restored, receipt)
    require_in_doubt(restored, make_proposal(run="new"))
    restored.charge_gap(unseen)
    assert restored.history.charged_rounds("r") == 1 + 2 * (rounds - 1)
    restored.require_receipt(receipt)
    train(restored, make_proposal(run="new"), 1)


def test_receipts_of_anchored_events_are_accepted_after_a_restore(backups: Backups) -> None:
    ledger = backups.put_back()
    receipts = [ledger.sign_receipt("r")]
    train(ledger, make_proposal(), 2)
    receipts.append(ledger.sign_receipt("r"))
    advance_head(ledger, 5)
    receipts.append(ledger.sign_receipt("x"))
    ledger.deny(make_proposal(run="denied"), "no")
    receipts.append(ledger.sign_receipt("r"))
    lost_head = advance_head(ledger)
    assert [receipt.sequence for receipt in receipts] == [4, 6, 6, 13]
    for receipt in receipts[1:]:
        require_missing_events(backups.put_back(), receipt)
    restored = backups.put_back()
    require_missing_events(restored, receipts[1], receipts[3])
    restored.charge_gap(lost_head)
    for receipt in receipts:
        restored.require_receipt(receipt)
    train(restored, make_proposal(run="new"), 1)


@pytest.mark.parametrize("order", [(0,), (0, 1), (1, 0)], ids=["doubting", "doubting then lost", "lost then doubting"])
def test_doubt_in_an_anchor_survives_a_restore(backups: Backups, order: tuple[int, ...]) -> None:
    """The anchor has all of its branch's events, and records that this one is missing."""
    lost_head, receipt = backups.branch(make_proposal(), 2)
    doubting = backups.put_back()
    train(doubting, make_proposal(), 2)
    advance_head(doubting)
    require_missing_events(doubting, receipt)
    anchor = doubting.head()
    restored_again = backups.put_back()
    for number in order:
        restored_again.charge_gap((anchor, lost_head)[number])
        if number == order[0] == 0:
            require_in_doubt(restored_again, make_proposal(run="new"))
            require_missing_events(restored_again, receipt)
    if 1 in order:
        restored_again.require_receipt(receipt)
        train(restored_again, make_proposal(run="new"), 1)
    else:
        require_in_doubt(backups.open(), make_proposal(run="new"))


def test_restore_keeps_denials_and_caps(backups: Backups) -> None:
    denied = make_proposal(run="denied")
    low_cap, high_cap = make_policy(budget={"max_epsilon": 9.0}), make_policy(budget={"max_epsilon": 12.0})
    backups.open(policy=high_cap)
    backups.open(policy=low_cap).deny(denied, "no")
    lost_head = backups.open(policy=low_cap).head()
    assert (lost_head.policy, lost_head.caps) == (low_cap.digest(), (11.0, 12.0, 9.0))
    backups.put_back(anchor=lost_head)
    assert read_refusal_reason(backups.open().reserve, denied, round=1, request="q") is Reason.DENIED
    assert backups.open().head().denied == lost_head.denied == (denied.digest(),), "a further restore must keep them"
    assert [cap for _, cap, _ in backups.open().history.policies] == [11.0, 12.0, 9.0, 11.0]
    assert backups.open().history.cap == 11.0


def test_restore_keeps_the_user_columns(open_ledger: Any, path: Path) -> None:
    first, notes = ("old", "old.csv", "who"), ("notes", "notes.csv", "patient")
    visits = (("notes", "notes.csv", "visit"), ("again", "./notes.csv", "visit"), ("notes", "again.csv", "visit"))
    open_ledger(policy=make_user_policy(first))
    backup = path.read_bytes()
    lost_head = open_ledger(policy=make_user_policy(first, notes))
    train(lost_head, make_proposal(dataset="notes", plan={"unit": "user", "records_per_user": 8}), 1)
    anchor = lost_head.head()
    assert anchor.users == (
        *(("dataset", "notes", "patient"), ("dataset", "old", "who")),
        *(("file", "notes.csv", "patient"), ("file", "old.csv", "who")),
    )
    # One policy is valid during the restore, another one afterwards.
    path.write_bytes(backup)
    with pytest.raises(RunError, match=r"created for dataset notes columns\.user = patient, but the policy says visit"):
        open_ledger(policy=make_user_policy(first, visits[0])).charge_gap(anchor)
    assert not verify(path).history.restored, "a refused restore must not be recorded"
    path.write_bytes(backup)
    restored = open_ledger(policy=make_user_policy(first))
    restored.charge_gap(anchor)
    for visit in visits:
        with pytest.raises(RunError, match=r"columns\.user = patient, but the policy says visit"):
            open_ledger(policy=make_user_policy(first, visit))
    assert restored.head().users == anchor.users, "a further restore must keep them"
    open_ledger(policy=make_user_policy(first, notes))


def test_record_level_anchor_has_no_user_columns(open_ledger: Any, path: Path) -> None:
    named = Dataset(id="notes", declared_size=2000, path="notes.csv", columns={"text": "t", "label": "l", "user": "u"})
    assert open_ledger(policy=make_policy(dataset=(named,))).head().users == ()


# Backups restored several times, and copies that diverged: every branch is charged, and no ledger becomes unusable.


def count_charged_rounds(ledger: SiteLedger) -> float:
    return (
        ledger.history.count_total_charges().total() / events.count_mechanisms([make_proposal().plan.event()]).total()
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_branches_of_one_backup_are_both_charged(backups: Backups, order: tuple[int, int]) -> None:
    gone = [backups.branch(make_proposal(run="long"), 1, 2, 3, 4), backups.branch(make_proposal(run="short"), 1, 2)]
    ledger = backups.put_back()
    for number in order:
        assert ledger.charge_gap(gone[number][0]), "each branch must have charges beyond the backup"
    assert count_charged_rounds(ledger) == 1 + 4 + 2
    for head, receipt in gone:
        ledger.require_receipt(receipt)
        assert verify(backups.path, anchor=head).anchor_sequence is not None
        assert not ledger.charge_gap(head), "no event may be charged twice"


def test_restoring_the_same_backup_twice_charges_all_lost_rounds(backups: Backups) -> None:
    first, receipt_a = backups.branch(make_proposal(run="a"), 1, 2)
    ledger = backups.put_back(anchor=first)
    train(ledger, make_proposal(run="c"), 1)
    second, receipt_c = ledger.head(), ledger.sign_receipt("c")
    restored_again = backups.put_back(anchor=second)
    assert count_charged_rounds(restored_again) == 1 + 2 + 1
    for receipt in (receipt_a, receipt_c):
        restored_again.require_receipt(receipt)
    train(restored_again, make_proposal(run="d"), 1)


def test_same_request_charged_on_two_branches_counts_twice(clock: Clock, backups: Backups) -> None:
    """If the clock is behind the newest event, as after restoring a whole machine, both events have the same time."""
    clock.time -= timedelta(days=1)
    lost_head, receipt = backups.branch(make_proposal(), 2)
    ledger = backups.put_back()
    train(ledger, make_proposal(), 2)
    assert read_refusal_reason(ledger.require_receipt, receipt) is Reason.LEDGER_BEHIND_RECEIPT
    assert ledger.charge_gap(lost_head)
    assert count_charged_rounds(ledger) == 1 + 1 + 1


WRONG = [*(("gap", count) for count in (-1, 0, True, 1.0)), *(("shared", count) for count in (-1, True))]


@pytest.mark.parametrize(("key", "value"), [*WRONG, ("end", 1.5), ("runs", -1)])
def test_forged_restore_entries_cannot_lower_the_charges(backups: Backups, key: str, value: Any) -> None:
    """A holder of the site's key may write an entry that breaks neither a hash nor an earlier receipt."""
    ledger = backups.open()
    ((only, _),) = ledger.history.count_total_charges().items()
    detail = {"shared": 1, "end": 1, "path": [], "gap": [[events.to_json(only), 1]], "runs": {"s": 1}}
    detail |= {"marks": [], "denied": [], "caps": [], "users": [], "doubts": []}
    forged = {"gap": [[events.to_json(only), value]], "runs": {"s": value}}.get(key, value)
    with ledger._store.transaction():
        ledger._store.append_note("restored", **detail)
    assert verify(backups.path).history.count_total_charges().total() > 0, "the forged entry must be well formed"
    with pytest.raises(RunError), ledger._store.transaction():
        ledger._store.append_note("restored", **detail | {key: forged})


def test_receipt_from_a_newer_process_raises_no_doubt(backups: Backups) -> None:
    idle, busy = backups.open(), backups.open()
    train(busy, make_proposal(), 2)
    idle.require_receipt(busy.sign_receipt("r"))
    assert backups.open().history.furthest_doubt is None


def test_receipts_of_a_long_lost_branch_are_accepted_after_a_restore(backups: Backups) -> None:
    ledger, receipts = backups.put_back(), []
    for _ in range(140):
        advance_head(ledger, 1)
        receipts.append(ledger.sign_receipt("r"))
    restored = backups.put_back(anchor=ledger.head())
    for receipt in receipts:
        restored.require_receipt(receipt)
