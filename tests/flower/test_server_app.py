"""A lead with sites that fail, fall silent, or send invalid replies."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message

from fedtune.federation.lead import compute_site_charge
from fedtune.federation.protocol import RoundRequest
from fedtune.federation.replies import BEYOND_PLAN
from fedtune.federation.site_round import TrainingResult
from fedtune.flower import flower_records
from fedtune.flower.site_socket import record_from_bytes
from fedtune.model.adapter import Adapter
from fedtune.model.spec import LoraSpec
from fedtune.privacy.events import count_mechanisms
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import store
from fedtune.spec import RefusedError, RunError

from ..conftest import run_plan
from ..privacy.builders import stranger_key


def find_reply(messages: list[Message], node: int) -> Message:
    (message,) = (message for message in messages if message.metadata.src_node_id == node)
    return message


def test_completed_rounds_are_recorded(federation: Any) -> None:
    fed = federation(num_rounds=2)
    state = fed.run()
    assert [result.round for result in state.rounds] == [1, 2]
    # After the last round every site sends a final receipt; nothing else changes.
    assert replace(state, receipts=fed.finished[-1].receipts) == fed.finished[-1]
    for result in state.rounds:
        assert result.sites == ("site-1", "site-2", "site-3")
        assert result.failed_sites == {}
        assert set(result.metrics) == {"sum"}
    assert fed.trained == ["site-1", "site-2", "site-3"] * 2
    assert compute_site_charge(state, "site-2", fed.plan).steps == 4


def test_site_with_error_replies_counts_as_charged(federation: Any, tamper: Any) -> None:
    """Silent sites are tested below."""

    def drop_reply(messages: list[Message]) -> list[Message]:
        silent = find_reply(messages, 2)
        answered = [message for message in messages if message is not silent]
        failed = Message.__new__(Message)
        failed.__dict__.update(silent.__dict__)
        failed.__dict__["_content"], failed.__dict__["_error"] = None, Error(code=1, reason="secret text")
        return [*answered, failed]

    tamper(drop_reply, ("train", "query.end"))
    fed = federation(num_rounds=2)
    state = fed.run()
    assert [result.sites for result in state.rounds] == [("site-1", "site-3")] * 2
    assert [dict(result.failed_sites) for result in state.rounds] == [{"site-2": "no_reply"}] * 2
    assert list_charges(fed, state) == {"site-1": (2, False), "site-2": (2, True), "site-3": (2, False)}


def test_too_few_sites_end_the_run_and_keep_the_checkpoint(federation: Any, tamper: Any) -> None:
    fed = federation(num_rounds=2, min_sites=3)
    after_one = fed.run_until(1)
    tamper(lambda messages: messages[1:])
    with pytest.raises(
        RunError, match=r"round 2: 2 of 3 sites .*min_sites = 3 .*site-1: no_reply.* checkpoint of round 1"
    ):
        fed.run(after_one)
    loaded = fed.lead.checkpoints.load()
    assert loaded.round == 1
    assert loaded.adapter.digest() == after_one.adapter.digest()
    assert loaded.unanswered == {"site-1": 1, "site-2": 1, "site-3": 1}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("a value changed", "unsigned_reply"), ("nothing", "no_reply"), ("a reason of its own", "no_reply")],
)
def test_invalid_reply_is_dropped_and_the_round_continues(
    federation: Any, tamper: Any, fault: str, reason: str
) -> None:
    """Replies that a site itself may sign: tests/federation/test_replies.py."""

    def spoil(messages: list[Message]) -> list[Message]:
        content = find_reply(messages, 2).content
        if fault == "a value changed":
            (array,) = content.array_records[flower_records.UPDATE].values()
            nan = array.data[:-2] + b"\xc0\x7f"
            content[flower_records.UPDATE] = record_from_bytes(nan)
        elif fault == "nothing":
            content.clear()
        else:
            fields = json.loads(str(content.config_records[flower_records.REPLY]["json"]))
            fields |= {"kind": "refusal", "reason": "because of patient 4711", "requested": None, "allowed": None}
            content[flower_records.REPLY] = ConfigRecord({"json": json.dumps(fields)})
        return messages

    tamper(spoil)
    fed = federation()
    state = fed.run()
    assert state.rounds[0].sites == ("site-1", "site-3")
    assert state.rounds[0].failed_sites == {"site-2": reason}
    assert all(np.isfinite(value).all() for value in state.adapter.tensors.values())
    # The round counts as charged until the site's final receipt; an earlier receipt may be for another answer.
    assert [list_charges(fed, one)["site-2"] for one in (fed.finished[-1], state)] == [(1, True), (1, False)]


def test_missing_node_is_awaited_until_the_timeout(federation: Any) -> None:
    fed = federation(round_timeout_s=0.1)
    sizes = fed.sizes | {"site-4": 5}
    with pytest.raises(RunError, match="the run did not start, because these sites did not answer: site-4"):
        fed.run(declared_sizes=sizes)


def test_exhausted_plan_ends_the_run_with_its_completed_rounds(federation: Any) -> None:
    many = federation(num_rounds=run_plan().max_rounds + 1, min_sites=3)
    state = many.run()
    *rounds, last = state.rounds
    assert len(rounds) == run_plan().max_rounds
    assert all(one.sites for one in rounds)
    assert (last.sites, set(last.failed_sites.values())) == ((), {"plan_exhausted"})
    assert state.adapter.digest() == many.finished[-2].adapter.digest(), "the run must end with its completed rounds"


def test_site_changing_frozen_tensors_is_excluded_from_the_average(federation: Any) -> None:
    zeros = np.zeros((2, 3), np.float32)
    fed = federation(num_rounds=2, adapter=Adapter({"b.lora_A.weight": zeros, "b.lora_B.weight": zeros}))
    lora = LoraSpec(alternate=True)

    def train(request: RoundRequest, adapter: Adapter, attempt: int) -> TrainingResult:
        rests = lora.get_frozen_name_part(request.round) or ""
        change = {
            name: value + np.float32(0.25 * (rests not in name or request.site == "site-2"))
            for name, value in adapter.tensors.items()
        }
        return TrainingResult(adapter=Adapter(change))

    fed._train = train
    state = fed.run(lora=lora)
    assert [result.failed_sites for result in state.rounds] == [{"site-2": BEYOND_PLAN}] * 2
    assert {float(value) for tensor in state.adapter.tensors.values() for value in tensor.ravel()} == {0.25}


SITES = ("site-1", "site-2", "site-3")


def list_known_keys(fed: Any) -> dict[str, str]:
    """Return the sites' signing keys as in a roster."""
    return {name: SigningKey.load_or_create(fed.folder / name / "site_key.pem").public for name in SITES}


