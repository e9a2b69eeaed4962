"""A lead's reaction to the answers of its sites during a round: reports, validity and retries."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.federation.protocol import Invitation, Reply, compute_answer_digest
from fedtune.federation.transport import Question
from fedtune.flower import flower_records
from fedtune.flower.asking_grid import ClassifiedAnswer as Answered
from fedtune.flower.internals import set_sender_ids
from fedtune.model.adapter import Adapter
from fedtune.ops.deployment import OFFER, LeadService, _AnswerClassifier
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.release import Offer, Reason, Refusal, Update
from fedtune.spec import ConfigError, RunError
from fedtune.version import build

from ..builders import round_request
from ..conftest import make_site_policy, run_proposal
from ..privacy.builders import lead_key, stranger_key

NONCE = "0a" * 16


class Line:
    """A lead with the sites north (1) and south (2), and their answers."""

    def __init__(self, ledger: SiteLedger, key: str, adapter: Adapter) -> None:
        set_sender_ids(run_id=7, node_id=0, task_id=0)
        self.ledger, self.adapter, self.listener = ledger, adapter, Mock()
        self.sites = [SimpleNamespace(site=name, node_key=b"", site_key=key) for name in ("north", "south")]
        self.ears = _AnswerClassifier(self.sites, self.listener, max_rounds=4)

    @property
    def heard(self) -> list[Any]:
        """Return the reported site and answer, and the other reported values."""
        return [(*call.args, call.kwargs) for call in self.listener.on_site_answered.call_args_list]

    @property
    def words(self) -> list[tuple[str, str]]:
        return [call[:2] for call in self.heard]

    def question(self, site: str, kind: str = "train") -> Message:
        asked: Any = round_request(run_proposal(), site=site)
        if kind != "train":
            asked = Invitation(proposal=run_proposal(), site=site, expires=1e12, nonce=NONCE)
        signed = asked.sign_with(lead_key)
        return Message(flower_records.from_question(Question(site=site, signed=signed), None), 1, kind)

    def receive_reply(self, number: int, reply: Reply, kind: str = "train") -> Answered:
        answer = Message(flower_records.from_reply(reply), 1, kind)
        return self.ears(number, self.question(self.sites[number - 1].site, kind), answer)

    def signed(self, body: Update | Refusal | Offer) -> Reply:
        return Reply(body=body, receipt=self.ledger.sign_receipt("r", reply=compute_answer_digest(body)))

    def update(self, site: str = "north", **changes: Any) -> Update:
        return Update(**({"site": site, "run": "r", "round": 1, "tensors": self.adapter.tensors} | changes))


def make_refusal(reason: Reason, round: int = 1) -> Refusal:
    return Refusal(site="north", run="r", round=round, reason=reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("north")


@pytest.fixture(scope="module")
def ledger(folder: Path) -> SiteLedger:
    """A ledger with two charged rounds, which signs both sites' receipts."""
    new_ledger = SiteLedger(
        folder / "ledger.db", make_site_policy(), SigningKey.load_or_create(folder / "key.pem"), create=True
    )
    for round in (1, 2):
        new_ledger.reserve(run_proposal(), round=round, request=f"{round}")
    return new_ledger


@pytest.fixture
def line(folder: Path, ledger: SiteLedger, adapter: Adapter) -> Line:
    return Line(ledger, SigningKey.load_or_create(folder / "key.pem").public, adapter)


def test_update_is_final_and_reported_with_size_and_charge(line: Line) -> None:
    assert line.receive_reply(2, line.signed(line.update("south"))) == Answered(good=True)
    ((site, event, details),) = line.heard
    assert (site, event, details["charged_rounds"]) == ("south", "update", 2)
    assert details["num_bytes"] > sum(value.nbytes for value in line.adapter.tensors.values())


@pytest.mark.parametrize("what", ["no receipt", "another answer's", "another key's", "another round", "another site's"])
def test_update_without_a_matching_signed_receipt_is_rejected(line: Line, what: str) -> None:
    body = line.update()
    if what == "no receipt":
        reply = Reply(body=body, receipt=None)
    elif what == "another answer's":
        reply = replace(line.signed(line.update(round=2)), body=body)
    elif what == "another key's":
        line.sites[0].site_key = stranger_key.public
        reply = line.signed(body)
    else:
        reply = line.signed(line.update(round=2) if what == "another round" else line.update("south"))
    assert line.receive_reply(1, reply) == Answered(good=False)
    own = what in ("another round", "another site's")
    assert line.heard[0][2]["charged_rounds"] == (2 if own else None), "an unsigned charge must not be reported"


def test_implausible_charge_is_not_reported(line: Line) -> None:
    # Composing so many rounds would take all of the lead's memory.
    ears = _AnswerClassifier(line.sites, line.listener, max_rounds=1)
    ears(1, line.question("north"), Message(flower_records.from_reply(line.signed(line.update())), 1, "train"))
    assert line.heard[0][2]["charged_rounds"] is None


