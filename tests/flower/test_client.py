"""A site's Flower app: every reply is a release type, without exception texts or other text of the site."""

import base64
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto

from fedtune.federation.protocol import EndOfRun, RoundRequest
from fedtune.federation.site_round import PreparedRun, Site, TrainingResult
from fedtune.federation.transport import Question
from fedtune.flower import flower_records
from fedtune.flower.client import SiteApp
from fedtune.flower.internals import set_sender_ids
from fedtune.model.adapter import Adapter
from fedtune.ops.wire.fleet import Fleet
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.release import Reason, Update
from fedtune.spec import ConfigError, RunError

from ..builders import MadeSite, Train, round_request
from ..conftest import make_site_policy, run_proposal
from ..privacy.builders import lead_key, stranger_key

END = f"query.{flower_records.END}"


@pytest.fixture(autouse=True)
def server() -> None:
    """Messages constructed as by Flower's server."""
    set_sender_ids(run_id=7, node_id=0, task_id=0)


def train_by_adding_one(request: RoundRequest, given: Adapter, attempt: int) -> TrainingResult:
    return TrainingResult(adapter=Adapter({name: value + np.float32(1) for name, value in given.tensors.items()}))


@pytest.fixture
def site(tmp_path: Path, adapter: Adapter) -> Callable[..., Site]:
    """The site `a` with a fresh ledger, which trains by adding one by default."""

    def make(train: Train = train_by_adding_one) -> Site:
        key = SigningKey.load_or_create(tmp_path / "site_key.pem")
        ledger = SiteLedger(tmp_path / "ledger.db", make_site_policy("a"), key, create=True)
        prepared = PreparedRun(proposal=run_proposal(), template=adapter, declared_size=100, update_dtype="float32")
        return MadeSite(ledger, prepare=lambda proposal: prepared, train=train)

    return make


@pytest.fixture
def app(site: Any) -> SiteApp:
    return SiteApp(lambda settings: site(), name="a")


@pytest.fixture
def request_(adapter: Adapter) -> RecordDict:
    request = round_request(run_proposal(), adapter_digest=adapter.digest())
    question = Question(site="a", signed=request.sign_with(lead_key), adapter=adapter)
    return flower_records.from_question(question, flower_records.from_adapter(adapter))


class Exchange(NamedTuple):
    """A message, its reply, and the decoded answer."""

    message: Message
    reply: Message
    answered: Any


def ask_app(app: SiteApp, content: RecordDict | Error, kind: str = "train") -> Exchange:
    message = Message(RecordDict(), 5, kind)
    if isinstance(content, Error):
        message.__dict__.update({"_content": None, "_error": content})
    else:
        message.content = content
    message.metadata.__dict__["_message_id"] = "m-1"
    reply = app.answer(message)
    return Exchange(message, reply, SiteApp.read_answer(reply.content))


def test_round_reply_contains_the_bytes_stored_in_the_ledger(
    app: SiteApp, request_: RecordDict, adapter: Adapter, tmp_path: Path
) -> None:
    exchange = ask_app(app, request_)
    (array,) = exchange.reply.content.array_records[flower_records.UPDATE].values()
    body = flower_records.to_reply(exchange.reply.content).body
    with store.open_for_reading(tmp_path / "ledger.db") as file:
        ((_, _, stored),) = store.read_replies(file)
    assert array.data == stored == body.to_bytes()
    np.testing.assert_array_equal(body.tensors["head"], adapter.tensors["head"] + 1)
    assert isinstance(exchange.answered, Update)
    assert (exchange.answered.run, exchange.answered.round) == ("r", 1)
    assert RoundRequest.from_signed(flower_records.to_signed(exchange.message.content)).round == 1
    about = exchange.reply.metadata
    assert (about.reply_to_message_id, about.src_node_id, about.dst_node_id, about.run_id) == ("m-1", 5, 0, 7)
    assert ask_app(app, request_).reply.content.object_id == exchange.reply.content.object_id, "the bytes must be equal"


