"""Rounds at a ledger: charged before training, answered once, and never beyond the plan, the run and the caps."""

import dataclasses
import math
import shutil
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from fedtune.privacy import events, filter
from fedtune.privacy.ledger import site_ledger as ledger_module
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.site_ledger import Reservation, SiteLedger
from fedtune.privacy.ledger.store import EventStore
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Reason, Refused
from fedtune.privacy.site_policy import Dataset
from fedtune.spec import RunError

from .builders import (
    OPENED,
    list_kinds,
    make_policy,
    make_proposal,
    make_user_policy,
    read_refusal_reason,
    reserve,
    site_key,
    tamper,
    train,
)


def read_refusal(ledger: SiteLedger, proposal: Proposal, round: int = 1, request: str | None = None) -> Refused:
    """Return the reason of a refusal, after checking that nothing was charged, also as seen by a new process."""
    before = ledger.history.count_total_charges()
    with pytest.raises(Refused) as caught:
        ledger.reserve(proposal, round=round, request=request or f"digest {proposal.run} {round}")
    ledger.end_run("no such run")  # rereads the file
    assert ledger.history.count_total_charges() == before
    return caught.value


def test_round_is_charged_before_training_and_committed_afterwards(path: Path, open_ledger: Any) -> None:
    ledger = open_ledger()
    reservation = reserve(ledger, make_proposal(), 1, "digest 1")
    assert reservation == Reservation(run="r", round=1, request="digest 1", attempt=1)
    assert list_kinds(path) == [*OPENED, (Kind.PLAN, ""), (Kind.RESERVE, "")]
    charged = events.from_json(verify(path).events[-1].detail["event"])
    assert charged == make_proposal().plan.event()
    assert open_ledger().history.count_total_charges() == events.count_mechanisms([charged]), (
        "a killed process must stay charged for the round that it started"
    )
    ledger.commit(reservation, b"reply 1", fingerprint="f")
    assert [kind for kind, _ in list_kinds(path)[2:]] == [Kind.PLAN, Kind.RESERVE, Kind.COMMIT]
    assert verify(path).events[-1].detail["fingerprint"] == "f"
    assert all(event.dataset == "notes" for event in verify(path).events[2:])


def test_different_request_for_the_same_round_is_refused(open_ledger: Any) -> None:
    train(open_ledger(), make_proposal(), 1)
    refused = read_refusal(open_ledger(), make_proposal(), 1, "another digest")
    assert refused.reason is Reason.ROUND_REQUESTED_DIFFERENTLY
    assert (refused.requested, refused.allowed) == ("another digest", "digest r 1")
    reserve(open_ledger(), make_proposal(), 2)  # interrupted, and only the same request may retry it
    assert read_refusal(open_ledger(), make_proposal(), 2, "another").reason is Reason.ROUND_REQUESTED_DIFFERENTLY
    assert reserve(open_ledger(), make_proposal(), 2).attempt == 2


@pytest.mark.parametrize(
    "change",
    [
        *({"plan": {"noise_multiplier": 0.9}}, {"plan": {"noise_multiplier": 1.1}}, {"plan": {"num_rounds": 6}}),
        *({"plan": {"spare_rounds": 1}}, {"rank": 3}, {"dataset": "letters"}, {"num_sites": 4}),
    ],
)
def test_changed_proposal_is_refused(open_ledger: Any, change: dict[str, Any]) -> None:
    train(open_ledger(), make_proposal(), 1)
    refused = read_refusal(open_ledger(), make_proposal(**change), 2)
    assert refused.reason is Reason.PLAN_CHANGED
    assert (refused.requested, refused.allowed) == (make_proposal(**change).digest(), make_proposal().digest())


def test_interrupted_round_is_charged_and_its_retry_uses_a_spare_round(open_ledger: Any) -> None:
    once_more = make_proposal(plan={"num_rounds": 2, "spare_rounds": 1})
    assert [reserve(open_ledger(), once_more, 1).attempt for _ in range(3)] == [1, 2, 3]
    assert open_ledger().sign_receipt("r").charged_rounds == 3
    for round in (1, 2):
        refused = read_refusal(open_ledger(), once_more, round)
        assert (refused.reason, refused.requested, refused.allowed) == (Reason.PLAN_EXHAUSTED, "4", "3")


