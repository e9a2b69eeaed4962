"""The hash chain: each event's hash covers all its values and everything before it."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.privacy.ledger import chain
from fedtune.privacy.ledger.chain import Event, Head, Kind

from .builders import site_key

# Two different values for each field.
EVENT: dict[str, tuple[Any, Any]] = {
    "sequence": (1, 2),
    "kind": (Kind.NOTE, Kind.COMMIT),
    "time": ("2030-01-10T00:00:00+00:00", "2030-01-10T00:00:00.000001+00:00"),
    "run": ("r", "s"),
    "round": (1, 2),
    "request": ("q", "p"),
    "attempt": (1, 2),
    "dataset": ("d", "e"),
    "cohort": ("", "c"),
    "code": ("0.1.0", "0.1.1"),
    "detail": ({"what": "frozen", "why": ""}, {"what": "frozen", "why": " "}),
}
HEAD: dict[str, tuple[Any, Any]] = {
    "ledger": ("0" * 32, "1" * 32),
    "sequence": (7, 6),
    "hash": ("1" * 64, "2" * 64),
    "time": ("2030-01-10T00:00:00+00:00", "2030-01-11T00:00:00+00:00"),
    "charged": ((({"kind": "gaussian", "noise_multiplier": 2.0}, 3),), ()),
    "runs": ((("r", 2),), ()),
    "path": (((6, "3" * 64), (7, "1" * 64)), ()),
    "made_up": (((5, "4" * 64),), ()),
    "doubts": ((chain.Doubt(9, "5" * 64, "r", 4),), ()),
    "denied": (("6" * 64,), ()),
    "marks": ((("never", "r"),), ()),
    "policy": ("7" * 64, ""),
    "caps": ((8.0, None), ()),
    "users": ((("dataset", "notes", "patient"),), ()),
    "arrivals": (chain.Arrivals(ranges=("..2026",), lost_after=0), None),
}


def make_event(**changes: Any) -> Event:
    return Event(**{name: value for name, (value, _) in EVENT.items()} | changes)


def test_event_hash_matches_the_golden_value() -> None:
    # Ledgers contain this hash, so changing it changes the file format.
    assert (
        make_event().compute_hash_after(chain.START)
        == "2ebf57e37ffcde6b2bda9df1b9f42ca10c63cd8c3aa8446943fe3dd89d2d2f22"
    )


def test_event_hash_covers_every_field_except_hash_and_signature() -> None:
    assert set(EVENT) == {field.name for field in fields(Event)} - {"hash", "signature"}
    hashes = {make_event(**{name: value}).compute_hash_after(chain.START) for name, (_, value) in EVENT.items()}
    original = make_event().compute_hash_after(chain.START)
    assert len(hashes | {original, make_event().compute_hash_after("1" * 64)}) == len(EVENT) + 2
    assert replace(make_event(), hash="x", signature="y").compute_hash_after(chain.START) == original


@settings(max_examples=50, deadline=None, derandomize=True)
@given(run=st.text(max_size=4), request=st.text(max_size=4), dataset=st.text(max_size=4))
def test_event_hash_separates_adjacent_fields(run: str, request: str, dataset: str) -> None:
    one = make_event(run=run, request=request, dataset=dataset)
    for value in (
        make_event(run=run + request, request="", dataset=dataset),
        make_event(run=run, request=request + dataset, dataset=""),
        make_event(run=request, request=run, dataset=dataset),
    ):
        assert (one.compute_hash_after(chain.START) == value.compute_hash_after(chain.START)) == (one == value)


def test_canonical_json_is_unique_and_rejects_infinity() -> None:
    assert chain.to_canonical_json({"b": [1, 2.5, None, "ü"], "a": True}) == b'{"a":true,"b":[1,2.5,null,"\\u00fc"]}'
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        chain.to_canonical_json({"epsilon": float("inf")})


def test_head_round_trips_through_its_file_and_signs_every_field(tmp_path: Path) -> None:
    head = Head.create_signed(site_key, **{name: value for name, (value, _) in HEAD.items()})
    path = tmp_path / "anchor.json"
    path.write_bytes(head.to_bytes())
    assert Head.read(path) == head
    changed_head = {name: other for name, (_, other) in HEAD.items()} | {"site_key": "3" * 64}
    assert set(changed_head) | {"signature"} == {field.name for field in fields(Head)}
    messages = {replace(head, **{name: value}).encode_signed_bytes() for name, value in changed_head.items()}
    assert len(messages | {head.encode_signed_bytes()}) == len(changed_head) + 1