def test_ledger_receives_the_server_time_of_the_request(app: SiteApp, request_: RecordDict, monkeypatch: Any) -> None:
    """The server time opens a period of the site's budget; without it, no period begins."""
    monkeypatch.setattr(SiteLedger, "set_server_time", set_time := Mock())
    set_time.assert_called_once_with(ask_app(app, request_).message.metadata.created_at)


def test_end_of_run_is_recorded_and_answered_only_for_its_lead(app: SiteApp, site: Any, request_: RecordDict) -> None:
    notice = EndOfRun(run="r", lead=lead_key.public).sign_with(lead_key)
    before = ask_app(app, flower_records.from_question(Question(site="", signed=notice), None), END)
    assert before.answered is None
    assert flower_records.to_receipt(before.reply.content) is None, "the site did not take part in this run"
    ask_app(app, request_)
    for key, ended in ((stranger_key, False), (lead_key, True)):
        notice = EndOfRun(run="r", lead=key.public).sign_with(key)
        content = flower_records.from_question(Question(site="a", signed=notice), None)
        receipt = flower_records.to_receipt(ask_app(app, content, END).reply.content)
        assert receipt == (site().ledger.sign_receipt("r") if ended else None)
        assert (site().ledger.history.runs["r"].expires is None) == ended


WORDS = {"json": "canary-31", "signature": "00"}
ARRAYS = ArrayRecord([np.ones(2, np.float32)])
ODD_CONTENTS: dict[str, RecordDict | Error] = {
    "empty": RecordDict(),
    "an error": Error(0, "canary-31"),
    "metrics": RecordDict({"canary-31": MetricRecord({"a": 1.0})}),
    "arrays alone": RecordDict({flower_records.ADAPTER: ARRAYS}),
    "a request that is none": RecordDict({flower_records.REQUEST: ConfigRecord(WORDS)}),
    "a request without a signature": RecordDict(
        {flower_records.REQUEST: ConfigRecord({"json": "{}"}), flower_records.ADAPTER: ARRAYS}
    ),
    "a request of arrays": RecordDict({flower_records.REQUEST: ARRAYS}),
    "settings that are none": RecordDict({flower_records.SETTINGS: ConfigRecord({"json": [1.0]})}),
}
KINDS = ["train", "evaluate", "query", END, "train.canary", "query.canary", "system", "get_properties", "reconnect"]
"""Contents of messages that Flower lets through."""


@pytest.mark.parametrize("odd", ODD_CONTENTS)
def test_malformed_content_is_answered_without_echoing_it(odd: str, caplog: pytest.LogCaptureFixture) -> None:
    app = SiteApp(Mock(side_effect=AssertionError("the site must not be opened")), name="a")
    for kind in KINDS:
        exchange = ask_app(app, ODD_CONTENTS[odd], kind)
        reply = exchange.reply
        assert not reply.has_error(), kind
        assert b"canary-31" not in message_to_proto(reply).content.SerializeToString(), kind
        if exchange.answered is not None:
            assert (exchange.answered.reason, exchange.answered.run) == (Reason.MALFORMED_REQUEST, ""), kind
            assert (exchange.answered.requested, exchange.answered.allowed) == (None, None), kind
            assert flower_records.to_reply(reply.content).receipt is None, kind
        elif kind == END and not isinstance(ODD_CONTENTS[odd], Error):
            assert reply.content == flower_records.from_receipt(None)
            assert "could not end a run" in caplog.text


