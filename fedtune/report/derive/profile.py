"""The privacy loss in a report and its meaning: epsilon as a function of delta, and bounds on the success of any
attack.

The ceilings follow from (epsilon, delta) alone, by closed formulas. They hold for an attacker who knows every other
record and all releases; real attacks are weaker. An unbounded epsilon gives the trivial ceiling.

The mechanism's own trade-off curve is tighter: the privacy loss distribution (PLD) of all charges bounds delta at every
epsilon at once, and with it the hit rate of every attack; (epsilon, delta) is only one point of that curve. Each figure
is an upper bound: losses are rounded up, add and remove adjacency are both covered, and each attack is bounded by the
best of many points. Like every PLD figure, the bound is proved only for a plan that was fixed beforehand.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context
from functools import lru_cache, partial
from typing import Any

from fedtune.federation.secure.agreement import MAX_SITES_OF_SUM
from fedtune.formatting import convert_infinite_to_none, convert_none_to_infinite
from fedtune.privacy import accountant, events
from fedtune.privacy.accountant import Counted
from fedtune.privacy.distributed_noise import Epsilons
from fedtune.privacy.dp_library import (
    DpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    from_gaussian_mechanism,
    from_mixture_gaussian_mechanism,
)
from fedtune.privacy.events import Charge, Spent
from fedtune.privacy.run_plan import Plan
from fedtune.report.facts import NOT_RECORDED, Source
from fedtune.report.model import Ceiling, CurvePoint, Meaning, Mechanism, SpentBudget
from fedtune.spec import check_at_least

DELTAS = tuple(10.0**-power for power in range(3, 11))  # deltas of the reports' curves, besides the report's own delta
_LARGEST_EPSILON = 60.0  # above it, the miss rate of an attack is below the precision of a float
_SEARCH_WIDTH = 1e-5  # of epsilon, at the end of the search for the least bound
PRIORS = (0.5, 0.1, 0.01, 0.001)  # prior probabilities of membership in the reports' tables
FALSE_ALARMS = (0.01, 0.001)  # false positive rates in the reports' tables
TIERS_SOURCE = "arXiv 2303.00654"
BANDS = {"strong": (0.0, 1.0), "reasonable": (1.0, 10.0), "weak": (10.0, math.inf)}  # epsilon above, and up to
_INTERVAL_OF_SEVERAL = 0.02
"""Width of the PLD buckets for several records.  Coarse buckets only raise the bound, by less than 0.2 of 100 guesses;
finer buckets take ten times as long."""
_MIN_NOISE_OF_SEVERAL = 0.2  # below this noise multiplier, a distribution takes minutes
_MAX_PLANS_OF_SEVERAL = 8  # each plan takes a second
_LARGEST_EXPONENT = 700.0  # exp overflows a float above about 709
_THIRTEEN_DIGITS = Context(prec=13, rounding=ROUND_HALF_EVEN)
_NINE_DIGITS = Context(prec=9, rounding=ROUND_CEILING)


def count_charged_events(plan: Plan, rounds: int) -> Mapping[DpEvent, int]:
    """Return the number of executions of each single mechanism in `rounds` charged rounds."""
    return events.count_mechanisms([plan.event(rounds=rounds)])


def split_sampling(event: DpEvent) -> tuple[float, DpEvent]:
    """Split a mechanism into its Poisson sampling rate and the mechanism on the sampled records; the rate is 1 without
    sampling.
    """
    return (event.sampling_probability, event.event) if isinstance(event, PoissonSampledDpEvent) else (1.0, event)


def describe_mechanism(plan: Plan, *, run: str, rounds: int, sampling: str) -> Mechanism:
    """Describe the mechanism of `rounds` charged rounds, including retries; `sampling` is the code of the sampling
    scheme.
    """
    return Mechanism(
        run=run,
        sampling_run=sampling,
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.accounted_noise,
        max_grad_norm=plan.max_grad_norm if plan.private else None,
        local_steps=plan.local_steps,
        rounds=rounds,
        metrics_noise_multiplier=plan.metrics_noise_multiplier,
        charges=tuple(
            Charge(event=one, count=count)
            for one, count in events.count_mechanisms_as_json(count_charged_events(plan, rounds))
        ),
        records_per_user=plan.records_per_user,
        shared=plan.shared,
    )


def describe_lost_mechanism(event: DpEvent, count: int) -> Mechanism:
    """Describe a mechanism on a lost branch of the ledger, of which only the event is known; it counts as a single
    round.
    """
    ((json, _),), (rate, gaussian) = events.count_mechanisms_as_json([event]), split_sampling(event)
    noise = getattr(gaussian, "noise_multiplier", 0.0)  # Gaussian or Laplace
    scores = noise if gaussian is event else 0.0
    return Mechanism(
        run="",
        sampling_run=NOT_RECORDED,
        sampling_rate=rate,
        noise_multiplier=noise,
        max_grad_norm=None,
        local_steps=0 if scores else count,
        rounds=0 if scores else 1,
        metrics_noise_multiplier=scores,
        charges=(Charge(event=json, count=count),),
    )


def parse_charges(charges: Iterable[Charge]) -> Counter[DpEvent]:
    """Count the mechanisms in a report's charges.

    Raises:
        ConfigError: a charge is not an event that fedtune uses.
    """
    total: Counter[DpEvent] = Counter()
    for charge in charges:
        check_at_least("count", charge.count, 1)
        total[events.from_json(charge.event)] += charge.count
    return events.count_mechanisms(total)


def compute_charges_against_colluders(rows: Sequence[Mechanism], *, colluders: int | None) -> Counter[DpEvent]:
    """Return the charges if `colluders` other sites reveal their noise shares; None: the number that each run's plan
    assumed.
    """
    total: Counter[DpEvent] = Counter()
    for row in rows:
        if row.shared is None:  # only the charges of a lost run are known
            total.update(parse_charges(row.charges))
            continue
        noise = row.noise_multiplier if colluders is None else row.shared.compute_honest_noise(colluders)
        steps = row.local_steps * row.rounds
        charged = [events.build_dp_sgd_event(sampling_rate=row.sampling_rate, noise_multiplier=noise, steps=steps)]
        if row.metrics_noise_multiplier > 0:
            charged.append(SelfComposedDpEvent(GaussianDpEvent(row.metrics_noise_multiplier), row.rounds))
        total.update(events.count_mechanisms(charged))
    return total


def compute_epsilons_by_observer(
    rows: Sequence[Mechanism], epsilon: Callable[[Spent], float | None]
) -> Epsilons | None:
    """Compute a site's epsilon for each observer with the function `epsilon`; None without secure aggregation."""
    if all(row.shared is None for row in rows):
        return None
    lost = any(not row.run for row in rows)  # a lost run may have relied on other sites' noise
    return Epsilons(
        server_alone=epsilon(compute_charges_against_colluders(rows, colluders=0)),
        with_colluders=epsilon(compute_charges_against_colluders(rows, colluders=None)),
        with_all_others=None if lost else epsilon(compute_charges_against_colluders(rows, colluders=MAX_SITES_OF_SUM)),
    )


