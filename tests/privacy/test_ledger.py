"""A round at a ledger: charged before it is trained, answered once, and never beyond its plan, its run and its caps."""

import dataclasses
import math
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy import events, filter
from fedtune.privacy.ledger import site_ledger as ledger_module
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.site_ledger import Reservation, SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Reason, Refused
from fedtune.privacy.site_policy import Dataset
from fedtune.spec import RunError

from .builders import OPENED, kinds_of, of_users, policy, proposal, reason_of, reserve, site_key, tamper, train


def refusal_of(ledger: SiteLedger, proposal: Proposal, round: int = 1, request: str | None = None) -> Refused:
    """Why a request is refused; nothing is charged for it, also as a fresh process sees it."""
    before = ledger.history.total_charges()
    with pytest.raises(Refused) as caught:
        ledger.reserve(proposal, round=round, request=request or f"digest {proposal.run} {round}")
    ledger.end_run("no such run")  # looks at the file again
    assert ledger.history.total_charges() == before
    return caught.value


def test_round_is_charged_before_training_and_committed_afterwards(path: Path, opened: Any) -> None:
    ledger = opened()
    granted = reserve(ledger, proposal(), 1, "digest 1")
    assert granted == Reservation(run="r", round=1, request="digest 1", attempt=1)
    assert kinds_of(path) == [*OPENED, (Kind.PLAN, ""), (Kind.RESERVE, "")]
    charged = events.from_json(verify(path).events[-1].detail["event"])
    assert charged == proposal().plan.event()
    assert opened().history.total_charges() == events.count_mechanisms([charged]), (
        "a killed process is charged for what it began"
    )
    ledger.commit(granted, b"reply 1", fingerprint="f")
    assert [kind for kind, _ in kinds_of(path)[2:]] == [Kind.PLAN, Kind.RESERVE, Kind.COMMIT]
    assert verify(path).events[-1].detail["fingerprint"] == "f"
    assert all(event.dataset == "notes" for event in verify(path).events[2:])


def test_different_request_for_the_same_round_is_refused(opened: Any) -> None:
    train(opened(), proposal(), 1)
    refused = refusal_of(opened(), proposal(), 1, "another digest")
    assert refused.reason is Reason.ROUND_REQUESTED_DIFFERENTLY
    assert (refused.asked, refused.allowed) == ("another digest", "digest r 1")
    reserve(opened(), proposal(), 2)  # interrupted, and retried by the same request alone
    assert refusal_of(opened(), proposal(), 2, "another").reason is Reason.ROUND_REQUESTED_DIFFERENTLY
    assert reserve(opened(), proposal(), 2).attempt == 2


@pytest.mark.parametrize(
    "change",
    [
        *({"plan": {"noise_multiplier": 0.9}}, {"plan": {"noise_multiplier": 1.1}}, {"plan": {"num_rounds": 6}}),
        *({"plan": {"spare_rounds": 1}}, {"rank": 3}, {"dataset": "letters"}, {"num_sites": 4}),
    ],
)
def test_changed_proposal_is_refused(opened: Any, change: dict[str, Any]) -> None:
    train(opened(), proposal(), 1)
    refused = refusal_of(opened(), proposal(**change), 2)
    assert refused.reason is Reason.PLAN_CHANGED
    assert (refused.asked, refused.allowed) == (proposal(**change).digest(), proposal().digest())


def test_interrupted_round_is_charged_and_its_retry_uses_a_spare_round(opened: Any) -> None:
    once_more = proposal(plan={"num_rounds": 2, "spare_rounds": 1})
    assert [reserve(opened(), once_more, 1).attempt for _ in range(3)] == [1, 2, 3]
    assert opened().sign_receipt("r").charged_rounds == 3
    for round in (1, 2):
        refused = refusal_of(opened(), once_more, round)
        assert (refused.reason, refused.asked, refused.allowed) == (Reason.PLAN_EXHAUSTED, "4", "3")


def test_only_the_newest_attempt_can_be_committed(opened: Any, path: Path) -> None:
    with pytest.raises((AssertionError, KeyError)):
        opened().commit(Reservation(run="r", round=1, request="q", attempt=1), b"of a round that nobody reserved")
    assert kinds_of(path) == OPENED
    first = reserve(opened(), proposal(), 1)
    second = reserve(opened(), proposal(), 1)
    with pytest.raises(AssertionError, match="only the newest reservation"):
        opened().commit(first, b"of the first")
    opened().commit(second, b"of the second")
    assert opened().reserve(proposal(), round=1, request="digest r 1") == b"of the second"
    with pytest.raises(AssertionError, match="committed once"):
        opened().commit(second, b"again")
    assert [kind for kind, _ in kinds_of(path)].count(Kind.COMMIT) == 1


