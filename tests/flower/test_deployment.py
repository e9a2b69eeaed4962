"""What a lead hears of its sites while a round goes on, and which of them it asks again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedtune.federation.protocol import Reply
from fedtune.flower import records
from fedtune.flower.deployment import _ASK_AGAIN_S, OFFER, _Ears
from fedtune.flower.remote_grid import Heard as Answered
from fedtune.model import Adapter
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import Ledger
from fedtune.privacy.policy import Policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Reason, Receipt, Refusal, Update


class Heard:
    """A listener that notes what it hears."""

    def __init__(self) -> None:
        self.all: list[tuple[str, str, int, int | None]] = []

    def site_answered(self, site: str, what: str, *, num_bytes: int, charged_rounds: int | None) -> None:
        self.all.append((site, what, num_bytes, charged_rounds))

    @property
    def words(self) -> list[tuple[str, str]]:
        return [heard[:2] for heard in self.all]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def ears(heard: Heard) -> _Ears:
    """The ears of a lead with two sites."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 0, 0
    listener: Any = heard
    return _Ears({1: "north", 2: "south"}, listener)


@pytest.fixture
def receipt(tmp_path: Path, site_policy: Callable[..., Policy], run_proposal: Callable[..., Proposal]) -> Receipt:
    """Of a ledger that two rounds were charged to."""
    ledger = Ledger(tmp_path / "ledger.db", site_policy(), SigningKey.load_or_make(tmp_path / "key.pem"))
    for round in (1, 2):
        ledger.reserve(run_proposal(), round=round, request=f"{round}")
    return ledger.receipt("r")


def refusal(reason: Reason, receipt: Receipt | None = None) -> Message:
    body = Refusal(site="whoever", run="r", round=1, reason=reason)
    return Message(records.from_reply(Reply(body=body, receipt=receipt)), 1, "train")


def update(adapter: Adapter, receipt: Receipt | None = None) -> Message:
    body = Update(site="whoever", run="r", round=1, tensors=adapter.tensors)
    return Message(records.from_reply(Reply(body=body, receipt=receipt)), 1, "train")


def test_an_update_is_final_and_reported_with_its_bytes_and_charge(
    ears: _Ears, heard: Heard, adapter: Adapter, receipt: Receipt
) -> None:
    answer = update(adapter, receipt)
    assert ears(2, answer) == Answered(good=True)
    payload = sum(value.nbytes for value in adapter.tensors.values())
    ((site, what, num_bytes, charged),) = heard.all
    # Its name is the roster's for the key that answered, whatever the answer says.
    assert (site, what, charged) == ("south", "update", 2)
    assert payload < num_bytes == records.num_bytes(answer.content)


def test_without_a_receipt_nothing_is_known_of_a_charge(ears: _Ears, heard: Heard, adapter: Adapter) -> None:
    ears(1, update(adapter))
    assert heard.all[0][3] is None


@pytest.mark.parametrize("reason", [reason for reason in Reason if not reason.is_waiting])
def test_a_refusal_is_final_whatever_its_reason(ears: _Ears, heard: Heard, reason: Reason) -> None:
    assert ears(1, refusal(reason)) == Answered(good=False)
    assert heard.words == [("north", reason.value)]


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason.is_waiting])
def test_a_site_that_waits_for_a_person_is_asked_again_and_reported_once(
    ears: _Ears, heard: Heard, adapter: Adapter, reason: Reason
) -> None:
    for _ in range(3):
        assert ears(1, refusal(reason)) == Answered(good=False, again_s=_ASK_AGAIN_S, idle=True)
    assert ears(2, refusal(reason)).again_s == _ASK_AGAIN_S > 0
    assert heard.words == [("north", reason.value), ("south", reason.value)]
    assert ears(1, update(adapter)).again_s is None
    assert heard.words[2:] == [("north", "update")]
    ears(1, refusal(reason))
    assert heard.words[3:] == [("north", reason.value)], "paused again in a later round is news"


def test_another_reason_to_wait_is_news(ears: _Ears, heard: Heard) -> None:
    for reason in (Reason.AWAITING_APPROVAL, Reason.PAUSED, Reason.AWAITING_APPROVAL):
        ears(1, refusal(reason))
    assert [what for _, what in heard.words] == ["awaiting_approval", "paused", "awaiting_approval"]


def test_the_same_update_in_two_rounds_is_told_twice(ears: _Ears, heard: Heard, adapter: Adapter) -> None:
    for _ in range(2):
        ears(1, update(adapter))
    assert heard.words == [("north", "update")] * 2


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({records.REPLY: ConfigRecord({"json": "[" * 10_000})}),
        RecordDict({records.REPLY: ConfigRecord({"json": '{"kind": "update"}'})}),
        RecordDict({records.REPLY: records.to_arrays({"a": np.ones(1, np.float32)})}),
        records.from_receipt(None),
    ],
    ids=["empty", "nested", "a piece", "arrays", "the end of a run"],
)
def test_what_is_no_answer_to_a_round_is_final_and_no_news(ears: _Ears, heard: Heard, content: RecordDict) -> None:
    assert ears(1, Message(content, 1, "train")) == Answered(good=False)
    assert heard.all == []


def test_an_answer_to_the_end_of_a_run_is_all_that_was_hoped_for(ears: _Ears, heard: Heard) -> None:
    assert ears(1, Message(records.from_receipt(None), 1, f"query.{records.END}")) == Answered(good=True)
    assert heard.all == []


def test_before_a_run_begins_people_are_waited_for_and_a_pause_is_not(ears: _Ears) -> None:
    for reason, idle in ((Reason.AWAITING_APPROVAL, False), (Reason.PAUSED, True)):
        body = Refusal(site="whoever", run="r", round=0, reason=reason)
        message = Message(records.from_reply(Reply(body=body, receipt=None)), 1, f"query.{records.INVITE}")
        assert ears(1, message) == Answered(good=False, again_s=_ASK_AGAIN_S, idle=idle)


def test_an_offer_is_good_and_news(ears: _Ears, heard: Heard, receipt: Receipt) -> None:
    offer = Offer(site="whoever", run="r", most_rounds=3, least_noise=1.0)
    assert ears(1, Message(records.from_reply(Reply(body=offer, receipt=receipt)), 1, "query.invite")).good
    assert heard.words == [("north", OFFER)]


def test_nobody_needs_to_listen(ears: _Ears, adapter: Adapter) -> None:
    deaf = _Ears({1: "north"}, None)
    assert deaf(1, refusal(Reason.PAUSED)).again_s == _ASK_AGAIN_S
    assert deaf(1, update(adapter)).again_s is None
