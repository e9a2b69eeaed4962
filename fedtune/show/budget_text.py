"""Description of a site's privacy budget: caps in reference runs, remaining epsilon, and policy warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.federation.calendar import describe_shared_epsilon
from fedtune.federation.planner import MIN_SIGNAL
from fedtune.formatting import pluralize
from fedtune.privacy import accountant, filter
from fedtune.privacy.accountant import NEIGHBORING_RELATION, format_epsilon
from fedtune.privacy.cohorts import OLDEST, format_cohort_name
from fedtune.privacy.distributed_noise import Epsilons
from fedtune.privacy.dp_library import DpEvent, GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.run_acceptance import compute_remaining_divergence, count_remaining_runs
from fedtune.privacy.ledger.verify import VerifiedLedger
from fedtune.privacy.proposal import UNVERIFIED
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import IMMEDIATE_REPLY_RISK, Policy
from fedtune.spec import spec
from fedtune.tasks.registry import get_task

SCHEMA_VERSION = 1  # version of the JSON output about a ledger
Caution = tuple[str, str]  # (policy key, warning)
Differences = list[tuple[str, object, object]]  # (key, value in the ledger, value in the policy)
LARGE_EPSILON = 10.0
SMALL_NOISE = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """A policy's caps, expressed in epsilon and in reference runs."""

    order: float  # Renyi order of the privacy filter for a new ledger with this policy
    fixed_part: float  # one-time epsilon of the first noisy step at this order
    reference_pld: float  # epsilon of the reference run with PLD accounting
    reference_filter: float  # epsilon of a single reference run in the privacy filter
    runs_in_lifetime: int | None  # number of sequential reference runs under the lifetime cap; None: no limit
    runs_in_period: int | None  # number of reference runs under the period's cap; None: no limit
    reference_fits: bool  # whether the reference run satisfies the per-run cap and the limits


def compute_amount(policy: Policy) -> Amount:
    """Compute a policy's caps in epsilon and in reference runs."""
    budget, limits = policy.budget, policy.limits
    typical, delta = budget.reference, budget.delta
    reference = typical.event
    order = budget.order()

    def count_fitting_runs(cap: float | None) -> int | None:
        room = math.inf if cap is None else filter.compute_max_divergence(cap, order=order, delta=delta)
        return filter.compute_max_repeats(reference, room, order=order)

    alone = accountant.epsilon_pld([reference], delta)
    within = (
        typical.noise_multiplier >= limits.min_noise_multiplier
        and typical.sampling_rate <= limits.max_sampling_rate
        and typical.steps <= limits.max_local_steps * limits.max_rounds
        and alone <= (budget.max_epsilon_per_run or math.inf)
    )
    return Amount(
        order=order,
        fixed_part=filter.compute_epsilon_conversion_term(order, delta),
        reference_pld=alone,
        reference_filter=filter.epsilon_filter([reference], order=order, delta=delta),
        runs_in_lifetime=count_fitting_runs(budget.max_epsilon),
        runs_in_period=count_fitting_runs(budget.max_epsilon_per_period),
        reference_fits=within,
    )


