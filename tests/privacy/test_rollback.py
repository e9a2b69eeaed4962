"""A ledger restored to an older state: detected with its anchor or a receipt, and charged by `charge_gap`."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from fedtune import system
from fedtune.privacy import events
from fedtune.privacy.durable import write_durably
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import Head, Kind
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError, RunError

from .builders import advance_head, make_key, make_policy, make_proposal, read_refusal_reason, reserve, site_key, train
from .conftest import Backups


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere" / "anchor.json"


@pytest.fixture
def open_anchored(open_ledger: Any, anchor: Path) -> Any:
    """Open the ledger with its anchor."""
    return partial(open_ledger, anchor=anchor)


# Anchors.


def test_anchor_holds_the_newest_head_after_every_transaction(open_anchored: Any, anchor: Path, path: Path) -> None:
    ledger = open_anchored()
    steps: list[Callable[[], object]] = [
        lambda: None,
        lambda: train(ledger, make_proposal(), 1),
        lambda: ledger.record_refusal(Refused(Reason.LEADS), run="x", round=1, request="q"),
        lambda: ledger.end_run("r"),
        lambda: ledger.freeze("why"),
    ]
    for step in steps:
        step()
        head, newest_event = Head.read(anchor), verify(path).events[-1]
        assert (head.sequence, head.hash, head.time) == (newest_event.sequence, newest_event.hash, newest_event.time)
        assert head.site_key == site_key.public
        assert head == ledger.head()
    assert ("frozen", "") in head.marks
    ((mechanism, count),) = head.charged
    assert {events.from_json(mechanism): count} == events.count_mechanisms([make_proposal().plan.event()])


def test_disk_full_error_for_another_file_does_not_name_the_anchor(open_anchored: Any) -> None:
    ledger, full = open_anchored(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a.json")
    with pytest.raises(OSError, match=r"runs/a\.json"):
        ledger.reserve(make_proposal(), round=1, request="a", before_charge=Mock(side_effect=full))
    assert ledger.history.charged_rounds("r") == 0


def test_branch_other_than_the_anchored_one_raises_a_run_error(
    open_anchored: Any, anchor: Path, open_ledger: Any, path: Path
) -> None:
    train(open_anchored(), make_proposal(), 1)
    backup = path.read_bytes()
    train(open_anchored(), make_proposal(), 2)
    path.write_bytes(backup)
    with pytest.raises(RunError, match=r"is older than its anchor .* \(event 5 of at least 7\)"):
        open_anchored()
    train(open_ledger(), make_proposal(), 2, 3, 4)  # without the anchor the ledger continues and grows
    with pytest.raises(RunError, match="or has diverged from it"):
        open_anchored()
    with pytest.raises(RunError, match="has diverged"):
        verify(path, anchor=Head.read(anchor))


def test_missing_ledger_or_missing_anchor_raises_a_run_error(open_anchored: Any, path: Path, anchor: Path) -> None:
    train(open_anchored(), make_proposal(), 1)
    ledger = path.read_bytes()
    path.unlink()
    with pytest.raises(RunError, match=r"is missing, but anchor .* covers 5 of its events"):
        open_anchored()
    path.write_bytes(ledger)
    anchor.unlink()
    with pytest.raises(RunError, match=r"anchor .* is missing, and ledger .* is not new"):
        open_anchored()


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
def test_damaged_anchor_raises_a_run_error(open_anchored: Any, anchor: Path, damage: Callable[[bytes], bytes]) -> None:
    open_anchored()
    before = anchor.read_bytes()
    anchor.write_bytes(damage(before))
    assert anchor.read_bytes() != before
    with pytest.raises(RunError, match=r"anchor = '.*anchor\.json': must .*; training is not possible"):
        open_anchored()


def test_anchor_of_another_version_raises_a_config_error(open_anchored: Any, anchor: Path) -> None:
    open_anchored()
    anchor.write_text(json.dumps(json.loads(anchor.read_text()) | {"schema": 99}))
    with pytest.raises(
        ConfigError, match=r"schema = 99: must be \d+: use the version of fedtune that wrote the ledger"
    ):
        open_anchored()


def test_anchor_of_another_ledger_or_key_raises_a_run_error(
    open_anchored: Any, anchor: Path, open_ledger: Any, tmp_path: Path
) -> None:
    head = open_anchored().head()
    fields = {name: getattr(head, name) for name in head.__slots__ if name not in ("site_key", "signature")}
    for other_ledger in (
        open_ledger(path=tmp_path / "other.db").head(),
        Head.create_signed(make_key(9), **(fields | {"sequence": 1})),
    ):
        anchor.write_bytes(other_ledger.to_bytes())
        with pytest.raises(RunError, match="the anchor belongs to another ledger"):
            open_anchored()


def test_ledger_recovers_after_a_crash_before_the_anchor_is_written(open_anchored: Any, anchor: Path) -> None:
    ledger = open_anchored()
    old_anchor = anchor.read_bytes()
    with patch.object(store, "write_durably", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        ledger.reserve(make_proposal(), round=1, request="q")
    assert anchor.read_bytes() == old_anchor
    assert ledger.history.charged_rounds("r") == 0, "the count must stay until a reread"
    assert open_anchored().sign_receipt("r").charged_rounds == 1
    train(ledger, make_proposal(), 2)
    assert Head.read(anchor).sequence == ledger.history.length == 6
    assert ledger.sign_receipt("r").charged_rounds == 2


def test_unwritable_anchor_raises_a_run_error(open_anchored: Any, anchor: Path) -> None:
    ledger = open_anchored()
    old_anchor = anchor.read_bytes()
    anchor.unlink()
    anchor.parent.rmdir()
    anchor.parent.write_bytes(b"a file where the folder was")
    with pytest.raises(RunError, match=r"anchor .* cannot be used \(.*\); training is not possible"):
        ledger.reserve(make_proposal(), round=1, request="q")
    anchor.parent.unlink()
    anchor.parent.mkdir()
    anchor.write_bytes(old_anchor)
    ledger.end_run("r")
    assert Head.read(anchor).sequence == ledger.history.length
    assert ledger.sign_receipt("r").charged_rounds == 0, "the request must be refused before it is charged"


def test_anchor_is_locked_from_the_commit_until_it_has_the_newest_head(
    open_anchored: Any, anchor: Path, path: Path
) -> None:
    ledger, checks = open_anchored(), list[int]()

    def write_while_locked(to: Path, data: bytes) -> None:
        descriptor = system.open_to_lock(anchor.parent)
        with pytest.raises(BlockingIOError):
            system.lock(descriptor)
        os.close(descriptor)
        checks.append(len(verify(path).events))
        write_durably(to, data)

    with patch.object(store, "write_durably", write_while_locked):
        ledger.reserve(make_proposal(), round=1, request="q")
    assert checks == [Head.read(anchor).sequence] == [ledger.history.length]


@pytest.mark.parametrize("rounds", [0, 1])
def test_anchor_that_a_clone_moved_during_a_transaction_refuses_the_commit(
    open_anchored: Any, anchor: Path, path: Path, rounds: int
) -> None:
    first = open_anchored()
    train(first, make_proposal(), *range(1, rounds + 1))
    copied = Path(shutil.copy(path, path.with_name("clone.db")))
    clone, before = open_anchored(path=copied), copied.read_bytes()
    charge = Mock(side_effect=lambda: reserve(first, make_proposal(), rounds + 1))
    with pytest.raises(RunError, match=r"is older than its anchor .*, or has diverged from it"):
        clone.reserve(make_proposal(run="other"), round=1, request="b", before_charge=charge)
    charge.assert_called_once()
    assert Head.read(anchor) == first.head()
    assert copied.read_bytes() == before, "a refused request must not be charged"
    train(first, make_proposal(), rounds + 2)
    assert Head.read(anchor) == open_anchored().head()


def test_linked_anchor_is_written_in_its_own_folder(open_anchored: Any, anchor: Path, path: Path) -> None:
    link = path.with_name("anchor.json")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(anchor)
    for rounds in (1, 2):
        ledger = open_anchored(anchor=link)
        train(ledger, make_proposal(), rounds)
        assert Head.read(anchor) == ledger.head()
    assert link.readlink() == anchor
    policy = make_policy(anchor=link.name, ledger=path.name)
    assert SiteFiles(policy, path.with_name("site.toml")).anchor == anchor.resolve()


def test_forged_receipt_is_refused_for_its_signature(open_ledger: Any, tmp_path: Path) -> None:
    ledger = open_ledger()
    train(ledger, make_proposal(), 1)
    receipt, second = ledger.sign_receipt("r"), open_ledger(path=tmp_path / "o.db", key=make_key(9)).sign_receipt("r")
    changes = {"sequence": receipt.sequence + 1, "charged_rounds": 0, "signature": receipt.signature[::-1]}
    unsigned = dataclasses.replace(receipt, signature="")
    for forged in (second, unsigned, *(dataclasses.replace(receipt, **{key: value}) for key, value in changes.items())):
        assert read_refusal_reason(ledger.require_receipt, forged) is Reason.WRONG_SIGNATURE


def test_receipt_of_another_population_raises_no_doubt(open_ledger: Any, tmp_path: Path) -> None:
    ledger, second = open_ledger(), open_ledger(path=tmp_path / "staff.db", policy=make_policy(site="north-staff"))
    for lost_event in (ledger, second):
        train(lost_event, make_proposal(), 1)
    assert read_refusal_reason(ledger.require_receipt, second.sign_receipt("r")) is Reason.WRONG_SIGNATURE
    train(ledger, make_proposal(), 2)


def test_ledger_swapped_while_open_raises_a_run_error(backups: Backups) -> None:
    ledger = backups.open()
    train(ledger, make_proposal(), 2)
    backups.put_back()
    for act in (
        lambda: ledger.reserve(make_proposal(), round=3, request="q"),
        lambda: ledger.end_run("r"),
        lambda: ledger.record_refusal(Refused(Reason.LEADS), run="r", round=1, request="q"),
    ):
        with pytest.raises(RunError, match="was changed or rolled back while it was open; training is not possible"):
            act()
    backups.branch(make_proposal(run="2"), 1)  # at least as long as the anchor's branch
    assert backups.open().history.length >= ledger.history.length
    with pytest.raises(RunError, match="was changed or rolled back while it was open"):
        ledger.reserve(make_proposal(), round=2, request="q")


# Restoring a backup.


class Lost:
    """What a ledger of three rounds had before it was restored to its first: two heads, a receipt and lost events."""

    def __init__(self, backups: Backups) -> None:
        ledger, self.path = backups.open(), backups.path
        train(ledger, make_proposal(), 2)
        self.earlier = ledger.head()
        train(ledger, make_proposal(run="2", plan={"noise_multiplier": 2.0}), 1)
        self.newest, self.sign_receipt = ledger.head(), ledger.sign_receipt("r")
        self.spent = ledger.history.epsilon()
        self.count_total_charges = ledger.history.count_total_charges() - events.count_mechanisms(
            [make_proposal().plan.event()]
        )
        backups.put_back()


@pytest.fixture
def lost_ledger(backups: Backups) -> Lost:
    return Lost(backups)


def test_restore_charges_exactly_the_events_missing_from_the_backup(
    lost_ledger: Lost, open_ledger: Any, path: Path
) -> None:
    ledger = open_ledger()
    gap = ledger.charge_gap(lost_ledger.newest)
    two, lost_event = make_proposal().plan.event(), make_proposal(plan={"noise_multiplier": 2.0}).plan.event()
    assert gap == lost_ledger.count_total_charges == events.count_mechanisms([two, lost_event])
    assert ledger.history.count_total_charges() == events.count_mechanisms([two, two, lost_event])
    assert open_ledger().history.epsilon() == pytest.approx(lost_ledger.spent)
    note = verify(path).events[-1]
    assert (note.kind, note.detail["what"]) == (Kind.NOTE, "restored")
    assert note.detail["path"][-1] == list(lost_ledger.newest.path[-1])


def test_earlier_anchors_and_receipts_pass_after_the_gap_is_charged(
    lost_ledger: Lost, anchor: Path, open_anchored: Any
) -> None:
    anchor.parent.mkdir(parents=True)
    anchor.write_bytes(lost_ledger.newest.to_bytes())
    with pytest.raises(RunError, match="is older than its anchor"):
        open_anchored()
    open_anchored(anchor=None).charge_gap(lost_ledger.newest)
    ledger = open_anchored()
    ledger.require_receipt(lost_ledger.sign_receipt)
    train(ledger, make_proposal(run="3"), 1)
    assert Head.read(anchor).sequence == ledger.history.length
    for head in (lost_ledger.newest, lost_ledger.earlier, Head.read(anchor)):
        assert verify(lost_ledger.path, anchor=head).anchor_sequence is not None


def test_run_with_lost_rounds_cannot_continue_after_a_restore(lost_ledger: Lost, open_ledger: Any) -> None:
    ledger = open_ledger()
    ledger.charge_gap(lost_ledger.newest)
    assert (ledger.sign_receipt("r").charged_rounds, ledger.sign_receipt("2").charged_rounds) == (2, 1)
    for run in ("r", "2"):
        assert read_refusal_reason(reserve, open_ledger(), make_proposal(run=run), 3) is Reason.RUN_ENDED


@pytest.mark.parametrize(("before", "after"), [(1, 0), (1, 3), (140, 0), (140, 150)])
def test_lost_branch_with_many_events_is_charged_in_full(backups: Backups, before: int, after: int) -> None:
    ledger = backups.open()
    advance_head(ledger, before)
    train(ledger, make_proposal(), 2)
    backups.back_up()
    train(ledger, make_proposal(), 3)
    newest_event, total = advance_head(ledger, after), ledger.history.count_total_charges()
    backups.branch(make_proposal(run="fork", plan={"noise_multiplier": 3.0}), 1)
    ledger = backups.open()
    charged_since = ledger.history.count_total_charges()
    gap = ledger.charge_gap(newest_event)
    assert gap == events.count_mechanisms([make_proposal().plan.event()]), "events on both must not count again"
    assert backups.open().history.count_total_charges() == charged_since + gap >= total
    assert verify(backups.path, anchor=newest_event).anchor_sequence is not None


def test_restore_releases_the_reserves_of_ended_runs(backups: Backups) -> None:
    ledger = backups.open()
    train(ledger, make_proposal(), 2)
    ledger.end_run("r")
    train(ledger, make_proposal(run="2", plan={"num_rounds": 8}), *range(1, 9))
    backups.put_back(anchor=ledger.head())
    for run, reason in (("r", Reason.RUN_ENDED), ("3", Reason.MAX_EPSILON)):
        assert read_refusal_reason(reserve, backups.open(), make_proposal(run=run), 2) is reason


@pytest.mark.parametrize("newer", [True, False])
def test_backup_restored_after_a_restore_is_detected(
    lost_ledger: Lost, backups: Backups, open_anchored: Any, anchor: Path, newer: bool
) -> None:
    # The new branch has fewer events than the lost one.
    ledger = backups.put_back(anchor=lost_ledger.newest)
    if newer:
        backups.back_up()
    anchor.parent.mkdir(parents=True)
    anchor.write_bytes(ledger.head().to_bytes())
    ledger = open_anchored()
    train(ledger, make_proposal(run="3"), 1)
    assert ledger.history.length <= lost_ledger.newest.sequence
    receipt = ledger.sign_receipt("r")
    backups.put_back()
    with pytest.raises(RunError, match="is older than its anchor"):
        open_anchored()
    with pytest.raises(RunError, match="the ledger was rolled back"):
        verify(backups.path, anchor=Head.read(anchor))
    assert read_refusal_reason(backups.open().require_receipt, receipt) is Reason.LEDGER_BEHIND_RECEIPT


def test_restore_keeps_all_permanent_marks(open_ledger: Any, path: Path) -> None:
    backups = Backups(partial(open_ledger, policy=make_policy(budget={"max_epsilon_per_run": 8.0})), path)
    train(backups.open(), make_proposal(), 1)
    backups.back_up()
    ledger = open_ledger(policy=make_policy(allow={"inexact_gradients": True, "seeded_noise": True}))
    train(ledger, make_proposal(run="2", seeded_noise=True), 1)
    lead = make_proposal().lead
    ledger.record_refusal(Refused(Reason.PAUSED), run="3", round=1, request="q", lead=lead)
    ledger.end_run("3", lead=lead)
    ledger.freeze("why")
    marks, event = ledger.history.marks, ledger.head()
    assert {kind for kind, _ in marks} == {"inexact_gradients", "seeded", "limits_loosened", "never", "frozen"}
    assert ledger.sign_receipt("3", lead=lead).ended
    assert not backups.put_back().history.marks
    assert read_refusal_reason(reserve, backups.put_back(anchor=event), make_proposal(run="3"), 1) is Reason.RUN_ENDED
    assert verify(path).history.marks == marks


def test_anchor_of_another_ledger_charges_nothing(backups: Backups, open_ledger: Any, tmp_path: Path) -> None:
    before = backups.path.read_bytes()
    for other_ledger in (open_ledger(path=tmp_path / "a.db"), open_ledger(path=tmp_path / "b.db", key=make_key(9))):
        with pytest.raises(RunError, match="the anchor belongs to another ledger"):
            backups.open().charge_gap(other_ledger.head())
    assert backups.path.read_bytes() == before
