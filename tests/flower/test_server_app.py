"""The lead against sites that fail, fall silent, or send what they like."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message

from fedtune.federation.protocol import RoundRequest
from fedtune.federation.replies import BEYOND_PLAN
from fedtune.federation.site_round import Trained
from fedtune.flower import flower_records
from fedtune.model.adapter import Adapter
from fedtune.model.spec import LoraSpec
from fedtune.runs.results import site_charge
from fedtune.spec import RefusedError, RunError

from ..conftest import run_plan


def reply_of(messages: list[Message], node: int) -> Message:
    (message,) = (message for message in messages if message.metadata.src_node_id == node)
    return message


def test_a_round_is_recorded(federation: Any) -> None:
    made = federation(num_rounds=2)
    state = made.run()
    assert [result.round for result in state.rounds] == [1, 2]
    # After the last round every site says once more what it was charged; nothing else changes.
    assert replace(state, receipts=made.finished[-1].receipts) == made.finished[-1]
    for result in state.rounds:
        assert result.sites == ("site-1", "site-2", "site-3")
        assert result.failed_sites == {}
        assert min(result.bytes_down, result.bytes_up) > 3 * 4 * 10
        assert set(result.metrics) == {"sum"}
    assert made.trained == ["site-1", "site-2", "site-3"] * 2
    assert site_charge(state, "site-2", made.plan).steps == 4


def test_a_site_that_sends_errors_counts_as_charged_and_the_others_go_on(federation: Any, tamper: Any) -> None:
    """A silent one: test_receipts.py."""

    def silence(messages: list[Message]) -> list[Message]:
        silent = reply_of(messages, 2)
        others = [message for message in messages if message is not silent]
        failed = Message.__new__(Message)
        failed.__dict__.update(silent.__dict__)
        failed.__dict__["_content"], failed.__dict__["_error"] = None, Error(code=1, reason="secret text")
        return [*others, failed]

    tamper(silence, ("train", "query.end"))
    made = federation(num_rounds=2)
    state = made.run()
    assert [result.sites for result in state.rounds] == [("site-1", "site-3")] * 2
    assert [dict(result.failed_sites) for result in state.rounds] == [{"site-2": "no_reply"}] * 2
    silent, heard = (site_charge(state, site, made.plan) for site in ("site-2", "site-1"))
    assert (silent.steps, silent.upper_bound) == (4, True)
    assert (heard.steps, heard.upper_bound) == (4, False)


def test_too_few_sites_end_the_run_and_the_checkpoint_stays(federation: Any, tamper: Any) -> None:
    made = federation(num_rounds=2, min_sites=3)
    after_one = made.run_until(1)
    tamper(lambda messages: messages[1:])
    with pytest.raises(RunError, match=r"round 2: 2 of 3 sites .*min_sites = 3 .*site-1: no_reply.* round 1 can"):
        made.run(after_one)
    loaded = made.lead.checkpoints.load()
    assert loaded.round == 1
    assert loaded.adapter.digest() == after_one.adapter.digest()
    assert loaded.unanswered == {"site-1": 1, "site-2": 1, "site-3": 1}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("a value changed", "unsigned_reply"), ("nothing", "no_reply"), ("a reason of its own", "no_reply")],
)
def test_a_bad_reply_is_dropped_and_the_round_goes_on(federation: Any, tamper: Any, fault: str, reason: str) -> None:
    """What a site itself may sign: tests/federation/test_replies.py."""

    def spoil(messages: list[Message]) -> list[Message]:
        content = reply_of(messages, 2).content
        if fault == "a value changed":
            (array,) = content.array_records[flower_records.UPDATE].values()
            nan = array.data[:-2] + b"\xc0\x7f"
            content[flower_records.UPDATE] = flower_records._from_bytes(nan)
        elif fault == "nothing":
            content.clear()
        else:
            fields = json.loads(str(content.config_records[flower_records.REPLY]["json"]))
            fields |= {"kind": "refusal", "reason": "because of patient 4711", "asked": None, "allowed": None}
            content[flower_records.REPLY] = ConfigRecord({"json": json.dumps(fields)})
        return messages

    tamper(spoil)
    made = federation()
    state = made.run()
    assert state.rounds[0].sites == ("site-1", "site-3")
    assert state.rounds[0].failed_sites == {"site-2": reason}
    assert all(np.isfinite(value).all() for value in state.adapter.tensors.values())
    charge = site_charge(made.finished[-1], "site-2", made.plan)
    # The round is taken as charged, until the site's last word: its receipt may be that of another answer.
    assert (charge.steps, charge.upper_bound) == (2, True)
    charge = site_charge(state, "site-2", made.plan)
    assert (charge.steps, charge.upper_bound) == (2, False)


def test_a_missing_node_is_waited_for_until_the_timeout(federation: Any) -> None:
    made = federation(round_timeout_s=0.1)
    sizes = made.sizes | {"site-4": 5}
    with pytest.raises(RunError, match="did not introduce themselves: site-4"):
        made.run(declared_sizes=sizes)


def test_a_spent_plan_is_a_refusal_and_no_failure(federation: Any) -> None:
    many = federation(num_rounds=run_plan().most_rounds + 1, min_sites=3)
    with pytest.raises(RefusedError, match=r"round 5: refused .*\(site-1: plan_exhausted, .*spare_rounds"):
        many.run()
    assert len(many.finished) == run_plan().most_rounds


def test_a_site_that_moves_what_rests_in_a_round_is_not_averaged(federation: Any) -> None:
    zeros = np.zeros((2, 3), np.float32)
    made = federation(num_rounds=2, adapter=Adapter({"b.lora_A.weight": zeros, "b.lora_B.weight": zeros}))
    lora = LoraSpec(alternate=True)

    def train(request: RoundRequest, adapter: Adapter, attempt: int) -> Trained:
        rests = lora.rests_in(request.round) or ""
        moved = {
            name: value + np.float32(0.25 * (rests not in name or request.site == "site-2"))
            for name, value in adapter.tensors.items()
        }
        return Trained(adapter=Adapter(moved))

    made._train = train
    state = made.run(lora=lora)
    assert [result.failed_sites for result in state.rounds] == [{"site-2": BEYOND_PLAN}] * 2
    assert {float(value) for tensor in state.adapter.tensors.values() for value in tensor.ravel()} == {0.25}
