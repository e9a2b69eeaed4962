"""The ledger charges before anything is trained, survives crashes, and never answers from doubt."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy import durable
from fedtune.privacy import ledger as ledger_module
from fedtune.privacy.ledger import JournalLedger, Kind, Ledger, Reservation
from fedtune.privacy.plan import Plan
from fedtune.privacy.release import Reason, Receipt, Refused
from fedtune.spec import RunError

Open = Callable[[], JournalLedger]


class PowerCut(Exception):
    """What a test raises where a crash would strike."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sites" / "a" / "ledger.jsonl"


@pytest.fixture
def opened(path: Path) -> Open:
    """Open the ledger as a fresh process would."""
    return lambda: JournalLedger("a", path)


def reserve(ledger: Ledger, round: int, plan: Plan, request: str | None = None) -> Reservation:
    granted = ledger.reserve(run="r", round=round, request=request or f"digest {round}", plan=plan)
    assert isinstance(granted, Reservation)
    return granted


def answered(ledger: Ledger, round: int, plan: Plan, reply: bytes) -> None:
    ledger.commit(reserve(ledger, round, plan), reply)


def refusal_of(ledger: Ledger, round: int, plan: Plan, request: str | None = None) -> Refused:
    with pytest.raises(Refused) as caught:
        ledger.reserve(run="r", round=round, request=request or f"digest {round}", plan=plan)
    return caught.value


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_round_is_charged_on_disk_before_reserve_returns(path: Path, opened: Open, plan: Any) -> None:
    reserve(opened(), 1, plan())
    assert [(line["kind"], line["round"]) for line in lines(path)] == [("plan", 0), ("reserve", 1)]
    assert opened().events("r") == [plan().event()], "a killed process is charged for what it began"