def test_only_the_newest_attempt_can_be_committed(open_ledger: Any, path: Path) -> None:
    with pytest.raises((AssertionError, KeyError)):
        open_ledger().commit(Reservation(run="r", round=1, request="q", attempt=1), b"of a round that nobody reserved")
    assert list_kinds(path) == OPENED
    first = reserve(open_ledger(), make_proposal(), 1)
    second = reserve(open_ledger(), make_proposal(), 1)
    with pytest.raises(AssertionError, match="only the newest reservation"):
        open_ledger().commit(first, b"of the first")
    open_ledger().commit(second, b"of the second")
    assert open_ledger().reserve(make_proposal(), round=1, request="digest r 1") == b"of the second"
    with pytest.raises(AssertionError, match="committed only once"):
        open_ledger().commit(second, b"again")
    assert [kind for kind, _ in list_kinds(path)].count(Kind.COMMIT) == 1


def test_algorithm_state_belongs_to_the_newest_reply_of_its_run(open_ledger: Any) -> None:
    assert open_ledger().read_algorithm_state("r") == b"", "a lost state must read as empty"
    open_ledger().commit(reserve(open_ledger(), make_proposal(), 1), b"reply 1", state=b"after round 1")
    assert open_ledger().read_algorithm_state("r") == b"after round 1"
    assert open_ledger().read_algorithm_state("another") == b""
    reserve(open_ledger(), make_proposal(), 2)  # the process dies before it commits
    assert open_ledger().read_algorithm_state("r") == b"after round 1"
    resumed = reserve(open_ledger(), make_proposal(), 2)
    with pytest.raises(RuntimeError), patch.object(EventStore, "append_event", side_effect=RuntimeError):
        open_ledger().commit(resumed, b"reply 2", state=b"after round 2")
    assert open_ledger().read_algorithm_state("r") == b"after round 1", "reply and state must be one transaction"
    open_ledger().commit(resumed, b"reply 2", state=b"after round 2")
    assert open_ledger().read_algorithm_state("r") == b"after round 2"


def test_algorithm_state_of_an_earlier_budget_period_is_lost(open_ledger: Any, clock: Any) -> None:
    monthly = partial(open_ledger, policy=make_policy(budget={"max_epsilon_per_period": 8.0, "period": "month"}))
    run = make_proposal(plan={"num_rounds": 4})
    ledger = monthly(server=clock.time)
    ledger.commit(reserve(ledger, run, 1), b"reply 1", state=b"after round 1")
    charged_in_january = reserve(ledger, run, 2)
    assert ledger.read_algorithm_state("r") == b"after round 1"
    clock.forward(days=25)
    ledger = monthly(server=clock.time)
    ledger.commit(charged_in_january, b"reply 2", state=b"after round 2")
    third = reserve(ledger, run, 3)
    assert ledger.read_algorithm_state("r") == b"", "February's charge does not cover what the state contains"
    ledger.commit(third, b"reply 3", state=b"after round 3")
    reserve(ledger, run, 4)
    assert monthly(server=clock.time).read_algorithm_state("r") == b"after round 3"


def test_newest_reply_is_stored_and_resent_without_charge(open_ledger: Any, path: Path) -> None:
    ledger = open_ledger()
    train(ledger, make_proposal(), 1, reply=b"reply 1")
    train(ledger, make_proposal(run="other"), 1, reply=b"reply of the other")
    train(ledger, make_proposal(), 2, reply=b"reply 2")
    length = len(verify(path).events)
    for opened in (ledger, open_ledger()):
        assert opened.reserve(make_proposal(), round=2, request="digest r 2") == b"reply 2"
        assert opened.reserve(make_proposal(run="other"), round=1, request="digest other 1") == b"reply of the other"
        refused = read_refusal(opened, make_proposal(), 1)
        assert (refused.reason, refused.requested) == (Reason.REPLY_NO_LONGER_STORED, "1")
    assert len(verify(path).events) == length


