"""Start and end of a run: invitations before round 1, early stopping, and rollback of diverged rounds."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from fedtune.federation.lead import LeadState, compute_site_charge
from fedtune.federation.protocol import _RunMessage
from fedtune.flower import flower_records
from fedtune.model.adapter import Adapter
from fedtune.privacy.ledger.chain import Kind
from fedtune.spec import WIRE_SCHEMA, ConfigError, RefusedError, RunError, StuckError

from .conftest import STEPS

SITES = ("site-1", "site-2", "site-3")


def list_charged_sites(fed: Any) -> list[str]:
    """List the sites whose ledgers have charges or reservations."""
    kinds = {site: {event.kind for event in fed.events(site)} for site in SITES}
    return [site for site, event_kinds in kinds.items() if event_kinds & {Kind.PLAN, Kind.RESERVE, Kind.COMMIT}]


def test_nothing_is_charged_when_too_few_sites_accept(federation: Any) -> None:
    fed = federation(min_sites=3, policies={"site-2": {"budget": {"max_epsilon": 0.01}}})
    for _ in range(2):  # previously each attempt cost the others a round
        with pytest.raises(
            RefusedError, match=r"2 of 3 sites accepted the invitation.*site-2: max_epsilon, requested .*nothing was"
        ):
            fed.run()
    assert list_charged_sites(fed) == []
    assert fed.trained == []


def test_run_starts_with_enough_sites_and_still_asks_refusing_sites(federation: Any) -> None:
    fed = federation(min_sites=2, policies={"site-2": {"budget": {"max_epsilon": 0.01}}})
    state = fed.run()
    assert state.rounds[0].sites == ("site-1", "site-3")
    assert state.rounds[0].failed_sites == {"site-2": "max_epsilon"}
    change = state.adapter.tensors["head"] - fed.adapter.tensors["head"]
    np.testing.assert_allclose(change, (STEPS["site-1"] + STEPS["site-3"]) / 2, atol=1e-6)


@pytest.mark.parametrize(("ahead", "older"), [(0, ""), (-1, "lead"), (1, "site")])
def test_only_a_different_protocol_version_ends_a_run(
    federation: Any, monkeypatch: Any, ahead: int, older: str
) -> None:
    fed, to_json = federation(num_rounds=2), _RunMessage._to_json
    state, settings = fed.run_until(1), {"protocol": WIRE_SCHEMA + ahead, "software": "0.2.1+7c1f09a4e2b5"}
    before = [fed.events(site) for site in SITES]
    monkeypatch.setattr(_RunMessage, "_to_json", lambda asked: to_json(asked) | settings)
    for resumed in (None, state) if older else ():
        with pytest.raises(ConfigError, match=f"site-1 uses protocol .*: upgrade the {older}"):
            fed.run(resumed)
        assert [fed.events(site) for site in SITES] == before, "nothing may be charged"
    if not older:
        assert len(fed.run().rounds) == 2
        assert sorted(fed.trained) == sorted([*SITES, *SITES]), "round 1 must be answered from the ledgers"


def test_run_with_too_few_approvals_fails_without_a_final_refusal(federation: Any) -> None:
    fed = federation(min_sites=3, policies={"site-2": {"approval": "manual"}})
    with pytest.raises(RunError, match=r"2 of 3 sites.*site-2: awaiting_approval") as raised:
        fed.run()
    assert not isinstance(raised.value, RefusedError)
    assert list_charged_sites(fed) == []


@pytest.mark.parametrize("what", ["nothing", "more rounds than were signed", "to another question"])
def test_unsigned_offer_does_not_count(federation: Any, tamper: Any, what: str) -> None:
    old: dict[str, ConfigRecord] = {}

    def change(messages: list[Message]) -> list[Message]:
        (message,) = [message for message in messages if message.metadata.src_node_id == 2]
        if what == "nothing":
            return [settings for settings in messages if settings is not message]
        if what == "to another question":
            message.content[flower_records.REPLY] = old.setdefault("reply", message.content[flower_records.REPLY])
        else:
            fields = json.loads(str(message.content.config_records[flower_records.REPLY]["json"]))
            text = json.dumps(fields | {"max_rounds": 1000})
            message.content[flower_records.REPLY] = ConfigRecord({"json": text})
        return messages

    fed = federation(min_sites=3)
    tamper(change, ("query.invite",))
    if what == "to another question":  # the first run gets the real reply; the second gets a replay of it
        fed.run()
        fed.ledger("site-2").freeze("consent withdrawn")
        spent = len(fed.events("site-1"))
        with pytest.raises(RunError, match="site-2: unsigned_reply"):
            fed.run()
        assert [event.kind for event in fed.events("site-1")[spent:] if event.kind is not Kind.NOTE] == []
        return
    with pytest.raises(RunError, match="site-2: no_reply" if what == "nothing" else "site-2: unsigned_reply"):
        fed.run()
    assert list_charged_sites(fed) == []


def test_resumed_run_sends_no_second_invitation(federation: Any) -> None:
    fed = federation(num_rounds=2)
    state = fed.run_until(1)
    fed.grid.deliver = deliver = Mock(side_effect=fed.grid.deliver)
    fed.run(state)
    assert "query.invite" not in {call.args[0].metadata.message_type for call in deliver.call_args_list}


@pytest.mark.parametrize(("algorithm", "own"), [("fedavg", None), ("fedavgm", {"server_momentum": 0.5})])
def test_diverged_round_is_rolled_back_and_the_run_continues(
    federation: Any, caplog: Any, algorithm: str, own: Any
) -> None:
    fed = federation(num_rounds=3, algorithm=algorithm, algorithm_settings=own)
    undisturbed = federation(num_rounds=3, algorithm=algorithm, algorithm_settings=own, folder="b")
    scores = iter([{"loss": 1.0}, {"loss": float("nan")}, {"loss": 0.5}])
    state = fed.run(evaluate=lambda adapter: next(scores))
    assert [result.diverged for result in state.rounds] == [False, True, False]
    assert [result.metrics for result in state.rounds] == [{"loss": 1.0}, {"loss": 1.0}, {"loss": 0.5}]
    assert "round 2 diverged (loss nan); restoring the adapter of the previous round" in caplog.text
    # Two good rounds, also for the server optimizer: the state of a run of two rounds.
    two = undisturbed.run_until(2)
    for name, value in two.adapter.tensors.items():
        np.testing.assert_array_equal(state.adapter.tensors[name], value)
    assert len([event for event in fed.events("site-1") if event.kind is Kind.COMMIT]) == 3, "all three are charged"


def test_two_consecutive_diverged_rounds_end_the_run(federation: Any) -> None:
    fed = federation(num_rounds=3)
    scores = iter([{"loss": 1.0}, {"loss": float("nan")}, {"loss": float("inf")}])
    message = (
        r"round 3 diverged \(loss inf\), like the previous round; the checkpoint of .* resumed run would diverge again"
    )
    with pytest.raises(StuckError, match=message + r".* start a new run with training\.learning_rate=\S+$"):
        fed.run(evaluate=lambda adapter: next(scores))
    saved = fed.lead.checkpoints.load()
    assert fed.events("site-1")[-1].detail["what"] == "run_ended", "the reserve must be released"
    assert (saved.round, saved.rounds[-1].diverged) == (2, True)
    first: LeadState = federation(num_rounds=3, folder="b").run_until(1)
    assert saved.adapter.digest() == first.adapter.digest()


def add_scores(fed: Any, *scores: float) -> Any:
    """Give the lead a validation file with this sequence of scores."""
    remaining = iter(scores)
    fed.lead = replace(fed.lead, evaluate=lambda _: {"accuracy": next(remaining)}, primary_metric="accuracy")
    return fed


def test_early_stopping_keeps_the_best_round_and_releases_the_reserve(federation: Any) -> None:
    """A run of four planned rounds stops after the third."""
    asks = {"num_rounds": 4, "spare_rounds": 0}
    fed = add_scores(
        federation(num_rounds=4, early_stopping_patience=1, checkpoint_selection="best", asks=asks), 0.25, 0.75, 0.75
    )
    adapters: list[Adapter] = []
    state: Any = fed.run(gives_adapter=True, finished=lambda state: adapters.append(state.adapter))
    assert (state.round, len(adapters)) == (3, 3)
    assert fed.trained == [*fed.spec.names] * 3
    assert state.kept_adapter.digest() == adapters[1].digest() != state.adapter.digest()
    # A checkpoint contains the best round, too.
    loaded = fed.lead.checkpoints.load()
    assert (loaded.kept_adapter.digest(), loaded.adapter.digest()) == (adapters[1].digest(), adapters[2].digest())
    for site in fed.spec.names:
        last = fed.events(site)[-1]
        assert (last.kind, last.detail["what"]) == (Kind.NOTE, "run_ended")
        assert last.detail["adapter_sha256"] == adapters[1].digest()
        history = fed.ledger(site).history
        assert not history.count_remaining_charges(datetime.now(UTC))
        charge = compute_site_charge(state, site, fed.plan)
        assert charge.rounds == 3
        assert 0 < charge.epsilon < charge.planned_epsilon == charge.proven_epsilon


def test_resumed_run_keeps_the_best_of_all_rounds(federation: Any) -> None:
    fed = add_scores(federation(num_rounds=2, checkpoint_selection="best"), 0.75, 0.5)
    after_one = fed.run_until(1)
    state = fed.run(after_one)
    assert state.round == 2
    assert state.kept_adapter.digest() == after_one.adapter.digest() != state.adapter.digest()
