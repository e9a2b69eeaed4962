"""Dry run of a proposal against a site's policy and remaining budget; the result is not binding.

The site decides when the first request of the run arrives, and its ledger may have changed by then.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fedtune.federation.planner import compute_target_epsilon, find_min_noise_for_target
from fedtune.privacy import accountant, events
from fedtune.privacy.dp_library import DpEvent
from fedtune.privacy.ledger import run_acceptance
from fedtune.privacy.ledger.history import History
from fedtune.privacy.mechanism import MAX_EPSILON
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy
from fedtune.spec import FedtuneError, RunError

_LESS_NOISE = 0.97  # factor below the least accepted noise, with a margin above the error of the coarse grid


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """Predicted answer of one site to a proposed run.

    Attributes:
        policy: the path of the policy file.
        site: the name of the site.
        lead: the lead's public key.
        violations: every violated rule of the policy and the budget; empty: the site would accept the run.
        ledger: "read", "new" (no file yet; the site would create one), or "in doubt" (inconsistent).
        committed_epsilon: the epsilon that is charged or reserved for open runs, as computed by the privacy filter.
        epsilon_after: the sum of `committed_epsilon` and the whole plan of this run, as computed by the privacy filter.
        max_epsilon: the lifetime cap; infinite: no cap.
        remaining_runs: the number of runs of this kind that the caps allow now; None without a cap.
        max_rounds: the largest number of rounds that the site would accept, at most that of the run.
        min_noise: the smallest noise multiplier that the site would accept, at least that of the run; None: the site
            would refuse the run at every noise multiplier.
        note: a warning outside the policy rules, such as an unreadable ledger; an empty string if there is none.
        max_accepted_epsilon: the largest `privacy.epsilon`, up to `MAX_EPSILON`, that the site would accept for an
            otherwise unchanged plan; None: the site accepts no epsilon, or the search was not requested.
        limit: the policy or budget rule that a larger epsilon would violate; None if there is no such rule.
    """

    policy: str
    site: str
    lead: str
    violations: tuple[Refused, ...]
    ledger: str
    committed_epsilon: float | None
    epsilon_after: float | None
    max_epsilon: float
    remaining_runs: int | None
    max_rounds: int
    min_noise: float | None
    note: str
    max_accepted_epsilon: float | None = None
    limit: Refused | None = None

    @property
    def allowed(self) -> bool:
        """Whether the site would accept the run unchanged."""
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, with broken rules in their JSON form."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        violations, limit = [refusal.to_json() for refusal in self.violations], self.limit and self.limit.to_json()
        return fields | {"violations": violations, "limit": limit, "allowed": self.allowed}


def find_strictest_dry_run(verdicts: Sequence[DryRun]) -> DryRun:
    """Return the dry run with the smallest `max_accepted_epsilon`, which every site accepts."""
    return min(verdicts, key=lambda run: 0.0 if run.max_accepted_epsilon is None else run.max_accepted_epsilon)


def dry_run(
    path: Path, proposal: Proposal, *, declared_sizes: Mapping[str, int], find_most_epsilon: bool = False
) -> DryRun:
    """Check a proposal against the policy file at `path`; an existing ledger is read but never written.

    Args:
        path: the site.toml file with the policy.
        proposal: the proposal of the run.
        declared_sizes: site -> its declared size in the run's settings.
        find_most_epsilon: whether to search for the largest epsilon that the site accepts; takes several seconds.

    Raises:
        ConfigError: the file is not a valid policy.
    """
    files = SiteFiles.from_site_toml(path)
    policy, plan = files.policy, proposal.plan
    note = "" if policy.site in declared_sizes else f"the run does not name site {policy.site}"
    if (lowered := policy.lower_rank(proposal)) != proposal:  # as the lead does before it starts
        proposal, note = lowered, note or f"the run would lower this site's rank to {policy.allow.max_rank}"
    budget: _PolicyBudget | None = None
    try:
        budget = _PolicyBudget(policy, read_history(files))
    except FedtuneError as error:  # with an inconsistent ledger, the site does not start
        note = f"the site would refuse to start: {error}"
    against = budget.list_refusals(proposal) if budget else [Refused(Reason.SITE_ERROR)]
    wrong_size = _list_size_refusals(policy, proposal, declared_sizes)
    broken = [*policy.find_broken_rules(proposal), *against, *wrong_size]
    may_fit = budget is not None and not wrong_size
    max_rounds, min_noise = (plan.num_rounds, plan.noise_multiplier) if may_fit else (0, None)
    if budget and may_fit and broken:
        max_rounds = run_acceptance.find_max_rounds(proposal, budget.accepts)
        min_noise = run_acceptance.find_min_noise(proposal, budget.accepts)
    max_accepted_epsilon, limit = (
        budget.find_most_epsilon(proposal) if budget and may_fit and find_most_epsilon else (None, None)
    )
    return DryRun(
        policy=str(path),
        site=policy.site,
        lead=proposal.lead,
        violations=tuple(broken),
        ledger="in doubt" if budget is None else "read" if files.ledger.is_file() else "new",
        committed_epsilon=budget.compute_epsilon(plan, Counter()) if budget else None,
        epsilon_after=budget.compute_epsilon(plan, events.count_mechanisms([plan.full_event])) if budget else None,
        max_epsilon=policy.budget.max_epsilon,
        remaining_runs=budget.count_remaining_runs(plan) if budget else None,
        max_rounds=max_rounds,
        min_noise=min_noise,
        note=note,
        max_accepted_epsilon=max_accepted_epsilon,
        limit=limit,
    )


class _PolicyBudget:
    """A site's policy and the state of its ledger at one point in time, to test proposals against."""

    def __init__(self, policy: Policy, history: History) -> None:
        self._now = history.now()
        self._policy, self._history = policy, history
        # `accepts` checks the cap per run on the coarse grid, because many plans are tried and the fine grid takes ten
        # times as long for a difference in the fifth digit.
        uncapped = dataclasses.replace(policy.budget, max_epsilon_per_run=None)
        self._rules = dataclasses.replace(policy, budget=uncapped)

    def list_refusals(self, proposal: Proposal) -> Iterator[Refused]:
        """Yield the refusals of `proposal` that follow from the ledger: its state and its remaining budget."""
        try:
            run_acceptance.require_usable_ledger(self._history)
        except Refused as refused:
            yield refused
        try:
            run_acceptance.require_run_room(
                self._history, self._policy, proposal.plan.full_event, self._now, admitted=proposal.plan.cohorts
            )
        except Refused as refused:
            yield refused

    def accepts(self, proposal: Proposal) -> bool:
        """Return True if policy and budget accept `proposal`; conservative for plans just below a cap."""
        if next(self.list_refusals(proposal), None) or self._rules.find_broken_rules(proposal):
            return False
        most = self._policy.budget.max_epsilon_per_run
        return most is None or compute_target_epsilon(dataclasses.replace(proposal.plan, runs=1)) <= most

    def find_most_epsilon(self, proposal: Proposal) -> tuple[float | None, Refused | None]:
        """Find the largest acceptable epsilon for `proposal`, and the rule that a larger epsilon violates.

        The result is rounded down to four digits, or to the nearest three digits if that is acceptable as well: a cap
        is usually a round number, and the noise search stops just below it.
        """
        tried = proposal
        while self.accepts(tried):
            noise = tried.plan.noise_multiplier
            if noise <= accountant.MIN_SOUGHT or compute_target_epsilon(tried.plan) >= MAX_EPSILON:
                return MAX_EPSILON, None
            tried = proposal.with_noise(max(noise / 2, accountant.MIN_SOUGHT))
        least = run_acceptance.find_min_noise(tried, self.accepts)
        if least is None:
            return None, None
        most = compute_target_epsilon(proposal.with_noise(least).plan)
        less = proposal.with_noise(_LESS_NOISE * least)
        limit = next(chain(self._policy.find_broken_rules(less), self.list_refusals(less)), None)
        if most == 0:  # delta alone covers the loss
            return 0.0, limit
        digits = -math.floor(math.log10(most))
        even, scale = round(most, digits + 2), 10.0 ** (digits + 3)
        needed = find_min_noise_for_target(proposal.plan, epsilon=even)
        accepted = needed is not None and self.accepts(proposal.with_noise(needed))
        return even if accepted else math.floor(most * scale) / scale, limit

    def compute_epsilon(self, plan: Plan, asked: Counter[DpEvent]) -> float:
        """Compute the epsilon of all charges and reservations plus `asked`, by the ledger's filter, for the cohort of
        the plan with the highest spending.
        """
        cohorts = self._history.cohorts(plan.cohorts)
        return max(
            self._history.epsilon(self._history.count_charges_and_reservations(self._now, cohort) + asked)
            for cohort in cohorts
        )

    def count_remaining_runs(self, plan: Plan) -> int | None:
        """Return the number of runs with this plan that the caps allow now; None without a cap."""
        return run_acceptance.count_remaining_runs(
            self._history, self._policy, plan.full_event, self._now, admitted=plan.cohorts
        )


def read_history(files: SiteFiles) -> History:
    """Load and verify the history of a site's ledger; empty if there is no ledger yet.

    Raises:
        RunError: the ledger is inconsistent, or was created for another policy.
    """
    verified = files.verify_ledger()
    if verified is None:
        return History.empty(files.policy)
    for key, made_for, says in verified.history.opening.list_differences(files.policy):
        raise RunError(f"the ledger was created for {key} = {made_for}, but the policy says {says}")
    return verified.history


def _list_size_refusals(policy: Policy, proposal: Proposal, declared_sizes: Mapping[str, int]) -> list[Refused]:
    """Return a refusal if the declared size of the site in the run differs from the site's policy; both sizes are
    public.
    """
    own = {dataset.id: dataset.declared_size for dataset in policy.dataset}.get(proposal.dataset)
    size = declared_sizes.get(policy.site)
    return [] if None in (own, size) or own == size else [Refused(Reason.DECLARED_SIZE, requested=size, allowed=own)]