@pytest.mark.parametrize("kept_back", [1, 2], ids=["interrupted", "never asked"])
def test_delayed_request_for_an_earlier_round_is_not_charged(open_ledger: Any, kept_back: int) -> None:
    reserve(open_ledger(), make_proposal(), 1)
    # an interrupted round is retried before any later one
    train(open_ledger(), make_proposal(), 1 if kept_back == 2 else 2)
    train(open_ledger(), make_proposal(), 3)
    before = open_ledger().history.charged_rounds("r")
    refused = read_refusal(open_ledger(), make_proposal(), kept_back)
    assert (refused.reason, refused.requested) == (Reason.REPLY_NO_LONGER_STORED, str(kept_back))
    assert open_ledger().history.charged_rounds("r") == before == 3


@pytest.mark.parametrize("sql", ["UPDATE replies SET reply = x'00'", "DELETE FROM replies"])
def test_tampered_reply_is_not_sent(open_ledger: Any, path: Path, sql: str) -> None:
    train(open_ledger(), make_proposal(), 1)
    tamper(path, sql)
    assert (
        read_refusal_reason(open_ledger().reserve, make_proposal(), round=1, request="digest r 1")
        is Reason.REPLY_NO_LONGER_STORED
    )
    assert open_ledger().sign_receipt("r").charged_rounds == 1, "an earlier round must not be trained again"


# Receipts and records.


def test_receipt_counts_rounds_without_a_reply(open_ledger: Any) -> None:
    ledger = open_ledger()
    empty_receipt = ledger.sign_receipt("r")
    assert (empty_receipt.charged_rounds, empty_receipt.sequence) == (0, 2)
    train(ledger, make_proposal(), 1)
    reserve(ledger, make_proposal(), 2)
    receipt = ledger.sign_receipt("r")
    assert (receipt.site, receipt.run, receipt.charged_rounds) == ("a", "r", 2)
    assert (receipt.sequence, receipt.site_key) == (6, site_key.public)
    assert receipt.has_valid_signature()


def test_receipt_hides_the_chain_head(open_ledger: Any, path: Path) -> None:
    # Anyone who knows the hash could test guesses of the ledger's content.
    reserve(open_ledger(), make_proposal(), 1)
    receipt = open_ledger().sign_receipt("r")
    assert receipt.head not in {event.hash for event in verify(path).events}
    assert open_ledger().sign_receipt("r") == receipt, "the same state must give the same receipt"


def test_refusal_is_recorded_and_costs_nothing(open_ledger: Any, path: Path) -> None:
    open_ledger().record_refusal(
        read_refusal(open_ledger(), make_proposal(rank=9)), run="r", round=1, request="digest r 1", lead="ab"
    )
    last = verify(path).events[-1]
    assert (last.kind, last.run, last.round, last.request) == (Kind.REFUSAL, "r", 1, "digest r 1")
    assert last.detail == {"reason": "max_rank", "requested": "9", "allowed": "at most 8", "lead": "ab"}
    assert not open_ledger().history.count_total_charges()


@pytest.mark.parametrize("limit", ["MAX_ANSWERS_PER_DAY", "MAX_STRANGERS_PER_DAY"])
def test_recorded_refusals_are_limited_per_day_and_in_length(
    open_ledger: Any, path: Path, clock: Any, monkeypatch: Any, limit: str
) -> None:
    monkeypatch.setattr(ledger_module, limit, 3)
    refused = Refused(Reason.LEADS if "STRANGERS" in limit else Reason.TASKS, requested="\ud800" + "x" * 100_000)
    for _ in range(3):
        for number in range(5):
            open_ledger().record_refusal(refused, run="r", round=1, request=f"q{number}")
        clock.forward(days=1)
    refusals = [event for event in verify(path).events if event.kind is Kind.REFUSAL]
    assert [event.time[:10] for event in refusals] == ["2030-01-10"] * 3 + ["2030-01-11"] * 3 + ["2030-01-12"] * 3
    assert all(len(str(event.detail)) < 1000 for event in refusals)