def test_newest_reply_is_stored_and_resent_without_charge(opened: Any, path: Path) -> None:
    ledger = opened()
    train(ledger, proposal(), 1, reply=b"reply 1")
    train(ledger, proposal(run="other"), 1, reply=b"reply of the other")
    train(ledger, proposal(), 2, reply=b"reply 2")
    length = len(verify(path).events)
    for each in (ledger, opened()):
        assert each.reserve(proposal(), round=2, request="digest r 2") == b"reply 2"
        assert each.reserve(proposal(run="other"), round=1, request="digest other 1") == b"reply of the other"
        refused = refusal_of(each, proposal(), 1)
        assert (refused.reason, refused.asked) == (Reason.REPLY_NO_LONGER_STORED, "1")
    assert len(verify(path).events) == length


@pytest.mark.parametrize("kept_back", [1, 2], ids=["interrupted", "never asked"])
def test_delayed_request_for_an_earlier_round_is_not_charged(opened: Any, kept_back: int) -> None:
    reserve(opened(), proposal(), 1)
    train(
        opened(), proposal(), 1 if kept_back == 2 else 2
    )  # an interrupted round is charged again, before any later one
    train(opened(), proposal(), 3)
    before = opened().history.charged_rounds("r")
    refused = refusal_of(opened(), proposal(), kept_back)
    assert (refused.reason, refused.asked) == (Reason.REPLY_NO_LONGER_STORED, str(kept_back))
    assert opened().history.charged_rounds("r") == before == 3


@pytest.mark.parametrize("sql", ["UPDATE replies SET reply = x'00'", "DELETE FROM replies"])
def test_tampered_reply_is_not_sent(opened: Any, path: Path, sql: str) -> None:
    train(opened(), proposal(), 1)
    tamper(path, sql)
    assert reason_of(opened().reserve, proposal(), round=1, request="digest r 1") is Reason.REPLY_NO_LONGER_STORED
    assert opened().sign_receipt("r").charged_rounds == 1, "an old round is not trained again"


# Receipts and records.


def test_receipt_counts_rounds_without_a_reply(opened: Any) -> None:
    ledger = opened()
    nothing = ledger.sign_receipt("r")
    assert (nothing.charged_rounds, nothing.sequence) == (0, 2)
    train(ledger, proposal(), 1)
    reserve(ledger, proposal(), 2)
    receipt = ledger.sign_receipt("r")
    assert (receipt.site, receipt.run, receipt.charged_rounds) == ("a", "r", 2)
    assert (receipt.sequence, receipt.site_key) == (6, site_key.public)
    assert receipt.has_valid_signature()


def test_receipt_hides_the_chain_head(opened: Any, path: Path) -> None:
    # Whoever knows the hash could test a guess of what the ledger holds.
    reserve(opened(), proposal(), 1)
    receipt = opened().sign_receipt("r")
    assert receipt.head not in {event.hash for event in verify(path).events}
    assert opened().sign_receipt("r") == receipt, "the same state has the same receipt"


def test_refusal_is_recorded_and_costs_nothing(opened: Any, path: Path) -> None:
    opened().record_refusal(refusal_of(opened(), proposal(rank=9)), run="r", round=1, request="digest r 1", lead="ab")
    last = verify(path).events[-1]
    assert (last.kind, last.run, last.round, last.request) == (Kind.REFUSAL, "r", 1, "digest r 1")
    assert last.detail == {"reason": "max_rank", "asked": "9", "allowed": "at most 8", "lead": "ab"}
    assert not opened().history.total_charges()


@pytest.mark.parametrize("limit", ["MOST_ANSWERS_A_DAY", "MOST_STRANGERS_A_DAY"])
def test_recorded_refusals_are_limited_per_day_and_in_length(
    opened: Any, path: Path, clock: Any, monkeypatch: Any, limit: str
) -> None:
    monkeypatch.setattr(ledger_module, limit, 3)
    refused = Refused(Reason.LEADS if "STRANGERS" in limit else Reason.TASKS, asked="x" * 100_000)
    for _ in range(3):
        for _ in range(5):
            opened().record_refusal(refused, run="r", round=1, request="q")
        clock.forward(days=1)
    refusals = [event for event in verify(path).events if event.kind is Kind.REFUSAL]
    assert [event.time[:10] for event in refusals] == ["2030-01-10"] * 3 + ["2030-01-11"] * 3 + ["2030-01-12"] * 3
    assert all(len(str(event.detail)) < 1000 for event in refusals)


