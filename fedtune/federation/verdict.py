"""What a site's policy would say to a run, and whether its budget has room: asked beforehand, deciding nothing.

A site decides again, by itself, when the run's first request comes; between now and then its ledger may have changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dp_accounting import DpEvent

from fedtune.federation.solver import coarse_epsilon
from fedtune.privacy import events, filter, spending
from fedtune.privacy.chain import Head
from fedtune.privacy.history import History
from fedtune.privacy.plan import Plan
from fedtune.privacy.policy import Policy
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.verify import verify
from fedtune.spec import FedtuneError, RunError


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


def ask(path: Path, proposal: Proposal, *, declared_sizes: Mapping[str, int]) -> Verdict:
    """What the policy in the file `path` says to `proposal`; its ledger is read where it exists, and never written.

    Args:
        path: a site.toml.
        proposal: the run.
        declared_sizes: what the run takes its sites' sizes to be.

    Raises:
        ConfigError: the file is no policy.
    """
    policy = read_policy(path)
    note = _size_note(policy, proposal, declared_sizes)
    ledger = path.parent / policy.ledger
    try:
        budget = _Budget(policy, _read(policy, path.parent) if ledger.exists() else _new_history(policy))
    except FedtuneError as error:
        return _in_doubt(path, policy, proposal, note=f"the site would not start: {error}")
    broken = [*policy.broken_rules(proposal), *budget.refusals(proposal)]
    plan = proposal.plan
    return Verdict(
        policy=str(path),
        site=policy.site,
        lead=proposal.lead,
        broken=tuple(BrokenRule(rule=why.reason.value, asked=why.asked, allowed=why.allowed) for why in broken),
        ledger="read" if ledger.exists() else "new",
        taken=budget.epsilon(budget.taken),
        would_be=budget.epsilon(budget.taken + _whole(plan)),
        max_epsilon=policy.budget.max_epsilon,
        runs_left=budget.runs_left(plan),
        most_rounds=spending.most_rounds(proposal, budget.accepts) if broken else plan.num_rounds,
        least_noise=spending.least_noise(proposal, budget.accepts) if broken else plan.noise_multiplier,
        note=note,
    )


class _Budget:
    """A policy and what is left of its budget at one moment."""

    def __init__(self, policy: Policy, history: History) -> None:
        now = datetime.now(UTC)
        # As the ledger counts time: a clock that was set back opens no new period.
        self._now = max(now, history.last_time or now)
        self._policy, self._history = policy, history
        self._held = history.set_aside(self._now)
        self.taken = history.charged() + self._held
        # The cap on a run's epsilon is checked on the coarse grid below: many plans are tried, and the fine one takes
        # ten times as long for an answer that differs in the fifth digit.
        uncapped = dataclasses.replace(policy.budget, max_epsilon_per_run=None)
        self._rules = dataclasses.replace(policy, budget=uncapped)

    def refusals(self, proposal: Proposal) -> Iterator[Refused]:
        """What of the ledger speaks against `proposal`."""
        if self._history.frozen:
            yield Refused(Reason.FROZEN)
        try:
            whole = _whole(proposal.plan)
            spending.require_room(self._history, self._policy, asked=whole, held=self._held, now=self._now)
        except Refused as refused:
            yield refused

    def accepts(self, proposal: Proposal) -> bool:
        """Whether rules and budget would let `proposal` in; on the safe side for a plan that all but reaches a cap."""
        if next(self.refusals(proposal), None) or self._rules.broken_rules(proposal):
            return False
        most = self._policy.budget.max_epsilon_per_run
        return most is None or coarse_epsilon(proposal.plan) <= most

    def epsilon(self, spent: Counter[DpEvent]) -> float:
        """Of `spent` by the ledger's filter."""
        return filter.epsilon_filter(spent, order=self._history.order, delta=self._history.delta)

    def runs_left(self, plan: Plan) -> int | None:
        """How many runs with this plan still fit the lifetime cap; None where there is none."""
        cap, history = self._policy.budget.max_epsilon, self._history
        if math.isinf(cap):
            return None
        room = filter.most_divergence(cap, order=history.order, delta=history.delta) - history.divergence(self.taken)
        return max(0, math.floor(room / history.divergence(_whole(plan))))


def _whole(plan: Plan) -> Counter[DpEvent]:
    return events.grouped([plan.event(rounds=plan.most_rounds)])


def _read(policy: Policy, folder: Path) -> History:
    """The history of the site's ledger, every event of it checked, against its anchor too where that is at hand."""
    anchor = folder / policy.anchor
    head = Head.read(anchor) if policy.anchor and anchor.exists() else None
    history = verify(folder / policy.ledger, anchor=head).history
    for name, asked in (
        ("site", policy.site),
        ("population", policy.population.name),
        ("unit", policy.population.unit),
        ("delta", policy.budget.delta),
    ):
        if (made_for := getattr(history.opened, name)) != asked:
            raise RunError(f"the ledger was made for {name} = {made_for}, the policy says {asked}")
    return history


def _new_history(policy: Policy) -> History:
    """The history of a ledger that the site would begin with this policy."""
    budget, history = policy.budget, History()
    history.delta = budget.delta
    history.order = filter.best_order(budget.reference_event(), epsilon=budget.max_epsilon, delta=budget.delta)
    return history


def _in_doubt(path: Path, policy: Policy, proposal: Proposal, *, note: str) -> Verdict:
    """The verdict of a site whose ledger does not fit together: it trains nothing."""
    broken = [*policy.broken_rules(proposal), Refused(Reason.SITE_ERROR)]
    return Verdict(
        policy=str(path),
        site=policy.site,
        lead=proposal.lead,
        broken=tuple(BrokenRule(rule=why.reason.value, asked=why.asked, allowed=why.allowed) for why in broken),
        ledger="in doubt",
        taken=None,
        would_be=None,
        max_epsilon=policy.budget.max_epsilon,
        runs_left=None,
        most_rounds=0,
        least_noise=None,
        note=note,
    )


def _size_note(policy: Policy, proposal: Proposal, declared_sizes: Mapping[str, int]) -> str:
    """Where policy and run differ in the site's declared size, which both publish."""
    own = {dataset.id: dataset.declared_size for dataset in policy.dataset}.get(proposal.dataset)
    if policy.site not in declared_sizes:
        return f"the run names no site {policy.site}"
    taken_for = declared_sizes[policy.site]
    if own is not None and own != taken_for:
        return f"the site declares {own:,} records of {proposal.dataset}, the run takes it for {taken_for:,}"
    return ""
