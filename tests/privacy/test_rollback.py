"""A ledger that was put back to an older state: found by its anchor or a receipt, and made up for by `charge_gap`."""

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from fedtune.privacy import events
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import Head, Kind
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Reason, Refused
from fedtune.spec import ConfigError, RunError

from .builders import far_on, make_key, policy, proposal, reason_of, reserve, site_key, train
from .conftest import Backups


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere" / "anchor.json"


@pytest.fixture
def anchored(opened: Any, anchor: Path) -> Any:
    """Open the ledger with its anchor."""
    return partial(opened, anchor=anchor)


# Anchors.


def test_anchor_holds_the_newest_head_after_every_transaction(anchored: Any, anchor: Path, path: Path) -> None:
    ledger = anchored()
    steps: list[Callable[[], object]] = [
        lambda: None,
        lambda: train(ledger, proposal(), 1),
        lambda: ledger.record_refusal(Refused(Reason.LEADS), run="x", round=1, request="q"),
        lambda: ledger.end_run("r"),
        lambda: ledger.freeze("why"),
    ]
    for step in steps:
        step()
        head, newest = Head.read(anchor), verify(path).events[-1]
        assert (head.sequence, head.hash, head.time) == (newest.sequence, newest.hash, newest.time)
        assert head.site_key == site_key.public
        assert head == ledger.head()
    assert ("frozen", "") in head.marks
    ((mechanism, count),) = head.charged
    assert {events.from_json(mechanism): count} == events.count_mechanisms([proposal().plan.event()])


def test_disk_full_error_elsewhere_is_not_blamed_on_the_anchor(anchored: Any) -> None:
    ledger, full = anchored(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a.json")
    with pytest.raises(OSError, match=r"runs/a\.json"):
        ledger.reserve(proposal(), round=1, request="a", before_charge=Mock(side_effect=full))
    assert ledger.history.charged_rounds("r") == 0


def test_branch_other_than_the_anchored_one_raises_a_run_error(
    anchored: Any, anchor: Path, opened: Any, path: Path
) -> None:
    train(anchored(), proposal(), 1)
    backup = path.read_bytes()
    train(anchored(), proposal(), 2)
    path.write_bytes(backup)
    with pytest.raises(RunError, match=r"is older than its anchor .* \(event 5 of at least 7\)"):
        anchored()
    train(opened(), proposal(), 2, 3, 4)  # without the anchor it goes on, and gets longer
    with pytest.raises(RunError, match="or has diverged from it"):
        anchored()
    with pytest.raises(RunError, match="has diverged"):
        verify(path, anchor=Head.read(anchor))


def test_missing_ledger_or_missing_anchor_raises_a_run_error(anchored: Any, path: Path, anchor: Path) -> None:
    train(anchored(), proposal(), 1)
    ledger = path.read_bytes()
    for lose in (path.unlink, lambda: path.write_bytes(b"")):
        lose()
        with pytest.raises(RunError, match=r"is missing: anchor .* has 5 events of it"):
            anchored()
    path.write_bytes(ledger)
    anchor.unlink()
    with pytest.raises(RunError, match=r"anchor .* is missing, and ledger .* is not new"):
        anchored()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"null",
        lambda data: data[:-40],
        lambda data: data.replace(b'"sequence": 2', b'"sequence": 1'),
        lambda data: data.replace(b'"marks": []', b'"marks": [["frozen", ""]]'),
        lambda data: json.dumps(json.loads(data) | {"site_key": "0" * 64}).encode(),
    ],
)
def test_damaged_anchor_raises_a_run_error(anchored: Any, anchor: Path, damage: Callable[[bytes], bytes]) -> None:
    anchored()
    before = anchor.read_bytes()
    anchor.write_bytes(damage(before))
    assert anchor.read_bytes() != before
    with pytest.raises(RunError, match=r"anchor = '.*anchor\.json': must .*; nothing is trained"):
        anchored()


def test_anchor_of_another_version_is_a_config_error(anchored: Any, anchor: Path) -> None:
    anchored()
    anchor.write_text(json.dumps(json.loads(anchor.read_text()) | {"schema": 99}))
    with pytest.raises(
        ConfigError, match=r"schema = 99: must be \d+: continue with the version of fedtune that wrote it"
    ):
        anchored()


def test_anchor_of_another_ledger_or_key_raises_a_run_error(
    anchored: Any, anchor: Path, opened: Any, tmp_path: Path
) -> None:
    head = anchored().head()
    fields = {name: getattr(head, name) for name in head.__slots__ if name not in ("site_key", "signature")}
    for other in (
        opened(path=tmp_path / "other.db").head(),
        Head.create_signed(make_key(9), **(fields | {"sequence": 1})),
    ):
        anchor.write_bytes(other.to_bytes())
        with pytest.raises(RunError, match="the anchor belongs to another ledger"):
            anchored()


