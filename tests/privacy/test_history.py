"""A ledger's events: each must follow from those before it, and its hash covers all of them."""

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.privacy import events
from fedtune.privacy.ledger import chain
from fedtune.privacy.ledger.chain import Event, Head, Kind
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.verify import verify
from fedtune.spec import RunError

from .builders import proposal, reserve, site_key

NOW = datetime(2030, 1, 10, tzinfo=UTC)


@pytest.fixture
def told(opened: Any, path: Any, clock: Any) -> list[Event]:
    """opened, policy, plan, reserve 1, commit 1, reserve 2; a day between the rounds."""
    ledger = opened()
    ledger.commit(reserve(ledger, proposal(), 1, "q1"), b"reply")
    clock.forward(days=1)
    reserve(ledger, proposal(), 2, "q2")
    return list(verify(path).events)


def followed(told: list[Event]) -> History:
    history = History()
    for number, event in enumerate(told, 1):
        history.follow(replace(event, sequence=number))
    return history


def changed(event: Event, /, **detail: Any) -> Event:
    return replace(event, detail=event.detail | detail)


def later(event: Event, **others: Any) -> Event:
    """An event again, after all others."""
    return replace(event, time="2031-01-01T00:00:00+00:00", **others)


OTHER_NOISE = events.to_json(events.dp_sgd(sampling_rate=0.25, noise_multiplier=1.1, steps=3))
NOTHING = events.to_json(events.dp_sgd(sampling_rate=0.25, noise_multiplier=1.0, steps=0))


@pytest.mark.parametrize(
    ("retell", "message"),
    [
        (lambda t: t[1:], "event 1 must be the note 'opened'"),
        (lambda t: [t[0], *t[2:]], "event 2 must be the note 'policy'"),
        (lambda t: [t[0], t[0]], "event 2 must be the note 'policy'"),
        (lambda t: [*t, later(t[0])], "the ledger was opened before"),
        (lambda t: [*t, later(t[2])], "the run was accepted before"),
        (lambda t: [*t[:2], t[3]], r"event 3 \(reserve\) cannot be understood: 'r'"),
        (lambda t: [*t[:3], t[4]], "it commits a round that was not reserved"),
        (lambda t: [*t[:4], replace(t[4], attempt=2)], "it commits a round that was not reserved"),
        (lambda t: [*t[:4], replace(t[4], request="other")], "it commits a round that was not reserved"),
        (lambda t: [*t[:4], t[3]], "it does not follow the reservations before it"),
        (lambda t: [*t[:4], replace(t[3], attempt=2, request="x")], "it does not follow the reservations"),
        (lambda t: [*t[:3], changed(t[3], event=OTHER_NOISE)], "it does not charge a round of the run's"),
        (lambda t: [*t[:3], changed(t[3], event=NOTHING)], "it does not charge a round of the run's"),
        (lambda t: [*t, replace(t[4], time="2029-12-31T00:00:00+00:00")], "its time is earlier"),
        (lambda t: [*t, replace(t[4], time="yesterday")], "Invalid isoformat string"),
        (lambda t: [*t, later(changed(t[1], what="refunded"))], "unknown note 'refunded'"),
        (lambda t: [*t, later(changed(t[1], what="run_ended"), run="x")], "cannot be understood: 'x'"),
        (lambda t: [changed(t[0], order=0.5)], "it does not open a ledger"),
        (lambda t: [changed(t[0], delta=2.0)], "it does not open a ledger"),
        (lambda t: [changed(t[0], site_key="0" * 64)], "it does not open a ledger"),
        (lambda t: [changed(t[0], reference={"kind": "free"})], "must be a privacy event"),
        (lambda t: [t[0], changed(t[1], policy=t[1].detail["policy"] | {"budget": {}})], "is required"),
    ],
)
def test_events_that_do_not_follow_are_a_run_error(told: list[Event], retell: Any, message: str) -> None:
    followed(told)
    with pytest.raises(RunError, match=message):
        followed(retell(told))