def test_the_charge_is_forced_to_disk_and_no_leave_is_given_without(
    opened: Open, plan: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = opened()
    synced: list[bytes] = []

    def cut_at_reserve(_: int) -> None:
        synced.append(path.read_bytes())
        if b'"reserve"' in synced[-1]:
            raise PowerCut

    monkeypatch.setattr(durable.os, "fsync", cut_at_reserve)
    with pytest.raises(PowerCut):
        reserve(ledger, 1, plan())
    assert b'"plan"' in synced[0]


def test_one_round(opened: Open, plan: Any) -> None:
    ledger = opened()
    granted = reserve(ledger, 1, plan())
    assert granted == Reservation(run="r", round=1, request="digest 1", attempt=1)
    ledger.commit(granted, b"reply 1")
    assert [entry.kind for entry in ledger.entries] == [Kind.PLAN, Kind.RESERVE, Kind.COMMIT]
    assert [entry.sequence for entry in ledger.entries] == [1, 2, 3]


def test_the_same_request_after_a_commit_is_free(opened: Open, plan: Any) -> None:
    answered(opened(), 1, plan(), b"reply 1")
    for ledger in (opened(), opened()):
        assert ledger.reserve(run="r", round=1, request="digest 1", plan=plan()) == b"reply 1"
    assert opened().receipt("r") == Receipt(site="a", run="r", charged_rounds=1, charged_steps=3, sequence=3)


def test_another_request_for_a_round_is_refused(opened: Open, plan: Any) -> None:
    answered(opened(), 1, plan(), b"reply 1")
    refused = refusal_of(opened(), 1, plan(), request="another digest")
    assert (refused.reason, refused.asked, refused.allowed) == (
        Reason.ROUND_REQUESTED_DIFFERENTLY,
        "another digest",
        "digest 1",
    )
    assert len(opened().events("r")) == 1


def test_another_request_for_an_interrupted_round_is_refused_too(opened: Open, plan: Any) -> None:
    reserve(opened(), 1, plan())
    assert refusal_of(opened(), 1, plan(), request="another").reason is Reason.ROUND_REQUESTED_DIFFERENTLY


@pytest.mark.parametrize("change", [{"noise_multiplier": 0.9}, {"sampling_rate": 0.3}, {"spare_rounds": 1}])
def test_a_changed_plan_is_refused(opened: Open, plan: Any, change: dict[str, float]) -> None:
    answered(opened(), 1, plan(), b"reply 1")
    refused = refusal_of(opened(), 2, plan(**change))
    assert refused.reason is Reason.PLAN_CHANGED
    assert (refused.asked, refused.allowed) == (plan(**change).digest(), plan().digest())
    assert len(opened().events("r")) == 1


def test_an_exhausted_plan_is_refused(opened: Open, plan: Any) -> None:
    two_and_one_spare = plan(num_rounds=2, spare_rounds=1)
    for round in (1, 2, 3):
        answered(opened(), round, two_and_one_spare, b"reply")
    refused = refusal_of(opened(), 4, two_and_one_spare)
    assert (refused.reason, refused.asked, refused.allowed) == (Reason.PLAN_EXHAUSTED, "4", "3")
    assert opened().receipt("r").charged_rounds == 3
    assert opened().reserve(run="r", round=3, request="digest 3", plan=two_and_one_spare) == b"reply"


def test_a_retry_is_charged_and_draws_fresh_noise(opened: Open, plan: Any) -> None:
    once_more = plan(num_rounds=2, spare_rounds=1)
    assert [reserve(opened(), 1, once_more).attempt for _ in range(3)] == [1, 2, 3]
    assert opened().receipt("r").charged_rounds == 3
    assert refusal_of(opened(), 1, once_more).reason is Reason.PLAN_EXHAUSTED


def test_attempts_are_counted_for_each_round(opened: Open, plan: Any) -> None:
    many = plan(num_rounds=9)
    reserve(opened(), 1, many)
    assert reserve(opened(), 2, many).attempt == 1
    assert reserve(opened(), 2, many).attempt == 2


def test_a_refusal_is_recorded_and_costs_nothing(opened: Open, plan: Any, path: Path) -> None:
    answered(opened(), 1, plan(), b"reply 1")
    refusal_of(opened(), 1, plan(), request="another")
    last = lines(path)[-1]
    assert (last["kind"], last["detail"]) == ("refusal", {"reason": "round_requested_differently"})
    assert opened().receipt("r") == Receipt(site="a", run="r", charged_rounds=1, charged_steps=3, sequence=4)


def test_runs_are_told_apart(opened: Open, plan: Any) -> None:
    answered(opened(), 1, plan(), b"reply 1")
    ledger = opened()
    ledger.reserve(run="other", round=1, request="digest 1 of other", plan=plan(local_steps=5))
    assert ledger.receipt("r").charged_steps == 3
    assert ledger.receipt("other").charged_steps == 5
    assert ledger.events("other") == [plan(local_steps=5).event()]


def test_before_anything_a_receipt_says_nothing_was_charged(opened: Open) -> None:
    assert opened().receipt("r") == Receipt(site="a", run="r", charged_rounds=0, charged_steps=0, sequence=0)
    assert opened().events("r") == []


def test_a_receipt_counts_rounds_without_a_reply(opened: Open, plan: Any) -> None:
    answered(opened(), 1, plan(), b"reply 1")
    reserve(opened(), 2, plan())
    assert opened().receipt("r") == Receipt(site="a", run="r", charged_rounds=2, charged_steps=6, sequence=4)


@pytest.mark.parametrize("struck", ["before the reply", "between reply and entry", "within the entry"])
def test_a_crash_during_commit_is_charged_and_never_answers_from_doubt(
    opened: Open, plan: Any, path: Path, monkeypatch: pytest.MonkeyPatch, struck: str
) -> None:
    many = plan(num_rounds=9)
    answered(opened(), 1, many, b"reply 1")
    ledger = opened()
    granted = reserve(ledger, 2, many)

    def cut(target: Path, data: bytes) -> None:
        if struck == "within the entry":
            target.write_bytes(target.read_bytes() + data[:-3])
        raise PowerCut

    name = "write_durably" if struck == "before the reply" else "append_durably"
    with monkeypatch.context() as patched:
        patched.setattr(ledger_module, name, cut)
        with pytest.raises(PowerCut):
            ledger.commit(granted, b"reply 2")

    assert opened().receipt("r").charged_rounds == 2
    if struck == "before the reply":
        assert opened().reserve(run="r", round=1, request="digest 1", plan=many) == b"reply 1"
    else:
        assert refusal_of(opened(), 1, many).reason is Reason.REPLY_NO_LONGER_STORED
    again = reserve(opened(), 2, many)
    assert again.attempt == 2, "the reply without an entry must not be sent, and its noise not used again"
    opened().commit(again, b"reply 2, second attempt")
    assert opened().reserve(run="r", round=2, request="digest 2", plan=many) == b"reply 2, second attempt"


def test_a_torn_last_line_is_dropped(opened: Open, plan: Any, path: Path) -> None:
    answered(opened(), 1, plan(), b"reply 1")
    whole = path.read_bytes()
    for cut in (1, 20):
        path.write_bytes(whole + whole.splitlines(keepends=True)[-1][:cut])
        assert len(opened().entries) == 3
        assert path.read_bytes() == whole, "the next entry would be written onto the torn line"
    reserve(opened(), 2, plan())
    assert [line["sequence"] for line in lines(path)] == [1, 2, 3, 4]


def damaged(whole: bytes, how: str) -> bytes:
    first, second, third = whole.splitlines(keepends=True)
    fields = json.loads(second)
    event = fields["detail"]["event"]
    return {
        "flipped bytes": first + second.replace(b'"', b"'", 4) + third,
        "not text": first + b"\xff\xfe\n" + third,
        "missing line": first + third,
        "doubled line": first + second + second + third,
        "swapped lines": second + first + third,
        "blank line": first + b"\n" + second + third,
        "unknown kind": first + second.replace(b'"reserve"', b'"reverse"') + third,
        "unknown field": first + json.dumps(fields | {"epsilon": 0}).encode() + b"\n" + third,
        "lost field": first + json.dumps({**fields, "detail": {}}).encode() + b"\n" + third,
        "impossible event": first
        + json.dumps(fields | {"detail": {"event": event | {"count": -3}}}).encode()
        + b"\n"
        + third,
        "impossible plan": first.replace(b'"sampling_rate": 0.25', b'"sampling_rate": 0.0') + second + third,
        "impossible digest": first + second + third.replace(b'"reply_sha256": "', b'"reply_sha256": "?'),
        "first line gone": second + third,
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "flipped bytes",
        "not text",
        "missing line",
        "doubled line",
        "swapped lines",
        "blank line",
        "unknown kind",
        "unknown field",
        "lost field",
        "impossible event",
        "impossible plan",
        "impossible digest",
        "first line gone",
    ],
)
def test_a_damaged_journal_stops_the_run(opened: Open, plan: Any, path: Path, how: str) -> None:
    answered(opened(), 1, plan(), b"reply 1")
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(RunError, match=r"ledger .*: line \d"):
        opened()


