"""A ledger's events: each must be consistent with those before it."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fedtune.privacy import events
from fedtune.privacy.ledger.chain import Event
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.verify import verify
from fedtune.spec import RunError

from .builders import make_proposal, reserve

NOW = datetime(2030, 1, 10, tzinfo=UTC)


@pytest.fixture
def recorded_events(open_ledger: Any, path: Any, clock: Any) -> list[Event]:
    """opened, policy, plan, reserve 1, commit 1, reserve 2; a day between the rounds."""
    ledger = open_ledger()
    ledger.commit(reserve(ledger, make_proposal(), 1, "q1"), b"reply")
    clock.forward(days=1)
    reserve(ledger, make_proposal(), 2, "q2")
    return list(verify(path).events)


def apply_events(events_to_apply: list[Event]) -> History:
    history = History()
    for number, event in enumerate(events_to_apply, 1):
        history.apply_event(replace(event, sequence=number))
    return history


def change_detail(event: Event, /, **detail: Any) -> Event:
    return replace(event, detail=event.detail | detail)


def repeat_later(event: Event, **changes: Any) -> Event:
    """Append an earlier event at the end."""
    return replace(event, time="2031-01-01T00:00:00+00:00", **changes)


OTHER_NOISE = events.to_json(events.build_dp_sgd_event(sampling_rate=0.25, noise_multiplier=1.1, steps=3))
NOTHING = events.to_json(events.build_dp_sgd_event(sampling_rate=0.25, noise_multiplier=1.0, steps=0))


@pytest.mark.parametrize(
    ("retell", "message"),
    [
        (lambda t: t[1:], "event 1 must be the note 'opened'"),
        (lambda t: [t[0], *t[2:]], "event 2 must be the note 'policy'"),
        (lambda t: [t[0], t[0]], "event 2 must be the note 'policy'"),
        (lambda t: [*t, repeat_later(t[0])], "the ledger has already been opened"),
        (lambda t: [*t, repeat_later(t[2])], "the run has already been accepted"),
        (lambda t: [*t[:2], t[3]], r"event 3 \(reserve\) is invalid: 'r'"),
        (lambda t: [*t[:3], t[4]], "the committed round was not reserved"),
        (lambda t: [*t[:4], replace(t[4], attempt=2)], "the committed round was not reserved"),
        (lambda t: [*t[:4], replace(t[4], request="other")], "the committed round was not reserved"),
        (lambda t: [*t[:4], t[3]], "the reservation contradicts an earlier reservation"),
        (
            lambda t: [*t[:4], replace(t[3], attempt=2, request="x")],
            "the reservation contradicts an earlier reservation",
        ),
        (lambda t: [*t[:3], change_detail(t[3], event=OTHER_NOISE)], "the charged event differs from a round"),
        (lambda t: [*t[:3], change_detail(t[3], event=NOTHING)], "the charged event differs from a round"),
        (
            lambda t: [*t, replace(t[4], time="2029-12-31T00:00:00+00:00")],
            "the event's time is before the previous event's time",
        ),
        (lambda t: [*t, replace(t[4], time="yesterday")], "Invalid isoformat string"),
        (lambda t: [*t, repeat_later(change_detail(t[1], what="refunded"))], "unknown note 'refunded'"),
        (lambda t: [*t, repeat_later(change_detail(t[1], what="run_ended"), run="x")], "is invalid: 'x'"),
        (lambda t: [change_detail(t[0], order=0.5)], "the first event has invalid fields"),
        (lambda t: [change_detail(t[0], delta=2.0)], "the first event has invalid fields"),
        (lambda t: [change_detail(t[0], site_key="0" * 64)], "the first event has invalid fields"),
        (lambda t: [change_detail(t[0], unit="")], "unit = '': must be"),
        (lambda t: [change_detail(t[0], reference={"kind": "free"})], "must be a privacy event"),
        (lambda t: [t[0], change_detail(t[1], policy=t[1].detail["policy"] | {"budget": {}})], "is required"),
    ],
)
def test_inconsistent_events_raise_a_run_error(recorded_events: list[Event], retell: Any, message: str) -> None:
    apply_events(recorded_events)
    with pytest.raises(RunError, match=message):
        apply_events(retell(recorded_events))


def test_history_adds_up_charges_replies_and_attempts(recorded_events: list[Event]) -> None:
    history = apply_events(recorded_events)
    assert (history.length, history.last_time) == (6, NOW + timedelta(days=1))
    run = history.runs["r"]
    assert (run.proposal, run.charged_rounds, dict(run.attempts)) == (make_proposal(), 2, {1: 1, 2: 1})
    assert (run.reserved, list(run.replies)) == ({1: "q1", 2: "q2"}, ["q1"])
    assert history.count_total_charges() == events.count_mechanisms([make_proposal().plan.event()] * 2)
    assert history.charges(up_to=4) == {
        (event, ""): n for event, n in events.count_mechanisms([make_proposal().plan.event()]).items()
    }
    assert history.charges(up_to=3) == {}
    assert history.count_charges_in_period("month", NOW) == history.count_total_charges()
    assert history.count_charges_in_period("month", NOW + timedelta(days=31)) == {}
