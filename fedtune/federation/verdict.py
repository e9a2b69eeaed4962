"""What a site's policy would say to a run, and whether its budget has room: asked beforehand, deciding nothing.

A site decides again, by itself, when the run's first request comes; between now and then its ledger may have changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dp_accounting import DpEvent

from fedtune.federation.solver import coarse_epsilon
from fedtune.privacy import chain, events, filter, spending
from fedtune.privacy.history import History
from fedtune.privacy.policy import Policy
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.verify import verify
from fedtune.spec import RunError


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenRule:
    """A reason to refuse: what the run asks for, and what the site allows."""

    rule: str
    asked: str | None
    allowed: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one site would say to a run that it does not know yet.

    Attributes:
        policy: file that was read.
        lead: public key of who asks.
        broken: every broken rule, the budget's among them; none: the site would accept.
        ledger: "read", "new" where the file is missing and the site would begin one, or "in doubt".
        taken: epsilon that was charged or is set aside for open runs, by the filter.
        would_be: the same with this run's whole plan.
        max_epsilon: the lifetime cap; infinite: none.
        runs_left: runs like this one that still fit the lifetime cap one after another; None without a cap.
        most_rounds: the most rounds, up to the run's own, that would be accepted.
        least_noise: the least noise, from the run's own upwards, that would be; None: more noise alone does not help.
        note: what else there is to know, in one sentence.
    """

    policy: str
    site: str
    lead: str
    broken: tuple[BrokenRule, ...]
    ledger: str
    taken: float | None
    would_be: float | None
    max_epsilon: float
    runs_left: int | None
    most_rounds: int
    least_noise: float | None
    note: str

    @property
    def allowed(self) -> bool:
        """Whether the site would accept the run as it is planned."""
        return not self.broken


def ask(path: Path, proposal: Proposal, *, declared_size: int | None = None) -> Verdict:
    """What the policy in the file `path` says to `proposal`; its ledger is read where it exists, and never written.

    Args:
        path: a site.toml.
        proposal: the run.
        declared_size: what the run takes this site's size to be; None: the run does not know the site.

    Raises:
        ConfigError: the file is no policy.
    """
    policy = read_policy(path)
    try:
        history, state = _history(policy, path.parent / policy.ledger)
    except RunError as error:
        return _in_doubt(path, policy, proposal, str(error))
    now = datetime.now(UTC)
    held = history.set_aside(now)
    broken = policy.broken_rules(proposal)
    if history.frozen:
        broken.append(Refused(Reason.FROZEN))
    whole = events.grouped([proposal.plan.event(rounds=proposal.plan.most_rounds)])
    try:
        spending.require_room(history, policy, asked=whole, held=held, now=now)
    except Refused as refused:
        broken.append(refused)

    cheap = dataclasses.replace(policy, budget=dataclasses.replace(policy.budget, max_epsilon_per_run=None))

    def accepts(other: Proposal) -> bool:
        return not history.frozen and _fits(policy, cheap, history, other, held=held, now=now)

    taken = history.charged() + held
    return Verdict(
        policy=str(path),
        site=policy.site,
        lead=proposal.lead,
        broken=tuple(BrokenRule(rule=why.reason.value, asked=why.asked, allowed=why.allowed) for why in broken),
        ledger=state,
        taken=_filtered(history, taken),
        would_be=_filtered(history, taken + whole),
        max_epsilon=policy.budget.max_epsilon,
        runs_left=_runs_left(policy, history, taken=taken, whole=whole),
        most_rounds=spending.most_rounds(proposal, accepts) if broken else proposal.plan.num_rounds,
        least_noise=spending.least_noise(proposal, accepts) if broken else proposal.plan.noise_multiplier,
        note=_size_note(policy, proposal, declared_size),
    )


def _fits(
    policy: Policy, cheap: Policy, history: History, proposal: Proposal, *, held: Counter[DpEvent], now: datetime
) -> bool:
    """Whether rules and budget would let `proposal` in.

    `cheap` is the policy without its cap on a run's epsilon, which is checked here on the coarse grid: many proposals
    are tried, and the fine one takes ten times as long for an answer that differs in the fifth digit.
    """
    whole = events.grouped([proposal.plan.event(rounds=proposal.plan.most_rounds)])
    try:
        spending.require_room(history, policy, asked=whole, held=held, now=now)
        cheap.check(proposal)
    except Refused:
        return False
    most = policy.budget.max_epsilon_per_run
    return most is None or coarse_epsilon(proposal.plan) <= most


def _history(policy: Policy, path: Path) -> tuple[History, str]:
    """The ledger's history, checked event by event; without a file, the one that the site would begin with."""
    if path.exists():
        return verify(path).history, "read"
    now, budget = datetime.now(UTC).isoformat(), policy.budget
    order = filter.best_order(budget.reference_event(), epsilon=budget.max_epsilon, delta=budget.delta)
    history = History()
    for number, detail in enumerate(
        (
            {"what": "opened", "delta": budget.delta, "order": order},
            {"what": "policy", "policy": policy.to_json()},
        ),
        1,
    ):
        note = chain.Event(
            sequence=number,
            kind=chain.Kind.NOTE,
            time=now,
            run="",
            round=0,
            request="",
            attempt=0,
            dataset="",
            cohort="",
            code="",
            detail=detail,
        )
        history.follow(note)
    return history, "new"
