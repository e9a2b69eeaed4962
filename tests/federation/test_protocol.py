from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fedtune.federation.protocol import RoundRequest
from fedtune.privacy.plan import Plan
from fedtune.spec import ConfigError


@pytest.fixture
def request_(plan: Plan) -> RoundRequest:
    return RoundRequest(run="r", round=2, site="a", adapter_digest="ab" * 32, plan=plan)


def test_json_round_trip(request_: RoundRequest) -> None:
    assert RoundRequest.from_json(request_.to_json()) == request_


def test_every_field_is_in_the_digest(request_: RoundRequest) -> None:
    changes = [
        {"run": "s"},
        {"round": 3},
        {"site": "b"},
        {"adapter_digest": "cd" * 32},
        {"plan": replace(request_.plan, max_grad_norm=2.0)},
    ]
    digests = {replace(request_, **change).digest() for change in changes}  # type: ignore[arg-type]
    assert len(digests | {request_.digest()}) == 6
    assert RoundRequest.from_json(request_.to_json()).digest() == request_.digest()


_FAULTS = {
    "no json": lambda fields: "round: 1",
    "a list": lambda fields: "[]",
    "null": lambda fields: "null",
    "a missing field": lambda fields: json.dumps({key: value for key, value in fields.items() if key != "run"}),
    "a further field": lambda fields: json.dumps(fields | {"note": "x"}),
    "round zero": lambda fields: json.dumps(fields | {"round": 0}),
    "a round that is true": lambda fields: json.dumps(fields | {"round": True}),
    "half a round": lambda fields: json.dumps(fields | {"round": 1.5}),
    "a numbered run": lambda fields: json.dumps(fields | {"run": 7}),
    "no plan": lambda fields: json.dumps(fields | {"plan": None}),
    "an empty plan": lambda fields: json.dumps(fields | {"plan": {}}),
    "a plan with more": lambda fields: json.dumps(fields | {"plan": fields["plan"] | {"extra": 1}}),
    "a plan out of range": lambda fields: json.dumps(fields | {"plan": fields["plan"] | {"sampling_rate": 2}}),
    "a plan of texts": lambda fields: json.dumps(fields | {"plan": fields["plan"] | {"noise_multiplier": "1"}}),
}


@pytest.mark.parametrize("fault", list(_FAULTS))
def test_anything_else_is_no_request(request_: RoundRequest, fault: str) -> None:
    text = _FAULTS[fault](json.loads(request_.to_json()))
    with pytest.raises(ConfigError, match=r"request|plan|sampling_rate"):
        RoundRequest.from_json(text)