def find_largest_epsilon(epsilons: Iterable[float | None]) -> float | None:
    """Return the largest epsilon; None means unbounded, and is larger than any number."""
    return convert_infinite_to_none(max(map(convert_none_to_infinite, epsilons), default=0.0))


def find_smallest_epsilon(*epsilons: float | None) -> float | None:
    """Return the smallest epsilon; None means unbounded."""
    return convert_infinite_to_none(min(map(convert_none_to_infinite, epsilons)))


def bound_posterior(epsilon: float, *, prior: float) -> float:
    """Bound the posterior probability that a record was used: posterior odds are at most e^epsilon times the `prior`
    odds.

    For delta above 0 the bound may fail for some outcomes. The probability of such outcomes is at least delta, and can
    be many times delta.
    """
    return prior / (prior + (1 - prior) * _invert_exponential(epsilon))


def compute_hit_rate_ceiling(epsilon: float, delta: float, *, false_positive_rate: float) -> float:
    """Bound the true positive rate of any attack on membership, from (epsilon, delta) alone.

    `false_positive_rate` is the share of non-members that the attack classifies as members.
    """
    other_way = 1 - (1 - delta - false_positive_rate) * _invert_exponential(epsilon)
    return max(
        false_positive_rate,
        min(math.exp(min(epsilon, _LARGEST_EXPONENT)) * false_positive_rate + delta, other_way, 1.0),
    )


def bound_correct_guesses_per_100(epsilon: float, delta: float) -> float:
    """Bound the correct membership guesses out of 100 if half of the records were used; random guessing has 50."""
    factor = _invert_exponential(epsilon)  # (e^epsilon + delta) / (1 + e^epsilon), without the large number
    return 100 * (1 + delta * factor) / (1 + factor)


