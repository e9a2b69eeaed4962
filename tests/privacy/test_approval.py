"""Site-side approval of runs: each approval covers one exact proposal, and never overrides policy or budget."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy.distributed_noise import DistributedNoise
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.trust import Trust
from fedtune.spec import RunError

from .builders import (
    OPENED,
    OTHER,
    list_kinds,
    make_key,
    make_policy,
    make_proposal,
    read_refusal_reason,
    reserve,
    site_key,
)


@pytest.fixture
def open_manual(open_ledger: Any) -> Any:
    """Open the ledger of a site with manual approval; keywords change its policy further."""
    return lambda **changes: open_ledger(policy=make_policy(approval="manual", trust=Trust(secure=True), **changes))


def test_unapproved_run_is_not_charged_and_starts_once_approved(open_manual: Any, path: Path) -> None:
    ledger = open_manual()
    assert read_refusal_reason(reserve, ledger, make_proposal()) is Reason.AWAITING_APPROVAL
    assert list_kinds(path) == OPENED, "a run without approval must reserve nothing, so not even its plan is recorded"
    assert ledger.sign_receipt("r").charged_rounds == 0
    ledger.approve(make_proposal())
    reserve(ledger, make_proposal())
    assert list_kinds(path) == [*OPENED, (Kind.NOTE, "approved"), (Kind.PLAN, ""), (Kind.RESERVE, "")]
    approval = next(event for event in verify(path).events if event.detail.get("what") == "approved")
    assert approval.detail["proposal"] == make_proposal().to_json(), "the full proposal must be recorded for auditors"
    for round in (2, 3):
        reserve(ledger, make_proposal(), round)  # an approval covers all rounds of the run


SHARED = DistributedNoise(num_sites=3, threshold=3, colluders=0, noise_multiplier=4.0, cell_bits=1, bound=9)
_PLAN: dict[str, Any] = {"sampling_rate": 0.2, "noise_multiplier": 1.0000001, "max_grad_norm": 0.25, "local_steps": 2}
_PLAN |= {"num_rounds": 4, "spare_rounds": 1, "runs": 2, "metrics_noise_multiplier": 9.0}
_CHANGES: dict[str, dict[str, Any]] = {
    **{name: {name: value} for name, value in OTHER.items()},  # all within the policy
    **{name: {"plan": {name: value}} for name, value in _PLAN.items()},
    "shared": {"plan": {"local_steps": 1, "noise_multiplier": 4.0, "shared": SHARED}},
}
_REFUSED_ANYWAY = {
    *("lead", "task", "base_model", "dtype", "adapter", "unit", "delta", "noise"),
    *("records_per_user", "cohorts"),
}
"""Fields for which this policy allows a single value; for the last two, any record-level policy does, and lead runs
always have Gaussian noise.
"""


def test_changing_any_field_of_a_proposal_invalidates_its_approval(open_manual: Any) -> None:
    fields = {field.name for type_ in (Proposal, Plan) for field in dataclasses.fields(type_)} - {"plan"}
    assert fields == _CHANGES.keys() | _REFUSED_ANYWAY
    ledger = open_manual(allow={"seeded_noise": True}, releases={"metrics": "noised"})
    ledger.approve(make_proposal())
    ledger.require_startable(make_proposal())
    for field, changes in _CHANGES.items():
        changed = make_proposal(**changes)
        assert read_refusal_reason(ledger.require_startable, changed) is Reason.AWAITING_APPROVAL, field
        assert read_refusal_reason(reserve, ledger, changed) is Reason.AWAITING_APPROVAL, field
    reserve(ledger, make_proposal())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 9}, Reason.MAX_RANK),
        ({"plan": {"noise_multiplier": 0.5}}, Reason.MIN_NOISE_MULTIPLIER),
        ({"plan": {"num_rounds": 20}}, Reason.MAX_EPSILON),
        ({"dataset": "images"}, Reason.DATASET),
        ({"lead": make_key(9).public}, Reason.LEADS),
    ],
)
def test_proposals_refused_by_policy_or_budget_cannot_be_approved(
    open_manual: Any, path: Path, changes: Any, reason: Reason
) -> None:
    ledger = open_manual()
    assert read_refusal_reason(ledger.approve, make_proposal(**changes)) is reason
    assert list_kinds(path) == OPENED, "a rejected approval must not be recorded"
    assert read_refusal_reason(reserve, ledger, make_proposal(**changes)) is reason, (
        "the lead must receive the broken rule, not the advice to wait"
    )


def test_approved_run_is_refused_once_the_budget_is_spent(open_manual: Any) -> None:
    ledger, (first, two, late) = open_manual(), (make_proposal(run=run) for run in ("one", "two", "late"))
    for proposal in (first, two, late):
        ledger.approve(proposal)
    for proposal in (first, two):
        reserve(ledger, proposal)  # the newest approval does not replace earlier ones
    assert read_refusal_reason(reserve, ledger, late) is Reason.MAX_EPSILON


def test_approval_from_another_process_takes_effect(open_manual: Any, path: Path) -> None:
    serving = open_manual()
    assert read_refusal_reason(reserve, serving, make_proposal()) is Reason.AWAITING_APPROVAL
    open_manual().approve(make_proposal())
    open_manual().require_startable(make_proposal())
    assert verify(path, site_key=site_key.public).history.approved.keys() == {make_proposal().digest()}
    reserve(serving, make_proposal())
    reserve(open_manual(), make_proposal(), 2)


def test_approving_a_proposal_twice_has_no_further_effect(open_manual: Any) -> None:
    ledger = open_manual()
    ledger.approve(make_proposal())
    ledger.approve(make_proposal())
    reserve(ledger, make_proposal())
    ledger.approve(make_proposal())  # also after the run has started
    assert ledger.history.approved.keys() == {make_proposal().digest()}
    reserve(ledger, make_proposal(), 2)


def test_unused_approval_expires_after_thirty_days(open_manual: Any, clock: Any) -> None:
    ledger = open_manual()
    ledger.approve(make_proposal())
    clock.forward(days=30)
    ledger.require_startable(make_proposal())
    clock.forward(seconds=1)
    assert read_refusal_reason(reserve, ledger, make_proposal()) is Reason.AWAITING_APPROVAL
    ledger.approve(make_proposal())
    reserve(ledger, make_proposal())  # after a second approval
    clock.forward(days=29)
    reserve(ledger, make_proposal(), 2)  # a run that has started needs no further approval


def test_policy_and_budget_can_be_checked_before_approval(open_manual: Any) -> None:
    ledger = open_manual()
    ledger.require_startable(make_proposal(), approved=False)
    assert read_refusal_reason(ledger.require_startable, make_proposal()) is Reason.AWAITING_APPROVAL
    assert read_refusal_reason(ledger.require_startable, make_proposal(rank=9), approved=False) is Reason.MAX_RANK


def test_approval_survives_a_policy_change(open_manual: Any) -> None:
    open_manual().approve(make_proposal())
    reserve(open_manual(limits={"max_rounds": 19}), make_proposal())
    refusing = open_manual(allow={"max_rank": 1})
    assert read_refusal_reason(reserve, refusing, make_proposal(), 2) is Reason.MAX_RANK, (
        "an approval must not outlast the rule that allowed the run"
    )


def test_switching_to_manual_approval_does_not_stop_an_accepted_run(open_ledger: Any, open_manual: Any) -> None:
    reserve(open_ledger(), make_proposal())
    ledger = open_manual()
    ledger.require_startable(make_proposal())
    reserve(ledger, make_proposal(), 2)
    assert read_refusal_reason(reserve, ledger, make_proposal(run="s")) is Reason.AWAITING_APPROVAL
    reserve(open_ledger(), make_proposal(run="s"))  # and after switching back


def test_approving_under_an_outdated_policy_raises_an_error(open_ledger: Any, open_manual: Any) -> None:
    ledger = open_manual()
    open_ledger()
    with pytest.raises(RunError, match=r"policy of ledger .* was changed while it was open"):
        ledger.approve(make_proposal())


def test_waiting_runs_are_recorded_once_per_day_and_reason(open_manual: Any, path: Path) -> None:
    def refuse(reason: Reason, *runs: str) -> None:
        for run in runs:
            open_manual().record_refusal(Refused(reason), run=run, round=1, request=f"digest {run} 1")

    refuse(Reason.AWAITING_APPROVAL, "r", "r")
    refuse(Reason.PAUSED, "r", "r", "s", "s")
    open_manual().approve(make_proposal())
    refuse(Reason.PAUSED, "s")
    seen = [(event.run, event.detail["reason"]) for event in verify(path).events if event.kind is Kind.REFUSAL]
    assert seen == [("r", "awaiting_approval"), ("r", "paused"), ("s", "paused")], "each must be recorded once a day"


def test_only_pending_approval_and_pause_count_as_waiting() -> None:
    assert {reason for reason in Reason if reason.is_waiting} == {Reason.AWAITING_APPROVAL, Reason.PAUSED}
    assert not any(reason.is_final for reason in Reason if reason.is_waiting), "a reason to wait must not be final"


def test_end_of_a_run_records_the_digest_of_the_first_adapter(open_ledger: Any, path: Path) -> None:
    reserve(open_ledger(), make_proposal())
    open_ledger().end_run("r", adapter_sha256="ab" * 32)
    open_ledger().end_run("r", adapter_sha256="cd" * 32)
    end_details = [event.detail for event in verify(path).events if event.detail.get("what") == "run_ended"]
    assert end_details == [{"what": "run_ended", "adapter_sha256": "ab" * 32}], "the first recorded end must stay"
    assert open_ledger().history.runs["r"].adapter == "ab" * 32
    assert not open_ledger().history.runs["r"].is_open(open_ledger().history.now())