def test_ledger_recovers_after_a_crash_before_the_anchor_is_written(anchored: Any, anchor: Path) -> None:
    ledger = anchored()
    behind = anchor.read_bytes()
    with patch.object(store, "write_durably", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        ledger.reserve(proposal(), round=1, request="q")
    assert anchor.read_bytes() == behind
    assert ledger.history.charged_rounds("r") == 0, "until it looks again"
    assert anchored().sign_receipt("r").charged_rounds == 1
    train(ledger, proposal(), 2)
    assert Head.read(anchor).sequence == ledger.history.length == 6
    assert ledger.sign_receipt("r").charged_rounds == 2


def test_unwritable_anchor_raises_a_run_error(anchored: Any, anchor: Path) -> None:
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
    ledger.end_run("r")
    assert Head.read(anchor).sequence == ledger.history.length
    assert ledger.sign_receipt("r").charged_rounds == 1, "charged, although leave to train was not given"


def test_anchor_keeps_the_newer_head_of_two_writers(anchored: Any, anchor: Path, monkeypatch: Any) -> None:
    """A second process writes its event and its anchor after the first one's event, before its anchor."""
    first, second = anchored(), anchored()
    write = store.EventStore._write_anchor

    def late(self: store.EventStore, to: Path) -> None:
        if self is first._store:
            train(second, proposal(run="2"), 1)
        write(self, to)

    monkeypatch.setattr(store.EventStore, "_write_anchor", late)
    first.reserve(proposal(), round=1, request="q")
    assert Head.read(anchor).sequence == 7
    assert Head.read(anchor) == anchored().head()


def test_forged_receipt_is_refused_for_its_signature(opened: Any, tmp_path: Path) -> None:
    ledger = opened()
    train(ledger, proposal(), 1)
    receipt, other = ledger.sign_receipt("r"), opened(path=tmp_path / "o.db", key=make_key(9)).sign_receipt("r")
    changes = {"sequence": receipt.sequence + 1, "charged_rounds": 0, "signature": receipt.signature[::-1]}
    unsigned = dataclasses.replace(receipt, signature="")
    for forged in (other, unsigned, *(dataclasses.replace(receipt, **{key: value}) for key, value in changes.items())):
        assert reason_of(ledger.require_receipt, forged) is Reason.WRONG_SIGNATURE


def test_receipt_of_another_population_raises_no_doubt(opened: Any, tmp_path: Path) -> None:
    ledger, other = opened(), opened(path=tmp_path / "staff.db", policy=policy(site="north-staff"))
    for one in (ledger, other):
        train(one, proposal(), 1)
    assert reason_of(ledger.require_receipt, other.sign_receipt("r")) is Reason.WRONG_SIGNATURE
    train(ledger, proposal(), 2)


def test_ledger_swapped_while_open_raises_a_run_error(backups: Backups) -> None:
    ledger = backups.open()
    train(ledger, proposal(), 2)
    backups.put_back()
    for act in (
        lambda: ledger.reserve(proposal(), round=3, request="q"),
        lambda: ledger.end_run("r"),
        lambda: ledger.record_refusal(Refused(Reason.LEADS), run="r", round=1, request="q"),
    ):
        with pytest.raises(RunError, match="was changed or rolled back while it was open; nothing is trained"):
            act()
    backups.branch(proposal(run="2"), 1)  # no shorter than what it knows
    assert backups.open().history.length >= ledger.history.length
    with pytest.raises(RunError, match="was changed or rolled back while it was open"):
        ledger.reserve(proposal(), round=2, request="q")


# Putting a backup back.


class Lost:
    """What a ledger of three rounds knew when it was put back to its first: two heads, a receipt and what it lost."""

    def __init__(self, backups: Backups) -> None:
        ledger, self.path = backups.open(), backups.path
        train(ledger, proposal(), 2)
        self.earlier = ledger.head()
        train(ledger, proposal(run="2", plan={"noise_multiplier": 2.0}), 1)
        self.newest, self.sign_receipt = ledger.head(), ledger.sign_receipt("r")
        self.spent = ledger.history.epsilon()
        self.total_charges = ledger.history.total_charges() - events.count_mechanisms([proposal().plan.event()])
        backups.put_back()


@pytest.fixture
def lost(backups: Backups) -> Lost:
    return Lost(backups)


def test_restore_charges_exactly_the_events_missing_from_the_backup(lost: Lost, opened: Any, path: Path) -> None:
    ledger = opened()
    gap = ledger.charge_gap(lost.newest)
    two, one = proposal().plan.event(), proposal(plan={"noise_multiplier": 2.0}).plan.event()
    assert gap == lost.total_charges == events.count_mechanisms([two, one])
    assert ledger.history.total_charges() == events.count_mechanisms([two, two, one])
    assert opened().history.epsilon() == pytest.approx(lost.spent)
    note = verify(path).events[-1]
    assert (note.kind, note.detail["what"]) == (Kind.NOTE, "restored")
    assert note.detail["path"][-1] == list(lost.newest.path[-1])


def test_earlier_anchors_and_receipts_pass_after_the_gap_is_charged(lost: Lost, anchor: Path, anchored: Any) -> None:
    anchor.parent.mkdir(parents=True)
    anchor.write_bytes(lost.newest.to_bytes())
    with pytest.raises(RunError, match="is older than its anchor"):
        anchored()
    anchored(anchor=None).charge_gap(lost.newest)
    ledger = anchored()
    ledger.require_receipt(lost.sign_receipt)
    train(ledger, proposal(run="3"), 1)
    assert Head.read(anchor).sequence == ledger.history.length
    for head in (lost.newest, lost.earlier, Head.read(anchor)):
        assert verify(lost.path, anchor=head).anchor_sequence is not None


def test_run_partly_lost_in_a_restore_cannot_continue(lost: Lost, opened: Any) -> None:
    ledger = opened()
    ledger.charge_gap(lost.newest)
    assert (ledger.sign_receipt("r").charged_rounds, ledger.sign_receipt("2").charged_rounds) == (2, 1)
    for run in ("r", "2"):
        assert reason_of(reserve, opened(), proposal(run=run), 3) is Reason.RUN_ENDED


@pytest.mark.parametrize(("before", "after"), [(1, 0), (1, 3), (140, 0), (140, 150)])
def test_long_lost_branch_is_charged_in_full(backups: Backups, before: int, after: int) -> None:
    ledger = backups.open()
    far_on(ledger, before)
    train(ledger, proposal(), 2)
    backups.back_up()
    train(ledger, proposal(), 3)
    newest, whole = far_on(ledger, after), ledger.history.total_charges()
    backups.branch(proposal(run="fork", plan={"noise_multiplier": 3.0}), 1)
    ledger = backups.open()
    since = ledger.history.total_charges()
    gap = ledger.charge_gap(newest)
    assert gap == events.count_mechanisms([proposal().plan.event()]), "and nothing again that both know"
    assert backups.open().history.total_charges() == since + gap >= whole
    assert verify(backups.path, anchor=newest).anchor_sequence is not None


def test_restore_releases_the_reserves_of_ended_runs(backups: Backups) -> None:
    ledger = backups.open()
    train(ledger, proposal(), 2)
    ledger.end_run("r")
    train(ledger, proposal(run="2", plan={"num_rounds": 8}), *range(1, 9))
    backups.put_back(anchor=ledger.head())
    for run, reason in (("r", Reason.RUN_ENDED), ("3", Reason.MAX_EPSILON)):
        assert reason_of(reserve, backups.open(), proposal(run=run), 2) is reason


@pytest.mark.parametrize("newer", [True, False])
def test_backup_restored_after_a_restore_is_detected(
    lost: Lost, backups: Backups, anchored: Any, anchor: Path, newer: bool
) -> None:
    # The new branch has not yet reached the number of events that the lost one had.
    ledger = backups.put_back(anchor=lost.newest)
    if newer:
        backups.back_up()
    anchor.parent.mkdir(parents=True)
    anchor.write_bytes(ledger.head().to_bytes())
    ledger = anchored()
    train(ledger, proposal(run="3"), 1)
    assert ledger.history.length <= lost.newest.sequence
    receipt = ledger.sign_receipt("r")
    backups.put_back()
    with pytest.raises(RunError, match="is older than its anchor"):
        anchored()
    with pytest.raises(RunError, match="the ledger was rolled back"):
        verify(backups.path, anchor=Head.read(anchor))
    assert reason_of(backups.open().require_receipt, receipt) is Reason.LEDGER_BEHIND_RECEIPT


def test_restore_keeps_all_permanent_marks(opened: Any, path: Path) -> None:
    backups = Backups(partial(opened, policy=policy(budget={"max_epsilon_per_run": 8.0})), path)
    train(backups.open(), proposal(), 1)
    backups.back_up()
    ledger = opened(policy=policy(allow={"inexact_gradients": True, "seeded_noise": True}))
    train(ledger, proposal(run="2", seeded_noise=True), 1)
    lead = proposal().lead
    ledger.record_refusal(Refused(Reason.PAUSED), run="3", round=1, request="q", lead=lead)
    ledger.end_run("3", lead=lead)
    ledger.freeze("why")
    marks, newest = ledger.history.marks, ledger.head()
    assert {kind for kind, _ in marks} == {"inexact_gradients", "seeded", "limits_loosened", "never", "frozen"}
    assert ledger.sign_receipt("3", lead=lead).ended
    assert not backups.put_back().history.marks
    assert reason_of(reserve, backups.put_back(anchor=newest), proposal(run="3"), 1) is Reason.RUN_ENDED
    assert verify(path).history.marks == marks


def test_anchor_of_another_ledger_charges_nothing(backups: Backups, opened: Any, tmp_path: Path) -> None:
    before = backups.path.read_bytes()
    for other in (opened(path=tmp_path / "a.db"), opened(path=tmp_path / "b.db", key=make_key(9))):
        with pytest.raises(RunError, match="the anchor belongs to another ledger"):
            backups.open().charge_gap(other.head())
    assert backups.path.read_bytes() == before
