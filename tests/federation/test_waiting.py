"""Checks before anything is loaded: the sender, pause, policy, budget and approval."""

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.federation.site_round import TrainingResult, answer
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.release import Reason, Refused, Update

from ..builders import MadeSite
from ..privacy.builders import stranger_key
from .conftest import read_reason


@pytest.fixture
def manual_site(station: Any) -> Any:
    """A site with manual approval of runs."""
    return station(approval="manual")


def test_paused_site_refuses_without_charge(station: Any) -> None:
    site = station(approval="manual", budget={"max_epsilon": 0.4})
    site.paused = True
    reply = site.ask(rank=64)
    assert read_reason(reply) is Reason.PAUSED, "a paused site must not check the proposal"
    assert (reply.body.requested, reply.body.allowed) == (None, None)
    assert site.prepared == site.trained == []
    assert site.kinds() == [Kind.REFUSAL]
    assert reply.receipt.charged_rounds == 0
    assert read_reason(site.ask(key=stranger_key, lead=stranger_key.public)) is Reason.LEADS, "the pause must be hidden"


def test_run_continues_unchanged_after_a_pause(site: Any) -> None:
    assert isinstance(site.ask(1).body, Update)
    site.paused = True
    signed = site.request(2).sign_with(site.lead)
    for _ in range(3):
        assert read_reason(site.send(signed)) is Reason.PAUSED
    site.paused = False
    reply = site.send(signed)
    assert isinstance(reply.body, Update)
    assert reply.receipt.charged_rounds == 2
    assert site.trained == [(1, 1), (2, 1)], "a pause must not count as an interrupted round"
    assert site.kinds().count(Kind.REFUSAL) == 1
    # A paused site still receives the end of a run.
    site.paused = True
    assert site.end().charged_rounds == 2
    assert site.ledger().history.runs["r"].expires is None


def test_repeated_request_is_answered_after_approval(manual_site: Any) -> None:
    signed = manual_site.request().sign_with(manual_site.lead)
    replies = [manual_site.send(signed) for _ in range(3)]
    assert [read_reason(reply) for reply in replies] == [Reason.AWAITING_APPROVAL] * 3
    assert replies[-1].receipt.charged_rounds == 0
    assert manual_site.kinds() == [Kind.REFUSAL], "three refusals must be recorded once"
    manual_site.ledger().approve(manual_site.request().proposal)
    reply = manual_site.send(signed)
    assert isinstance(reply.body, Update)
    assert manual_site.trained == [(1, 1)]
    assert manual_site.kinds() == [Kind.REFUSAL, Kind.NOTE, Kind.PLAN, Kind.RESERVE, Kind.COMMIT]
    repeated = manual_site.send(signed)
    assert repeated.body.to_bytes() == reply.body.to_bytes(), "the stored reply must be resent without a charge"
    assert isinstance(manual_site.ask(2).body, Update), "later rounds must not need another approval"


def test_only_acceptable_proposals_are_submitted_for_approval(manual_site: Any) -> None:
    assert read_reason(manual_site.ask()) is Reason.AWAITING_APPROVAL
    assert manual_site.submitted == [manual_site.request().proposal]
    assert read_reason(manual_site.ask(rank=64)) is Reason.MAX_RANK
    manual_site.paused = True
    manual_site.ask()
    assert len(manual_site.submitted) == 1, "a run that is refused anyway must not be submitted"
    manual_site.paused = False
    manual_site.ledger().approve(manual_site.request().proposal)
    assert isinstance(manual_site.ask().body, Update)
    assert len(manual_site.submitted) == 1


def test_denied_run_is_refused_and_the_reason_stays_at_the_site(manual_site: Any) -> None:
    manual_site.ask()
    proposal = manual_site.request().proposal
    manual_site.ledger().deny(proposal, "the ethics board said no")
    for _ in range(2):
        reply = manual_site.ask()
        assert read_reason(reply) is Reason.DENIED
        assert (reply.body.requested, reply.body.allowed, reply.receipt.charged_rounds) == (None, None, 0)
        assert b"ethics" not in reply.body.to_bytes()
    assert Reason.DENIED.is_final, "a denied lead must stop asking"
    assert len(manual_site.submitted) == 1, "a denied run must not be submitted again"
    # A later approval, or a policy without manual approval, does not revoke the denial.
    manual_site.ledger().approve(proposal)
    assert read_reason(manual_site.ask()) is Reason.DENIED
    manual_site.policy = replace(manual_site.policy, approval="automatic")
    assert read_reason(manual_site.ask()) is Reason.DENIED
    assert manual_site.prepared == manual_site.trained == []


