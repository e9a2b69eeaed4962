"""A site's ClientApp: whatever comes in, what goes out is a release and never an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedtune.federation.protocol import RoundRequest
from fedtune.federation.site import Site
from fedtune.flower import records
from fedtune.flower.client import make_client_app
from fedtune.flower.grid import InProcessGrid
from fedtune.model import Adapter
from fedtune.privacy.ledger import JournalLedger
from fedtune.privacy.plan import Plan
from fedtune.privacy.release import Reason, Refusal, Update


class Asked:
    """Sends one message to one site and returns the answer."""

    def __init__(self, site_of: Callable[[Context], Site]) -> None:
        self.replies: list[int] = []
        app = make_client_app(site_of, lambda context: "a")
        self._grid = InProcessGrid(app, 1, replied=self.replies.append)

    def __call__(self, content: RecordDict, kind: str = "train") -> Message:
        (answer,) = self._grid.send_and_receive([Message(content, 1, kind)])
        return answer


@pytest.fixture
def site(plan: Plan) -> Callable[[Any], Site]:
    """A site that trains by the given function."""
    return lambda train: Site(name="a", run="r", plan=plan, ledger=JournalLedger("a"), train=train)


@pytest.fixture
def content(adapter: Adapter, plan: Plan) -> RecordDict:
    request = RoundRequest(run="r", round=1, site="a", adapter_digest=adapter.digest(), plan=plan)
    return records.from_request(request, records.to_arrays(adapter.tensors))


def test_it_gives_its_public_name(site: Callable[[Any], Site]) -> None:
    asked = Asked(lambda context: site(None))
    answer = asked(RecordDict(), "query")
    assert answer.content.config_records[records.SITE]["name"] == "a"
    assert asked.replies == [], "an introduction is no progress of a round"


def test_it_answers_a_round(site: Callable[[Any], Site], content: RecordDict, adapter: Adapter) -> None:
    asked = Asked(lambda context: site(lambda request, adapter, attempt: adapter))
    reply = records.to_reply(asked(content).content)
    assert isinstance(reply.body, Update)
    np.testing.assert_array_equal(reply.body.tensors["head"], adapter.tensors["head"])
    assert asked.replies == [1]


def fails(*args: object) -> Any:
    raise OSError("canary-23: /data/patients.csv")


@pytest.mark.parametrize("where", ["opening the site", "training"])
def test_a_failure_is_a_reason_without_text(
    site: Callable[[Any], Site], content: RecordDict, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Asked(fails if where == "opening the site" else lambda context: site(fails))
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
        RecordDict({records.REQUEST: ConfigRecord({"json": "__import__('os')"})}),
        RecordDict(
            {records.REQUEST: ConfigRecord({"json": "{}"}), records.ARRAYS: ArrayRecord([np.ones(2, np.float32)])}
        ),
    ],
    ids=["empty", "no arrays", "no request"],
)
def test_a_malformed_request_is_refused_before_the_site_is_opened(content: RecordDict) -> None:
    reply = records.to_reply(Asked(fails)(content).content)
    assert isinstance(reply.body, Refusal)
    assert reply.body.reason is Reason.MALFORMED_REQUEST
    assert reply.receipt is None


def test_ctrl_c_is_not_swallowed(site: Callable[[Any], Site], content: RecordDict) -> None:
    def interrupted(*args: object) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Asked(lambda context: site(interrupted))(content)