def bound_right_guesses_for_several(
    spent: Spent | None, right: float, *, epsilon: float, delta: float, members: int
) -> float:
    """Bound the correct guesses out of 100 about the membership of a person with `members` records.

    The result is the smallest of three bounds. First, each further record shifts the outcome at most as far as one
    record does, by the triangle inequality for total variation. Second, group privacy converts (epsilon, delta) for one
    record to several records. Third, if the charges in `spent` were fixed beforehand, their own trade-off curve gives
    the tightest bound: a Poisson sample contains a binomial number of the k records, and moves the sum by at most that
    many clipping norms. This mixture of Gaussians dominates every step (Ganesh 2024, arXiv 2401.10294, Theorem 2).

    Args:
        spent: the charges; None: they were not fixed beforehand.
        right: the bound for one record.
        epsilon: epsilon at `delta` for one record.
        delta: the report's delta.
        members: the person's number of records.
    """
    found = [
        50 + members * (right - 50),
        bound_correct_guesses_per_100(*apply_group_privacy(epsilon, delta, members=members)),
    ]
    by_mixture = None if spent is None else _bound_by_mixture(_sort_mechanisms(spent), members)
    return min(100.0, *found, *([] if by_mixture is None else [by_mixture]))


@lru_cache(maxsize=256)
def _bound_by_mixture(counted: Counted, members: int) -> float | None:
    """Compute the bound from the mechanism's own curve; None if it is trivial or would take too long to compute."""
    if len(counted) > _MAX_PLANS_OF_SEVERAL:
        return None
    total = None
    for event, count in counted:
        rate, gaussian = split_sampling(event)
        if not isinstance(gaussian, GaussianDpEvent) or gaussian.noise_multiplier < _MIN_NOISE_OF_SEVERAL:
            return None
        shares = {n: math.comb(members, n) * rate**n * (1 - rate) ** (members - n) for n in range(members + 1)}
        moved = [n for n, share in shares.items() if share > 0]
        noise, width = gaussian.noise_multiplier, _INTERVAL_OF_SEVERAL
        if len(moved) == 1:  # the library rejects a mixture with a single component
            one = from_gaussian_mechanism(noise, sensitivity=moved[0], value_discretization_interval=width)
        else:
            of_moved = [float(n) for n in moved], [shares[n] for n in moved]
            one = from_mixture_gaussian_mechanism(noise, *of_moved, value_discretization_interval=width)
        one = one.self_compose(count)
        total = one if total is None else total.compose(one)
    return None if total is None else 50 * (1 + min(1.0, max(0.0, float(total.get_delta_for_epsilon(0.0)))))


def apply_group_privacy(epsilon: float, delta: float, *, members: int) -> tuple[float, float]:
    """Convert (epsilon, delta) for one record to (epsilon, delta) for a group of `members` records of one person.

    Delta grows so fast that the result is rarely meaningful; training with the person as the privacy unit avoids this.
    """
    if delta == 0 or epsilon == 0:
        return members * epsilon, min(1.0, members * delta)
    if members * epsilon > _LARGEST_EXPONENT:
        return members * epsilon, 1.0
    return members * epsilon, min(1.0, delta * math.expm1(members * epsilon) / math.expm1(epsilon))


def find_strength_band(epsilon: float | None) -> str:
    """Return the code of the strength band of `epsilon` (None: unbounded), by the tiers of `TIERS_SOURCE`, not of a
    regulator.
    """
    if epsilon is None or math.isinf(epsilon):
        return "none"
    return next(code for code, (_, most) in BANDS.items() if epsilon <= most)


def _invert_exponential(epsilon: float) -> float:
    return 0.0 if epsilon > _LARGEST_EXPONENT else math.exp(-epsilon)


def choose_pld_interval(source: Source) -> float:
    """Return the PLD bucket width for a site's epsilon; curves always use the coarse grid, which can only raise their
    figures.
    """
    return accountant.COARSE if source == "own_ledger" else accountant.FINE


def epsilon_pld(spent: Spent, delta: float, *, interval: float = accountant.COARSE) -> float | None:
    """Compute epsilon at `delta` by PLD accounting with cached results; None: unbounded."""
    return _epsilon_pld(_sort_mechanisms(spent), delta, interval)


