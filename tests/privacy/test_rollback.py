"""A ledger that was put back to an older state: found by its anchor or a receipt, and made up for by `charge_gap`."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import DpEvent

from fedtune.privacy import events
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import Head, Kind
from fedtune.privacy.ledger.site_ledger import Ledger
from fedtune.privacy.ledger.store import EventStore
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Reason, Refused
from fedtune.spec import RunError

from .builders import reason_of, train


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere" / "anchor.json"


@pytest.fixture
def anchored(opened: Any, anchor: Path) -> Callable[..., Ledger]:
    """Open the ledger with its anchor."""
    return lambda **changes: opened(anchor=anchor, **changes)


# Anchors.


def test_the_anchor_is_the_newest_head_after_every_transaction(
    anchored: Any, anchor: Path, proposal: Any, path: Path, site_key: SigningKey
) -> None:
    ledger = anchored()
    steps: list[Callable[[], object]] = [
        lambda: None,
        lambda: train(ledger, proposal(), 1),
        lambda: ledger.refuse(Refused(Reason.LEADS), run="x", round=1, request="q"),
        lambda: ledger.end("r"),
        lambda: ledger.freeze("why"),
    ]
    for step in steps:
        step()
        head, newest = Head.read(anchor), verify(path).events[-1]
        assert (head.sequence, head.hash, head.time) == (newest.sequence, newest.hash, newest.time)
        assert head.site_key == site_key.public
        assert head == ledger.head()
    assert head.frozen
    ((mechanism, count),) = head.charged
    assert {events.from_json(mechanism): count} == events.grouped([proposal().plan.event()])


def test_a_file_that_has_no_room_is_not_blamed_on_the_anchor(anchored: Any, proposal: Any) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a.json")

    ledger = anchored()
    with pytest.raises(OSError, match=r"runs/a\.json"):
        ledger.reserve(proposal(), round=1, request="a", unless=full)
    assert ledger.history.charged_rounds("r") == 0


def test_a_ledger_older_than_its_anchor_stops(anchored: Any, proposal: Any, path: Path, copied: Any) -> None:
    train(anchored(), proposal(), 1)
    backup = copied(path)
    train(anchored(), proposal(), 2)
    shutil.copy(backup, path)
    with pytest.raises(RunError, match=r"is older than its anchor .* \(event 5 of at least 7\)"):
        anchored()


def test_another_branch_than_the_anchors_stops(
    anchored: Any, anchor: Path, opened: Any, proposal: Any, path: Path, copied: Any
) -> None:
    train(anchored(), proposal(), 1)
    backup = copied(path)
    train(anchored(), proposal(), 2)
    shutil.copy(backup, path)
    train(opened(), proposal(), 2, 3, 4)  # without the anchor it goes on, and gets longer
    with pytest.raises(RunError, match="or has branched off"):
        anchored()
    with pytest.raises(RunError, match="has branched off"):
        verify(path, anchor=Head.read(anchor))


def test_a_missing_anchor_stops_where_something_was_charged(anchored: Any, anchor: Path, proposal: Any) -> None:
    train(anchored(), proposal(), 1)
    anchor.unlink()
    with pytest.raises(RunError, match=r"anchor .* is missing, and ledger .* is not new"):
        anchored()


def test_a_lost_ledger_with_an_anchor_stops(anchored: Any, path: Path) -> None:
    anchored()
    path.unlink()
    with pytest.raises(RunError, match=r"is missing: anchor .* knows 2 events of it"):
        anchored()
    path.write_bytes(b"")
    with pytest.raises(RunError, match=r"is missing: anchor .* knows 2 events of it"):
        anchored()


def test_an_anchor_of_another_ledger_stops(anchored: Any, anchor: Path, opened: Any, tmp_path: Path) -> None:
    anchored()
    opened(path=tmp_path / "other.db", anchor=tmp_path / "other.json")
    anchor.write_bytes((tmp_path / "other.json").read_bytes())
    with pytest.raises(RunError, match="the anchor is of another ledger"):
        anchored()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"null",
        lambda data: data[:-40],
        lambda data: data.replace(b'"sequence": 2', b'"sequence": 1'),
        lambda data: data.replace(b'"frozen": false', b'"frozen": true'),
        lambda data: json.dumps(json.loads(data) | {"site_key": "0" * 64}).encode(),
    ],
)
def test_a_damaged_anchor_stops(anchored: Any, anchor: Path, damage: Callable[[bytes], bytes]) -> None:
    anchored()
    before = anchor.read_bytes()
    anchor.write_bytes(damage(before))
    assert anchor.read_bytes() != before
    with pytest.raises(RunError, match=r"anchor = '.*anchor\.json': must .*; nothing is trained"):
        anchored()


def test_an_anchor_that_somebody_else_signed_stops(anchored: Any, anchor: Path, make_key: Any) -> None:
    head = anchored().head()
    fields = {name: getattr(head, name) for name in head.__slots__ if name not in ("site_key", "signature")}
    anchor.write_bytes(Head.signed(make_key(9), **(fields | {"sequence": 1})).to_bytes())
    with pytest.raises(RunError, match="the anchor is of another ledger"):
        anchored()


def test_a_crash_before_the_anchor_is_written_leaves_it_behind_and_the_ledger_good(
    anchored: Any, anchor: Path, proposal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = anchored()
    behind = anchor.read_bytes()

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedtune.privacy.ledger.store.write_durably", cut)
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve(proposal(), round=1, request="q")
    assert anchor.read_bytes() == behind
    assert ledger.history.charged_rounds("r") == 0, "until it looks again"
    assert anchored().receipt("r").charged_rounds == 1
    train(ledger, proposal(), 2)
    assert Head.read(anchor).sequence == ledger.history.length == 6
    assert ledger.receipt("r").charged_rounds == 2


def test_an_anchor_that_cannot_be_written_stops(anchored: Any, anchor: Path, proposal: Any) -> None:
    ledger = anchored()
    behind = anchor.read_bytes()
    anchor.unlink()
    anchor.parent.rmdir()
    anchor.parent.write_bytes(b"a file where the folder was")
    with pytest.raises(RunError, match=r"anchor .* cannot be used \(.*\); nothing is trained"):
        ledger.reserve(proposal(), round=1, request="q")
    anchor.parent.unlink()
    anchor.parent.mkdir()
    anchor.write_bytes(behind)
    ledger.end("r")
    assert Head.read(anchor).sequence == ledger.history.length
    assert ledger.receipt("r").charged_rounds == 1, "charged, although leave to train was not given"


def test_of_two_heads_the_newer_one_stays(anchored: Any, anchor: Path, proposal: Any, monkeypatch: Any) -> None:
    """A second process writes its event and its anchor after the first one's event, before its anchor."""
    first, second = anchored(), anchored()
    write = EventStore._write_anchor

    def late(self: EventStore, to: Path) -> None:
        if self is first._store:
            train(second, proposal(run="2"), 1)
        write(self, to)

    monkeypatch.setattr(EventStore, "_write_anchor", late)
    first.reserve(proposal(), round=1, request="q")
    assert Head.read(anchor).sequence == 7
    assert Head.read(anchor) == anchored().head()


