"""A new budget period opens when local clock and server time agree, or on confirmation, never by one clock alone."""

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.privacy import filter
from fedtune.privacy.cohorts import compute_period_number
from fedtune.privacy.ledger import history
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_policy import Policy

from .builders import make_policy, make_proposal, read_refusal_reason, site_key, train
from .conftest import Clock

ONE_ROUND = {"num_rounds": 1}
JANUARY = datetime(2030, 1, 10, tzinfo=UTC)
FEBRUARY, MARCH = JANUARY + timedelta(days=31), JANUARY + timedelta(days=62)


@pytest.fixture
def full_ledger(open_ledger: Any, clock: Clock) -> Any:
    """Open a ledger whose one round of January is spent, as for a request with the server's time."""
    order = open_ledger().history.order
    cap = filter.epsilon_filter([make_proposal().plan.event()], order=order, delta=1e-5) + 1e-9
    monthly = make_policy(budget={"max_epsilon_per_period": cap, "period": "month"})
    charge(open_ledger(policy=monthly, server=clock.time), make_proposal(run="january", plan=ONE_ROUND))
    return partial(open_ledger, policy=monthly)


def charge(ledger: SiteLedger, proposal: Any) -> Reason | None:
    """Charge a round, or return the reason of the refusal."""
    try:
        train(ledger, proposal, 1)
    except Refused as refused:
        ledger.record_refusal(refused, run=proposal.run, round=1, request=proposal.run)
        return refused.reason
    return None


@pytest.mark.parametrize(
    ("local", "server", "opens"),
    [
        (FEBRUARY, FEBRUARY, True),
        (FEBRUARY, MARCH, False),  # the local clock lags by a period
        (FEBRUARY, JANUARY, False),  # only the local clock was set forward
        (JANUARY, FEBRUARY, False),  # only the server's time moved
        (JANUARY, MARCH, False),
        (FEBRUARY, None, False),  # a local command, without a server's time
        (MARCH, FEBRUARY, False),  # the local clock is a period ahead of the server
        (MARCH, MARCH, False),  # skips a period
        (datetime(2999, 1, 1, tzinfo=UTC), datetime(2999, 1, 1, tzinfo=UTC), False),
    ],
)
def test_new_period_starts_only_when_both_clocks_have_reached_it(
    full_ledger: Any, clock: Clock, local: datetime, server: datetime | None, opens: bool
) -> None:
    clock.time, refused = local, None if opens else Reason.MAX_EPSILON_PER_PERIOD
    assert charge(full_ledger(server=server), make_proposal(run="next", plan=ONE_ROUND)) is refused
    assert compute_period_number(full_ledger(server=server).history.last_time, "month") - compute_period_number(
        JANUARY, "month"
    ) == int(opens)


def test_refusal_without_the_server_says_how_to_open_the_period(full_ledger: Any, clock: Clock, path: Path) -> None:
    clock.time, ledger = FEBRUARY, full_ledger(server=None)
    assert charge(ledger, make_proposal(run="next", plan=ONE_ROUND)) is Reason.MAX_EPSILON_PER_PERIOD
    assert "A lead's next request opens the next month. If the clock is right" in ledger.explain_pending_period
    known = verify(path).history
    assert (known.now(), known.explain_pending_period()) == (FEBRUARY, ""), "as for the next request"


def test_server_clock_cannot_open_past_periods_one_by_one(full_ledger: Any, clock: Clock) -> None:
    """With a correct clock in June, a single day could otherwise spend each month's budget since January."""
    clock.time = JANUARY + timedelta(days=150)
    for month in range(1, 6):
        run = make_proposal(run=f"month-{month}", plan=ONE_ROUND)
        assert charge(full_ledger(server=JANUARY + timedelta(days=30 * month)), run) is Reason.MAX_EPSILON_PER_PERIOD


def test_approvals_and_runs_expire_while_a_new_period_is_pending(open_ledger: Any, clock: Clock) -> None:
    budget = {"max_epsilon_per_period": 100.0, "period": "month"}
    manual, started = make_policy(budget=budget, approval="manual"), make_proposal(run="begun")
    ledger = open_ledger(policy=manual, server=clock.time)
    ledger.approve(started)
    assert charge(ledger, started) is None
    ledger.approve(make_proposal(run="approved"))
    clock.time += timedelta(days=manual.limits.run_expires_after_days + 400)
    ledger = open_ledger(policy=manual, server=clock.time)
    assert charge(ledger, make_proposal(run="approved")) is Reason.AWAITING_APPROVAL
    assert read_refusal_reason(ledger.reserve, started, round=2, request="another") is Reason.RUN_ENDED


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), -1e300, 1e18])
def test_invalid_server_time_opens_no_new_period(full_ledger: Any, clock: Clock, nonsense: float) -> None:
    clock.time, ledger = FEBRUARY, full_ledger(server=None)
    ledger.set_server_time(nonsense)
    assert charge(ledger, make_proposal(run="next", plan=ONE_ROUND)) is Reason.MAX_EPSILON_PER_PERIOD


