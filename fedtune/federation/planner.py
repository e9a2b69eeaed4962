"""Privacy cost of a run, computed only from public numbers; no record is read.

`compute_cost` computes the cost of a plan by site and by round, and `compute_alternatives` the cost of modified plans.
`solve_rounds`, `solve_sampling_rate` and `find_min_noise_for_target` derive a plan from a target epsilon, on the
coarse grid of the calibration.  `policy_dry_run.py` predicts whether a site would accept the plan; `forecast.py`
estimates time and traffic, for which the model must be loaded.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from fedtune.federation.calendar import CalendarRun, compute_epsilon_over_runs, list_calendar_runs
from fedtune.formatting import format_html_table
from fedtune.privacy import accountant, filter
from fedtune.privacy.distributed_noise import Epsilons
from fedtune.privacy.run_plan import Plan
from fedtune.spec import ConfigError

_MAX_POINTS = 20
MAX_ROUNDS = 1_000_000  # upper limit of the search for the number of rounds


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteCost:
    """Cost of a plan at one site, without epsilon, which is equal for all sites that take part in every round."""

    declared_size: int
    weight: float  # weight of the site in the average
    expected_batch: float  # mean number of units in a step, if the declared size is true
    # delta times declared size: on average, at most this many units reveal something that could not have been
    # released without them
    expected_failures: float
    step_noise: float  # standard deviation of the noise in each coordinate of a step's mean gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundCost:
    """Cumulative epsilon after a round, by each accountant."""

    round: int
    steps: int
    pld: float  # by PLD, the epsilon that reports show
    rdp: float  # at the best order for these rounds
    filter: float  # by the ledger's privacy filter, at the best order for the whole plan
    spare: bool  # whether this is a spare round, budgeted in case another round is interrupted


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCost:
    """Privacy cost of a plan; the default values apply to a plan without noise.

    Attributes:
        plan: the plan.
        sites: the cost of the plan by site.
        largest: sites with the largest declared size, and thus the largest weight and the most expected failures;
            delta should be below 1 / this size.
        rounds: all rounds, or about twenty of them, always including the last.
        epsilon: of the whole plan including spare rounds, by PLD; a run's report never shows more.
        epsilon_of_all_runs: of all `plan.runs` runs that share the target; `calendar` lists them one by one, if there
            are several.
        epsilon_rdp: of the whole plan, by RDP.
        epsilon_filter: the smallest lifetime cap of a new ledger that admits the plan.
        filter_order: the Renyi order for that cap.
        epsilon_of_one_round: of a single round, as an accountant that restarts in each round would report it; not a
            bound for the run.
        by_trust: epsilon of the whole plan by adversary, if the sites share the noise.
        calendar: the runs that share the target, one by one.
    """

    plan: Plan
    sites: Mapping[str, SiteCost] = field(repr=False)
    largest: tuple[str, ...]
    rounds: tuple[RoundCost, ...] = field(default=(), repr=False)
    epsilon: float = math.inf
    epsilon_of_all_runs: float = math.inf
    epsilon_rdp: float = math.inf
    epsilon_filter: float = math.inf
    filter_order: float | None = None
    epsilon_of_one_round: float = math.inf
    by_trust: Epsilons | None = None
    calendar: tuple[CalendarRun, ...] = field(default=(), repr=False)

    @property
    def steps(self) -> int:
        """The maximum number of noisy steps that each site is charged for."""
        return self.plan.local_steps * self.plan.max_rounds

    def _repr_html_(self) -> str:
        rows = {"epsilon": accountant.format_epsilon(self.epsilon), "delta": f"{self.plan.delta:g}"}
        rows |= {"noise multiplier": f"{self.plan.noise_multiplier:.4g}", "steps": f"{self.steps:,}"}
        return format_html_table("Upper bounds on the privacy cost of the plan", rows.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A modification of a plan, with the epsilon and the noise that it results in."""

    what: str  # a description of the modification
    plan: Plan  # the modified plan, with the noise multiplier of the original plan
    epsilon: float  # the target epsilon
    noise_needed: float | None  # the smallest noise multiplier that meets the target; None: no noise is enough
    same_noise_epsilon: float  # epsilon at the noise multiplier of the original plan
    step_noise: float | None  # noise in a step's mean gradient with `noise_needed`, relative to the original plan