def test_a_reply_that_was_changed_is_not_sent(opened: Open, plan: Any, path: Path) -> None:
    answered(opened(), 1, plan(), b"reply 1")
    path.with_suffix(".reply").write_bytes(b"reply X")
    assert refusal_of(opened(), 1, plan()).reason is Reason.REPLY_NO_LONGER_STORED
    path.with_suffix(".reply").unlink()
    assert refusal_of(opened(), 1, plan()).reason is Reason.REPLY_NO_LONGER_STORED
    assert opened().receipt("r").charged_rounds == 1, "an old round is not trained again"


def test_only_the_newest_reply_is_kept(opened: Open, plan: Any) -> None:
    ledger = opened()
    answered(ledger, 1, plan(), b"reply 1")
    answered(ledger, 2, plan(), b"reply 2")
    for each in (ledger, opened()):
        assert each.reserve(run="r", round=2, request="digest 2", plan=plan()) == b"reply 2"
        assert refusal_of(each, 1, plan()).reason is Reason.REPLY_NO_LONGER_STORED


def test_a_ledger_without_a_file_behaves_alike(plan: Any) -> None:
    ledger = JournalLedger("a")
    answered(ledger, 1, plan(), b"reply 1")
    assert ledger.reserve(run="r", round=1, request="digest 1", plan=plan()) == b"reply 1"
    reserve(ledger, 2, plan())
    assert refusal_of(ledger, 2, plan()).reason is Reason.PLAN_EXHAUSTED
    assert ledger.receipt("r").charged_rounds == 2


def test_all_charges_of_a_run_stay_within_its_plan(opened: Open, plan: Any) -> None:
    # Whatever is asked, in whatever order, with crashes or without.
    small = plan(num_rounds=2, spare_rounds=2)
    for round, request, reply in [(1, "a", b"1"), (1, "a", None), (7, "b", None), (7, "b", b"7"), (7, "b", b"7")]:
        granted = opened().reserve(run="r", round=round, request=request, plan=small)
        if isinstance(granted, Reservation) and reply is not None:
            opened().commit(granted, reply)
    assert len(opened().events("r")) == 3, "a retry is charged, a stored reply is not"
    reserve(opened(), 8, small)
    for round in (8, 9):
        assert refusal_of(opened(), round, small).reason is Reason.PLAN_EXHAUSTED
    assert opened().events("r") == [small.event()] * small.most_rounds


def test_durable_writing_leaves_the_old_bytes_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "file"
    durable.write_durably(file, b"old")

    def cut(*_: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr(durable.os, "replace", cut)
        with pytest.raises(PowerCut):
            durable.write_durably(file, b"new")
    assert file.read_bytes() == b"old"
    durable.write_durably(file, b"new")
    assert file.read_bytes() == b"new"


def test_durable_writing_syncs_the_bytes_before_the_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = os.replace

    def fsync(handle: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "bytes")

    def named(source: Path, target: Path) -> None:
        order.append("name")
        replace(source, target)

    monkeypatch.setattr(durable.os, "fsync", fsync)
    monkeypatch.setattr(durable.os, "replace", named)
    durable.write_durably(tmp_path / "file", b"x")
    assert order == ["bytes", "name", "folder"]