def test_confirming_the_date_opens_the_current_period(full_ledger: Any, clock: Clock, path: Path) -> None:
    clock.time, ledger = MARCH, full_ledger(server=JANUARY)
    proposal = make_proposal(run="next", plan=ONE_ROUND)
    assert charge(ledger, proposal) is Reason.MAX_EPSILON_PER_PERIOD
    for words in ("clock says 2030-03-13", "server's time is 2030-01-10", "month of 2030-01-10", "confirm-date"):
        assert words in ledger.explain_pending_period
    full_ledger(server=None).confirm_date()
    assert charge(full_ledger(server=JANUARY), proposal) is None
    assert full_ledger(server=JANUARY).explain_pending_period == ""
    assert verify(path).history.last_time == MARCH
    # Only the confirmed period opens: the clock may advance within it, but no further.
    clock.forward(days=31)
    assert charge(full_ledger(server=MARCH), make_proposal(run="more", plan=ONE_ROUND)) is Reason.MAX_EPSILON_PER_PERIOD


def test_fast_clock_does_not_move_the_ledger_past_the_server(open_ledger: Any, clock: Clock) -> None:
    """Without a cap per period too: otherwise one refusal at a wrong time would end all runs and daily limits."""
    clock.time = JANUARY
    open_ledger()
    clock.time = datetime(2099, 1, 1, tzinfo=UTC)
    ledger = open_ledger(server=FEBRUARY)
    assert charge(ledger, make_proposal(plan=ONE_ROUND)) is None
    assert (ledger.history.last_time, ledger.explain_pending_period) == (FEBRUARY, "")
    clock.time = JANUARY  # behind the newest event, whose time remains
    assert charge(open_ledger(server=MARCH), make_proposal(run="again", plan=ONE_ROUND)) is None
    assert open_ledger().history.last_time == FEBRUARY


@pytest.mark.parametrize("capped", [False, True])
def test_person_can_set_the_date_back_after_a_clock_was_ahead(open_ledger: Any, clock: Clock, capped: bool) -> None:
    clock.time = datetime(2099, 1, 1, tzinfo=UTC)
    budget = {"max_epsilon_per_period": 100.0, "period": "month"} if capped else {}
    ledger = partial(open_ledger, policy=make_policy(budget=budget))
    assert charge(ledger(server=clock.time), make_proposal(run="early", plan=ONE_ROUND)) is None
    clock.time = FEBRUARY
    assert "newest event is from 2099-01-01" in ledger(server=FEBRUARY).explain_pending_period
    ledger(server=None).confirm_date()
    assert ledger(server=FEBRUARY).explain_pending_period == ""
    assert charge(ledger(server=FEBRUARY), make_proposal(run="next", plan=ONE_ROUND)) is None
    history = ledger(server=None).history
    in_february = history.count_charges_in_period("month", FEBRUARY)
    assert (history.last_time, in_february.total() > 0) == (FEBRUARY, True)
    assert history.count_total_charges() == in_february + in_february


def test_state_of_another_period_is_not_used_after_the_date_was_set_back() -> None:
    charged = {1: datetime(2099, 1, 1, tzinfo=UTC), 2: FEBRUARY}
    run = history.AcceptedRun(proposal=make_proposal(), expires=None, charged=charged, state_charged=charged[1])
    assert not run.has_state_of_this_period("month")


def test_restored_charges_count_in_the_period_of_the_anchor(full_ledger: Any, clock: Clock, path: Path) -> None:
    backup = path.read_bytes()
    clock.time = FEBRUARY
    assert charge(full_ledger(server=FEBRUARY), make_proposal(run="february", plan=ONE_ROUND)) is None
    anchor = full_ledger(server=None).head()
    path.write_bytes(backup)
    full_ledger(server=None).charge_gap(anchor)  # by a local command, without a server's time
    assert full_ledger(server=None).history.last_time == FEBRUARY
    assert (
        charge(full_ledger(server=FEBRUARY), make_proposal(run="late", plan=ONE_ROUND)) is Reason.MAX_EPSILON_PER_PERIOD
    )


MOMENTS = st.integers(-100, 1500).map(lambda days: JANUARY + timedelta(days=days))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    period=st.sampled_from(["month", "quarter", "year"]),
    moves=st.lists(st.tuples(MOMENTS, st.none() | MOMENTS, st.sampled_from(["ask", "ask", "confirm", "end"]))),
)
def test_single_clock_never_opens_a_period(tmp_path_factory: Any, period: Any, moves: Any) -> None:
    site: Policy = make_policy(budget={"max_epsilon_per_period": 5.0, "period": period})
    clock, path = Clock(JANUARY), tmp_path_factory.mktemp("clocks") / "ledger.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "datetime", clock)
        SiteLedger(path, site, site_key, create=True)
        for local, server, move in moves:
            clock.time, ledger = local, SiteLedger(path, site, site_key, create=True)
            before = ledger.history.last_time
            ledger.set_server_time(server.timestamp() if server else float("nan"))
            if move == "confirm":
                ledger.confirm_date()
            else:
                ledger.record_refusal(Refused(Reason.SITE_ERROR), run=move, round=1, request="x")
            after = ledger.history.last_time
            if move == "confirm":
                assert after == local, "a person may also set the date back"
                continue
            assert before <= after <= max(before, local), "the server's time must not move the ledger past both clocks"
            old, new = compute_period_number(before, period), compute_period_number(after, period)
            if move != "confirm" and new > old:
                assert server is not None
                assert new == old + 1
                assert new <= min(compute_period_number(local, period), compute_period_number(server, period))