def test_replayed_request_is_recorded_once_a_day(open_ledger: Any, path: Path, clock: Any) -> None:
    """A relay could otherwise use up the day's refusals with one old request of the lead."""
    for _ in range(2):
        for reason in (Reason.REQUEST_EXPIRED, Reason.REQUEST_EXPIRED, Reason.WRONG_SITE, Reason.REQUEST_EXPIRED):
            open_ledger().record_refusal(Refused(reason), run="r", round=1, request="q", lead="ab")
        clock.forward(days=1)
    reasons = [event.detail["reason"] for event in verify(path).events if event.kind is Kind.REFUSAL]
    assert reasons == ["request_expired", "wrong_site"] * 2


# Data sets: one budget for one population.


def test_all_data_sets_share_the_budget_of_the_population(open_ledger: Any) -> None:
    # Ten rounds fit: another run, data set, data path or declared size adds none.
    train(open_ledger(), make_proposal(plan={"num_rounds": 4}), 1)
    moved_datasets = (Dataset(id="notes", declared_size=9000, path="moved.csv"), Dataset(id="new", declared_size=10))
    changed = make_policy(dataset=moved_datasets)
    train(open_ledger(policy=changed), make_proposal(run="2", dataset="new", plan={"num_rounds": 4}), 1)
    for dataset in ("notes", "new"):
        refused = read_refusal(
            open_ledger(policy=changed), make_proposal(run="3", dataset=dataset, plan={"num_rounds": 3})
        )
        assert refused.reason is Reason.MAX_EPSILON
    train(open_ledger(policy=changed), make_proposal(run="3", plan={"num_rounds": 2}), 1)


FIRST = ("notes", "notes.csv", "who")


def test_population_unit_site_and_delta_of_a_ledger_are_fixed(open_ledger: Any, path: Path) -> None:
    open_ledger()
    for key, other_value in (
        ("population.name", make_policy(population={"name": "staff"})),
        ("population.unit", make_user_policy(FIRST)),
        ("site", make_policy(site="b")),
        ("budget.delta", make_policy(budget={"delta": 1e-6})),
    ):
        with pytest.raises(
            RunError, match=rf"was created for {key} = .*; restore the old value, which is fixed for the ledger"
        ):
            open_ledger(policy=other_value)
    assert list_kinds(path) == OPENED


def test_user_column_of_a_data_set_cannot_change(open_ledger: Any, path: Path) -> None:
    open_ledger(policy=make_user_policy(FIRST))
    open_ledger(policy=make_user_policy(("other", "other.csv", "who")))  # an intermediate policy
    for refused, make_policy_with in (
        *(([("notes", file, "visit")], "dataset notes") for file in ("notes.csv", "moved.csv")),
        ([("notes2", "notes.csv", "visit")], r"file notes\.csv"),
        ([FIRST, ("notes2", "./notes.csv", "visit")], r"file notes\.csv"),
        ([("new", "new.csv", "who"), ("new2", "new.csv", "visit")], r"file new\.csv"),
    ):
        with pytest.raises(RunError, match=rf"created for {make_policy_with} columns\.user = "):
            open_ledger(policy=make_user_policy(*refused))
    open_ledger(policy=make_user_policy(FIRST, ("notes2", "notes.csv", "who"), ("others", "others.csv", "visit")))
    (data,) = make_user_policy(FIRST).dataset
    other_text = dataclasses.replace(data, columns=data.columns | {"text": "note"})
    open_ledger(policy=dataclasses.replace(make_user_policy(FIRST), dataset=(other_text,)))
    open_ledger(path=path.with_name("records.db"), policy=make_policy(dataset=make_user_policy(FIRST).dataset))
    open_ledger(path=path.with_name("records.db"))  # a ledger without user-level privacy


# Caps.