def test_final_refusal_is_reported_for_every_reason(line: Line) -> None:
    final = [reason for reason in Reason if not reason.is_waiting]
    for reason in final:
        assert line.receive_reply(1, line.signed(make_refusal(reason))) == Answered(good=False)
    assert line.words == [("north", reason.value) for reason in final]


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason.is_waiting])
def test_waiting_site_is_asked_again_and_reported_once(line: Line, reason: Reason) -> None:
    for _ in range(3):
        reply = line.signed(make_refusal(reason))
        assert line.receive_reply(1, reply) == Answered(good=False, again_s=5, idle=True)
    assert line.receive_reply(2, line.signed(make_refusal(reason))).again_s == 5
    assert line.words == [("north", reason.value), ("south", reason.value)]
    assert line.receive_reply(1, line.signed(line.update())) == Answered(good=True)
    assert line.words[2:] == [("north", "update")]
    line.receive_reply(1, line.signed(make_refusal(reason)))
    assert line.words[3:] == [("north", reason.value)], "a pause in a later round must be reported again"


def test_polling_interval_grows_while_a_site_awaits_approval(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("fedtune.ops.deployment.time.monotonic", lambda: now)
    waiting = line.signed(make_refusal(Reason.AWAITING_APPROVAL))
    times = []
    while now < 3_600:
        now += line.receive_reply(1, waiting).again_s or 0
        times.append(now)
    assert times[0] == 5
    assert now - times[-2] == 60
    assert len(times) < 100, "on stock Flower each question starts a process"
    line.receive_reply(1, line.signed(line.update()))
    assert line.receive_reply(1, waiting).again_s == 5, "a new wait must start with the shortest interval"


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({flower_records.REPLY: ConfigRecord({"json": "[" * 10_000})}),
        RecordDict({flower_records.REPLY: ConfigRecord({"json": '{"kind": "update"}'})}),
        RecordDict({flower_records.REPLY: flower_records.to_arrays({"a": np.ones(1, np.float32)})}),
        flower_records.from_receipt(None),
    ],
    ids=["empty", "nested", "a piece", "arrays", "the end of a run"],
)
def test_malformed_reply_is_final_and_not_reported(line: Line, content: RecordDict) -> None:
    assert line.ears(1, line.question("north"), Message(content, 1, "train")) == Answered(good=False)
    assert line.heard == []


def test_end_of_run_reply_is_accepted(line: Line) -> None:
    kind = f"query.{flower_records.END}"
    question = Message(RecordDict(), 1, kind)
    assert line.ears(1, question, Message(flower_records.from_receipt(None), 1, kind)) == Answered(good=True)
    assert line.heard == []


def test_invitation_waits_for_approval_but_not_during_a_pause(line: Line) -> None:
    for reason, idle in ((Reason.AWAITING_APPROVAL, False), (Reason.PAUSED, True)):
        reply = line.signed(make_refusal(reason, round=0))
        expected = Answered(good=False, again_s=5, idle=idle)
        assert line.receive_reply(1, reply, f"query.{flower_records.INVITE}") == expected


def test_offer_is_accepted_only_for_an_invitation(line: Line) -> None:
    offer = Offer(site="north", run="r", max_rounds=3, min_noise=1.0, nonce=NONCE, software="0.2.1+7c1f")
    kind = f"query.{flower_records.INVITE}"
    assert line.receive_reply(1, line.signed(offer), kind) == Answered(good=True)
    assert line.words == [("north", OFFER)]
    line.listener.note.assert_called_once_with(f"north runs fedtune 0.2.1+7c1f, and this lead runs {build()}")
    for other in (replace(offer, nonce="1b" * 16), replace(offer, run="s"), replace(offer, site="south")):
        assert line.receive_reply(1, line.signed(other), kind) == Answered(good=False)
    assert line.receive_reply(1, line.signed(offer)) == Answered(good=False), "a round needs an update"
    assert line.receive_reply(1, line.signed(line.update()), kind) == Answered(good=False), (
        "an invitation needs an offer"
    )


def test_lead_contacts_no_site_if_the_expected_signal_is_weak(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    weak = ("privacy.noise_multiplier=400", "training.ignore_weak_signal=false", "runtime=deployment")
    config = compose_run(tiny(*weak, into=tmp_path))
    sites = [SimpleNamespace(site=name, node_key=b"", site_key="ab" * 32) for name in ("site-1", "site-2")]
    monkeypatch.setattr(LeadService, "open_grid", grid := MagicMock())
    entered = grid.return_value.__enter__
    entered.side_effect = RunError("no server")
    monkeypatch.setattr(LeadService, "key", lead_key)
    monkeypatch.setattr("fedtune.ops.deployment.find_members", lambda kit, names: sites)
    (tmp_path / "run").mkdir()

    def run(config: RunConfig) -> None:
        lead = LeadService(kit=MagicMock(folder=tmp_path), federation=config.federation)
        lead.run(config, tmp_path / "run", MagicMock())

    with pytest.raises(ConfigError, match=r"training\.ignore_weak_signal = false"):
        run(config)
    entered.assert_not_called()
    with pytest.raises(RunError, match="no server"):
        run(replace(config, training=replace(config.training, ignore_weak_signal=True)))
    entered.assert_called_once()