def drop_node(node: int) -> Callable[[list[Message]], list[Message]]:
    return lambda messages: [message for message in messages if message.metadata.src_node_id != node]


def list_charges(fed: Any, state: Any) -> dict[str, tuple[int, bool]]:
    charged = {site: compute_site_charge(state, site, fed.plan) for site in SITES}
    return {site: (charge.rounds, charge.upper_bound) for site, charge in charged.items()}


@pytest.mark.parametrize("listed", [SITES, SITES[:1]], ids=["all", "one"])
def test_receipts_are_accepted_under_roster_keys_and_for_unlisted_sites(
    federation: Any, listed: tuple[str, ...]
) -> None:
    fed = federation(num_rounds=2)
    keys = {site: key for site, key in list_known_keys(fed).items() if site in listed}
    state = fed.run(asked=replace(fed.lead.asked, site_keys=keys))
    assert list_charges(fed, state) == dict.fromkeys(SITES, (2, False))


def test_receipt_under_another_key_is_rejected(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
    fed = federation(num_rounds=2)
    keys = list_known_keys(fed) | {"site-2": stranger_key.public}
    state = fed.run(asked=replace(fed.lead.asked, site_keys=keys))
    # The origin of these updates and their charges are unknown, in the rounds and at the end.
    assert [result.sites for result in state.rounds] == [("site-1", "site-3")] * 2
    assert state.rounds[0].failed_sites == {"site-2": "unsigned_reply"}
    assert list_charges(fed, state) == {"site-1": (2, False), "site-2": (2, True), "site-3": (2, False)}
    assert "site-2" not in state.receipts
    assert "site site-2: the receipt is signed with a key that is not in the roster" in caplog.text


def test_final_receipt_of_a_silent_site_corrects_its_charge(federation: Any, tamper: Any) -> None:
    # Its answers were lost, but not the one to the last question.
    fed = federation(num_rounds=2)
    tamper(drop_node(2))
    state = fed.run()
    assert list_charges(fed, fed.finished[-1])["site-2"] == (2, True)
    assert list_charges(fed, state) == dict.fromkeys(SITES, (2, False))
    saved = fed.lead.checkpoints.load()
    assert list_charges(fed, saved) == dict.fromkeys(SITES, (2, False)), "the final receipt must be stored"
    assert saved.round == 2


_LAST_WORDS: dict[str, Any] = {  # a text, or changes of the receipt
    "no receipt": "null",
    "a number": 7,
    "of fewer rounds": {"charged_rounds": 0},
    "of another run": {"run": "s"},
}


@pytest.mark.parametrize("what", list(_LAST_WORDS))
def test_invalid_final_receipt_changes_nothing(federation: Any, tamper: Any, what: str) -> None:
    def spoil(messages: list[Message]) -> list[Message]:
        record, said = messages[1].content.config_records[flower_records.RECEIPT], _LAST_WORDS[what]
        record["json"] = json.dumps(json.loads(str(record["json"])) | said) if isinstance(said, dict) else said
        return messages

    fed = federation()
    tamper(drop_node(2))
    tamper(spoil, ("query.end",))
    state = fed.run()
    assert list_charges(fed, state) == {"site-1": (1, False), "site-2": (1, True), "site-3": (1, False)}
    assert state.round == 1, "the run must end anyway"


def test_settings_are_sent_to_each_site_in_each_round(federation: Any) -> None:
    fed = federation(num_rounds=2)
    settings = json.dumps({"task": "classification", "name": "Größe"})
    fed.run(asked=replace(fed.lead.asked, settings=settings))
    asked, end_requests = fed.asked[:9], fed.asked[9:]
    assert asked == [(name, settings) for name in SITES] * 3, "before the run, and in each of two rounds"
    assert end_requests == [(name, "") for name in SITES], "the end of a run needs no settings"


@pytest.mark.parametrize("gives_adapter", [True, False], ids=["real sites", "a simulation"])
def test_sites_receive_the_final_adapter_only_when_deployed(federation: Any, gives_adapter: bool) -> None:
    fed = federation(num_rounds=2)
    state = fed.run(gives_adapter=gives_adapter)
    assert fed.kept == (dict.fromkeys(SITES, ("r", state.adapter.digest())) if gives_adapter else {})
    assert state.adapter.digest() != fed.adapter.digest()
    for site in SITES:
        (end_event,) = [event for event in fed.events(site) if event.detail.get("what") == "run_ended"]
        assert end_event.detail["adapter_sha256"] == (state.adapter.digest() if gives_adapter else "")
        assert state.receipts[site].reply == end_event.detail["adapter_sha256"]


def test_lead_keeps_no_end_receipt_for_another_adapter(federation: Any) -> None:
    fed = federation(num_rounds=1)
    state = fed.run(gives_adapter=True, finished=lambda _: fed.ledger("site-2").end_run("r", adapter_sha256="ab" * 32))
    assert [state.receipts[site].ended for site in SITES] == [True, False, True]


def test_refused_run_leaves_no_adapter_and_releases_reserves(federation: Any) -> None:
    fed = federation(num_rounds=2, min_sites=3)
    freeze = lambda state: fed.ledger("site-2").freeze("consent withdrawn")  # noqa: E731
    with pytest.raises(RefusedError, match=r"round 2: .*site-2: frozen"):
        fed.run(gives_adapter=True, finished=freeze)
    assert fed.kept == {}
    for site in ("site-1", "site-3"):
        history = fed.ledger(site).history
        assert history.count_total_charges() == count_mechanisms([run_plan().event(rounds=2)]), (
            "the completed rounds must stay charged"
        )
        assert not history.count_remaining_charges(history.now())


# A site with a damaged ledger trains nothing and reports only that; the others do not wait for it. Kinds of damage:
# tests/privacy/test_ledger_file.py, test_verify.py and test_rollback.py.


def test_read_only_ledger_stops_training_but_still_issues_receipts(
    federation: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a disk that was mounted read-only; file modes would not stop a test that runs as root.
    fed = federation(num_rounds=2)
    state = fed.run_until(1)
    connect = sqlite3.connect

    def read_only(path: Any, **settings: Any) -> sqlite3.Connection:
        if path == f"{fed.find_ledger_path('site-2').resolve().as_uri()}?mode=rw":
            path = path.replace("mode=rw", "mode=ro")
        return connect(path, **settings)

    monkeypatch.setattr(store.sqlite3, "connect", read_only)
    after = fed.run(state)
    assert after.rounds[-1].failed_sites == {"site-2": "site_error"}
    assert fed.trained[-2:] == ["site-1", "site-3"]
    assert "attempt to write a readonly database" in caplog.text
    assert list_charges(fed, after)["site-2"] == (1, False), "its receipt must still be available"
    monkeypatch.undo()
    assert [event.kind for event in fed.events("site-2")][2:] == ["plan", "reserve", "commit"]


def test_restored_ledger_is_detected_by_the_receipt_of_the_lead(federation: Any) -> None:
    fed = federation(num_rounds=3)
    path = fed.find_ledger_path("site-2")
    state = fed.run_until(1)
    backup = path.with_suffix(".backup")
    shutil.copy(path, backup)
    state = fed.run_until(2, state)
    shutil.copy(backup, path)
    after = fed.run(state)
    assert after.rounds[-1].failed_sites == {"site-2": "ledger_behind_receipt"}
    assert fed.trained[-2:] == ["site-1", "site-3"]
    assert after.receipts["site-2"] == state.receipts["site-2"], "a receipt of the restored ledger must not be accepted"
    assert list_charges(fed, after)["site-2"] == (3, True)
