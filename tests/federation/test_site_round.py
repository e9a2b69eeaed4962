"""What a site answers, and what it must have written before it reads a record."""

import contextlib
import logging
import sqlite3
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import fedtune.federation.site_round as site_module
from fedtune.federation.lead import LeadState
from fedtune.federation.site_round import Trained
from fedtune.model.adapter import Adapter
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.release import Reason, Refused, Update
from fedtune.runs.results import site_charge

from ..conftest import run_plan
from ..privacy.builders import stranger_key
from .conftest import reason


def test_the_charge_is_on_disk_before_training_and_the_reply_before_it_leaves(site: Any, adapter: Adapter) -> None:
    reply = site.ask()
    assert isinstance(reply.body, Update)
    assert (reply.body.site, reply.body.run, reply.body.round) == ("a", "r", 1)
    for name, value in adapter.tensors.items():
        np.testing.assert_array_equal(reply.body.tensors[name], value + 1)
    assert site.before_training == [[Kind.PLAN, Kind.RESERVE]]
    assert site.kinds() == [Kind.PLAN, Kind.RESERVE, Kind.COMMIT]
    assert site.events()[-1].detail["fingerprint"] == "hmac of the records"
    receipt = reply.receipt
    assert (receipt.site, receipt.run, receipt.charged_rounds, receipt.charged_steps) == ("a", "r", 1, 2)
    assert receipt.is_signed()
    assert receipt.site_key == site.key.public


def test_an_interrupted_round_is_tried_again_at_a_new_charge(site: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        site.ask(train=Mock(side_effect=KeyboardInterrupt))
    reply = site.ask()
    assert isinstance(reply.body, Update)
    assert site.trained == [(1, 2)]
    assert reply.receipt.charged_rounds == 2


def test_no_text_of_a_failure_leaves(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "fedtune"):
        reply = site.ask(train=Mock(side_effect=RuntimeError("canary-17 in row 3")))
    assert reason(reply) is Reason.SITE_ERROR
    assert "canary" not in repr(reply)
    assert "canary-17 in row 3" in caplog.text
    assert (reply.body.asked, reply.body.allowed) == (None, None)
    assert reply.receipt.charged_rounds == 1, "what failed had begun, and was charged"


def test_what_cannot_be_stored_is_not_sent_and_its_charge_is_not_denied(
    site: Any, adapter: Adapter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.05)
    site.ledger()
    with contextlib.closing(sqlite3.connect(site.path, isolation_level=None)) as file:

        def blocked(*args: object) -> Trained:
            # Begins to read the ledger and does not end, as a backup that hangs: nobody can commit meanwhile.
            file.execute("BEGIN")
            file.execute("SELECT count(*) FROM events").fetchone()
            return Trained(adapter=adapter)

        reply = site.ask(train=blocked)
    assert reason(reply) is Reason.SITE_ERROR
    assert site.kinds() == [Kind.PLAN, Kind.RESERVE]
    # A receipt of nothing charged would be a lie: without one the lead counts the round.
    assert reply.receipt is None
    state = LeadState(round=0, adapter=adapter).asked(["a"])
    assert state.with_receipt("a", reply.receipt, run="r", plan=run_plan()) is None
    assert site_charge(state, "a", run_plan()).steps == run_plan().local_steps
    assert "database is locked" in caplog.text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Time that passes only while somebody sleeps, or trains."""
    clock = SimpleNamespace(now=17.25, sleeps=[])

    def sleep(seconds: float) -> None:
        assert seconds >= 0, "time.sleep raises ValueError otherwise"
        clock.sleeps.append(seconds)
        clock.now += seconds

    clock.monotonic, clock.time, clock.sleep = lambda: clock.now, lambda: clock.now, sleep
    monkeypatch.setattr(site_module, "time", clock)
    return clock


@pytest.mark.parametrize(("training_s", "reply_s"), [(0.0, 0.0), (0.1, 60.0), (59.9, 60.0), (60.5, 120.0), (600, 600)])
@pytest.mark.parametrize("error", [None, RuntimeError(), Refused(Reason.PLAN_EXHAUSTED)], ids=repr)
def test_an_answer_leaves_at_a_whole_multiple(
    station: Any, clock: Any, adapter: Adapter, error: Exception | None, training_s: float, reply_s: float
) -> None:
    def train(*args: object) -> Trained:
        clock.now += training_s
        if error:
            raise error
        return Trained(adapter=adapter)

    began, reply = clock.now, station(releases={"reply_after_s": 60.0}).ask(train=train)
    assert clock.now - began == pytest.approx(reply_s)
    if error:
        assert reason(reply) is getattr(error, "reason", Reason.SITE_ERROR)
    else:
        assert isinstance(reply.body, Update)


def test_strangers_are_not_kept_waiting(station: Any, clock: Any) -> None:
    # Nothing that they are told depends on a record, and each would hold a worker.
    site = station(releases={"reply_after_s": 60.0})
    assert reason(site.ask(key=stranger_key, lead=stranger_key.public)) is Reason.LEADS
    assert reason(site.ask(key=stranger_key)) is Reason.WRONG_SIGNATURE
    assert clock.sleeps == []


def test_a_reply_is_never_due_before_it_is_there(clock: Any) -> None:
    # Dividing by 0.1 and multiplying again may round to a little less than what has passed.
    for number in range(1, 2000):
        clock.now = 0.0
        with site_module._held_to_a_schedule(0.1):
            clock.now = float(np.nextafter(number * 0.1, np.inf))
