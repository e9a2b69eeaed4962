"""A proposal arrives from a server: its format is checked before anything else."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.codec import decode
from fedtune.privacy.proposal import Proposal
from fedtune.spec import ConfigError

from .builders import OTHER, draw_json, make_key, make_proposal


def test_proposal_round_trips_through_json() -> None:
    scored = {"plan": {"metrics_noise_multiplier": 20.0}}
    for changes in ({}, {"start_adapter": "d" * 64}, {"target_modules": ()}, scored):
        proposal = make_proposal(**changes)
        decoded = decode(Proposal, json.loads(json.dumps(proposal.to_json())))
        assert decoded == proposal
        assert decoded.digest() == proposal.digest()


def test_every_proposal_field_is_in_its_json_and_digest() -> None:
    changes = {**OTHER, "lead": make_key(3).public, "task": "generation", "base_model": "c" * 64, "dtype": "bfloat16"}
    changes |= {"plan": {"spare_rounds": 1}, "adapter": "dora"}
    fields = {field.name for field in dataclasses.fields(Proposal)}
    assert set(changes) == set(make_proposal(**changes).to_json()) == fields
    # omitted when equal to their defaults
    assert set(make_proposal().to_json()) == fields - {"start_adapter", "adapter", "algorithm", "ranks"}
    digests = {make_proposal(**{name: value}).digest() for name, value in changes.items()}
    assert len(digests | {make_proposal().digest()}) == len(fields) + 1


@pytest.mark.parametrize("name", ["run", "lead", "dataset", "task", "base_model", "dtype"])
@pytest.mark.parametrize("value", ["", "x" * 301, "\ud800", "a\nb", "a\0b"])
def test_unprintable_or_overlong_text_is_refused(name: str, value: object) -> None:
    # A lone surrogate cannot be stored in a ledger; a line break would forge a line in a log.
    if (name, value) == ("lead", ""):  # a site's own release, which `SiteLedger.reserve` distinguishes from a run
        return
    with pytest.raises(ConfigError, match=rf"^{name} = .*must be printable text of 1 to 300 characters"):
        make_proposal(**{name: value})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), value=draw_json())
def test_changed_json_is_refused_or_read_as_another_proposal(data: st.DataObject, value: object) -> None:
    fields = make_proposal().to_json()
    plan_field = data.draw(st.sampled_from([None, *fields["plan"]]))
    if plan_field is None:
        changed = fields | {data.draw(st.sampled_from(list(fields))): value}
    else:
        changed = fields | {"plan": fields["plan"] | {plan_field: value}}
    try:
        decoded = decode(Proposal, changed)
    except ConfigError:
        return
    assert decoded.to_json() == changed, "an accepted change must not be read as another value"