# Who is asked for: one budget for one population.


def test_all_data_sets_share_the_budget_of_the_population(opened: Any) -> None:
    # Ten rounds fit: another run, data set, path of the data or declared size starts no new ones.
    train(opened(), proposal(plan={"num_rounds": 4}), 1)
    moved = (Dataset(id="notes", declared_size=9000, path="moved.csv"), Dataset(id="new", declared_size=10))
    changed = policy(dataset=moved)
    train(opened(policy=changed), proposal(run="2", dataset="new", plan={"num_rounds": 4}), 1)
    for dataset in ("notes", "new"):
        refused = refusal_of(opened(policy=changed), proposal(run="3", dataset=dataset, plan={"num_rounds": 3}))
        assert refused.reason is Reason.MAX_EPSILON
    train(opened(policy=changed), proposal(run="3", plan={"num_rounds": 2}), 1)


FIRST = ("notes", "notes.csv", "who")


def test_population_unit_site_and_delta_of_a_ledger_are_fixed(opened: Any, path: Path) -> None:
    opened()
    for key, other in (
        ("population.name", policy(population={"name": "staff"})),
        ("population.unit", of_users(FIRST)),
        ("site", policy(site="b")),
        ("budget.delta", policy(budget={"delta": 1e-6})),
    ):
        with pytest.raises(
            RunError, match=rf"was created for {key} = .*; restore the old value, which is fixed for the ledger"
        ):
            opened(policy=other)
    assert kinds_of(path) == OPENED


def test_user_column_of_a_data_set_cannot_change(opened: Any, path: Path) -> None:
    opened(policy=of_users(FIRST))
    opened(policy=of_users(("other", "other.csv", "who")))  # a detour
    for refused, by in (
        *(([("notes", file, "visit")], "dataset notes") for file in ("notes.csv", "moved.csv")),
        ([("notes2", "notes.csv", "visit")], r"file notes\.csv"),
        ([FIRST, ("notes2", "./notes.csv", "visit")], r"file notes\.csv"),
        ([("new", "new.csv", "who"), ("new2", "new.csv", "visit")], r"file new\.csv"),
    ):
        with pytest.raises(RunError, match=rf"made for {by} columns\.user = "):
            opened(policy=of_users(*refused))
    opened(policy=of_users(FIRST, ("notes2", "notes.csv", "who"), ("others", "others.csv", "visit")))
    (data,) = of_users(FIRST).dataset
    other_text = dataclasses.replace(data, columns=data.columns | {"text": "note"})
    opened(policy=dataclasses.replace(of_users(FIRST), dataset=(other_text,)))
    opened(path=path.with_name("records.db"), policy=policy(dataset=of_users(FIRST).dataset))
    opened(path=path.with_name("records.db"))  # there a user is nobody's unit


# Caps.


def test_whole_plan_is_reserved_when_its_first_round_is_accepted(opened: Any) -> None:
    train(opened(), proposal(plan={"num_rounds": 6}), 1)
    refused = refusal_of(opened(), proposal(run="2"))
    assert (refused.reason, refused.asked) == (Reason.MAX_EPSILON, "11.4859")
    assert "at most 11, of which 8.8675 is spent" in refused.allowed, "six rounds are taken, one of them spent"
    train(opened(), proposal(run="2", plan={"num_rounds": 4}), 1)
    assert refusal_of(opened(), proposal(run="3", plan={"num_rounds": 1})).reason is Reason.MAX_EPSILON


def test_spare_rounds_are_reserved_with_the_planned_rounds(opened: Any) -> None:
    # Ten rounds fit the cap: three and three spare ones are held, until the run ends or has used them.
    with_spare = proposal(plan={"num_rounds": 3, "spare_rounds": 3})
    train(opened(), with_spare, 1)
    assert opened().history.remaining_charges(datetime.now(UTC)) == events.count_mechanisms(
        [with_spare.plan.event()] * 5
    )
    assert refusal_of(opened(), proposal(run="2", plan={"num_rounds": 5})).reason is Reason.MAX_EPSILON
    train(opened(), proposal(run="2", plan={"num_rounds": 4}), 1)
    for round in (2, 3, 4, 5, 6):
        train(opened(), with_spare, round)
    assert opened().history.total_charges() == events.count_mechanisms([with_spare.plan.event()] * 7), (
        "one of them of the other run"
    )


def test_run_is_accepted_only_if_its_spare_rounds_fit_the_budget(opened: Any) -> None:
    assert refusal_of(opened(), proposal(plan={"num_rounds": 10, "spare_rounds": 1})).reason is Reason.MAX_EPSILON
    assert not opened().history.runs
    train(opened(), proposal(plan={"num_rounds": 9, "spare_rounds": 1}), 1)