@lru_cache(maxsize=1024)  # most sites of a run have equal charges
def _epsilon_pld(counted: Counted, delta: float, interval: float) -> float | None:
    return convert_infinite_to_none(accountant.epsilon_pld(dict(counted), delta, interval=interval))


def epsilon_rdp(spent: Spent, delta: float) -> float | None:
    """Compute epsilon at `delta` by RDP accounting; None: unbounded."""
    return convert_infinite_to_none(accountant.compose_rdp(_sort_mechanisms(spent))(delta))


def accountants_agree(figures: SpentBudget, *, width: float) -> bool:
    """Whether the PLD epsilon is at most the looser RDP epsilon, with a tolerance for the PLD bucket `width`.

    The PLD discretization error grows at most with `width` times about the square root of the number of mechanisms.
    """
    if not figures.epsilon_pld or not figures.epsilon_rdp:
        return True
    return figures.epsilon_pld <= figures.epsilon_rdp + width * math.sqrt(figures.steps + figures.rounds)


def compute_epsilon_curve(spent: Spent, delta: float) -> tuple[CurvePoint, ...]:
    """Compute epsilon with both accountants at `DELTAS` and at the report's delta, in decreasing order; () without
    charges.
    """
    deltas = sorted({*DELTAS, delta}, reverse=True) if spent else ()
    both = ((one, epsilon_pld(spent, one), epsilon_rdp(spent, one)) for one in deltas)
    return tuple(CurvePoint(delta=one, epsilon_pld=pld, epsilon_rdp=rdp) for one, pld, rdp in both)


def bound_hit_rate(spent: Spent, *, false_positive_rate: float) -> float | None:
    """Bound the true positive rate of any membership attack from the mechanism's trade-off curve; None: unbounded.

    For an attack with false positive rate f, and each epsilon >= 0 with its delta, the rate is at most e^epsilon f +
    delta, and at most 1 - (1 - delta - f) / e^epsilon. The minimum over epsilon is the mechanism's trade-off curve
    (Dong, Roth and Su 2019, arXiv 1905.02383, Section 2.3).
    """
    return _bound_hit_rate_cached(_sort_mechanisms(spent), false_positive_rate)


@lru_cache(maxsize=256)
def _bound_hit_rate_cached(counted: Counted, false_positive_rate: float) -> float | None:
    own = _pld(counted, accountant.COARSE)
    if math.isinf(own.epsilon(0.5)):
        return None
    more_alarms = _minimize_bound(lambda epsilon: math.exp(epsilon) * false_positive_rate + own.delta(epsilon))
    fewer_misses = _minimize_bound(
        lambda epsilon: 1 - (1 - own.delta(epsilon) - false_positive_rate) * math.exp(-epsilon)
    )
    return max(false_positive_rate, min(1.0, more_alarms, fewer_misses))


def bound_secret_chance(spent: Spent | None, *, epsilon: float | None, delta: float, candidates: int) -> float:
    """Bound the chance that any attack rebuilds a secret in one record that is one of `candidates` equally likely
    values.

    Without the record, a guess is right with a chance of 1 / candidates.  With the record, the chance is at most the
    hit rate at this rate of false alarms, 1 - f(1 / candidates) of the trade-off curve f (reconstruction robustness;
    Balle, Cherubin and Hayes 2022, arXiv 2201.04845; Hayes, Mahloujifar and Balle 2023, arXiv 2302.07225).  The result
    is the least over all (epsilon, delta) of the mechanism, and over the given pair.

    Args:
        spent: the charges; None: they were not fixed beforehand, so that the given pair alone bounds attacks.
        epsilon: epsilon at `delta`; None: unbounded, and so is the chance.
        delta: the report's delta.
        candidates: number of values, at least 2.
    """
    if epsilon is None:
        return 1.0
    guess = 1 / candidates
    ceiling = compute_hit_rate_ceiling(epsilon, delta, false_positive_rate=guess)
    by_mechanism = None if spent is None else bound_hit_rate(spent, false_positive_rate=guess)
    return ceiling if by_mechanism is None else min(ceiling, by_mechanism)


def bound_correct_of_100(spent: Spent) -> float | None:
    """Bound the correct membership guesses out of 100 if half of the records were used; None: unbounded.

    The best attack is right with probability (1 + delta) / 2, where delta is the mechanism's delta at epsilon 0.
    """
    own = _pld(_sort_mechanisms(spent), accountant.COARSE)
    return None if math.isinf(own.epsilon(0.5)) else 50 * (1 + own.delta(0.0))