def list_cautions(policy: Policy, amount: Amount, *, folder: Path) -> Iterator[Caution]:
    """Yield warnings about a policy in `folder`, the most serious warnings first."""
    allow, budget, limits = policy.allow, policy.budget, policy.limits
    if not policy.simulated and policy.asserted.no_person_at_another_site is None:
        yield "asserted.no_person_at_another_site", "unanswered: set true or false, or the site does not start"
    # Settings that weaken or void the guarantee.
    if allow.seeded_noise:
        text = "true: anyone who knows the seed can subtract the noise; only for synthetic records"
        yield "allow.seeded_noise", f"{text}. It marks the ledger permanently"
    if allow.inexact_gradients:
        bound = f"the bound on one {policy.population.unit}'s influence is measured, not proved"
        text = f"true: where rounding makes gradients depend on the rest of the batch, {bound}"
        yield "allow.inexact_gradients", f"{text}; false accepts only exact machines"
    if math.isinf(budget.max_epsilon):
        yield "budget.max_epsilon", "inf: there is no guarantee"
    elif budget.max_epsilon > LARGE_EPSILON:
        yield "budget.max_epsilon", f"{budget.max_epsilon:g}: above {LARGE_EPSILON:g}, the guarantee is very weak"
    if limits.min_noise_multiplier == 0:
        yield "limits.min_noise_multiplier", "0: only the caps prevent a run without noise"
    elif limits.min_noise_multiplier < SMALL_NOISE:
        text = f"{limits.min_noise_multiplier:g}: below {SMALL_NOISE:g} a single step can reveal a record's membership"
        yield "limits.min_noise_multiplier", text
    size = policy.population_size
    if budget.delta > 1 / (10 * size):
        chance = f"{budget.delta:g}: the probability, for each of {size:,} {policy.population.unit}s, of an outcome"
        most = f"{10.0 ** math.floor(-math.log10(10 * size)):.0e}"
        yield "budget.delta", f"{chance} that only this one can explain; choose at most {most}"
    if not policy.anchor:
        yield "anchor", "empty: a rollback of the ledger to an older copy is not detected"
    # Settings that refuse every request, or accept more requests than the policy's author may expect.
    for name in ("leads", "tasks", "base_models", "target_modules"):
        if not getattr(allow, name):
            yield f"allow.{name}", "empty: every request is refused"
    if not policy.releases.updates:
        yield "releases.updates", "false: every request is refused"
    if UNVERIFIED in allow.base_models:
        yield "allow.base_models", '"unverified": accepts runs that do not specify the hash of their base model'
    if "0" * 64 in allow.base_models:
        yield "allow.base_models", "all zeros is a placeholder: no model has this digest"
    for dataset in policy.dataset:
        if not dataset.path:
            yield f"dataset.{dataset.id}.path", "empty: the site has nothing to train on"
    # Caps that contradict each other or the reference run.
    if budget.max_epsilon_per_run is None and budget.max_epsilon_per_period is None:
        text = "not set, like max_epsilon_per_period: a single run can spend the whole lifetime budget"
        yield "budget.max_epsilon_per_run", text
    if not amount.reference_fits:
        text = "would itself be refused by the limits or by max_epsilon_per_run; is this the run that you expect?"
        yield "budget.reference", text
    for key, runs in {"max_epsilon": amount.runs_in_lifetime, "max_epsilon_per_period": amount.runs_in_period}.items():
        if runs == 0:
            yield f"budget.{key}", "is too small for a single run like the reference"
    if not policy.releases.reply_after_s:
        yield "releases.reply_after_s", f"0: {IMMEDIATE_REPLY_RISK}; choose more than the duration of a round"
    if policy.asserted.no_person_at_another_site is False:
        about = "for a person with records at several sites, the epsilons of these sites add up"
        yield "asserted.no_person_at_another_site", f"false: {about}"
    # The key and the anchor of an existing ledger.
    ledger, anchor = folder / policy.ledger, folder / policy.anchor
    if not ledger.is_file():
        return
    if not policy.key_command and not (folder / policy.site_key).is_file():
        yield "site_key", "is missing, but the ledger requires its original key: restore the key from its backup"
    if policy.anchor and not anchor.is_file():
        text = "is missing, although the ledger is not new: the site does not train (see docs/site_policy.md)"
        yield "anchor", text
    elif policy.anchor and anchor.stat().st_dev == ledger.stat().st_dev:
        yield "anchor", "is on the ledger's own disk: both can be rolled back together"


