"""Invitations before a run begins: the site's answers, which charge nothing."""

import json
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.federation.protocol import Invitation, Signed
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.release import Offer, Reason
from fedtune.spec import ConfigError
from fedtune.version import build

from ..builders import MadeSite
from ..privacy.builders import lead_key, stranger_key
from .conftest import NONCE, read_reason


def test_site_without_objections_offers_the_whole_plan(site: Any) -> None:
    reply = site.invite()
    plan = site.propose().plan
    offered = {"max_rounds": plan.num_rounds, "min_noise": plan.noise_multiplier}
    assert reply.body == Offer(site="a", run="r", nonce=NONCE, software=build(), **offered)
    assert reply.is_signed()
    assert reply.receipt.charged_rounds == 0
    assert site.kinds() == [], "nothing may be charged, reserved or recorded"
    assert site.trained == []
    assert site.prepared == ["r"], "the machine must be checked for the run"


@pytest.mark.parametrize(
    ("policy", "changes", "fields", "rule"),
    [
        ({}, {"noise_multiplier": 0.5}, {}, Reason.MIN_NOISE_MULTIPLIER),
        ({}, {"rank": 64}, {}, Reason.MAX_RANK),
        ({}, {}, {"site": "b"}, Reason.WRONG_SITE),
        ({}, {}, {"expires": 1.0}, Reason.REQUEST_EXPIRED),
        ({"budget": {"max_epsilon": 0.4}}, {}, {}, Reason.MAX_EPSILON),
        ({"approval": "manual"}, {}, {}, Reason.AWAITING_APPROVAL),
        ({}, {"num_sites": 99}, {"software": "0.3.0+7c1f"}, Reason.PLAN_CHANGED),
    ],
    ids=str,
)
def test_invitation_is_refused_for_the_same_reasons_as_a_round(
    station: Any, policy: Any, changes: Any, fields: Any, rule: Reason
) -> None:
    site = station(**policy)
    reply = site.invite(fields=fields, **changes)
    assert read_reason(reply) is rule
    if "software" in fields:
        assert "(fedtune 0.3.0+7c1f)" in reply.body.requested
        assert f"(fedtune {build()})" in reply.body.allowed
    assert reply.is_signed()
    assert site.kinds() == [Kind.REFUSAL]
    assert (len(site.submitted) == 1) is (rule is Reason.AWAITING_APPROVAL)
    site.paused = True
    assert read_reason(site.invite()) is Reason.PAUSED


def test_unknown_lead_receives_no_receipt(site: Any) -> None:
    for reply in (site.invite(key=stranger_key, lead=stranger_key.public), site.invite(key=stranger_key)):
        assert read_reason(reply).is_from_stranger
        assert reply.receipt is None


def test_site_with_insufficient_budget_offers_a_smaller_plan_on_request(station: Any) -> None:
    site = station(budget={"max_epsilon": 0.4})
    assert read_reason(site.invite()) is Reason.MAX_EPSILON
    reply = site.invite(fields={"less": True})
    plan = site.propose().plan
    assert reply.is_signed()
    assert reply.body.max_rounds < plan.num_rounds
    assert reply.body.min_noise > plan.noise_multiplier
    assert reply.body.nonce == NONCE
    assert site.kinds() == [Kind.REFUSAL, Kind.RELEASE]


def test_failure_during_preparation_is_a_site_error_without_charge(site: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(MadeSite, "prepare", Mock(side_effect=MemoryError("patient Zoe Quartz")))
    reply = site.invite()
    assert read_reason(reply) is Reason.SITE_ERROR
    assert "Quartz" not in json.dumps([str(reply.body), str(reply.receipt)])
    assert site.kinds() == []


def test_invitations_and_round_requests_are_not_interchangeable(site: Any) -> None:
    invitation = Invitation(proposal=site.propose(), site="a", expires=1e12, nonce=NONCE)
    assert Invitation.from_signed(invitation.sign_with(lead_key)) == invitation
    for change in ({"less": 1}, {"site": "../b"}, {"expires": float("nan")}, {"nonce": "x"}, {"more": 1}):
        text = json.dumps(json.loads(invitation.sign_with(lead_key).text) | change)
        with pytest.raises(ConfigError, match="invitation"):
            Invitation.from_signed(Signed(text=text, signature=lead_key.sign(Invitation.purpose, text.encode())))
    with pytest.raises(ConfigError):
        Invitation.from_signed(site.request().sign_with(lead_key))
    assert read_reason(site.send(invitation.sign_with(lead_key))) is Reason.MALFORMED_REQUEST
    assert replace(invitation, expires=1.0).digest() == invitation.digest()