# Receipts.


def test_a_receipt_that_the_ledger_contains_passes(opened: Any, proposal: Any) -> None:
    ledger = opened()
    early = ledger.receipt("r")
    train(ledger, proposal(), 1)
    late = ledger.receipt("r")
    train(ledger, proposal(run="2"), 1)
    for each in (ledger, opened()):
        each.require_contains(early)
        each.require_contains(late)


def test_a_ledger_older_than_a_receipt_is_refused(opened: Any, proposal: Any, path: Path, copied: Any) -> None:
    train(opened(), proposal(), 1)
    backup = copied(path)
    train(opened(), proposal(), 2)
    receipt = opened().receipt("r")
    shutil.copy(backup, path)
    older = copied(path)
    assert reason_of(opened().require_contains, receipt) is Reason.LEDGER_BEHIND_RECEIPT
    shutil.copy(older, path)
    train(opened(), proposal(), 3, 4)
    assert reason_of(opened().require_contains, receipt) is Reason.LEDGER_BEHIND_RECEIPT, (
        "another event stands in its place"
    )


def test_a_new_ledger_is_behind_every_receipt_of_the_lost_one(opened: Any, path: Path) -> None:
    receipt = opened().receipt("r")
    path.unlink()
    assert reason_of(opened().require_contains, receipt) is Reason.LEDGER_BEHIND_RECEIPT