def compute_meaning(
    spent: Spent | None,
    *,
    epsilon: float | None,
    delta: float,
    declared_size: int | None,
    others: tuple[Spent, float | None] | None = None,
) -> Meaning:
    """Express `epsilon` (None: unbounded) at `delta`, and the charges in `spent`, as success rates of attacks.

    If the charges were not fixed beforehand, the mechanism's trade-off curve does not bound attacks, and `spent` is
    None. `others` are the charges and their epsilon if all other sites reveal their noise shares; None without secure
    aggregation.
    """
    stated = convert_none_to_infinite(epsilon)
    right, by_mechanism = _bound_right_guesses(spent, stated, delta)
    best = right if by_mechanism is None else by_mechanism
    for_several = partial(bound_right_guesses_for_several, spent, best, epsilon=stated, delta=delta)
    with_all_others, rates = None, []
    for alarms in FALSE_ALARMS:
        ceiling = compute_hit_rate_ceiling(stated, delta, false_positive_rate=alarms)
        found = None if spent is None else bound_hit_rate(spent, false_positive_rate=alarms)
        found = None if found is None else min(found, ceiling)
        rates.append(Ceiling(operating_point=alarms, ceiling=ceiling, mechanism=found))
    if others is not None:
        told, of_told = others
        fixed = None if spent is None or of_told is None else told
        bounds = _bound_right_guesses(fixed, convert_none_to_infinite(of_told), delta)
        with_all_others = min(bound for bound in bounds if bound is not None)
    return Meaning(
        correct_of_100_ceiling=right,
        correct_of_100_mechanism=by_mechanism,
        posterior=tuple(
            Ceiling(operating_point=prior, ceiling=bound_posterior(stated, prior=prior)) for prior in PRIORS
        ),
        hit_rates=tuple(rates),
        expected_failures=None if declared_size is None else delta * declared_size,
        correct_of_100_with_all_others=with_all_others,
        correct_of_100_for_2=for_several(members=2),
        correct_of_100_for_5=for_several(members=5),
    )


def _bound_right_guesses(spent: Spent | None, epsilon: float, delta: float) -> tuple[float, float | None]:
    """Bound the correct guesses out of 100 from (epsilon, delta), and from the PLD of `spent` if given."""
    ceiling = bound_correct_guesses_per_100(epsilon, delta)
    found = None if spent is None else bound_correct_of_100(spent)
    # Both bounds hold for every attack; the curve's coarse grid may slightly exceed a ceiling from the fine grid.
    return ceiling, None if found is None else min(found, ceiling)


def round_up_figures(part: Any) -> Any:
    """Round each figure of a `Meaning` up to nine digits, because the last digits depend on the number of threads."""
    if isinstance(part, float):  # first to thirteen digits, so that a float's rounding error does not add a digit
        return float(_NINE_DIGITS.plus(_THIRTEEN_DIGITS.create_decimal_from_float(part)))
    if isinstance(part, tuple):
        return tuple(map(round_up_figures, part))
    return part and replace(part, **{key.name: round_up_figures(getattr(part, key.name)) for key in fields(part)})


def _minimize_bound(bound: Callable[[float], float]) -> float:
    """Return an approximate minimum over epsilon of a unimodal `bound`; the result is valid because any epsilon gives a
    bound.

    This is a golden-section search. SciPy's takes longer to import than the search takes.
    """
    low, high, shrink = 0.0, _LARGEST_EPSILON, (math.sqrt(5) - 1) / 2
    left, right = high - shrink * (high - low), low + shrink * (high - low)
    at_left, at_right = bound(left), bound(right)
    least = min(bound(0.0), at_left, at_right)
    while high - low > _SEARCH_WIDTH:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - shrink * (high - low)
            at_left = bound(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + shrink * (high - low)
            at_right = bound(right)
        least = min(least, at_left, at_right)
    return least


def _sort_mechanisms(spent: Spent) -> Counted:
    """Sort the mechanisms, so that equal charges give equal figures to the last digit."""
    pairs = events.count_mechanisms(spent).items()
    return tuple(sorted(pairs, key=lambda pair: json.dumps(events.to_json(pair[0]), sort_keys=True)))


_pld = lru_cache(maxsize=64)(accountant.compose_pld)
