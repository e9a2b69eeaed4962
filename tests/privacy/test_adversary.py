"""No sequence of requests exceeds a cap, even if each is chosen after seeing the spending so far."""

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import DpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.privacy import events, filter
from fedtune.privacy.cohorts import compute_period_number
from fedtune.privacy.ledger import history, run_acceptance
from fedtune.privacy.ledger.site_ledger import Reservation, SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_policy import Policy

from .builders import make_policy, make_proposal, site_key
from .conftest import Clock

SETTINGS: list[dict[str, Any]] = [
    {"sampling_rate": 0.25, "noise_multiplier": 1.0, "local_steps": 3},
    {"sampling_rate": 0.5, "noise_multiplier": 0.7, "local_steps": 1},
    {"sampling_rate": 0.01, "noise_multiplier": 0.6, "local_steps": 10},
    {"sampling_rate": 0.25, "noise_multiplier": 4.0, "local_steps": 5, "metrics_noise_multiplier": 5.0},
]


def compute_divergence(charged: Counter[DpEvent], order: float) -> float:
    """Compute the divergence with dp-accounting alone, one event at a time."""
    accountant = RdpAccountant(orders=[order])
    for event, count in charged.items():
        accountant.compose(event, count)
    return float(accountant._rdp[0])


class Game:
    """A site and an adversary, who reads the ledger's figures before each move and requests as much as possible.

    The real charges are counted separately from the ledger, from the reservations that it granted.
    """

    def __init__(self, path: Path, policy: Policy) -> None:
        self.path, self.policy = path, policy
        self.clock = Clock(datetime(2030, 1, 10, tzinfo=UTC))
        self.server: datetime | None = self.clock.time
        self.ledger = SiteLedger(path, policy, site_key, create=True)
        self.order = self.ledger.history.order
        self.charged: list[tuple[datetime, str, DpEvent]] = []
        self.started: list[Proposal] = []
        self.expires: dict[str, datetime] = {}
        """Expiry of each open run's reserve."""
        self.spent = 0.0
        self.accepted = self.refused = 0

    def would_accept(self, proposal: Proposal) -> bool:
        """Predict the site's decision from its published figures, without asking the site."""
        self.receive_server_time()
        now = self.ledger.history.now(server=self.server or self.ledger.history.last_time)
        try:
            self.policy.check(proposal)
            plan = proposal.plan
            run_acceptance.require_run_room(
                self.ledger.history, self.policy, plan.full_event, now, admitted=plan.cohorts
            )
        except Refused:
            return False
        return True

    def ask(self, proposal: Proposal, round: int, *, request: str, reply: bool) -> Reason | None:
        """Send one request; returns the reason of a refusal."""
        new = proposal.run not in self.ledger.history.runs
        before = self.ledger.history.count_total_charges()
        self.receive_server_time()
        try:
            reservation = self.ledger.reserve(proposal, round=round, request=request)
        except Refused as refused:
            self.refused += 1
            assert self.ledger.history.count_total_charges() == before
            return refused.reason
        last = self.ledger.history.last_time
        if new:
            self.started.append(proposal)
            self.expires[proposal.run] = last + timedelta(days=30)
        if isinstance(reservation, Reservation):
            self.accepted += 1
            self.charged.append((last, proposal.run, proposal.plan.event()))
            if reply:
                self.ledger.commit(reservation, b"reply")
        self.check()
        return None

    def receive_server_time(self) -> None:
        """The server's time arrives with each request."""
        self.ledger.set_server_time(self.server.timestamp() if self.server else math.nan)

    def end(self, proposal: Proposal) -> None:
        self.ledger.end_run(proposal.run)
        self.expires.pop(proposal.run, None)
        self.check()

    def sum_reservations(self, now: datetime) -> Counter[DpEvent]:
        """Sum what open runs may still spend."""
        rounds = Counter(run for _, run, _ in self.charged)
        open_runs = [proposal for proposal in self.started if now < self.expires.get(proposal.run, now)]
        return events.count_mechanisms(
            each.plan.event(rounds=each.plan.max_rounds - rounds[each.run]) for each in open_runs
        )

    def check(self) -> None:
        history, budget = self.ledger.history, self.policy.budget
        charged = events.count_mechanisms([event for _, _, event in self.charged])
        assert history.count_total_charges() == charged
        assert history.divergence(charged) == pytest.approx(compute_divergence(charged, self.order), rel=1e-9)
        reserved = self.sum_reservations(history.now(server=self.server or history.last_time))
        surcharge = filter.compute_epsilon_conversion_term(self.order, budget.delta)
        total = compute_divergence(charged + reserved, self.order) + surcharge
        assert total <= budget.max_epsilon + 1e-9, "charges and reserves together exceed the cap"
        now = filter.epsilon_filter(charged, order=self.order, delta=budget.delta)
        assert now >= self.spent, "spending must not decrease"
        self.spent = now
        if budget.max_epsilon_per_period is not None:
            sums: dict[int, Counter[DpEvent]] = {}
            for moment, _, event in self.charged:
                sums.setdefault(compute_period_number(moment, budget.period), Counter()).update(
                    events.count_mechanisms([event])
                )
            for each in sums.values():
                assert compute_divergence(each, self.order) + surcharge <= budget.max_epsilon_per_period + 1e-9
        rounds = Counter(run.proposal.run for run in history.runs.values() for _ in range(run.charged_rounds))
        assert all(rounds[proposal.run] <= proposal.plan.max_rounds for proposal in self.started)


