"""What a site answers, and what it must have written before it reads a record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.federation.protocol import Reply, RoundRequest
from fedtune.federation.site import Site, answer
from fedtune.model import Adapter
from fedtune.privacy.ledger import JournalLedger, Kind
from fedtune.privacy.plan import Plan
from fedtune.privacy.release import Reason, Refusal, Update


class Trainer:
    """Adds one to every value; notes what the ledger held when it was called."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.calls: list[tuple[int, int]] = []
        self.journals: list[str] = []

    def __call__(self, request: RoundRequest, adapter: Adapter, attempt: int) -> Adapter:
        self.calls.append((request.round, attempt))
        self.journals.append(self._path.read_text())
        return Adapter({name: value + np.float32(1) for name, value in adapter.tensors.items()})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def trainer(path: Path) -> Trainer:
    return Trainer(path)


@pytest.fixture
def ask(path: Path, trainer: Trainer, adapter: Adapter, plan: Plan) -> Callable[..., Reply]:
    """Ask the site of a round, its ledger opened anew as after a restart."""

    def run(round: int = 1, *, train: Any = trainer, sent: Adapter = adapter, **changes: Any) -> Reply:
        site = Site(name="a", run="r", plan=plan, ledger=JournalLedger("a", path), train=train)
        request = RoundRequest(run="r", round=round, site="a", adapter_digest=adapter.digest(), plan=plan)
        return answer(site, replace(request, **changes), sent)

    return run


def reason(reply: Reply) -> Reason:
    assert isinstance(reply.body, Refusal)
    return reply.body.reason


def test_the_charge_is_on_disk_before_training_and_the_reply_before_it_leaves(
    ask: Callable[..., Reply], trainer: Trainer, path: Path, adapter: Adapter
) -> None:
    reply = ask()
    assert isinstance(reply.body, Update)
    assert (reply.body.site, reply.body.run, reply.body.round) == ("a", "r", 1)
    for name, value in adapter.tensors.items():
        np.testing.assert_array_equal(reply.body.tensors[name], value + 1)
    assert '"reserve"' in trainer.journals[0]
    assert '"commit"' not in trainer.journals[0]
    assert [entry.kind for entry in JournalLedger("a", path).entries] == [Kind.PLAN, Kind.RESERVE, Kind.COMMIT]
    assert reply.receipt is not None
    assert (reply.receipt.site, reply.receipt.run) == ("a", "r")
    assert (reply.receipt.charged_rounds, reply.receipt.charged_steps) == (1, 2)


def test_the_same_request_again_gets_the_stored_bytes_for_free(ask: Callable[..., Reply], trainer: Trainer) -> None:
    first, second = ask(), ask()
    assert isinstance(first.body, Update)
    assert isinstance(second.body, Update)
    assert first.body.to_bytes() == second.body.to_bytes()
    assert trainer.calls == [(1, 1)]
    assert first.receipt == second.receipt


def test_an_interrupted_round_is_tried_again_at_a_new_charge(ask: Callable[..., Reply], trainer: Trainer) -> None:
    def interrupted(*args: object) -> Adapter:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(train=interrupted)
    reply = ask()
    assert isinstance(reply.body, Update)
    assert trainer.calls == [(1, 2)]
    assert reply.receipt is not None
    assert reply.receipt.charged_rounds == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"run": "other"}, Reason.WRONG_RUN),
        ({"site": "b"}, Reason.WRONG_SITE),
        ({"adapter_digest": "00" * 32}, Reason.ADAPTER_DIFFERS),
    ],
)
def test_what_was_not_meant_for_it_is_refused_unread(
    ask: Callable[..., Reply], trainer: Trainer, path: Path, changes: dict[str, Any], expected: Reason
) -> None:
    assert reason(ask(**changes)) is expected
    assert trainer.calls == []
    assert [entry for entry in JournalLedger("a", path).entries if entry.kind is Kind.RESERVE] == []


def test_an_adapter_that_was_changed_on_the_way_is_refused(ask: Callable[..., Reply], trainer: Trainer) -> None:
    other = Adapter({"b.lora_A": np.zeros((2, 3), np.float32), "head": np.ones(4, np.float32)})
    assert reason(ask(sent=other)) is Reason.ADAPTER_DIFFERS
    assert trainer.calls == []