def compare_with_ledger(files: SiteFiles) -> tuple[VerifiedLedger | None, Differences]:
    """Compare the policy with its ledger.

    Returns:
        The verified ledger (None before it exists), and its differences from the policy.

    Raises:
        RunError: the verification of the ledger failed.
    """
    if (verified := files.verify_ledger()) is None:
        return None, []
    opened = verified.history.opening
    differences = opened.list_differences(files.policy)
    if (public := files.public_key) not in (None, opened.site_key):
        differences.append(("site_key", opened.site_key, public))
    return verified, differences


def compute_remaining_epsilon(history: History) -> float:
    """Compute the epsilon that the caps leave now, after all reservations.

    It equals the remaining Renyi divergence: at the ledger's order, the conversion only adds a constant.
    """
    assert history.policy is not None
    return compute_remaining_divergence(history, history.policy, history.now())


def count_remaining_reference_runs(history: History) -> int | None:
    """Count the reference runs that the caps allow now; None if there is no cap."""
    assert history.policy is not None
    return count_remaining_runs(history, history.policy, history.policy.budget.reference.event, history.now())


def convert_identity_to_json(path: Path, verified: VerifiedLedger) -> dict[str, Any]:
    """Convert the ledger's identity to JSON values with stable keys."""
    opened = verified.history.opening
    return {
        "schema_version": SCHEMA_VERSION,
        "path": str(path),
        "ledger": opened.ledger,
        "site": opened.site,
        "population": opened.population,
        "unit": opened.unit,
        "neighboring_relation": NEIGHBORING_RELATION.name.lower(),
        "delta": opened.delta,
        "site_key": verified.site_key,
        "num_events": len(verified.events),
    }


def convert_verification_to_json(verified: VerifiedLedger) -> dict[str, Any]:
    """Convert a successful verification to JSON values.  A failed verification raises an error in `verify`."""
    return {
        "unchanged": True,
        "head": verified.history.hash,
        "key_expected": verified.key_expected,
        "rollback_excluded": verified.anchor_sequence is not None,
        "anchor_sequence": verified.anchor_sequence,
    }


SEEDED = (
    "NO GUARANTEE: the noise would come from the configured seed, and anyone who knows the seed can subtract the noise."
)


def format_rounded_down(epsilon: float) -> str:
    """Format a remaining epsilon, rounded down to three decimals."""
    return "unbounded" if math.isinf(epsilon) else f"{math.floor(epsilon * 1000) / 1000:.3f}"


def format_cap(cap: float | None) -> str:
    """Format a cap of a policy."""
    return "no cap" if cap is None or math.isinf(cap) else f"at most {cap:g}"


def describe_noise(plan: Plan) -> str:
    """Describe a plan's noise: its multiplier and, for secure aggregation, each site's share and the threshold."""
    if (shared := plan.shared) is None:
        return f"multiplier {plan.noise_multiplier:g}{describe_shared_epsilon(plan)}"
    less = f", less {shared.colluders} that may collude" if shared.colluders else ""
    least = f"at least {shared.threshold} of {pluralize(shared.num_sites, 'site')}{less}"
    each = f"multiplier {plan.noise_multiplier:g} at each site"
    return f"{each}, {plan.accounted_noise:.4g} in a secure aggregate of {least}{describe_shared_epsilon(plan)}"


def describe_trust(by_trust: Epsilons) -> str:
    """Describe the epsilons of distributed noise under different assumptions on the honesty of server and sites."""
    alone = f"epsilon {format_epsilon(by_trust.server_alone)} against the server alone"
    planned = f"{format_epsilon(by_trust.with_colluders)} with the planned number of colluding sites"
    return f"{alone}, {planned}, {format_epsilon(by_trust.with_all_others)} if all other sites collude"


ABOUT_RDP = (
    "Epsilon by RDP is a bound on the same privacy loss by an older, looser method, and is usually larger. It is a "
    "check only: the guarantee is {counts}, and nothing is spent in addition."
)
"""Note next to an RDP epsilon.  `counts` is the name of the guaranteed epsilon."""
WEAK_SIGNAL = 1.0
"""Signal-to-noise ratio below which noise moves the adapter further than all records can; see docs/planning.md."""


