import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedtune.federation.protocol import EndOfRun, Invitation, RoundRequest, Signed
from fedtune.privacy.distributed_noise import SecureAggregationSpec
from fedtune.privacy.release import Reason, Refused
from fedtune.spec import WIRE_SCHEMA, ConfigError
from fedtune.version import build

from ..builders import round_request
from ..conftest import run_proposal
from ..privacy.builders import lead_key, read_refusal_reason, stranger_key
from .conftest import make_receipt


@pytest.fixture
def request_() -> RoundRequest:
    return round_request(run_proposal(), round=2, receipt=make_receipt(), expires=1e9)


def test_signed_round_request_round_trips(request_: RoundRequest) -> None:
    assert RoundRequest.from_signed(request_.sign_with(lead_key)) == request_
    first = replace(request_, receipt=None)
    assert RoundRequest.from_signed(first.sign_with(lead_key)) == first
    assert request_.run == "r"


def test_request_digest_covers_every_requested_field(request_: RoundRequest) -> None:
    proposals = [{"proposal": run_proposal(**change)} for change in ({"run": "s"}, {"max_grad_norm": 2.0})]
    changes = [*proposals, {"round": 3}, {"site": "b"}, {"adapter_digest": "cd" * 32}]
    digests = {replace(request_, **change).digest() for change in changes}
    assert len(digests | {request_.digest()}) == 6
    assert RoundRequest.from_signed(request_.sign_with(lead_key)).digest() == request_.digest()
    again = replace(request_, receipt=None, expires=2e9, software="0.2.1+7c1f09a4e2b5")
    assert again.digest() == request_.digest(), "a lead must be able to repeat a request"


def test_session_is_required_exactly_for_secure_aggregation(request_: RoundRequest) -> None:
    shared = SecureAggregationSpec(num_sites=3, threshold=3, colluders=0).with_share(
        request_.proposal.plan.noise_multiplier
    )
    plan = replace(request_.proposal.plan, local_steps=1, shared=shared)
    secure = replace(request_, proposal=replace(request_.proposal, plan=plan, num_sites=3), session="ab" * 16)
    assert RoundRequest.from_signed(secure.sign_with(lead_key)) == secure
    other = replace(secure, session="cd" * 16)
    assert RoundRequest.from_signed(other.sign_with(lead_key)).digest() != secure.digest()
    for bad in (replace(request_, session="ab" * 16), replace(secure, session=""), replace(secure, session="x")):
        with pytest.raises(ConfigError, match="must be a lead's round request"):
            RoundRequest.from_signed(bad.sign_with(lead_key))


def resign_request(request: RoundRequest, change: Callable[[dict[str, Any]], str]) -> Signed:
    """Change the text of a request and sign it with the lead's true key."""
    text = change(json.loads(request.sign_with(lead_key).text))
    return Signed(text=text, signature=lead_key.sign(RoundRequest.purpose, text.encode()))


_FAULTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "no json": lambda fields: "round: 1",
    "deeply nested": lambda fields: "[" * 50_000,
    "a book": lambda fields: json.dumps(fields | {"adapter_digest": "x" * 70_000}),
    "a missing field": lambda fields: json.dumps({key: value for key, value in fields.items() if key != "site"}),
    "a further field": lambda fields: json.dumps(fields | {"note": "x"}),
    "round zero": lambda fields: json.dumps(fields | {"round": 0}),
    "a round that no table holds": lambda fields: json.dumps(fields | {"round": 10**30}),
    "a site of two lines": lambda fields: json.dumps(fields | {"site": "a\nanother line of the log"}),
    "no digest": lambda fields: json.dumps(fields | {"adapter_digest": "AB"}),
    "no expiry": lambda fields: json.dumps(fields | {"expires": float("inf")}),
    "an expiry that is no number": lambda fields: json.dumps(fields | {"expires": float("nan")}),
    "a receipt of texts": lambda fields: json.dumps(fields | {"receipt": fields["receipt"] | {"sequence": "3"}}),
    "a version of two lines": lambda fields: json.dumps(fields | {"software": "0.2.0\nanother line"}),
    "no proposal": lambda fields: json.dumps(fields | {"proposal": None}),
    "an empty plan": lambda fields: json.dumps(fields | {"proposal": fields["proposal"] | {"plan": {}}}),
}