def move(game: Game, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    """Make one move of the adversary, based on the ledger's own figures."""
    name = f"run {len(game.started)}"
    action = draw(st.sampled_from(["exact", "exact", "more", "any", "next", "next", "retry", "end", "time", "reopen"]))
    if action in ("exact", "more", "any"):
        plan = draw(st.sampled_from(SETTINGS))
        wanted = make_proposal(run=name, plan=plan | {"num_rounds": 20})
        fits = run_acceptance.find_max_rounds(wanted, game.would_accept)
        count = {"exact": fits, "more": fits + 1, "any": draw(st.integers(1, 20))}[action]
        if not 1 <= count <= 20:
            return
        asked = dataclasses.replace(wanted, plan=dataclasses.replace(wanted.plan, num_rounds=count))
        reason = game.ask(asked, 1, request=name, reply=draw(st.booleans()))
        assert (reason is None) == (count <= fits), (reason, count, fits)
    elif action in ("next", "retry") and game.started:
        asked = draw(st.sampled_from(game.started[-3:]))
        round = draw(st.integers(1, asked.plan.max_rounds + 1))
        request = f"{asked.run} {round}" if round > 1 else asked.run
        for _ in range(3 if action == "retry" else 1):
            game.ask(asked, round, request=request, reply=action == "next")
    elif action == "end" and game.started:
        game.end(draw(st.sampled_from(game.started)))
    elif action == "time":
        game.clock.time += timedelta(days=draw(st.sampled_from([-400, -1, 20, 31, 400])))
        lies = [game.clock.time, game.clock.time + timedelta(days=400), game.clock.time - timedelta(days=31), None]
        game.server = draw(st.sampled_from(lies))
    elif action == "reopen":
        game.ledger = SiteLedger(game.path, game.policy, site_key, create=True)
        game.check()


@pytest.mark.parametrize("monthly", [False, True])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_adaptive_requests_never_exceed_a_cap(tmp_path_factory: Any, monthly: bool, data: Any) -> None:
    budget = {"max_epsilon_per_period": 8.5, "period": "month"} if monthly else {}
    site = make_policy(budget=budget, releases={"metrics": "noised"})
    game = Game(tmp_path_factory.mktemp("game") / "ledger.db", site)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "datetime", game.clock)
        for _ in range(data.draw(st.integers(1, 20))):
            move(game, data.draw)
    # The cost does not depend on the order of events.
    shuffled = [event for _, _, event in game.charged]
    random.Random(0).shuffle(shuffled)
    assert filter.epsilon_filter(shuffled, order=game.order, delta=1e-5) == game.spent
    assert verify(game.path).history.count_total_charges() == events.count_mechanisms(shuffled)


def test_greedy_adversary_approaches_the_cap_without_exceeding_it(path: Path) -> None:
    """The site does not win the game above by refusing everything: exact requests get nearly all of the budget."""
    game = Game(path, make_policy(releases={"metrics": "noised"}))
    for number, plan in enumerate(SETTINGS * 3):
        largest = make_proposal(run=f"run {number}", plan=plan | {"num_rounds": 20})
        fits = run_acceptance.find_max_rounds(largest, game.would_accept)
        for rounds, accepted in ((fits + 1, False), (fits, True)):
            if not 1 <= rounds <= 20:
                continue
            proposal = dataclasses.replace(largest, plan=dataclasses.replace(largest.plan, num_rounds=rounds))
            assert (game.ask(proposal, 1, request="1", reply=True) is None) is accepted
            for round in range(2, rounds + 1) if accepted else ():
                assert game.ask(proposal, round, request=f"{round}", reply=True) is None
    assert game.refused > 2
    assert 10.9 < game.spent <= 11.0
    history = game.ledger.history
    assert 0.95 < run_acceptance.compute_spent_fraction(history, history.count_total_charges(), cap=history.cap) <= 1