def explain_signal(ratio: float, task: str) -> str:
    """Explain a run's signal-to-noise ratio (`planner.compute_signal_to_noise`) for its task."""
    times = f"noise moves the adapter {1 / max(ratio, 1e-99):.3g} times as far as all records together can"
    if ratio < MIN_SIGNAL:
        return f"{times}: the run will likely learn nothing; it requires training.ignore_weak_signal=true"
    if ratio < WEAK_SIGNAL:
        return f"{times}: this run will likely learn little, and still spends its epsilon"
    furthest = f"signal to noise: at most {ratio:.2g}"
    if not (studied := get_task(task).studied):
        return f"{furthest}; there is no study of how much task {task} learns at this ratio"
    nearest = min(studied, key=lambda one: abs(math.log(one / ratio)))
    kept = f"runs at {nearest:g} kept {studied[nearest]} of the gain of training without privacy"
    return f"{furthest}; in a study, {kept}"


def describe_contribution(plan: Plan) -> str:
    """Describe the contribution bound of a user per step, for a plan with user-level privacy."""
    most = pluralize(plan.records_per_user, "record")
    whom = ""
    if (cohorts := plan.cohorts) is not None:
        came = f"up to {cohorts.last}, and those without a date" if cohorts.first is None else f"in {cohorts}"
        whom = f"; it admits and charges people who arrived {came}, and nobody else"
    return f"at most {most} per user in a step, their mean gradient clipped once; sizes count users{whom}"


@spec
class ArrivalRange:
    """A range of arrival periods.

    Attributes:
        first: first period; None: including people without a date; "": from the first date.
        last: last period; "before": only people without a date; None: up to the newest period.
    """

    first: str | None
    last: str | None

    @classmethod
    def from_cohort(cls, cohort: int, after: int | None, period: str) -> ArrivalRange:
        """Build the range from a cohort to the last cohort before `after` (None: to the newest cohort)."""
        first = None if cohort == OLDEST else "" if cohort == OLDEST + 1 else format_cohort_name(cohort, period)
        return cls(first=first, last=None if after is None else format_cohort_name(after - 1, period))

    @property
    def code(self) -> str:
        """Key of this range in the section `arrivals` of the report's texts."""
        if self.first is None:
            return "all" if self.last is None else "undated" if self.last == "before" else "undated_to"
        if not self.first:
            return "dated" if self.last is None else "to"
        return "from" if self.last is None else "in" if self.first == self.last else "between"

    @property
    def dates(self) -> str:
        """The range in language-neutral notation, for chart labels."""
        return "?" if self.code == "undated" else "–".join(dict.fromkeys((self.first or "…", self.last or "…")))  # noqa: RUF001


def merge_adjacent_ranges(people: Mapping[int, ArrivalRange]) -> list[ArrivalRange]:
    """Merge the arrival ranges in `people` whose indices are consecutive."""
    found: list[ArrivalRange] = []
    for place, one in people.items():
        if place - 1 in people:
            one = ArrivalRange(first=found.pop().first, last=one.last)
        found.append(one)
    return found


def format_mechanism(event: DpEvent, count: int) -> str:
    """Describe `count` identical mechanisms, such as the noisy steps of a round."""
    match event:
        case PoissonSampledDpEvent():
            rate, noise = event.sampling_probability, event.event.noise_multiplier
            return f"{pluralize(count, 'noisy step')} (rate {rate:g}, noise {noise:g})"
        case GaussianDpEvent():
            return f"{pluralize(count, 'noised score')} (noise {event.noise_multiplier:g})"
        case LaplaceDpEvent():
            return f"{pluralize(count, 'noised sum')} (Laplace noise {event.noise_multiplier:g})"
        case _:
            return f"{pluralize(count, 'round')} WITHOUT NOISE"
