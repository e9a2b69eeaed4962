"""What a site answers, and what it must have written before it reads a record."""

import logging
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

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


def interrupted(*args: object) -> Trained:
    raise KeyboardInterrupt


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
        site.ask(train=interrupted)
    reply = site.ask()
    assert isinstance(reply.body, Update)
    assert site.trained == [(1, 2)]
    assert reply.receipt.charged_rounds == 2


def test_no_text_of_a_failure_leaves(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*args: object) -> Trained:
        raise RuntimeError("canary-17 in row 3")

    with caplog.at_level(logging.ERROR, "fedtune"):
        reply = site.ask(train=fails)
    assert reason(reply) is Reason.SITE_ERROR
    assert "canary" not in repr(reply)
    assert "canary-17 in row 3" in caplog.text
    assert (reply.body.asked, reply.body.allowed) == (None, None)
    assert reply.receipt.charged_rounds == 1, "what failed had begun, and was charged"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked ledger is given up soon."""
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.05)


@pytest.fixture
def reader(site: Any) -> Iterator[Callable[[], None]]:
    """Begins to read the ledger and does not end, as a backup that hangs: nobody can commit meanwhile."""
    open_files: list[sqlite3.Connection] = []

    def begin() -> None:
        file = sqlite3.connect(site.path, isolation_level=None)
        file.execute("BEGIN")
        file.execute("SELECT count(*) FROM events").fetchone()
        open_files.append(file)

    yield begin
    for file in open_files:
        file.close()


@pytest.mark.usefixtures("impatient")
def test_a_reply_that_cannot_be_stored_is_not_sent_and_its_charge_is_not_denied(
    site: Any, reader: Any, adapter: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    def blocked(*args: object) -> Trained:
        reader()
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


class Clock:
    """Time that passes only while somebody sleeps, or trains."""

    def __init__(self) -> None:
        self.now = 17.25
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0, "time.sleep raises ValueError otherwise"
        self.sleeps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(site_module, "time", clock)
    return clock


@pytest.mark.parametrize(("training_s", "reply_s"), [(0.0, 0.0), (0.1, 60.0), (59.9, 60.0), (60.5, 120.0), (600, 600)])
@pytest.mark.parametrize("error", [None, RuntimeError(), Refused(Reason.PLAN_EXHAUSTED)], ids=repr)
def test_an_answer_leaves_at_a_whole_multiple(
    station: Any, clock: Clock, adapter: Adapter, error: Exception | None, training_s: float, reply_s: float
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


def test_strangers_are_not_kept_waiting(station: Any, clock: Clock) -> None:
    # Nothing that they are told depends on a record, and each would hold a worker.
    site = station(releases={"reply_after_s": 60.0})
    assert reason(site.ask(key=stranger_key, lead=stranger_key.public)) is Reason.LEADS
    assert reason(site.ask(key=stranger_key)) is Reason.WRONG_SIGNATURE
    assert clock.sleeps == []


def test_a_reply_is_never_due_before_it_is_there(clock: Clock) -> None:
    # Dividing by 0.1 and multiplying again may round to a little less than what has passed.
    for number in range(1, 2000):
        clock.now = 0.0
        with site_module._held_to_a_schedule(0.1):
            clock.now = float(np.nextafter(number * 0.1, np.inf))
