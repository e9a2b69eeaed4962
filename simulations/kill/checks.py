"""What must be true after a kill.  Each check gives sentences that say what is wrong; none is what one hopes for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from observer import Seen
from world import Setting

from fedtune.federation.lead import Checkpoints, LeadState, compute_site_charge
from fedtune.federation.protocol import RoundRequest
from fedtune.privacy import accountant
from fedtune.privacy.events import count_mechanisms
from fedtune.privacy.filter import epsilon_filter
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import register, store
from fedtune.privacy.ledger.chain import Head, Kind
from fedtune.privacy.ledger.history import AcceptedRun
from fedtune.privacy.ledger.verify import VerifiedLedger, verify
from fedtune.privacy.release import Reason
from fedtune.privacy.run_plan import Plan
from fedtune.spec import ConfigError, FedtuneError

_HOT = bytes.fromhex("d9d505f920a163d7")


def half_written(sites: Path) -> bool:
    """Whether a transaction was interrupted so that SQLite has to undo it: its journal is there, and counts."""
    return any(journal.read_bytes()[:8] == _HOT for journal in sites.glob("*/ledger.db-journal"))


def verified(sites: Path, site: str) -> VerifiedLedger | None:
    """The verified ledger of a site; None where nothing was ever written into it.

    Raises:
        FedtuneError: the ledger does not verify, or is behind its anchor.
    """
    path, anchor = sites / site / "ledger.db", sites / "anchors" / f"{site}.json"
    head = Head.read(anchor) if anchor.exists() else None
    try:
        return verify(path, anchor=head, site_key=SigningKey.load(path.with_name("site_key.pem")).public)
    except FedtuneError:
        if head is None and not (path.exists() and _has_events(path)):
            return None
        raise


def _has_events(ledger: Path) -> bool:
    """Whether a ledger has its first events, which follow in a transaction of their own after the file is created."""
    with store.open_for_reading(ledger) as file:
        return bool(store.read_events(file))


def register_problems(sites: Path, site: str, seen: Seen, setting: Setting) -> Iterator[str]:
    """Whether the register of arrivals has everybody who could be sampled, under cohorts that the run is charged to."""
    if (cohorts := setting.everyone.plan.cohorts) is None or not seen.admitted:
        return
    with store.open_for_reading(sites / site / "ledger.db") as file:
        rows = {row.unit: row.cohort for row in register.read_rows(file)}
    secret = SigningKey.load(sites / site / "site_key.pem").derive_secret("arrivals")
    if missing := seen.admitted - {user for user in seen.admitted if register.pseudonymize(secret, user) in rows}:
        yield f"{len(missing)} people could be sampled whom the register lacks"
    if not all(cohort in cohorts for cohort in rows.values()):
        yield "the register has people of a cohort that no round was charged to"


def site_problems(seen: Seen, state: VerifiedLedger | None, setting: Setting) -> Iterator[str]:
    """Whether the ledger accounts for everything that was seen of its site."""
    run = None if state is None else state.history.runs.get(setting.config.run_id())
    charged = run.charged_rounds if run else 0
    yield from seen.failures
    if seen.num_updates > charged:
        yield f"an observer has {seen.num_updates} different updates, {charged} rounds are charged"
    if seen.begun > charged:
        yield f"records were read for {seen.begun} rounds, {charged} are charged"
    if charged > setting.everyone.plan.max_rounds:
        yield f"{charged} rounds are charged, the plan has {setting.everyone.plan.max_rounds}"
    if len(set(seen.trained)) != len(seen.trained):
        yield "the same noise was drawn twice"
    for request, updates in seen.updates.items():
        if len(updates) > 1:
            yield f"one request was answered with {len(updates)} different updates"
        if run is None or not updates <= {run.replies.get(request)}:
            yield "an update left that the ledger does not know as committed"
    if any(reason == Reason.SITE_ERROR for _, reason in seen.refusals):
        yield "the site failed"
    if state is not None:
        yield from _spending_problems(seen, state, setting.everyone.plan)
        yield from _record_problems(seen, state, charged)


def _spending_problems(seen: Seen, state: VerifiedLedger, plan: Plan) -> Iterator[str]:
    history, known = state.history, plan.event(rounds=seen.num_updates)
    spent = history.count_total_charges()
    if not history.divergence(spent) >= history.divergence([known]):
        yield "the divergence spent is below what an observer could know"
    by_filter = epsilon_filter(spent, order=history.order, delta=history.delta)
    if not by_filter >= epsilon_filter([known], order=history.order, delta=history.delta):
        yield "the epsilon spent by the filter is below what an observer could know"
    if not _epsilon(frozenset(spent.items()), plan.delta) >= _epsilon(
        frozenset(count_mechanisms([known]).items()), plan.delta
    ):
        yield "the epsilon spent by PLD is below what an observer could know"


@lru_cache
def _epsilon(spent: frozenset, delta: float) -> float:
    return accountant.epsilon_pld(dict(spent), delta, interval=accountant.COARSE) if spent else 0.0


def _record_problems(seen: Seen, state: VerifiedLedger, charged: int) -> Iterator[str]:
    recorded = {(event.request, event.detail["reason"]) for event in state.events if event.kind is Kind.REFUSAL}
    for request, reason in sorted(seen.refusals - recorded):
        yield f"the refusal {reason} of request {request} was given, and is not recorded"
    if seen.receipt is not None:
        if seen.receipt.sequence > state.history.length:
            yield f"a receipt knows event {seen.receipt.sequence}, the ledger has {state.history.length}"
        if seen.receipt.charged_rounds > charged:
            yield f"a receipt says {seen.receipt.charged_rounds} rounds, {charged} are charged"


def lead_problems(folder: Path, states: Mapping[str, VerifiedLedger | None], setting: Setting) -> Iterator[str]:
    """Whether the lead, from what it has on disk, would state at least what each site was charged."""
    run_id, plan = setting.config.run_id(), setting.everyone.plan
    try:
        lead = Checkpoints(folder / "checkpoints", setting.config.digest()).load()
    except ConfigError:  # no checkpoint yet, and so no request yet
        lead = LeadState(round=0, adapter=setting.everyone.shared.initial_adapter)
    for site, state in states.items():
        run = None if state is None else state.history.runs.get(run_id)
        charged = run.charged_rounds * plan.local_steps if run else 0
        stated = compute_site_charge(lead, site, plan).steps
        if stated < charged:
            yield f"the lead would state {stated} steps of {site}, which was charged {charged}"


def again_problems(
    told: list[dict[str, Any]],
    asked: list[RoundRequest],
    before: VerifiedLedger | None,
    after: VerifiedLedger | None,
    earlier: Seen,
    plan: Plan,
) -> Iterator[str]:
    """Whether one site, asked every request again after a kill, answered each as it must and charged no more.

    Args:
        told: what came of asking.
        before: the ledger when it was asked; `after`, once it had answered.
        earlier: what was seen of the site until the kill.
    """
    answers = {line["request"]: line for line in told if line["what"] in ("update", "refusal")}
    fresh = 0
    for request in asked:
        line = answers.get(request.digest(), {})
        given, must = (
            line.get("sha256", line.get("reason", "nothing")),
            _must_answer(_run(before, request), request, plan),
        )
        if must is None:
            fresh += 1
            if line.get("what") != "update" or line["noise"] in {*earlier.trained, *earlier.released}:
                yield f"round {request.round} was interrupted, and asking again gave {given}"
        elif given != must:
            yield f"round {request.round} asked again gave {given} and not {must}"
    if asked:
        charged = [run.charged_rounds if run else 0 for run in (_run(before, asked[0]), _run(after, asked[0]))]
        if charged[1] != charged[0] + fresh:
            yield f"asking again charged {charged[1] - charged[0]} rounds and not {fresh}"


def _run(state: VerifiedLedger | None, request: RoundRequest) -> AcceptedRun | None:
    return None if state is None else state.history.runs.get(request.run)


def _must_answer(run: AcceptedRun | None, request: RoundRequest, plan: Plan) -> str | None:
    """The stored update's SHA-256 or the reason to refuse; None: a fresh update, for a charge of its own."""
    if run is not None and request.digest() in run.replies:
        newest = list(run.replies)[-1] == request.digest()
        return run.replies[request.digest()] if newest else Reason.REPLY_NO_LONGER_STORED.value
    if run is not None and run.expires is None:
        return Reason.RUN_ENDED.value
    return Reason.PLAN_EXHAUSTED.value if run is not None and run.charged_rounds >= plan.max_rounds else None