def test_whole_plan_is_reserved_when_its_first_round_is_accepted(open_ledger: Any) -> None:
    train(open_ledger(), make_proposal(plan={"num_rounds": 6}), 1)
    refused = read_refusal(open_ledger(), make_proposal(run="2"))
    assert (refused.reason, refused.requested) == (Reason.MAX_EPSILON, "11.4859")
    assert "at most 11, of which 8.8675 is spent or reserved" in refused.allowed, (
        "six rounds must be reserved, one of them spent"
    )
    train(open_ledger(), make_proposal(run="2", plan={"num_rounds": 4}), 1)
    assert read_refusal(open_ledger(), make_proposal(run="3", plan={"num_rounds": 1})).reason is Reason.MAX_EPSILON


def test_spare_rounds_are_reserved_with_the_planned_rounds(open_ledger: Any) -> None:
    # Ten rounds fit the cap: three and three spare ones are reserved until the run has used them or ends.
    with_spare = make_proposal(plan={"num_rounds": 3, "spare_rounds": 3})
    train(open_ledger(), with_spare, 1)
    assert open_ledger().history.count_remaining_charges(datetime.now(UTC)) == events.count_mechanisms(
        [with_spare.plan.event()] * 5
    )
    assert read_refusal(open_ledger(), make_proposal(run="2", plan={"num_rounds": 5})).reason is Reason.MAX_EPSILON
    train(open_ledger(), make_proposal(run="2", plan={"num_rounds": 4}), 1)
    for round in (2, 3, 4, 5, 6):
        train(open_ledger(), with_spare, round)
    assert open_ledger().history.count_total_charges() == events.count_mechanisms([with_spare.plan.event()] * 7), (
        "one of the rounds must belong to the other run"
    )


def test_run_is_accepted_only_if_its_spare_rounds_fit_the_budget(open_ledger: Any) -> None:
    assert (
        read_refusal(open_ledger(), make_proposal(plan={"num_rounds": 10, "spare_rounds": 1})).reason
        is Reason.MAX_EPSILON
    )
    assert not open_ledger().history.runs
    train(open_ledger(), make_proposal(plan={"num_rounds": 9, "spare_rounds": 1}), 1)


@pytest.mark.parametrize("ends", [True, False], ids=["ended", "expired"])
def test_finished_runs_release_their_unspent_reserve(open_ledger: Any, clock: Any, ends: bool) -> None:
    ledger, ten = open_ledger(), make_proposal(plan={"num_rounds": 10})
    train(ledger, ten, 1)
    clock.forward(days=29, hours=23)
    assert read_refusal(open_ledger(), make_proposal(run="2", plan={"num_rounds": 1})).reason is Reason.MAX_EPSILON
    if ends:
        open_ledger().end_run("r")
    else:
        clock.forward(hours=1)
    assert not open_ledger().history.count_remaining_charges(clock.time)
    assert read_refusal(open_ledger(), ten, 2).reason is Reason.RUN_ENDED
    train(open_ledger(), make_proposal(run="2", plan={"num_rounds": 9}), 1)
    assert ledger.reserve(ten, round=1, request="digest r 1") == b"reply"


def test_run_ends_once_and_its_round_in_flight_is_committed(open_ledger: Any, path: Path) -> None:
    reservation = reserve(open_ledger(), make_proposal(), 1)
    for run in ("r", "r", "unknown"):
        open_ledger().end_run(run)
    assert [kind for _, kind in list_kinds(path)].count("run_ended") == 1
    open_ledger().commit(reservation, b"reply")
    assert open_ledger().reserve(make_proposal(), round=1, request="digest r 1") == b"reply"


def test_receipt_does_not_report_expiry_as_the_end_of_a_run(open_ledger: Any, clock: Any) -> None:
    train(open_ledger(), make_proposal(), 1)
    clock.forward(days=31)
    assert read_refusal(open_ledger(), make_proposal(), 2).reason is Reason.RUN_ENDED
    assert not open_ledger().sign_receipt("r").ended
    clock.forward(days=-31)
    train(open_ledger(), make_proposal(), 2)
    open_ledger().end_run("r")
    assert open_ledger().sign_receipt("r").ended