@pytest.mark.parametrize("fault", list(_FAULTS))
def test_malformed_request_is_refused_despite_a_valid_signature(request_: RoundRequest, fault: str) -> None:
    with pytest.raises(ConfigError, match=r"must be a lead's round request"):
        RoundRequest.from_signed(resign_request(request_, _FAULTS[fault]))


def test_round_request_must_be_signed_by_its_named_lead(request_: RoundRequest) -> None:
    signed = request_.sign_with(lead_key)
    notice = EndOfRun(run="r", lead=lead_key.public).sign_with(lead_key)
    for bad in (
        request_.sign_with(stranger_key),
        replace(signed, signature=""),
        replace(signed, signature="not hex"),
        replace(signed, signature=signed.signature[:-2] + "ff"),  # never a valid signature ending
        replace(signed, text=signed.text.replace('"round": 2', '"round": 3')),
        replace(signed, signature=notice.signature),
        replace(signed, signature=lead_key.sign(EndOfRun.purpose, signed.text.encode())),
    ):
        assert read_refusal_reason(RoundRequest.from_signed, bad) is Reason.WRONG_SIGNATURE


def test_end_of_run_notice_must_be_signed_by_its_lead() -> None:
    notice = EndOfRun(run="r", lead=lead_key.public)
    assert EndOfRun.from_signed(notice.sign_with(lead_key)) == notice
    signed = notice.sign_with(lead_key)
    other = replace(notice, adapter_digest="00" * 32).sign_with(lead_key).text
    for bad in (notice.sign_with(stranger_key), replace(signed, signature="00" * 64), replace(signed, text=other)):
        assert read_refusal_reason(EndOfRun.from_signed, bad) is Reason.WRONG_SIGNATURE
    for text in ("{", "[]", "null", "{}", json.dumps({"run": "r"}), " " * 70_000):
        with pytest.raises(ConfigError, match="must be a lead's end of run"):
            EndOfRun.from_signed(Signed(text=text, signature=lead_key.sign(EndOfRun.purpose, text.encode())))


@pytest.mark.parametrize(("protocol", "older"), [(1, "lead"), (WIRE_SCHEMA - 1, "lead"), (WIRE_SCHEMA + 1, "site")])
def test_protocol_mismatch_names_the_side_to_upgrade(request_: RoundRequest, protocol: int, older: str) -> None:
    invitation = Invitation(proposal=request_.proposal, site="a", expires=1e9, nonce="0a" * 16)
    newer = {"protocol": protocol, "software": "0.3.0+7c1f", "what": "only a later protocol knows"}
    text = json.dumps(json.loads(invitation.sign_with(lead_key).text) | newer)
    for read, signed in (
        (RoundRequest.from_signed, resign_request(request_, lambda fields: json.dumps(fields | newer))),
        (Invitation.from_signed, Signed(text=text, signature="")),
    ):
        with pytest.raises(Refused) as error:
            read(signed)
        assert error.value.reason is Reason.MALFORMED_REQUEST
        assert error.value.requested == f"protocol {protocol} (fedtune 0.3.0+7c1f)"
        assert error.value.allowed == f"protocol {WIRE_SCHEMA} (fedtune {build()}): upgrade the {older}"
    for value in (True, 2.0, "2", 0, -1, [], 10**30):
        with pytest.raises(ConfigError, match="must be a lead's round request"):
            RoundRequest.from_signed(resign_request(request_, lambda f, v=value: json.dumps(f | {"protocol": v})))