def result_problems(
    folder: Path, states: Mapping[str, VerifiedLedger | None], setting: Setting, *, refused: bool
) -> Iterator[str]:
    """Whether the run came to its end, or to that of its sites' plans, and states what they charged."""
    plan, run_id = setting.everyone.plan, setting.config.run_id()
    result = json.loads((folder / "run.json").read_text())
    runs = {site: state and state.history.runs.get(run_id) for site, state in states.items()}
    charged = {site: run.charged_rounds if run else 0 for site, run in runs.items()}
    exhausted = all(count == plan.max_rounds for count in charged.values())
    if len(result["rounds"]) != plan.num_rounds and not (refused and exhausted):
        yield f"the run ended after round {len(result['rounds'])}, with {charged} rounds charged"
    for site, spent in result["privacy"]["sites"].items():
        true = charged.get(site, 0) * plan.local_steps
        if spent["steps"] < true or (spent["steps"] != true and not spent["upper_bound"]):
            yield f"run.json states {spent['steps']} steps of {site}, which was charged {true}"


def copy_problems(sites: Path, site: str, state: VerifiedLedger, scratch: Path) -> Iterator[str]:
    """Whether a copy of the ledger's file alone is a whole ledger once the site has come back."""
    if list((sites / site).glob("ledger.db-*")):
        yield "a journal was left behind"
    shutil.copy(sites / site / "ledger.db", scratch)
    if verify(scratch, site_key=state.site_key).history.hash != state.history.hash:
        yield "a copy of the file is another ledger"
