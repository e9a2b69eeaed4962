import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant

from fedtune.federation.lead import LeadState, compute_site_charge, read_receipts, save_receipts
from fedtune.federation.protocol import Reply
from fedtune.model.adapter import Adapter
from fedtune.privacy.release import Reason, Receipt, Refusal, Update
from fedtune.spec import RunError

from ..conftest import run_plan
from .conftest import make_receipt, make_site_key, make_update, round_of

RUN: Any = {"run": "r", "plan": run_plan()}


@pytest.fixture
def state(adapter: Adapter) -> LeadState:
    return LeadState(round=0, adapter=adapter)


def make_answer(receipt: Receipt | None, site: str = "a") -> dict[str, Reply]:
    """Build a reply with a receipt; a refusal is enough, because receipts count with any reply."""
    return {site: Reply(body=Refusal(site=site, run="r", round=1, reason=Reason.SITE_ERROR), receipt=receipt)}


def add_answers(state: LeadState, replies: dict[str, Reply]) -> LeadState:
    for site, reply in replies.items():
        state = state.with_receipt(site, reply.receipt, update=isinstance(reply.body, Update), **RUN) or state
    return state


def read_charged_steps(state: LeadState, site: str = "a") -> tuple[int, bool]:
    """Return the charged steps of a site, and whether they are an upper bound."""
    charge = compute_site_charge(state, site, run_plan())
    return charge.steps, charge.upper_bound


def test_site_charge_matches_its_receipt_and_is_zero_without_requests(state: LeadState) -> None:
    charge = compute_site_charge(state, "a", run_plan())
    assert (charge.steps, charge.epsilon, charge.epsilon_rdp, charge.upper_bound) == (0, 0.0, 0.0, False)
    state = add_answers(state.with_requests_to(["a"]), make_answer(make_receipt(charged=2)))
    charge = compute_site_charge(state, "a", run_plan())
    assert read_charged_steps(state) == (4, False)
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_event.PoissonSampledDpEvent(0.2, dp_event.GaussianDpEvent(4.0))
    assert charge.epsilon == pytest.approx(accountant.compose(step, 4).get_epsilon(1e-5), abs=1e-3)
    assert charge.planned_epsilon == pytest.approx(accountant.compose(step, 4).get_epsilon(1e-5), abs=1e-3)
    assert charge.epsilon < charge.epsilon_rdp


def test_silent_site_is_charged_for_every_requested_round(state: LeadState) -> None:
    state = add_answers(state.with_requests_to(["a", "b"]), make_answer(make_receipt(charged=1)))
    state = state.with_requests_to(["a", "b"])
    assert read_charged_steps(state, "a") == read_charged_steps(state, "b") == (4, True)
    assert (
        compute_site_charge(state, "a", run_plan()).epsilon == compute_site_charge(state, "b", run_plan()).epsilon > 0
    )
    # It never counts more than the plan lets a ledger charge.
    state = add_answers(state.with_requests_to(["a"]), make_answer(make_receipt(charged=3)))
    for _ in range(5):
        state = state.with_requests_to(["a"])
    assert read_charged_steps(state) == (2 * run_plan().max_rounds, True)


@pytest.mark.parametrize("fault", [{"site": "b"}, {"run": "other"}, "unsigned"])
def test_receipt_of_another_site_or_run_is_treated_as_missing(state: LeadState, fault: Any) -> None:
    unsigned = fault == "unsigned"
    sent = replace(make_receipt(charged=1), charged_rounds=0) if unsigned else make_receipt(**{"charged": 0, **fault})
    state = add_answers(state.with_requests_to(["a"]), make_answer(sent))
    assert (state.receipts, read_charged_steps(state)) == ({}, (2, True))


def test_receipt_under_a_changed_site_key_is_ignored(state: LeadState) -> None:
    state = add_answers(state.with_requests_to(["a"]), make_answer(make_receipt(charged=1)))
    state = add_answers(state.with_requests_to(["a"]), make_answer(make_receipt(charged=2, key=make_site_key("b"))))
    assert (state.receipts["a"], read_charged_steps(state)) == (make_receipt(charged=1), (4, True))