def test_a_forged_receipt_is_refused_for_its_signature(
    opened: Any, proposal: Any, make_key: Any, tmp_path: Path
) -> None:
    ledger = opened()
    train(ledger, proposal(), 1)
    receipt = ledger.receipt("r")
    forged = [
        dataclasses.replace(receipt, sequence=receipt.sequence + 1),
        dataclasses.replace(receipt, charged_rounds=0),
        dataclasses.replace(receipt, signature=receipt.signature[::-1]),
        dataclasses.replace(receipt, signature=""),
        opened(path=tmp_path / "o.db", key=make_key(9)).receipt("r"),
    ]
    assert [reason_of(ledger.require_contains, each) for each in forged] == [Reason.WRONG_SIGNATURE] * len(forged)


def test_after_a_genuine_receipt_of_lost_events_nobody_trains_until_they_are_made_up_for(
    opened: Any, proposal: Any, path: Path, copied: Any
) -> None:
    ledger = opened()
    train(ledger, proposal(), 1)
    backup = copied(path)
    train(ledger, proposal(), 2)
    receipt, newest = ledger.receipt("r"), ledger.head()
    shutil.copy(backup, path)
    assert reason_of(opened().require_contains, receipt) is Reason.LEDGER_BEHIND_RECEIPT
    assert reason_of(opened().require_contains, receipt) is Reason.LEDGER_BEHIND_RECEIPT
    assert [event.detail.get("what") for event in verify(path).events].count("in_doubt") == 1
    for asked, round in ((proposal(), 2), (proposal(run="another lead's"), 1)):
        with pytest.raises(Refused) as caught:
            opened().reserve(asked, round=round, request="q")
        assert caught.value.reason is Reason.LEDGER_BEHIND_RECEIPT
    opened().charge_gap(newest)
    opened().require_contains(receipt)
    train(opened(), proposal(run="another lead's"), 1)


# While it is open.


def test_a_ledger_swapped_while_it_is_open_stops(opened: Any, proposal: Any, path: Path, copied: Any) -> None:
    ledger = opened()
    train(ledger, proposal(), 1)
    backup = copied(path)
    train(ledger, proposal(), 2)
    shutil.copy(backup, path)
    for act in (
        lambda: ledger.reserve(proposal(), round=3, request="q"),
        lambda: ledger.end("r"),
        lambda: ledger.refuse(Refused(Reason.LEADS), run="r", round=1, request="q"),
    ):
        with pytest.raises(RunError, match="was changed or put back while it was open; nothing is trained"):
            act()


def test_another_branch_of_equal_length_is_seen_while_it_is_open(
    opened: Any, proposal: Any, path: Path, copied: Any
) -> None:
    ledger = opened()
    backup = copied(path)
    train(ledger, proposal(), 1)
    shutil.copy(backup, path)
    train(opened(), proposal(run="2"), 1, 2)
    with pytest.raises(RunError, match="was changed or put back while it was open"):
        ledger.reserve(proposal(), round=2, request="q")


# Putting a backup back.


