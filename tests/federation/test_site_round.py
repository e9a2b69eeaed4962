"""A site's answers, its writes before any record is read, and the adapter stored at the end of a run."""

import contextlib
import logging
import sqlite3
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import fedtune.federation.site_round as site_module
from fedtune.federation.lead import LeadState, compute_site_charge
from fedtune.federation.protocol import EndOfRun
from fedtune.federation.site_round import TrainingResult, end_run
from fedtune.model.adapter import Adapter
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.release import Reason, Refused, Update

from ..builders import set_methods
from ..conftest import run_plan
from ..privacy.builders import lead_key, read_refusal_reason, stranger_key
from .conftest import read_reason


def test_charge_is_stored_before_training_and_reply_before_sending(site: Any, adapter: Adapter) -> None:
    reply = site.ask()
    assert isinstance(reply.body, Update)
    assert (reply.body.site, reply.body.run, reply.body.round) == ("a", "r", 1)
    for name, value in adapter.tensors.items():
        np.testing.assert_array_equal(reply.body.tensors[name], value + 1)
    assert site.before_training == [[Kind.PLAN, Kind.RESERVE]]
    assert site.kinds() == [Kind.PLAN, Kind.RESERVE, Kind.COMMIT]
    assert site.events()[-1].detail["fingerprint"] == "hmac of the records"
    receipt = reply.receipt
    assert (receipt.site, receipt.run, receipt.charged_rounds) == ("a", "r", 1)
    assert receipt.has_valid_signature()
    assert receipt.site_key == site.key.public


