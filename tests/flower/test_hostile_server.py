"""A server that asks one site for too much: that site refuses, and the round goes on with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from fedtune.federation.protocol import RoundRequest, Signed
from fedtune.federation.rounds import run_rounds
from fedtune.flower import flower_records
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Reason
from fedtune.runs.results import site_charge
from fedtune.spec import RefusedError

Change = Callable[[Message], None]


def asked_of(message: Message) -> RoundRequest:
    """The honest request that the message holds."""
    return RoundRequest.of(flower_records.to_signed(message.content))


def put(message: Message, signed: Signed) -> None:
    message.content[flower_records.REQUEST] = ConfigRecord({"json": signed.text, "signature": signed.signature})


@pytest.fixture
def asking(lead_key: SigningKey) -> Callable[..., Change]:
    """Asks for another run or plan, with the signature of a lead whom the site knows, or with that of `key`."""

    def make(key: SigningKey = lead_key, **changes: Any) -> Change:
        def change(message: Message) -> None:
            request = asked_of(message)
            plan = {name: changes[name] for name in changes if hasattr(request.proposal.plan, name)}
            other = {name: changes[name] for name in changes if name not in plan}
            proposal = replace(request.proposal, plan=replace(request.proposal.plan, **plan), **other)
            put(message, replace(request, proposal=proposal).signed(key))

        return change

    return make


def require_site_2_only_refused(made: Any, intercept: Any, change: Change, rule: Reason, *, recorded: bool) -> None:
    """Two rounds, in the second of which site-2 is asked for something else."""
    state = made.run_until(1)
    before = verify(made.ledger_path("site-2")).events
    intercept(2, change)
    state = run_rounds(made.transport, made.lead, state)
    assert [result.sites for result in state.rounds] == [("site-1", "site-2", "site-3"), ("site-1", "site-3")]
    assert state.rounds[1].failed_sites == {"site-2": rule.value}
    # In the first round all three sites moved the adapter, in the second two of them.
    moved = state.adapter.tensors["head"] - made.adapter.tensors["head"]
    np.testing.assert_allclose(moved, (1.0 - 2.0 + 0.125) / 3 + (1.0 + 0.125) / 2, atol=1e-6)
    assert made.trained == ["site-1", "site-2", "site-3", "site-1", "site-3"]
    after = verify(made.ledger_path("site-2")).events
    assert after[: len(before)] == before
    added = [event for event in after[len(before) :] if event.detail.get("what") != "run_ended"]
    if recorded:
        (refusal,) = added
        assert (refusal.kind, refusal.detail["reason"]) == (Kind.REFUSAL, rule.value)
    else:
        assert added == []
    # A stranger gets no receipt, and who asks for another run gets that run's: the lead must count the round until it
    # hears from the site itself, at the end of the run.
    in_doubt = rule.is_of_a_stranger or rule is Reason.WRONG_RUN
    charge = site_charge(made.finished[-1], "site-2", made.plan)
    assert (charge.rounds, charge.upper_bound) == ((2, True) if in_doubt else (1, False))
    charge = site_charge(state, "site-2", made.plan)
    assert (charge.rounds, charge.upper_bound) == (1, False)


# Every rule is in tests/federation/test_hostile_lead.py; here the others' round goes on.
@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"noise_multiplier": 0.0}, Reason.MIN_NOISE_MULTIPLIER),
        ({"base_model": "cd" * 32}, Reason.BASE_MODELS),
        ({"run": "another"}, Reason.WRONG_RUN),
    ],
    ids=str,
)
def test_asking_one_site_for_more(
    federation: Any, intercept: Any, asking: Callable[..., Change], changes: dict[str, Any], rule: Reason
) -> None:
    made = federation(num_rounds=2)
    require_site_2_only_refused(made, intercept, asking(**changes), rule, recorded=True)


def test_asking_in_the_name_of_a_lead_whom_nobody_knows(
    federation: Any, intercept: Any, asking: Callable[..., Change], stranger_key: SigningKey
) -> None:
    change = asking(stranger_key, lead=stranger_key.public)
    require_site_2_only_refused(federation(num_rounds=2), intercept, change, Reason.LEADS, recorded=True)


def test_asking_with_somebody_elses_signature(
    federation: Any, intercept: Any, asking: Callable[..., Change], stranger_key: SigningKey
) -> None:
    change = asking(stranger_key)
    require_site_2_only_refused(federation(num_rounds=2), intercept, change, Reason.WRONG_SIGNATURE, recorded=False)


def test_sending_no_tensor_at_all(federation: Any, intercept: Any) -> None:
    def change(message: Message) -> None:
        broken = Array("float32", (4,), "numpy.ndarray", b"no array")
        message.content[flower_records.ADAPTER] = ArrayRecord({"head": broken})

    made = federation(num_rounds=2)
    state = made.run_until(1)
    before = verify(made.ledger_path("site-2")).events
    intercept(2, change)
    state = run_rounds(made.transport, made.lead, state)
    # The message does not even get as far as the site and its ledger, so that no receipt comes.
    assert state.rounds[1].failed_sites == {"site-2": "malformed_request"}
    assert state.rounds[1].sites == ("site-1", "site-3")
    after = verify(made.ledger_path("site-2")).events
    assert [event.detail.get("what") for event in after[len(before) :]] == ["run_ended"]


def test_playing_an_old_request_again(federation: Any, intercept: Any) -> None:
    made = federation(num_rounds=2)
    overheard: list[Signed] = []
    intercept(2, lambda message: overheard.append(flower_records.to_signed(message.content)))
    state = made.run_until(1)
    before = verify(made.ledger_path("site-2")).events
    intercept(2, lambda message: put(message, overheard[0]))
    state = run_rounds(made.transport, made.lead, state)
    # The adapter that came with it is the second round's: the old signature does not cover it.  What the site says to
    # that is about the first round, and so no answer to the lead's question.
    assert state.rounds[1].failed_sites == {"site-2": "unsigned_reply"}
    assert [event.kind for event in made.events("site-2")[len(before) :]] == [Kind.REFUSAL, Kind.NOTE]
    assert made.events("site-2")[len(before)].detail["reason"] == "adapter_differs"


def test_a_run_that_no_site_accepts_ends_as_refused_with_every_reason(
    federation: Any, intercept: Any, asking: Callable[..., Change]
) -> None:
    made = federation(
        policies={site: {"limits": {"max_sampling_rate": 0.1}} for site in ("site-1", "site-2", "site-3")}
    )
    with pytest.raises(RefusedError) as refused:
        run_rounds(made.transport, made.lead, made.start)
    assert refused.value.exit_code == 3
    for site in ("site-1", "site-2", "site-3"):
        assert f"{site}: max_sampling_rate, asked 0.2, allowed at most 0.1" in str(refused.value)
        assert [event.kind for event in made.events(site)][2:] == [Kind.REFUSAL]
    assert made.trained == []


def test_after_its_end_no_site_trains_for_a_run(federation: Any) -> None:
    made = federation(num_rounds=1)
    state = run_rounds(made.transport, made.lead, made.start)
    longer = replace(made.lead, federation=replace(made.spec, num_rounds=2))
    with pytest.raises(RefusedError, match="site-1: run_ended, site-2: run_ended, site-3: run_ended"):
        run_rounds(made.transport, longer, state)
    assert made.trained == ["site-1", "site-2", "site-3"]
    assert made.lead.checkpoints.load().receipts["site-1"].charged_rounds == 1