class Restored:
    """A ledger of three rounds, put back to its first, and made up for with the anchor of the third.

    Attributes:
        lost: what the lost part charged.
        receipt: the last one of the lost part.
        newest: the last head of the lost part.
        earlier: a head within the lost part.
    """

    def __init__(self, opened: Any, proposal: Any, path: Path, copied: Any, **lost: Any) -> None:
        ledger = opened()
        train(ledger, proposal(), 1)
        backup = copied(path)
        train(ledger, proposal(), 2)
        self.earlier = ledger.head()
        train(ledger, proposal(run="2", plan={"noise_multiplier": 2.0}, **lost), 1)
        self.newest, self.receipt = ledger.head(), ledger.receipt("r")
        self.spent = ledger.history.epsilon()
        self.lost = ledger.history.charged() - events.grouped([proposal().plan.event()])
        shutil.copy(backup, path)


@pytest.fixture
def put_back(opened: Any, proposal: Any, path: Path, copied: Any) -> Restored:
    return Restored(opened, proposal, path, copied)


def test_the_gap_is_what_the_backup_lacks_and_nothing_else(
    put_back: Restored, opened: Any, proposal: Any, path: Path
) -> None:
    ledger = opened()
    gap = ledger.charge_gap(put_back.newest)
    two, one = proposal().plan.event(), proposal(plan={"noise_multiplier": 2.0}).plan.event()
    assert gap == put_back.lost == events.grouped([two, one])
    assert ledger.history.charged() == events.grouped([two, two, one])
    assert opened().history.epsilon() == pytest.approx(put_back.spent)
    note = verify(path).events[-1]
    assert (note.kind, note.detail["what"]) == (Kind.NOTE, "restored")
    assert note.detail["path"][-1] == list(put_back.newest.path[-1])


def test_after_the_gap_is_charged_old_anchors_and_receipts_pass(
    put_back: Restored, opened: Any, anchor: Path, anchored: Any, path: Path, proposal: Any
) -> None:
    anchor.parent.mkdir(parents=True)
    anchor.write_bytes(put_back.newest.to_bytes())
    with pytest.raises(RunError, match="is older than its anchor"):
        anchored()
    opened().charge_gap(put_back.newest)
    for head in (put_back.newest, put_back.earlier):
        assert verify(path, anchor=head).anchor_sequence is not None
    ledger = anchored()
    ledger.require_contains(put_back.receipt)
    train(ledger, proposal(run="3"), 1)
    assert Head.read(anchor).sequence == ledger.history.length
    assert verify(path, anchor=Head.read(anchor)).anchor_sequence is not None


def test_a_run_that_only_the_lost_events_knew_whole_does_not_go_on(
    put_back: Restored, opened: Any, proposal: Any
) -> None:
    ledger = opened()
    ledger.charge_gap(put_back.newest)
    assert (ledger.receipt("r").charged_rounds, ledger.receipt("2").charged_rounds) == (2, 1)
    for run in ("r", "2"):
        with pytest.raises(Refused) as caught:
            opened().reserve(proposal(run=run), round=3, request="q")
        assert caught.value.reason is Reason.RUN_ENDED


@pytest.mark.parametrize(("before", "after"), [(1, 0), (1, 3), (140, 0), (140, 150)])
def test_a_long_lost_branch_is_made_up_for_in_full(
    opened: Any, proposal: Any, policy: Any, path: Path, copied: Any, before: int, after: int
) -> None:
    def refused(ledger: Ledger, times: int) -> None:
        for _ in range(times):
            ledger.refuse(Refused(Reason.TASKS), run="x", round=1, request="q")

    ledger = opened()
    train(ledger, proposal(), 1)
    refused(ledger, before)
    train(ledger, proposal(), 2)
    backup = copied(path)
    train(ledger, proposal(), 3)
    refused(ledger, after)
    newest, whole = ledger.head(), ledger.history.charged()
    shutil.copy(backup, path)
    train(opened(), proposal(run="fork", plan={"noise_multiplier": 3.0}), 1)
    since = opened().history.charged()
    gap = opened().charge_gap(newest)
    lost = events.grouped([proposal().plan.event()])
    assert gap == lost, "and nothing again that both know"
    assert opened().history.charged() == since + gap >= whole
    assert verify(path, anchor=newest).anchor_sequence is not None