def test_interrupted_round_is_retried_with_a_new_charge(site: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        site.ask(train=Mock(side_effect=KeyboardInterrupt))
    reply = site.ask()
    assert isinstance(reply.body, Update)
    assert site.trained == [(1, 2)]
    assert reply.receipt.charged_rounds == 2


def test_exception_text_does_not_leave_the_site(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "fedtune"):
        reply = site.ask(train=Mock(side_effect=RuntimeError("canary-17 in row 3")))
    assert read_reason(reply) is Reason.SITE_ERROR
    assert "canary" not in repr(reply)
    assert "canary-17 in row 3" in caplog.text
    assert (reply.body.requested, reply.body.allowed) == (None, None)
    assert reply.receipt.charged_rounds == 1, "the failed training must stay charged"


def test_unstored_update_is_not_sent_but_stays_charged(
    site: Any, adapter: Adapter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.05)
    site.ledger()
    with contextlib.closing(sqlite3.connect(site.path, isolation_level=None)) as file:

        def block_store(*args: object) -> TrainingResult:
            # Starts to read the ledger and never finishes, like a hanging backup: meanwhile nobody can commit.
            file.execute("BEGIN")
            file.execute("SELECT count(*) FROM events").fetchone()
            return TrainingResult(adapter=adapter)

        reply = site.ask(train=block_store)
    assert read_reason(reply) is Reason.SITE_ERROR
    assert site.kinds() == [Kind.PLAN, Kind.RESERVE]
    # A receipt without the charge would be false; without a receipt the lead counts the round.
    assert reply.receipt is None
    state = LeadState(round=0, adapter=adapter).with_requests_to(["a"])
    assert state.with_receipt("a", reply.receipt, run="r", plan=run_plan()) is None
    assert compute_site_charge(state, "a", run_plan()).steps == run_plan().local_steps
    assert "database is locked" in caplog.text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that advances only during sleeps and training."""
    clock = SimpleNamespace(now=17.25, sleeps=[])

    def sleep(seconds: float) -> None:
        assert seconds >= 0, "time.sleep would raise ValueError"
        clock.sleeps.append(seconds)
        clock.now += seconds

    clock.monotonic, clock.time, clock.sleep = lambda: clock.now, lambda: clock.now, sleep
    monkeypatch.setattr(site_module, "time", clock)
    return clock


@pytest.mark.parametrize(("training_s", "reply_s"), [(0.0, 0.0), (0.1, 60.0), (59.9, 60.0), (60.5, 120.0), (600, 600)])
@pytest.mark.parametrize("error", [None, RuntimeError(), Refused(Reason.PLAN_EXHAUSTED)], ids=repr)
def test_reply_time_is_rounded_up_to_the_interval(
    station: Any, clock: Any, adapter: Adapter, error: Exception | None, training_s: float, reply_s: float
) -> None:
    def train(*args: object) -> TrainingResult:
        clock.now += training_s
        if error:
            raise error
        return TrainingResult(adapter=adapter)

    start, reply = clock.now, station(releases={"reply_after_s": 60.0}).ask(train=train)
    assert clock.now - start == pytest.approx(reply_s)
    if error:
        assert read_reason(reply) is getattr(error, "reason", Reason.SITE_ERROR)
    else:
        assert isinstance(reply.body, Update)


def test_unknown_leads_are_answered_without_delay(station: Any, clock: Any) -> None:
    # Such an answer does not depend on a record, and waiting would occupy a worker.
    site = station(releases={"reply_after_s": 60.0})
    assert read_reason(site.ask(key=stranger_key, lead=stranger_key.public)) is Reason.LEADS
    assert read_reason(site.ask(key=stranger_key)) is Reason.WRONG_SIGNATURE
    assert clock.sleeps == []


def test_scheduled_reply_time_is_never_in_the_past(clock: Any) -> None:
    # Dividing by 0.1 and multiplying again may round to slightly less than the elapsed time.
    for number in range(1, 2000):
        clock.now = 0.0
        with site_module._pad_duration(0.1):
            clock.now = float(np.nextafter(number * 0.1, np.inf))


@pytest.fixture
def final(adapter: Adapter) -> Adapter:
    return Adapter({name: value * 3 for name, value in adapter.tensors.items()})


def list_end_notes(site: Any) -> list[dict[str, Any]]:
    return [dict(event.detail) for event in site.events() if event.detail.get("what") == "run_ended"]


def test_final_adapter_is_kept_and_its_digest_recorded(site: Any, final: Adapter) -> None:
    site.ask()
    receipt = site.end(adapter=final, digest=final.digest())
    assert site.stored == [("r", final.digest())]
    assert list_end_notes(site) == [{"what": "run_ended", "adapter_sha256": final.digest()}]
    assert (receipt.run, receipt.charged_rounds, receipt.reply) == ("r", 1, final.digest())
    assert receipt.has_valid_signature()
    assert receipt.site_key == site.key.public
    assert receipt.sequence == len(site.events()), "the receipt must cover the recorded end"


def test_receipts_state_their_plan_and_whether_the_run_ended(site: Any) -> None:
    plan = site.propose().plan.digest()
    states = [(r.ended, r.plan, r.simulated, r.seeded_noise) for r in (site.ask().receipt, site.end())]
    assert states == [(False, plan, False, False), (True, plan, False, False)]


def test_refused_run_cannot_start_after_its_lead_ended_it(station: Any) -> None:
    site = station(approval="manual")
    assert site.end() is None, "a site without the run must not sign its end"
    assert read_reason(site.ask()) is Reason.AWAITING_APPROVAL
    receipt = site.end()
    assert (receipt.charged_rounds, receipt.ended, receipt.plan) == (0, True, "")
    assert receipt.has_valid_signature()
    site.ledger().approve(site.propose())
    assert read_reason(site.ask()) is Reason.RUN_ENDED, "the receipt stated that nothing is charged"
    repeated = site.end()
    assert (repeated.ended, repeated.charged_rounds) == (True, 0)
    assert len(list_end_notes(site)) == 1


def test_lead_cannot_end_an_equally_named_run_of_another_lead(station: Any) -> None:
    site = station(allow={"leads": (stranger_key.public, lead_key.public)})
    assert read_reason(site.ask(key=stranger_key, lead=stranger_key.public, rank=64)) is Reason.MAX_RANK
    assert site.end() is None, "this lead has no run here"
    assert site.end(key=stranger_key).ended
    assert read_reason(site.ask(key=stranger_key, lead=stranger_key.public)) is Reason.RUN_ENDED
    reply = site.ask()
    assert isinstance(reply.body, Update)
    assert (reply.receipt.charged_rounds, reply.receipt.ended) == (1, False)
    assert read_refusal_reason(site.end, key=stranger_key) is Reason.LEADS


@pytest.mark.parametrize("declines", [True, False], ids=["declined", "not sent"])
def test_end_of_run_is_recorded_without_an_adapter(station: Any, final: Adapter, declines: bool) -> None:
    site = station(final_adapter="decline") if declines else station()
    site.ask()
    digest = final.digest() if declines else ""
    assert site.end(adapter=final if declines else None, digest=digest).charged_rounds == 1
    assert list_end_notes(site) == [{"what": "run_ended", "adapter_sha256": digest}]
    assert site.stored == []


@pytest.mark.parametrize("fault", ["no adapter", "names", "shapes", "values", "digest"])
def test_invalid_final_adapter_ends_the_run_unsigned(site: Any, final: Adapter, fault: str) -> None:
    site.ask()
    changed = {
        "names": {f"x.{name}": value for name, value in final.tensors.items()},
        "shapes": {name: np.repeat(value, 2) for name, value in final.tensors.items()},
        "values": {name: value * np.float32("nan") for name, value in final.tensors.items()},
    }
    adapter = Adapter(changed.get(fault, final.tensors))
    receipt = site.end(
        adapter=None if fault == "no adapter" else adapter, digest="00" * 32 if fault == "digest" else adapter.digest()
    )
    assert (receipt.ended, receipt.reply) == (True, "")
    assert list_end_notes(site) == [{"what": "run_ended", "adapter_sha256": ""}]
    assert site.ledger().history.runs["r"].expires is None, "the reserve must be released"
    assert site.stored == []


def test_second_end_notice_is_ignored(site: Any, final: Adapter) -> None:
    # The lead may not have received the first answer. The ledger does not have the digest of another adapter.
    site.ask()
    first = site.end(adapter=final, digest=final.digest())
    before = site.events()
    assert site.end(adapter=final, digest=final.digest()) == first
    other = Adapter({name: value + 1 for name, value in final.tensors.items()})
    assert site.end(adapter=other, digest=other.digest()) == first, "the site must sign the adapter in its ledger"
    assert site.events() == before
    assert set(site.stored) == {("r", final.digest())}


def test_unauthorized_lead_cannot_end_a_run_or_deliver_an_adapter(station: Any, final: Adapter) -> None:
    site = station(allow={"leads": (lead_key.public, stranger_key.public)})
    site.ask()
    narrowed = replace(site.policy, allow=replace(site.policy.allow, leads=(stranger_key.public,)))
    for key, policy in ((stranger_key, site.policy), (lead_key, narrowed)):
        site.policy = policy
        assert read_refusal_reason(site.end, key=key, adapter=final, digest=final.digest()) is Reason.LEADS
    forged = EndOfRun(run="r", lead=lead_key.public).sign_with(stranger_key)
    assert read_refusal_reason(end_run, site.open(), forged, final) is Reason.WRONG_SIGNATURE
    assert site.stored == list_end_notes(site) == []


def test_adapter_storage_failure_allows_a_retry(site: Any, final: Adapter) -> None:
    store_adapter = Mock(side_effect=OSError("no space left on device"))
    site.ask()
    notice = EndOfRun(run="r", lead=site.lead.public, adapter_digest=final.digest()).sign_with(site.lead)
    with pytest.raises(OSError, match="no space left"):
        end_run(set_methods(site.open(), store_adapter=store_adapter), notice, final)
    assert site.ledger().history.runs["r"].expires is None, "the reserve must be released anyway"
    end_run(site.open(), notice, final)
    assert site.stored == [("r", final.digest())]