def test_a_plan_that_the_site_did_not_make_is_refused_before_anything_is_charged(
    ask: Callable[..., Reply], trainer: Trainer, plan: Plan
) -> None:
    for change in ({"noise_multiplier": 0.0}, {"sampling_rate": 1.0}, {"local_steps": 50}, {"max_grad_norm": 100.0}):
        reply = ask(plan=replace(plan, **change))
        assert reason(reply) is Reason.PLAN_CHANGED
        assert reply.receipt is not None
        assert reply.receipt.charged_rounds == 0
    assert trainer.calls == []


def test_the_first_plan_stays(ask: Callable[..., Reply], trainer: Trainer, plan: Plan) -> None:
    assert isinstance(ask().body, Update)
    reply = ask(2, plan=replace(plan, noise_multiplier=0.5))
    assert reason(reply) is Reason.PLAN_CHANGED
    assert reply.receipt is not None
    assert reply.receipt.charged_rounds == 1
    assert trainer.calls == [(1, 1)]


def test_one_round_is_not_trained_for_two_requests(ask: Callable[..., Reply], trainer: Trainer) -> None:
    ask()
    other = Adapter({"b.lora_A": np.zeros((2, 3), np.float32), "head": np.zeros(4, np.float32)})
    reply = ask(sent=other, adapter_digest=other.digest())
    assert reason(reply) is Reason.ROUND_REQUESTED_DIFFERENTLY
    assert trainer.calls == [(1, 1)]


def test_a_site_leaves_when_its_plan_is_used_up(ask: Callable[..., Reply], trainer: Trainer, plan: Plan) -> None:
    for round in range(1, plan.most_rounds + 1):
        assert isinstance(ask(round).body, Update)
    reply = ask(plan.most_rounds + 1)
    assert reason(reply) is Reason.PLAN_EXHAUSTED
    assert reply.receipt is not None
    assert reply.receipt.charged_rounds == plan.most_rounds
    assert len(trainer.calls) == plan.most_rounds


def test_no_text_of_a_failure_leaves(ask: Callable[..., Reply], caplog: pytest.LogCaptureFixture) -> None:
    def fails(*args: object) -> Adapter:
        raise RuntimeError("canary-17 in row 3")

    with caplog.at_level(logging.ERROR, "fedtune"):
        reply = ask(train=fails)
    assert reason(reply) is Reason.SITE_ERROR
    assert "canary" not in repr(reply)
    assert "canary-17 in row 3" in caplog.text
    assert isinstance(reply.body, Refusal)
    assert (reply.body.asked, reply.body.allowed) == (None, None)
    assert reply.receipt is not None
    assert reply.receipt.charged_rounds == 1, "what failed had begun, and was charged"


def test_a_ledger_behind_the_leads_receipt_trains_nothing(ask: Callable[..., Reply], trainer: Trainer) -> None:
    ask()
    reply = ask(2, receipt_sequence=99)
    assert reason(reply) is Reason.LEDGER_BEHIND_RECEIPT
    assert trainer.calls == [(1, 1)]


def test_what_the_lead_knows_of_the_ledger_is_no_part_of_what_it_asks(ask: Callable[..., Reply]) -> None:
    first, again = ask(), ask(receipt_sequence=2)
    assert isinstance(first.body, Update)
    assert isinstance(again.body, Update)
    assert again.body.to_bytes() == first.body.to_bytes()
    assert again.receipt == first.receipt


@pytest.mark.parametrize("value", [51.0, -1e9, float("nan"), float("inf")])
def test_an_adapter_out_of_range_is_refused_before_anything_is_charged(
    ask: Callable[..., Reply], trainer: Trainer, value: float
) -> None:
    blown_up = Adapter({"b.lora_A": np.zeros((2, 3), np.float32), "head": np.full(4, value, np.float32)})
    reply = ask(sent=blown_up, adapter_digest=blown_up.digest())
    assert reason(reply) is Reason.ADAPTER_OUT_OF_RANGE
    assert reply.receipt is not None
    assert reply.receipt.charged_rounds == 0
    assert trainer.calls == []
