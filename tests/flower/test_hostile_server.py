"""A server that asks one site for too much: that site refuses, and the round goes on with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from fedtune.federation.protocol import RoundRequest, Signed
from fedtune.federation.rounds import run_rounds
from fedtune.flower import flower_records
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.release import Reason
from fedtune.runs.results import site_charge

Change = Callable[[Message], None]


def put(message: Message, signed: Signed) -> None:
    message.content[flower_records.REQUEST] = ConfigRecord({"json": signed.text, "signature": signed.signature})


@pytest.fixture
def asking(lead_key: SigningKey) -> Callable[..., Change]:
    """Asks for another run or plan, with the signature of a lead whom the site knows, or with that of `key`."""

    def make(key: SigningKey = lead_key, **changes: Any) -> Change:
        def change(message: Message) -> None:
            request = RoundRequest.of(flower_records.to_signed(message.content))
            plan = {name: changes[name] for name in changes if hasattr(request.proposal.plan, name)}
            other = {name: changes[name] for name in changes if name not in plan}
            proposal = replace(request.proposal, plan=replace(request.proposal.plan, **plan), **other)
            put(message, replace(request, proposal=proposal).signed(key))

        return change

    return make


# Every rule is in tests/federation/test_hostile_lead.py; here the others' round goes on.
@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"noise_multiplier": 0.0}, Reason.MIN_NOISE_MULTIPLIER),
        ({"run": "another"}, Reason.WRONG_RUN),
        ({}, Reason.WRONG_SIGNATURE),
    ],
    ids=str,
)
def test_asking_one_site_for_more(
    federation: Any, intercept: Any, asking: Any, stranger_key: SigningKey, changes: dict[str, Any], rule: Reason
) -> None:
    """Two rounds, in the second of which site-2 is asked for something else, or by somebody else."""
    made = federation(num_rounds=2)
    state = made.run_until(1)
    before = made.events("site-2")
    intercept(2, asking(**changes) if changes else asking(stranger_key))
    state = run_rounds(made.transport, made.lead, state)
    assert [result.sites for result in state.rounds] == [("site-1", "site-2", "site-3"), ("site-1", "site-3")]
    assert state.rounds[1].failed_sites == {"site-2": rule.value}
    # In the first round all three sites moved the adapter, in the second two of them.
    moved = state.adapter.tensors["head"] - made.adapter.tensors["head"]
    np.testing.assert_allclose(moved, (1.0 - 2.0 + 0.125) / 3 + (1.0 + 0.125) / 2, atol=1e-6)
    assert made.trained == ["site-1", "site-2", "site-3", "site-1", "site-3"]
    added = [event for event in made.events("site-2")[len(before) :] if event.detail.get("what") != "run_ended"]
    # Nobody may fill a ledger with requests that their lead did not sign.
    written = [(Kind.REFUSAL, rule.value)] if changes else []
    assert [(event.kind, event.detail["reason"]) for event in added] == written
    # A stranger gets no receipt, and who asks for another run gets that run's: the lead must count the round until it
    # hears from the site itself, at the end of the run.
    charge = site_charge(made.finished[-1], "site-2", made.plan)
    assert (charge.rounds, charge.upper_bound) == ((1, False) if "noise_multiplier" in changes else (2, True))
    charge = site_charge(state, "site-2", made.plan)
    assert (charge.rounds, charge.upper_bound) == (1, False)


def test_playing_an_old_request_again(federation: Any, intercept: Any) -> None:
    made = federation(num_rounds=2)
    overheard: list[Signed] = []
    intercept(2, lambda message: overheard.append(flower_records.to_signed(message.content)))
    state = made.run_until(1)
    before = made.events("site-2")
    intercept(2, lambda message: put(message, overheard[0]))
    state = run_rounds(made.transport, made.lead, state)
    # The adapter that came with it is the second round's: the old signature does not cover it.  What the site says to
    # that is about the first round, and so no answer to the lead's question.
    assert state.rounds[1].failed_sites == {"site-2": "unsigned_reply"}
    assert [event.kind for event in made.events("site-2")[len(before) :]] == [Kind.REFUSAL, Kind.NOTE]
    assert made.events("site-2")[len(before)].detail["reason"] == "adapter_differs"