def test_setting_the_clock_back_does_not_reopen_an_expired_run(open_ledger: Any, clock: Any) -> None:
    train(open_ledger(), make_proposal(), 1)
    clock.forward(days=31)
    train(open_ledger(), make_proposal(run="2"), 1)
    clock.forward(days=-30)
    assert read_refusal(open_ledger(), make_proposal(), 2).reason is Reason.RUN_ENDED


def test_period_cap_reserves_what_open_runs_may_still_spend(open_ledger: Any, clock: Any) -> None:
    four = filter.epsilon_filter([make_proposal().plan.event()] * 4, order=open_ledger().history.order, delta=1e-5)
    monthly = make_policy(budget={"max_epsilon_per_period": four + 1e-9, "period": "month"})
    train(open_ledger(policy=monthly, server=clock.time), make_proposal(plan={"num_rounds": 3}), 1)
    other = make_proposal(run="2", plan={"num_rounds": 2})
    assert read_refusal(open_ledger(policy=monthly, server=clock.time), other).reason is Reason.MAX_EPSILON_PER_PERIOD
    clock.forward(days=25)  # February: one round fewer is reserved
    train(open_ledger(policy=monthly, server=clock.time), other, 1)


def test_lowering_the_cap_stops_a_run_with_reserved_rounds(open_ledger: Any, path: Path) -> None:
    train(open_ledger(), proposal := make_proposal(plan={"num_rounds": 10}), 1)
    three = filter.epsilon_filter([proposal.plan.event()] * 3, order=open_ledger().history.order, delta=1e-5)
    lower = make_policy(budget={"max_epsilon": three + 1e-9})
    train(open_ledger(policy=lower), proposal, 2, 3)
    assert read_refusal(open_ledger(policy=lower), proposal, 4).reason is Reason.MAX_EPSILON
    assert open_ledger(policy=lower).reserve(proposal, round=3, request="digest r 3") == b"reply"
    train(open_ledger(), proposal, 4)  # as the earlier cap allowed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"limits": {"min_noise_multiplier": 1.5}}, Reason.MIN_NOISE_MULTIPLIER),
        ({"allow": {"leads": ()}}, Reason.LEADS),
        ({"releases": {"updates": False}}, Reason.UPDATES),
        ({"budget": {"max_epsilon_per_run": 1.0}}, Reason.MAX_EPSILON_PER_RUN),
    ],
)
def test_stricter_policy_stops_a_running_run(open_ledger: Any, change: dict[str, Any], reason: Reason) -> None:
    train(open_ledger(), make_proposal(), 1)
    assert read_refusal(open_ledger(policy=make_policy(**change)), make_proposal(), 2).reason is reason


def test_policy_changes_are_recorded_with_their_digests(open_ledger: Any, path: Path) -> None:
    other_value, unrelated = make_policy(limits={"max_rounds": 4}), make_policy(socket="site.sock")
    for opened in (
        make_policy(),
        make_policy(),
        unrelated,
        other_value,
        other_value,
        make_policy(),
    ):  # transport settings do not change the policy
        open_ledger(policy=opened)
    notes = [event.detail for event in verify(path).events if event.detail.get("what") == "policy"]
    assert [note["sha256"] for note in notes] == [make_policy().digest(), other_value.digest(), make_policy().digest()]
    assert [cap for _, cap, _ in open_ledger().history.policies] == [11.0] * 3


def test_changing_the_reference_keeps_the_order_of_the_filter(open_ledger: Any) -> None:
    order = open_ledger().history.order
    reference = dataclasses.replace(make_policy().budget.reference, noise_multiplier=30.0)
    assert open_ledger(policy=make_policy(budget={"reference": reference})).history.order == order
    other = make_policy(budget={"reference": reference}).budget.reference.event
    assert filter.find_best_order(other, epsilon=11.0, delta=1e-5) != order, "a new ledger would choose another order"