@pytest.fixture
def check_settings(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Count how often the site reads a run's settings."""
    monkeypatch.setattr(MadeSite, "check_settings", mock := Mock())
    return mock


def test_invalid_settings_are_refused_before_approval(manual_site: Any, check_settings: Mock) -> None:
    check_settings.side_effect = Refused(Reason.SETTINGS)
    assert read_reason(manual_site.ask()) is Reason.SETTINGS
    assert [call.args[0].run for call in check_settings.call_args_list] == ["r"]
    assert manual_site.submitted == manual_site.prepared == []
    manual_site.ledger().approve(manual_site.request().proposal)
    assert read_reason(manual_site.ask()) is Reason.SETTINGS


def test_settings_are_not_read_for_refused_requests(site: Any, check_settings: Mock) -> None:
    site.ask(rank=64)
    site.ask(key=stranger_key, lead=stranger_key.public)
    site.ask(fields={"expires": 1.0})
    site.paused = True
    site.ask()
    check_settings.assert_not_called()
    site.paused = False
    assert isinstance(site.ask().body, Update)
    check_settings.assert_called_once()


def test_preparation_refusals_are_reported_and_errors_hidden(site: Any, monkeypatch: Any) -> None:
    for error, rule in (
        (Refused(Reason.WRONG_RUN, requested="r", allowed="s"), Reason.WRONG_RUN),
        (OSError("canary: /data/patients.csv"), Reason.SITE_ERROR),
    ):
        monkeypatch.setattr(MadeSite, "prepare", Mock(side_effect=error))
        reply = site.ask()
        assert read_reason(reply) is rule
        assert "canary" not in repr(reply)
        assert reply.receipt.charged_rounds == 0


def test_denial_applies_to_one_plan_only(manual_site: Any) -> None:
    manual_site.ledger().deny(manual_site.request().proposal, "too many rounds")
    assert read_reason(manual_site.ask(num_rounds=2)) is Reason.AWAITING_APPROVAL


def test_denied_run_in_progress_is_charged_no_further_rounds(site: Any) -> None:
    proposal, other = site.request().proposal, replace(site.request().proposal, run="other")
    first = site.request(1).sign_with(site.lead)
    assert isinstance(site.send(first).body, Update)
    site.ledger().reserve(other, round=1, request="0" * 64)
    site.ledger().deny(proposal, "the board asks to stop", by="Anna Weber", ticket="DPO-7")
    for signed in (first, site.request(2).sign_with(site.lead)):  # also the reply stored in the ledger
        reply = site.send(signed)
        assert read_reason(reply) is Reason.DENIED
        assert reply.receipt.charged_rounds == 1
        assert b"board" not in reply.body.to_bytes()
    history = site.ledger().history
    assert not history.runs["r"].count_remaining_charges(history.clock), "the reserve of its plan must be released"
    ((decision,),) = history.decided.values()
    assert (decision["what"], decision["by"], decision["ticket"]) == ("denied", "Anna Weber", "DPO-7")
    assert site.end().charged_rounds == 1, "the lead must still get its receipt"
    assert history.runs["other"].is_open(history.clock), "other runs must stay open"
    site.ledger().reserve(other, round=2, request="1" * 64)
    site.ledger().deny(replace(other, lead=stranger_key.public), "another lead's run of this name")
    assert site.ledger().history.runs["other"].is_open(history.clock)


def test_run_denied_during_training_sends_nothing(site: Any) -> None:
    def train(*args: Any) -> TrainingResult:
        site.ledger().deny(site.request().proposal, "stop")
        return TrainingResult(adapter=site.template)

    reply = answer(site.open(train), site.request().sign_with(site.lead), site.template)
    assert read_reason(reply) is Reason.DENIED
    assert reply.receipt.charged_rounds == 1
    assert site.kinds().count(Kind.COMMIT) == 0