@pytest.mark.parametrize("ends", [True, False], ids=["ended", "expired"])
def test_finished_runs_release_their_unspent_reserve(opened: Any, clock: Any, ends: bool) -> None:
    ledger, ten = opened(), proposal(plan={"num_rounds": 10})
    train(ledger, ten, 1)
    clock.forward(days=29, hours=23)
    assert refusal_of(opened(), proposal(run="2", plan={"num_rounds": 1})).reason is Reason.MAX_EPSILON
    if ends:
        opened().end_run("r")
    else:
        clock.forward(hours=1)
    assert not opened().history.remaining_charges(clock.time)
    assert refusal_of(opened(), ten, 2).reason is Reason.RUN_ENDED
    train(opened(), proposal(run="2", plan={"num_rounds": 9}), 1)
    assert ledger.reserve(ten, round=1, request="digest r 1") == b"reply"


def test_run_ends_once_and_its_round_in_flight_is_committed(opened: Any, path: Path) -> None:
    granted = reserve(opened(), proposal(), 1)
    for run in ("r", "r", "unknown"):
        opened().end_run(run)
    assert [what for _, what in kinds_of(path)].count("run_ended") == 1
    opened().commit(granted, b"reply")
    assert opened().reserve(proposal(), round=1, request="digest r 1") == b"reply"


def test_receipt_does_not_report_expiry_as_the_end_of_a_run(opened: Any, clock: Any) -> None:
    train(opened(), proposal(), 1)
    clock.forward(days=31)
    assert refusal_of(opened(), proposal(), 2).reason is Reason.RUN_ENDED
    assert not opened().sign_receipt("r").ended
    clock.forward(days=-31)
    train(opened(), proposal(), 2)
    opened().end_run("r")
    assert opened().sign_receipt("r").ended


def test_setting_the_clock_back_does_not_reopen_an_expired_run(opened: Any, clock: Any) -> None:
    train(opened(), proposal(), 1)
    clock.forward(days=31)
    train(opened(), proposal(run="2"), 1)
    clock.forward(days=-30)
    assert refusal_of(opened(), proposal(), 2).reason is Reason.RUN_ENDED


def test_period_cap_reserves_what_open_runs_may_still_spend(opened: Any, clock: Any) -> None:
    four = filter.epsilon_filter([proposal().plan.event()] * 4, order=opened().history.order, delta=1e-5)
    monthly = policy(budget={"max_epsilon_per_period": four + 1e-9, "period": "month"})
    train(opened(policy=monthly, server=clock.time), proposal(plan={"num_rounds": 3}), 1)
    asked = proposal(run="2", plan={"num_rounds": 2})
    assert refusal_of(opened(policy=monthly, server=clock.time), asked).reason is Reason.MAX_EPSILON_PER_PERIOD
    clock.forward(days=25)  # February: one round less is held
    train(opened(policy=monthly, server=clock.time), asked, 1)


def test_lowering_the_cap_stops_a_run_with_reserved_rounds(opened: Any, path: Path) -> None:
    train(opened(), asked := proposal(plan={"num_rounds": 10}), 1)
    three = filter.epsilon_filter([asked.plan.event()] * 3, order=opened().history.order, delta=1e-5)
    lower = policy(budget={"max_epsilon": three + 1e-9})
    train(opened(policy=lower), asked, 2, 3)
    assert refusal_of(opened(policy=lower), asked, 4).reason is Reason.MAX_EPSILON
    assert opened(policy=lower).reserve(asked, round=3, request="digest r 3") == b"reply"
    train(opened(), asked, 4)  # as the site allowed before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"limits": {"min_noise_multiplier": 1.5}}, Reason.MIN_NOISE_MULTIPLIER),
        ({"allow": {"leads": ()}}, Reason.LEADS),
        ({"releases": {"updates": False}}, Reason.UPDATES),
        ({"budget": {"max_epsilon_per_run": 1.0}}, Reason.MAX_EPSILON_PER_RUN),
    ],
)
def test_stricter_policy_stops_a_running_run(opened: Any, change: dict[str, Any], reason: Reason) -> None:
    train(opened(), proposal(), 1)
    assert refusal_of(opened(policy=policy(**change)), proposal(), 2).reason is reason