def test_what_a_history_adds_up_to(told: list[Event]) -> None:
    history = followed(told)
    assert (history.length, history.last_time) == (6, NOW + timedelta(days=1))
    run = history.runs["r"]
    assert (run.proposal, run.charged_rounds, dict(run.attempts)) == (proposal(), 2, {1: 1, 2: 1})
    assert (run.reserved, list(run.replies)) == ({1: "q1", 2: "q2"}, ["q1"])
    assert history.charged() == events.grouped([proposal().plan.event()] * 2)
    assert history.charges(up_to=4) == {(each, ""): n for each, n in events.grouped([proposal().plan.event()]).items()}
    assert history.charges(up_to=3) == {}
    assert history.charged_in_period("month", NOW) == history.charged()
    assert history.charged_in_period("month", NOW + timedelta(days=31)) == {}


# The hash chain: each event's hash covers all its values and everything before it.

# Of each field a value, and another one.
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
    "seeded": (True, False),
    "frozen": (True, False),
    "doubts": ((chain.Doubt(9, "5" * 64, "r", 4),), ()),
    "denied": (("6" * 64,), ()),
    "policy": ("7" * 64, ""),
    "caps": ((8.0, None), ()),
    "users": ((("dataset", "notes", "patient"),), ()),
    "arrivals": (chain.Arrivals(ranges=("..2026",), lost_after=0), None),
}


def event(**changes: Any) -> Event:
    return Event(**{name: value for name, (value, _) in EVENT.items()} | changes)


def test_the_hash_of_an_event_is_golden() -> None:
    # It lies in ledgers: a change of it is a change of format.
    assert event().hash_after(chain.START) == "2ebf57e37ffcde6b2bda9df1b9f42ca10c63cd8c3aa8446943fe3dd89d2d2f22"


def test_every_value_is_in_the_hash_but_the_hash_and_its_signature() -> None:
    assert set(EVENT) == {field.name for field in fields(Event)} - {"hash", "signature"}
    hashes = {event(**{name: other}).hash_after(chain.START) for name, (_, other) in EVENT.items()}
    own = event().hash_after(chain.START)
    assert len(hashes | {own, event().hash_after("1" * 64)}) == len(EVENT) + 2
    assert replace(event(), hash="x", signature="y").hash_after(chain.START) == own


@settings(max_examples=50, deadline=None, derandomize=True)
@given(run=st.text(max_size=4), request=st.text(max_size=4), dataset=st.text(max_size=4))
def test_values_cannot_move_from_one_field_to_the_next(run: str, request: str, dataset: str) -> None:
    one = event(run=run, request=request, dataset=dataset)
    for other in (
        event(run=run + request, request="", dataset=dataset),
        event(run=run, request=request + dataset, dataset=""),
        event(run=request, request=run, dataset=dataset),
    ):
        assert (one.hash_after(chain.START) == other.hash_after(chain.START)) == (one == other)


def test_json_has_one_spelling() -> None:
    assert chain.canonical({"b": [1, 2.5, None, "ü"], "a": True}) == b'{"a":true,"b":[1,2.5,null,"\\u00fc"]}'
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        chain.canonical({"epsilon": float("inf")})


def test_a_head_survives_its_file_and_every_field_is_signed(tmp_path: Path) -> None:
    head = Head.signed(site_key, **{name: value for name, (value, _) in HEAD.items()})
    path = tmp_path / "anchor.json"
    path.write_bytes(head.to_bytes())
    assert Head.read(path) == head
    others = {name: other for name, (_, other) in HEAD.items()} | {"site_key": "3" * 64}
    assert set(others) | {"signature"} == {field.name for field in fields(Head)}
    messages = {replace(head, **{name: value}).message() for name, value in others.items()}
    assert len(messages | {head.message()}) == len(others) + 1
