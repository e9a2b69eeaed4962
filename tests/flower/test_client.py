"""A site's ClientApp: whatever comes in, what goes out is a release and never an exception."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedtune.federation.protocol import EndOfRun, RoundRequest
from fedtune.federation.site import Prepared, Site, Trained
from fedtune.flower import records
from fedtune.flower.client import make_client_app
from fedtune.flower.grid import InProcessGrid
from fedtune.model import Adapter
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.decisions import Ledger
from fedtune.privacy.policy import Policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refusal, Update


class Asked:
    """Sends one message to one site and returns the answer."""

    def __init__(self, site_of: Callable[[Context, str], Site]) -> None:
        self.replies: list[int] = []
        app = make_client_app(site_of, lambda context: "a")
        self._grid = InProcessGrid(app, 1, replied=self.replies.append)

    def __call__(self, content: RecordDict, kind: str = "train") -> Message:
        (answer,) = self._grid.send_and_receive([Message(content, 1, kind)])
        return answer


@pytest.fixture
def site(
    tmp_path: Path, adapter: Adapter, site_policy: Callable[..., Policy], run_proposal: Callable[..., Proposal]
) -> Callable[[Any], Site]:
    """A site that trains by the given function."""

    def make(train: Any) -> Site:
        key = SigningKey.load_or_make(tmp_path / "site_key.pem")
        ledger = Ledger(tmp_path / "ledger.db", site_policy("a"), key)
        prepared = Prepared(proposal=run_proposal(), template=adapter, declared_size=100, train=train)
        return Site(name="a", ledger=ledger, prepare=lambda request: prepared)

    return make


@pytest.fixture
def content(adapter: Adapter, run_proposal: Callable[..., Proposal], lead_key: SigningKey) -> RecordDict:
    request = RoundRequest(
        proposal=run_proposal(), round=1, site="a", adapter_digest=adapter.digest(), receipt=None, expires=1e12
    )
    return records.from_signed(request.signed(lead_key), adapter=records.from_adapter(adapter))


def unchanged(request: RoundRequest, adapter: Adapter, attempt: int) -> Trained:
    return Trained(adapter=adapter)


def test_it_gives_its_public_name(site: Callable[[Any], Site]) -> None:
    asked = Asked(lambda context, settings: site(None))
    answer = asked(RecordDict(), "query")
    assert answer.content.config_records[records.SITE]["name"] == "a"
    assert asked.replies == [], "an introduction is no progress of a round"


def test_it_answers_a_round(site: Callable[[Any], Site], content: RecordDict, adapter: Adapter) -> None:
    asked = Asked(lambda context, settings: site(unchanged))
    reply = records.to_reply(asked(content).content)
    assert isinstance(reply.body, Update)
    np.testing.assert_array_equal(reply.body.tensors["head"], adapter.tensors["head"])
    assert asked.replies == [1]


def fails(*args: object) -> Any:
    raise OSError("canary-23: /data/patients.csv")


class Panic(BaseException):
    """As a library written in Rust raises it."""


def panics(*args: object) -> Any:
    raise Panic("canary-23: /data/patients.csv")


@pytest.mark.parametrize("fails", [fails, panics])
@pytest.mark.parametrize("where", ["opening the site", "training"])
def test_a_failure_is_a_reason_without_text(
    site: Callable[[Any], Site],
    content: RecordDict,
    where: str,
    fails: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = Asked(fails if where == "opening the site" else lambda context, settings: site(fails))
    answer = asked(content)
    assert not answer.has_error()
    reply = records.to_reply(answer.content)
    assert isinstance(reply.body, Refusal)
    assert reply.body.reason is Reason.SITE_ERROR
    assert "canary" not in repr((answer.metadata, answer.content))
    assert "canary-23" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({records.REQUEST: ConfigRecord({"json": "__import__('os')", "signature": "00"})}),
        RecordDict({records.ADAPTER: ArrayRecord([np.ones(2, np.float32)])}),
        RecordDict(
            {records.REQUEST: ConfigRecord({"json": "{}"}), records.ADAPTER: ArrayRecord([np.ones(2, np.float32)])}
        ),
    ],
    ids=["empty", "no arrays", "no request", "no signature"],
)
def test_a_malformed_request_is_refused_before_the_site_is_opened(content: RecordDict) -> None:
    reply = records.to_reply(Asked(fails)(content).content)
    assert isinstance(reply.body, Refusal)
    assert reply.body.reason is Reason.MALFORMED_REQUEST
    assert reply.receipt is None


def test_a_request_of_no_words_is_refused(site: Callable[[Any], Site]) -> None:
    words = ConfigRecord({"json": "{}", "signature": "00"})
    adapter = records.from_adapter(Adapter({"head": np.ones(4, np.float32)}))
    request = RecordDict({records.REQUEST: words, records.ADAPTER: adapter})
    reply = records.to_reply(Asked(lambda context, settings: site(unchanged))(request).content)
    assert isinstance(reply.body, Refusal)
    assert reply.body.reason is Reason.MALFORMED_REQUEST


def test_the_end_of_a_run_is_noted_and_answered_with_a_receipt_for_its_lead_alone(
    site: Callable[[Any], Site], content: RecordDict, lead_key: SigningKey, stranger_key: SigningKey
) -> None:
    asked = Asked(lambda context, settings: site(unchanged))
    asked(content)
    assert asked.replies == [1]
    for key, ended in ((stranger_key, False), (lead_key, True)):
        notice = EndOfRun(run="r", lead=key.public).signed(key)
        answer = asked(records.from_signed(notice), f"query.{records.END}")
        assert not answer.has_error()
        receipt = records.to_receipt(answer.content)
        assert receipt == (site(None).ledger.receipt("r") if ended else None)
        assert (site(None).ledger.history.runs["r"].expires is None) == ended


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({records.REQUEST: ConfigRecord({"json": "{"})})])
def test_a_notice_that_is_none_is_answered_like_any_other(
    site: Callable[[Any], Site], content: RecordDict, caplog: pytest.LogCaptureFixture
) -> None:
    answer = Asked(lambda context, settings: site(unchanged))(content, f"query.{records.END}")
    assert not answer.has_error()
    assert answer.content == records.from_receipt(None)
    assert "could not end a run" in caplog.text


def test_ctrl_c_is_not_swallowed(site: Callable[[Any], Site], content: RecordDict) -> None:
    def interrupted(*args: object) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Asked(lambda context, settings: site(interrupted))(content)