def test_run_without_privacy_is_accepted_only_without_a_cap(open_ledger: Any, path: Path) -> None:
    unlimited = make_policy(budget={"max_epsilon": math.inf}, limits={"min_noise_multiplier": 0.0})
    train(open_ledger(policy=unlimited), make_proposal(plan={"noise_multiplier": 0.0}), 1)
    assert open_ledger(policy=unlimited).history.epsilon() == math.inf
    capped = open_ledger(policy=make_policy(limits={"min_noise_multiplier": 0.0}), path=path.with_name("capped.db"))
    refused = read_refusal(capped, make_proposal(plan={"noise_multiplier": 0.0}))
    assert (refused.reason, refused.requested) == (Reason.MAX_EPSILON, "inf")


def test_seeded_run_marks_the_ledger_permanently(open_ledger: Any) -> None:
    study = make_policy(allow={"seeded_noise": True})
    assert not open_ledger(policy=study).history.seeded
    train(open_ledger(policy=study), make_proposal(seeded_noise=True), 1)
    open_ledger(policy=study).end_run("r")
    train(open_ledger(), make_proposal(run="2"), 1)
    assert open_ledger().history.seeded


def test_frozen_population_refuses_every_request(open_ledger: Any, path: Path) -> None:
    train(open_ledger(), make_proposal(), 1)
    in_flight = reserve(open_ledger(), make_proposal(), 2)
    open_ledger().freeze("two people asked to be left out")
    length = len(verify(path).events)
    assert verify(path).events[-1].detail["why"] == "two people asked to be left out"
    for proposal, round in ((make_proposal(), 1), (make_proposal(), 2), (make_proposal(run="2"), 1)):
        assert read_refusal(open_ledger(), proposal, round).reason is Reason.FROZEN
    for call in (open_ledger().make_offer, open_ledger().approve):
        assert read_refusal_reason(call, make_proposal(run="2")) is Reason.FROZEN
    assert read_refusal_reason(open_ledger().commit, in_flight, b"reply that must not leave") is Reason.FROZEN
    assert len(verify(path).events) == length
    assert open_ledger(policy=make_policy(budget={"max_epsilon": 100.0})).history.is_frozen


def test_offer_is_the_largest_acceptable_plan(open_ledger: Any, path: Path) -> None:
    train(open_ledger(), make_proposal(plan={"num_rounds": 6}), 1)
    proposal = make_proposal(run="2", plan={"num_rounds": 8})
    offer = open_ledger().make_offer(proposal)
    assert offer == Offer(site="a", run="2", max_rounds=4, min_noise=offer.min_noise)
    fits, too_little = (
        make_proposal(run="2", plan={"num_rounds": 8, "noise_multiplier": noise})
        for noise in (offer.min_noise, round(offer.min_noise - 2e-4, 4))
    )
    reserve(open_ledger(path=Path(shutil.copy(path, path.with_name("copy.db")))), fits, 1)
    assert read_refusal(open_ledger(), too_little).reason is Reason.MAX_EPSILON


def test_offer_is_recorded_without_charging_or_reserving_budget(open_ledger: Any, path: Path) -> None:
    assert read_refusal_reason(open_ledger().make_offer, make_proposal(rank=9)) is Reason.MAX_RANK, (
        "fewer rounds or more noise would not help"
    )
    open_ledger().make_offer(make_proposal(plan={"num_rounds": 20}))
    last = verify(path).events[-1]
    assert (last.kind, last.run, last.detail["what"]) == (Kind.RELEASE, "r", "offer")
    assert last.detail["max_rounds"] == 10
    assert not open_ledger().history.runs
    reserve(open_ledger(), make_proposal(plan={"num_rounds": 10}), 1)


def test_ledger_opened_under_an_older_policy_raises_a_run_error(open_ledger: Any) -> None:
    ledger = open_ledger()
    open_ledger(policy=make_policy(limits={"max_rounds": 3}))
    for request in (
        lambda: ledger.reserve(make_proposal(), round=1, request="q"),
        lambda: ledger.make_offer(make_proposal()),
    ):
        with pytest.raises(RunError, match="was changed while it was open; reopen it"):
            request()
    assert not open_ledger(policy=make_policy(limits={"max_rounds": 3})).history.runs
