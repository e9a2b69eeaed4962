"""Whose receipts the lead believes, what it hears at the end of a run, and what it sends along."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedtune.flower import flower_records
from fedtune.privacy.events import grouped
from fedtune.privacy.keys import SigningKey
from fedtune.runs.results import site_charge
from fedtune.spec import RefusedError

from ..conftest import run_plan
from ..privacy.builders import stranger_key

SITES = ("site-1", "site-2", "site-3")


def known_keys(made: Any) -> dict[str, str]:
    """What a roster says: the keys under which the sites sign."""
    return {name: SigningKey.load_or_make(made.folder / name / "site_key.pem").public for name in SITES}


def without(node: int) -> Callable[[list[Message]], list[Message]]:
    return lambda messages: [message for message in messages if message.metadata.src_node_id != node]


def charges(made: Any, state: Any) -> dict[str, tuple[int, bool]]:
    charged = {site: site_charge(state, site, made.plan) for site in SITES}
    return {site: (charge.rounds, charge.upper_bound) for site, charge in charged.items()}


@pytest.mark.parametrize("named", [SITES, SITES[:1]], ids=["all", "one"])
def test_receipts_count_under_the_keys_of_the_roster_and_of_sites_that_it_does_not_name(
    federation: Any, named: tuple[str, ...]
) -> None:
    made = federation(num_rounds=2)
    keys = {site: key for site, key in known_keys(made).items() if site in named}
    state = made.run(site_keys=keys)
    assert charges(made, state) == dict.fromkeys(SITES, (2, False))


def test_a_receipt_under_another_key_is_nobody_s_word(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = federation(num_rounds=2)
    keys = known_keys(made) | {"site-2": stranger_key.public}
    state = made.run(site_keys=keys)
    # Nobody knows whose update it is, nor what was charged, in the rounds and at the end.
    assert [result.sites for result in state.rounds] == [("site-1", "site-3")] * 2
    assert state.rounds[0].failed_sites == {"site-2": "unsigned_reply"}
    assert charges(made, state) == {"site-1": (2, False), "site-2": (2, True), "site-3": (2, False)}
    assert "site-2" not in state.receipts
    assert "site-2: its receipt is signed with a key that the roster does not know" in caplog.text


def test_the_last_word_of_a_site_that_was_silent_says_what_it_was_charged(federation: Any, tamper: Any) -> None:
    # Its answers were lost on the way, and the last question was not.
    made = federation(num_rounds=2)
    tamper(without(2))
    state = made.run()
    assert charges(made, made.finished[-1])["site-2"] == (2, True)
    assert charges(made, state) == dict.fromkeys(SITES, (2, False))
    saved = made.lead.checkpoints.load()
    assert charges(made, saved) == dict.fromkeys(SITES, (2, False)), "and it is kept"
    assert saved.round == 2


def test_an_older_receipt_hides_no_charge(federation: Any, tamper: Any) -> None:
    """A server keeps what a site says of a round, and gives the lead what it said before."""
    made, said = federation(num_rounds=2), list[RecordDict]()

    def swap(messages: list[Message]) -> list[Message]:
        said.append(messages[1].content)
        if messages[1].metadata.message_type == "train":
            messages[1].content = said[0]  # its offer
        elif len(said) > 1:  # the end: what it said of round 1
            messages[1].content = flower_records.from_receipt(flower_records.to_reply(said[1]).receipt)
        return messages

    tamper(swap, ("query.invite", "train", "query.end"))
    state = made.run()
    assert charges(made, state) == {"site-1": (2, False), "site-2": (2, True), "site-3": (2, False)}


_LAST_WORDS: dict[str, Any] = {  # a text, or changes of the receipt
    "no receipt": "null",
    "a number": 7,
    "of fewer rounds": {"charged_rounds": 0},
    "of another run": {"run": "s"},
}


@pytest.mark.parametrize("what", list(_LAST_WORDS))
def test_a_last_word_that_is_none_changes_nothing(federation: Any, tamper: Any, what: str) -> None:
    def spoil(messages: list[Message]) -> list[Message]:
        record, said = messages[1].content.config_records[flower_records.RECEIPT], _LAST_WORDS[what]
        record["json"] = json.dumps(json.loads(str(record["json"])) | said) if isinstance(said, dict) else said
        return messages

    made = federation()
    tamper(without(2))
    tamper(spoil, ("query.end",))
    state = made.run()
    assert charges(made, state) == {"site-1": (1, False), "site-2": (1, True), "site-3": (1, False)}
    assert state.round == 1, "the run is over all the same"


def test_settings_travel_to_each_site_in_each_round(federation: Any) -> None:
    made = federation(num_rounds=2)
    settings = json.dumps({"task": "classification", "name": "Größe"})
    made.run(settings=settings)
    asked, ends = made.asked[:9], made.asked[9:]
    assert asked == [(name, settings) for name in SITES] * 3, "before the run, and in each of two rounds"
    assert ends == [(name, "") for name in SITES], "the end of a run needs none"


@pytest.mark.parametrize("gives", [True, False], ids=["real sites", "a simulation"])
def test_the_sites_receive_the_final_adapter(federation: Any, gives: bool) -> None:
    made = federation(num_rounds=2)
    state = made.run(gives_adapter=gives)
    assert made.kept == (dict.fromkeys(SITES, ("r", state.adapter.digest())) if gives else {})
    assert state.adapter.digest() != made.adapter.digest()
    for site in SITES:
        (ended,) = [event for event in made.events(site) if event.detail.get("what") == "run_ended"]
        assert ended.detail["adapter_sha256"] == (state.adapter.digest() if gives else "")


def test_a_run_that_is_refused_leaves_no_adapter_and_gives_the_others_their_budget_back(federation: Any) -> None:
    made = federation(num_rounds=2, min_sites=3)
    freeze = lambda state: made.ledger("site-2").freeze("consent withdrawn")  # noqa: E731
    with pytest.raises(RefusedError, match=r"round 2: .*site-2: frozen"):
        made.run(gives_adapter=True, finished=freeze)
    assert made.kept == {}
    for site in ("site-1", "site-3"):
        history = made.ledger(site).history
        assert history.charged() == grouped([run_plan().event(rounds=2)]), "the rounds that were trained"
        assert not history.set_aside(history.now())