@pytest.mark.parametrize("kind", ["evaluate", "train.canary", "system", "reconnect"])
def test_unknown_message_type_is_refused_even_with_a_valid_request(
    app: SiteApp, request_: RecordDict, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask_app(app, request_, kind).answered.reason is Reason.MALFORMED_REQUEST
    assert "could not answer" in caplog.text


class Panic(BaseException):
    """A panic as raised by a library written in Rust."""


@pytest.mark.parametrize(
    "failure",
    [RunError("canary-31"), ConfigError("canary-31", 1, "x"), OSError("canary-31: /a.csv"), Panic("canary-31")],
    ids=lambda failure: type(failure).__name__,
)
@pytest.mark.parametrize("stage", ["opening the site", "training", "ending"])
def test_failure_is_reported_as_a_reason_without_text(
    site: Any, request_: RecordDict, failure: BaseException, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fails = Mock(side_effect=failure)
    app = SiteApp((lambda settings: site(fails)) if stage == "training" else fails, name="a")
    exchange = ask_app(app, request_, END if stage == "ending" else "train")
    assert not exchange.reply.has_error()
    if stage != "ending":
        assert exchange.answered.reason is Reason.SITE_ERROR
    sent = message_to_proto(exchange.reply).content.SerializeToString()
    assert b"canary-31" not in sent
    assert type(failure).__name__.encode() not in sent
    assert "canary-31" in caplog.text


def test_keyboard_interrupt_is_not_swallowed(site: Any, request_: RecordDict) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask_app(SiteApp(lambda settings: site(Mock(side_effect=KeyboardInterrupt)), name="a"), request_)


def test_name_query_returns_the_site_name_and_expires(app: SiteApp) -> None:
    exchange = ask_app(app, RecordDict(), "query")
    assert exchange.answered is None
    assert exchange.reply.content.config_records[flower_records.SITE]["name"] == "a"
    about = exchange.message.metadata
    about.created_at, about.ttl = 1000.0, 60.0
    assert not Fleet.is_past_deadline(exchange.message, now=1060.0)
    assert Fleet.is_past_deadline(exchange.message, now=1060.5)


CANARY = "patient-4711-has-hepatitis"
_WORDS = (CANARY, "patient", "hepatitis", "Traceback", "Error", "ledger.db", "site_key.pem", "sqlite")


def require_silence(sent: list[bytes], words: tuple[str, ...] = _WORDS) -> None:
    """Check that the content contains no text of the site and no encoding of the canary."""
    assert sent
    all_bytes = b"\0".join(sent)
    for word in words:
        assert word.encode() not in all_bytes
    canary = CANARY.encode()
    for spelled in (canary.hex().encode(), CANARY.encode("utf-16-le"), base64.b64encode(canary)[:-4]):
        assert spelled not in all_bytes


def test_file_names_of_a_site_never_leave_it(federation: Any, sent_bytes: list[bytes], caplog: Any) -> None:
    caplog.set_level(logging.INFO, "fedtune")
    names = {
        "ledger": f"{CANARY}/{CANARY}.db",
        "site_key": f"{CANARY}.pem",
        "anchor": f"{CANARY}.json",
        "population": {"name": CANARY},
        "releases": {"metrics": "none"},
    }
    fed = federation(policies={"site-2": names})
    assert fed.run().rounds[0].failed_sites == {}
    require_silence(sent_bytes)
    # A ledger that cannot be read: the error message names its path.
    fed.find_ledger_path("site-2").write_bytes(b"no database" * 500)
    second = federation(policies={"site-2": names}, asks={"run": "s"})
    state = second.run()
    assert (state.rounds[0].sites, state.rounds[0].failed_sites) == (("site-1", "site-3"), {"site-2": "site_error"})
    require_silence(sent_bytes)
    assert f"{CANARY}.db cannot be read or written" in caplog.text


def test_leak_search_covers_every_message_and_detects_a_canary(federation: Any, sent_bytes: Any) -> None:
    # Otherwise the test above would prove nothing.
    federation(num_rounds=2, asks={"run": CANARY}).run()
    introductions, offers, replies, ends = 3, 3, 2 * 3, 3
    assert len(sent_bytes) == introductions + offers + replies + ends
    assert sum(b"site_key" in sent for sent in sent_bytes) == offers + replies + ends, "each must contain a receipt"
    with pytest.raises(AssertionError, match="hepatitis"):
        require_silence(sent_bytes)