def compute_cost(plan: Plan, declared_sizes: Mapping[str, int], *, before: int) -> PlanCost:
    """Compute the privacy cost of `plan` for sites with these declared sizes.

    Guarantee: every epsilon is an upper bound, except `epsilon_of_one_round`, which bounds a single round only.

    Args:
        plan: the plan of one run.
        declared_sizes: site -> its declared size in records or persons.
        before: the number of finished runs in the plan's calendar.
    """
    sites = {
        site: _compute_site_cost(plan, size, total=sum(declared_sizes.values()))
        for site, size in declared_sizes.items()
    }
    largest = tuple(site for site, size in declared_sizes.items() if size == max(declared_sizes.values()))
    if not plan.private:
        return PlanCost(plan=plan, sites=sites, largest=largest)
    whole, delta = plan.full_event, plan.delta
    _, order = filter.find_smallest_cap(whole, delta=delta)
    # All rounds, or about twenty of them at even distances (rounded up), with the first, the last and the last planned.
    count, every = plan.max_rounds, -(-plan.max_rounds // _MAX_POINTS)
    shown = sorted({1, *range(every, count, every), plan.num_rounds, count})
    return PlanCost(
        plan=plan,
        sites=sites,
        largest=largest,
        rounds=tuple(_compute_round_cost(plan, number, order) for number in shown),
        epsilon=accountant.epsilon_pld([whole], delta),
        epsilon_of_all_runs=compute_epsilon_over_runs(plan, runs=plan.runs),
        epsilon_rdp=accountant.epsilon_rdp([whole], delta),
        epsilon_filter=filter.epsilon_filter([whole], order=order, delta=delta),
        filter_order=order,
        epsilon_of_one_round=accountant.epsilon_pld([plan.event()], delta, interval=accountant.COARSE),
        by_trust=plan.compute_epsilons_by_trust(plan.max_rounds),
        calendar=list_calendar_runs(plan, before=before),
    )


MIN_SIGNAL = 0.5
"""The `compute_signal_to_noise` below which a run is unlikely to learn, measured in simulations/own_data."""


def check_signal(plan: Plan, declared_sizes: Mapping[str, int], *, values: float) -> None:
    """Check that a plan is likely to learn anything, from public numbers and before any site is charged.

    Raises:
        ConfigError: `compute_signal_to_noise` is below `MIN_SIGNAL`.
    """
    ratio = compute_signal_to_noise(plan, declared_sizes, values=values)
    if ratio < MIN_SIGNAL:
        bound = (
            "the signal is too weak at this size and epsilon: noise moves the adapter "
            f"{1 / ratio:.3g} times as far as all records together can, so the run will likely learn nothing "
            "(docs/planning.md, Signal). Nothing was charged. Use more or larger sites, a larger epsilon or secure "
            "aggregation, or set this to true to train anyway"
        )
        raise ConfigError("training.ignore_weak_signal", False, bound)


def compute_signal_to_noise(plan: Plan, declared_sizes: Mapping[str, int], *, values: float) -> float:
    """Compute an upper bound on the signal-to-noise ratio of the aggregated update; infinite without noise.

    Signal and noise are L2 norms of the mean gradient over all sites and steps.  The signal is at most the clipping
    norm C, reached if all per-example gradients are aligned.  Each of K sites has weight n / N, so each of the `values`
    coordinates has noise of standard deviation z C sqrt(K) / (q N) in a step, and 1 / sqrt(T) times that in the mean of
    T steps.  If the sites train different numbers of coordinates, `values` is the mean of these numbers.

    The ratio is an upper bound, not a forecast, because gradients are rarely aligned.
    """
    if not plan.private:
        return math.inf
    steps, total = plan.local_steps * plan.num_rounds, sum(declared_sizes.values())
    return plan.sampling_rate * total * math.sqrt(steps / (len(declared_sizes) * values)) / plan.noise_multiplier


def compute_alternatives(plan: Plan, *, epsilon: float) -> tuple[Change, ...]:
    """Compute the cost of alternatives to a plan: more rounds, a smaller delta, larger batches, and half of `epsilon`.

    Alternatives without a computable epsilon are skipped. There are none for an epsilon of 0, which no noise reaches.

    Args:
        plan: a plan with privacy.
        epsilon: the target epsilon over all `plan.runs` runs, or the epsilon of the plan itself.
    """
    if epsilon == 0:  # delta alone covers the loss
        return ()
    changes: list[tuple[str, dict[str, Any], float]] = [
        (f"{rounds} rounds", {"num_rounds": rounds}, epsilon)
        for rounds in (math.ceil(1.5 * plan.num_rounds), 2 * plan.num_rounds)
    ]
    for rate in sorted({min(1.0, factor * plan.sampling_rate) for factor in (1.5, 2.0)} - {plan.sampling_rate}):
        batches = f"batches x {rate / plan.sampling_rate:.3g} (rate {rate:.4g})"
        changes.append((batches, {"sampling_rate": rate}, epsilon))
    changes.append((f"delta {plan.delta / 10:.3g}", {"delta": plan.delta / 10}, epsilon))
    changes.append((f"epsilon {epsilon / 2:.4g}", {}, epsilon / 2))
    alternatives = []
    for what, changed, keep in changes:
        with suppress(ConfigError):
            alternatives.append(_build_alternative(what, dataclasses.replace(plan, **changed), keep, original=plan))
    return tuple(alternatives)


def _build_alternative(what: str, plan: Plan, epsilon: float, *, original: Plan) -> Change:
    noise = find_min_noise_for_target(plan, epsilon=epsilon)
    before = original.noise_multiplier / original.sampling_rate
    return Change(
        what=what,
        plan=plan,
        epsilon=epsilon,
        noise_needed=noise,
        same_noise_epsilon=compute_target_epsilon(plan),
        step_noise=None if noise is None else noise / plan.sampling_rate / before,
    )


def _compute_site_cost(plan: Plan, size: int, *, total: int) -> SiteCost:
    batch = plan.sampling_rate * size
    return SiteCost(
        declared_size=size,
        weight=size / total,
        expected_batch=batch,
        expected_failures=plan.delta * size if plan.private else float(size),
        step_noise=plan.noise_multiplier * plan.max_grad_norm / batch,
    )


def _compute_round_cost(plan: Plan, number: int, order: float) -> RoundCost:
    spent = [plan.event(rounds=number)]
    return RoundCost(
        round=number,
        steps=number * plan.local_steps,
        pld=accountant.epsilon_pld(spent, plan.delta, interval=accountant.COARSE),
        rdp=accountant.epsilon_rdp(spent, plan.delta),
        filter=filter.epsilon_filter(spent, order=order, delta=plan.delta),
        spare=number > plan.num_rounds,
    )


@lru_cache(maxsize=1024)
def compute_target_epsilon(plan: Plan) -> float:
    """Compute the PLD epsilon of all `plan.runs` runs, which `privacy.epsilon` limits.

    Uses the coarse grid of the calibration; the result is slightly above that of the fine grid.
    """
    return accountant.epsilon_pld([plan.all_runs_event], plan.delta, interval=accountant.COARSE)


def solve_rounds(plan: Plan, *, epsilon: float) -> Plan:
    """Return `plan` with the largest number of rounds that keeps it within `epsilon`; spare rounds stay as planned.

    Raises:
        ConfigError: even a single round exceeds `epsilon`.
    """

    def is_within_target(count: int) -> bool:
        return compute_target_epsilon(dataclasses.replace(plan, num_rounds=count)) <= epsilon

    fits, too_many = 0, 1
    while is_within_target(too_many):
        fits, too_many = too_many, 2 * too_many
        if too_many > MAX_ROUNDS:
            return dataclasses.replace(plan, num_rounds=fits)
    fits += bisect(range(fits + 1, too_many), False, key=lambda count: not is_within_target(count))
    if not fits:
        spare = f" and {plan.spare_rounds} spare ones" if plan.spare_rounds else ""
        bound = (
            f"exceeds privacy.epsilon = {epsilon:g} with one round of {plan.local_steps} steps{spare}; increase the "
            "noise or epsilon"
        )
        raise ConfigError("privacy.noise_multiplier", plan.noise_multiplier, bound)
    return dataclasses.replace(plan, num_rounds=fits)


def solve_sampling_rate(plan: Plan, *, epsilon: float, least: float) -> Plan:
    """Return `plan` with the largest sampling rate, rounded down to four digits, that keeps it within `epsilon`.

    Raises:
        ConfigError: even the rate `least` exceeds `epsilon`.
    """

    def set_rate(rate: float) -> Plan:
        return dataclasses.replace(plan, sampling_rate=rate)

    rate = accountant.find_boundary(
        lambda rate: compute_target_epsilon(set_rate(rate)),
        epsilon,
        start=max(plan.sampling_rate, least),
        bounds=(least, 1.0),
        rising=True,
    )
    if rate is None:
        bound = (
            f"exceeds privacy.epsilon = {epsilon:g} at every sampling rate down to {least:.3g}; increase the noise or "
            "epsilon"
        )
        raise ConfigError("privacy.noise_multiplier", plan.noise_multiplier, bound)
    scale = 10.0 ** (3 - math.floor(math.log10(rate)))
    return set_rate(math.floor(rate * scale) / scale)


def find_min_noise_for_target(plan: Plan, *, epsilon: float) -> float | None:
    """Find the smallest noise multiplier, rounded up to four decimals, that keeps `plan` within `epsilon`; None if no
    noise is enough.

    Works like `accountant.calibrate_noise`, but starts the search at the noise multiplier of `plan`.
    """
    most = plan.with_noise(accountant.MAX_NOISE)
    if plan.releases_metrics and compute_target_epsilon(most) > epsilon:
        return None  # the released scores alone exceed the target, so the search would fail
    noise = accountant.find_boundary(
        lambda noise: compute_target_epsilon(plan.with_noise(noise)),
        epsilon,
        start=plan.noise_multiplier,
        bounds=(accountant.MIN_NOISE, accountant.MAX_NOISE),
        rising=False,
    )
    return None if noise is None else math.ceil(noise * 1e4) / 1e4
