"""Questions and answers as Flower records, and over Flower's grid."""

from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedtune.federation.protocol import Reply, Signed
from fedtune.federation.transport import Question
from fedtune.flower import flower_records
from fedtune.flower.grid_transport import GridTransport
from fedtune.flower.internals import set_metadata, set_sender_ids
from fedtune.model.adapter import Adapter
from fedtune.privacy.release import Reason, Receipt, Refusal, Update
from fedtune.spec import ConfigError

from ..builders import round_request
from ..conftest import run_proposal
from ..privacy.builders import lead_key

COUNTS = {"charged_rounds": 1, "sequence": 3, "ended": False, "plan": "", "seeded_noise": False, "simulated": False}
RECEIPT = Receipt(site="a", run="r", head="ab" * 32, site_key="cd" * 32, signature="ef" * 64, **COUNTS)


@pytest.mark.parametrize("scores", [None, (0.25, -1.5)])
@pytest.mark.parametrize("receipt", [RECEIPT, None])
def test_update_round_trips_through_flower_records(adapter: Adapter, receipt: Receipt | None, scores: Any) -> None:
    sent = Update(site="a", run="r", round=1, tensors=dict(reversed(adapter.tensors.items())), scores=scores)
    reply = flower_records.to_reply(flower_records.from_reply(Reply(body=sent, receipt=receipt)))
    assert reply.receipt == receipt
    assert isinstance(reply.body, Update)
    assert reply.body.to_bytes() == sent.to_bytes()
    assert list(reply.body.tensors) == list(sent.tensors), "the order of tensors must be kept"


def test_refusal_round_trips_through_flower_records() -> None:
    for reason in Reason:
        body = Refusal(site="a", run="r", round=1, reason=reason, requested="2", allowed=None)
        sent = Reply(body=body, receipt=RECEIPT)
        assert flower_records.to_reply(flower_records.from_reply(sent)) == sent


def test_reply_accepts_only_its_canonical_record_form(adapter: Adapter) -> None:
    """Flower's fields besides the bytes are unsigned, so they must have fixed values."""
    update = Update(site="a", run="r", round=1, tensors=adapter.tensors)
    content = flower_records.from_reply(Reply(body=update, receipt=RECEIPT))
    assert set(content) == {flower_records.UPDATE, flower_records.REPLY}
    assert not content.metric_records, "Flower's num-examples would reveal a site's exact size"
    refusal = Refusal(site="a", run="r", round=1, reason=Reason.SITE_ERROR)
    assert set(flower_records.from_reply(Reply(body=refusal, receipt=None))) == {flower_records.REPLY}
    ((name, honest),) = content.array_records[flower_records.UPDATE].items()
    assert honest.data == update.to_bytes()
    fields: dict[str, Any] = {"dtype": honest.dtype, "shape": honest.shape, "stype": honest.stype, "data": honest.data}
    others = [
        {"patient-4711": honest},
        {name: honest, "beside": honest},
        {},
        *({name: Array(**{**fields, **other})} for other in ({"dtype": "int8"}, {"shape": (1,)}, {"stype": "numpy"})),
    ]
    for other in others:
        content[flower_records.UPDATE] = ArrayRecord(other)
        with pytest.raises(ConfigError, match="must be a site's answer"):
            flower_records.to_reply(content)


def test_message_size_counts_tensors_and_text(adapter: Adapter) -> None:
    request_ = round_request(run_proposal(), adapter_digest=adapter.digest()).sign_with(lead_key)
    content = flower_records.from_question(Question(site="", signed=request_), flower_records.from_adapter(adapter))
    payload = sum(value.nbytes for value in adapter.tensors.values())
    words = len(request_.text) + len(request_.signature)
    assert payload + words <= flower_records.count_payload_bytes(content) <= payload + words + 400


@pytest.mark.parametrize("receipt", [RECEIPT, None])
def test_receipt_round_trips_through_flower_records(receipt: Receipt | None) -> None:
    content = flower_records.from_receipt(receipt)
    assert set(content) == {flower_records.RECEIPT}
    assert flower_records.to_receipt(content) == receipt


NO_ANSWER, NO_RECEIPT = "must be a site's answer", "must be a site's receipt"


@pytest.mark.parametrize(
    ("read", "record", "texts", "message"),
    [
        (flower_records.to_reply, flower_records.REPLY, ("{", "[1]", '{"kind": "update"}'), NO_ANSWER),
        (
            flower_records.to_receipt,
            flower_records.RECEIPT,
            ("", "{", "[]", "7", '"text"', '{"site": "a"}', "[" * 5000, '{"charged_rounds": 1e999}'),
            NO_RECEIPT,
        ),
    ],
    ids=["reply", "receipt"],
)
def test_malformed_records_raise_a_config_error(read: Any, record: str, texts: tuple[str, ...], message: str) -> None:
    contents = [RecordDict({record: ConfigRecord({"json": text})}) for text in texts]
    for content in (RecordDict(), *contents):
        with pytest.raises(ConfigError, match=message):
            read(content)


def test_answers_of_known_nodes_are_read_one_by_one_and_their_bytes_counted() -> None:
    set_sender_ids(run_id=7, node_id=0, task_id=0)
    grid, counted = MagicMock(spec=["get_node_ids", "receive"]), list[int]()

    def receive(messages: Iterable[Message], *, timeout: float) -> Iterator[Message]:
        for message in messages:
            set_metadata(message, message_id=str(message.metadata.dst_node_id))
            counted.append(message.metadata.dst_node_id)
            yield Message(flower_records.from_receipt(None), reply_to=message)

    grid.receive.side_effect = receive
    transport = GridTransport(grid, {1: "a", 2: "b", 3: "c"})
    signed = Signed(text="{}", signature="")
    answers = transport.end([Question(site=site, signed=signed) for site in "bca"], timeout_s=1)
    assert (next(answers), counted) == (("b", None), [2]), "the next answer must not be fetched early"
    assert list(answers) == [("c", None), ("a", None)]
    assert (min(transport.take_traffic()) > 0, transport.take_traffic()) == (True, (0, 0))
    grid.get_node_ids.assert_not_called()