def test_policy_changes_are_recorded_with_their_digests(opened: Any, path: Path) -> None:
    other, heard = policy(limits={"max_rounds": 4}), policy(socket="site.sock")
    for each in (policy(), policy(), heard, other, other, policy()):  # the way of messages is no other policy
        opened(policy=each)
    notes = [event.detail for event in verify(path).events if event.detail.get("what") == "policy"]
    assert [note["sha256"] for note in notes] == [policy().digest(), other.digest(), policy().digest()]
    assert [cap for _, cap, _ in opened().history.policies] == [11.0] * 3


def test_changing_the_reference_keeps_the_order_of_the_filter(opened: Any) -> None:
    order = opened().history.order
    reference = dataclasses.replace(policy().budget.reference, noise_multiplier=30.0)
    assert opened(policy=policy(budget={"reference": reference})).history.order == order
    other = policy(budget={"reference": reference}).budget.reference.event
    assert filter.best_order(other, epsilon=11.0, delta=1e-5) != order, "a new ledger would have another"


def test_run_without_privacy_is_accepted_only_without_a_cap(opened: Any, path: Path) -> None:
    unlimited = policy(budget={"max_epsilon": math.inf}, limits={"min_noise_multiplier": 0.0})
    train(opened(policy=unlimited), proposal(plan={"noise_multiplier": 0.0}), 1)
    assert opened(policy=unlimited).history.epsilon() == math.inf
    capped = opened(policy=policy(limits={"min_noise_multiplier": 0.0}), path=path.with_name("capped.db"))
    refused = refusal_of(capped, proposal(plan={"noise_multiplier": 0.0}))
    assert (refused.reason, refused.asked) == (Reason.MAX_EPSILON, "inf")


def test_seeded_run_marks_the_ledger_permanently(opened: Any) -> None:
    study = policy(allow={"seeded_noise": True})
    assert not opened(policy=study).history.seeded
    train(opened(policy=study), proposal(seeded_noise=True), 1)
    opened(policy=study).end_run("r")
    train(opened(), proposal(run="2"), 1)
    assert opened().history.seeded


def test_frozen_population_refuses_every_request(opened: Any, path: Path) -> None:
    train(opened(), proposal(), 1)
    in_flight = reserve(opened(), proposal(), 2)
    opened().freeze("two people asked to be left out")
    length = len(verify(path).events)
    assert verify(path).events[-1].detail["why"] == "two people asked to be left out"
    for asked, round in ((proposal(), 1), (proposal(), 2), (proposal(run="2"), 1)):
        assert refusal_of(opened(), asked, round).reason is Reason.FROZEN
    for call in (opened().make_offer, opened().approve):
        assert reason_of(call, proposal(run="2")) is Reason.FROZEN
    assert reason_of(opened().commit, in_flight, b"reply that must not leave") is Reason.FROZEN
    assert len(verify(path).events) == length
    assert opened(policy=policy(budget={"max_epsilon": 100.0})).history.is_frozen


def test_offer_is_the_largest_acceptable_plan(opened: Any, path: Path) -> None:
    train(opened(), proposal(plan={"num_rounds": 6}), 1)
    asked = proposal(run="2", plan={"num_rounds": 8})
    offer = opened().make_offer(asked)
    assert offer == Offer(site="a", run="2", most_rounds=4, least_noise=offer.least_noise)
    fits, too_little = (
        proposal(run="2", plan={"num_rounds": 8, "noise_multiplier": noise})
        for noise in (offer.least_noise, round(offer.least_noise - 2e-4, 4))
    )
    reserve(opened(path=Path(shutil.copy(path, path.with_name("copy.db")))), fits, 1)
    assert refusal_of(opened(), too_little).reason is Reason.MAX_EPSILON


def test_offer_is_recorded_without_charging_or_reserving_budget(opened: Any, path: Path) -> None:
    assert reason_of(opened().make_offer, proposal(rank=9)) is Reason.MAX_RANK, "no rounds and no noise would mend that"
    opened().make_offer(proposal(plan={"num_rounds": 20}))
    last = verify(path).events[-1]
    assert (last.kind, last.run, last.detail["what"]) == (Kind.RELEASE, "r", "offer")
    assert last.detail["most_rounds"] == 10
    assert not opened().history.runs
    reserve(opened(), proposal(plan={"num_rounds": 10}), 1)


def test_ledger_opened_under_an_older_policy_raises_a_run_error(opened: Any) -> None:
    ledger = opened()
    opened(policy=policy(limits={"max_rounds": 3}))
    for ask in (lambda: ledger.reserve(proposal(), round=1, request="q"), lambda: ledger.make_offer(proposal())):
        with pytest.raises(RunError, match="was changed while it was open; reopen it"):
            ask()
    assert not opened(policy=policy(limits={"max_rounds": 3})).history.runs