@pytest.mark.parametrize("changes", [{"sites": ("a",)}, {"sites": (), "failed_sites": {"a": "beyond_plan"}}])
def test_receipt_counting_fewer_rounds_than_updates_is_rejected(state: LeadState, changes: Any) -> None:
    # A server could send an old genuine receipt with each new update, and hide the charges.
    reused = make_receipt(charged=1)
    state = add_answers(state.with_requests_to(["a"]), {"a": Reply(body=make_update(), receipt=reused)})
    state = replace(state, rounds=(round_of(1, **changes),))
    assert compute_site_charge(state, "a", run_plan()).upper_bound is False
    replayed = add_answers(state.with_requests_to(["a"]), {"a": Reply(body=make_update(round=2), receipt=reused)})
    assert read_charged_steps(replayed) == (4, True)
    honest = add_answers(
        state.with_requests_to(["a"]), {"a": Reply(body=make_update(round=2), receipt=make_receipt(charged=2))}
    )
    assert read_charged_steps(honest) == (4, False)
    assert honest.with_receipt("a", reused, **RUN) is None


def test_receipt_counting_more_rounds_than_the_plan_is_rejected(state: LeadState) -> None:
    # With or without a signature: composing so many events would take hours and all memory.
    for charged in (5, 10**18):
        replies = make_answer(make_receipt(charged=charged))
        updated = add_answers(state.with_requests_to(["a"]), replies)
        assert (updated.receipts, updated.unanswered) == ({}, {"a": 1})


def test_remaining_time_is_estimated_from_rounds_without_one_time_work() -> None:
    """The first estimate is within a factor of two, however slow the first round and its scores are."""

    def make_state(completed: int, *, first_s: float = 60.0, gap_s: float = 0.0) -> LeadState:
        ends = [first_s + 20 * n + gap_s * (n > 2) for n in range(completed)]
        start = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
        results = [
            round_of(n, seconds=first_s if n == 1 else 16.0, ended=(start + timedelta(seconds=end)).isoformat())
            for n, end in enumerate(ends, 1)
        ]
        seconds = 90.0 + ends[-1] if ends else 0.0
        return LeadState(round=completed, adapter=Adapter({}), rounds=results, seconds=seconds)

    assert make_state(0).seconds_per_round is None
    assert make_state(1).seconds_per_round is None, "one slow first round would triple the estimate"
    for completed in range(2, 10):
        assert make_state(completed).seconds_per_round == 20.0
    assert make_state(6, gap_s=3600.0).seconds_per_round == 20.0, "an interruption of an hour must not count"
    fast = replace(
        make_state(3),
        rounds=[replace(result, seconds=0.4, ended=make_state(1).rounds[0].ended) for result in make_state(3).rounds],
    )
    assert fast.seconds_per_round == 0.4


@pytest.fixture
def receipts_file(tmp_path: Path) -> Path:
    return tmp_path / "lead" / "receipts.json"


def test_concurrent_runs_keep_all_receipts(receipts_file: Path) -> None:
    def save(sites: str) -> None:
        for site in sites:
            save_receipts(receipts_file, {site: make_receipt(site)})

    threads = [threading.Thread(target=save, args=(sites,)) for sites in ("abcdefgh", "ijklmnop")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_receipts(receipts_file)) == set("abcdefghijklmnop")


def test_newest_receipt_per_site_is_kept_over_all_runs(receipts_file: Path) -> None:
    save_receipts(receipts_file, {"a": make_receipt("a", charged=2), "b": make_receipt("b")})
    save_receipts(receipts_file, {"a": make_receipt("a", charged=1, run="older")})
    assert read_receipts(receipts_file)["a"] == make_receipt("a", charged=2)
    save_receipts(receipts_file, {"a": make_receipt("a", charged=3, run="newer")})
    assert read_receipts(receipts_file) == {"a": make_receipt("a", charged=3, run="newer"), "b": make_receipt("b")}
    assert all(receipt.has_valid_signature() for receipt in read_receipts(receipts_file).values())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"a"', '{"a": 1}', '{"a": {}}', '{"a": {"site": "a"}}', "\udcff", "1" * 5000],
    ids=lambda text: text[:20],
)
def test_damaged_receipt_file_is_reported_and_not_overwritten(receipts_file: Path, text: str) -> None:
    receipts_file.parent.mkdir()
    receipts_file.write_bytes(text.encode("utf-8", "surrogateescape"))
    before = receipts_file.read_bytes()
    # If the file were taken as empty, a restored ledger would pass.
    for call in (partial(read_receipts, receipts_file), lambda: save_receipts(receipts_file, {"a": make_receipt("a")})):
        with pytest.raises(RunError, match=r"receipts\.json is damaged"):
            call()
    assert receipts_file.read_bytes() == before