def test_what_the_backup_charged_since_makes_up_for_nothing(put_back: Restored, opened: Any, proposal: Any) -> None:
    # Round 2 was released on both branches, which is twice.
    ledger = opened()
    train(ledger, proposal(), 2)
    train(ledger, proposal(run="3", plan={"noise_multiplier": 3.0}), 1)
    since = ledger.history.charged()
    assert ledger.charge_gap(put_back.newest) == put_back.lost
    assert ledger.history.charged() == since + put_back.lost
    known: Counter[DpEvent] = Counter({events.from_json(data): count for data, count in put_back.newest.charged})
    assert known <= ledger.history.charged()


def test_after_a_restore_nobody_holds_what_the_backup_had_set_aside(
    opened: Any, proposal: Any, path: Path, copied: Any
) -> None:
    ledger = opened()
    train(ledger, proposal(), 1)
    backup = copied(path)
    train(ledger, proposal(), 2)
    ledger.end("r")
    train(ledger, proposal(run="2", plan={"num_rounds": 8}), *range(1, 9))
    newest = ledger.head()
    shutil.copy(backup, path)
    opened().charge_gap(newest)
    for run, reason in (("r", Reason.RUN_ENDED), ("3", Reason.MAX_EPSILON)):
        with pytest.raises(Refused) as caught:
            opened().reserve(proposal(run=run), round=2, request="q")
        assert caught.value.reason is reason


def test_a_backup_put_back_twice_is_found_again(
    put_back: Restored, opened: Any, anchored: Any, anchor: Path, proposal: Any, path: Path, copied: Any
) -> None:
    # The new branch has not yet reached the number of events that the lost one had.
    opened().charge_gap(put_back.newest)
    restored = copied(path)
    anchor.parent.mkdir(parents=True)
    anchor.write_bytes(opened().head().to_bytes())
    ledger = anchored()
    train(ledger, proposal(run="3"), 1)
    assert ledger.history.length <= put_back.newest.sequence
    receipt = ledger.receipt("r")
    shutil.copy(restored, path)
    with pytest.raises(RunError, match="is older than its anchor"):
        anchored()
    with pytest.raises(RunError, match="the ledger was put back"):
        verify(path, anchor=Head.read(anchor))
    assert reason_of(opened().require_contains, receipt) is Reason.LEDGER_BEHIND_RECEIPT


def test_a_backup_from_before_a_restore_is_found(put_back: Restored, opened: Any, path: Path, copied: Any) -> None:
    backup = copied(path)
    ledger = opened()
    ledger.charge_gap(put_back.newest)
    head, receipt = ledger.head(), ledger.receipt("r")
    shutil.copy(backup, path)
    with pytest.raises(RunError, match="the ledger was put back"):
        verify(path, anchor=head)
    assert reason_of(opened().require_contains, receipt) is Reason.LEDGER_BEHIND_RECEIPT


def test_a_restore_forgets_neither_a_seeded_run_nor_a_freeze(
    opened: Any, policy: Any, proposal: Any, path: Path, copied: Any
) -> None:
    study = policy(allow={"seeded_noise": True})
    put_back = Restored(lambda: opened(policy=study), proposal, path, copied, seeded_noise=True)
    assert not opened().history.seeded
    opened().charge_gap(put_back.newest)
    assert opened().history.seeded
    backup = copied(path)
    opened().freeze("why")
    frozen = opened().head()
    shutil.copy(backup, path)
    assert not opened().history.frozen
    opened().charge_gap(frozen)
    assert opened().history.frozen
    assert verify(path).history.seeded


def test_an_anchor_of_another_ledger_charges_nothing(
    put_back: Restored, opened: Any, path: Path, tmp_path: Path, make_key: Any
) -> None:
    before = path.read_bytes()
    for other in (opened(path=tmp_path / "a.db"), opened(path=tmp_path / "b.db", key=make_key(9))):
        with pytest.raises(RunError, match="the anchor is of another ledger"):
            opened().charge_gap(other.head())
    assert path.read_bytes() == before
