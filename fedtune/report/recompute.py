"""A report's figures again, from the events in it alone, and its rules again, from its own facts.

Nothing but the charges is taken on trust: what they come to is computed anew, and compared with what the report says.
Verdicts, assumptions and cells are derived again by the rules that made them, as favourably as the report allows: one
that nobody signed can be changed in one place and not in the others.  Where everything was changed alike, only a
signature tells; and whether the charges are what really ran is for the ledger's signature, or the receipts, to show.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
)

from fedtune.privacy import accountant, events, filter
from fedtune.privacy.events import Spent
from fedtune.privacy.run_plan import LEAST_SAMPLING_RATE
from fedtune.privacy.selection import MOST_TRIALS, Selection
from fedtune.report.derive import profile, reliance, rules, verdicts
from fedtune.report.derive.audit_bounds import audit_problems, refutes
from fedtune.report.derive.facts import LedgerFacts, RunFacts
from fedtune.report.derive.profile import largest
from fedtune.report.derive.verdicts import WORST_FIRST
from fedtune.report.model import Lifetime, Mechanism, Report, SiteReport
from fedtune.report.model import Problem as Problem
from fedtune.spec import ConfigError
from fedtune.words import finite

TOLERANCE = 1e-6
"""Relative, upwards; downwards only what two machines' last digits may differ by."""
_LAST_DIGITS = 1e-9
_FFT_ROUNDING = 5e-15
"""Of the sum that a delta is: distributions are composed by a Fourier transform, which two processors round otherwise.
An epsilon at delta 1e-10 was seen to differ by 1.3e-6 of itself."""
_MOST_BUCKETS = 5e7
"""Of one distribution, and of all distributions of single mechanisms of a report together: some minutes' work.  A
ledger of 200 runs, each with another plan and noised scores, stays below it; a run has one plan."""
_MOST_COMPOSED = 2 * _MOST_BUCKETS
"""Buckets that are passed over to compose all that a report holds; a composition is far quicker than a distribution."""
_PLACES = 8
"""Of a run's steps, which never fall, so many are computed again."""
_TELLING_PROGRESS = ("end_independent_of_releases", "chosen_by_the_leads_own_records")
"""Assumptions whose evidence ends in the rounds that there were, a slash, and those planned."""
_NUMBER = re.compile(r"[0-9]{1,6}")
_BUCKETS_OF_ANY = 3e4
"""As much work as a mechanism takes whatever its size: about 0.1 s."""

Charges = Counter[DpEvent]
_Charged = Mechanism | Selection


def problems(report: Report) -> list[Problem]:
    """Every figure of the report that is not what its events come to, and all that another part of it contradicts.

    An epsilon may be larger than what is found by a millionth, and never smaller.
    """
    if not 0 < report.delta < 1:
        return [Problem("delta", report.delta, "a number between 0 and 1")]
    if too_much := [*_too_much_work(report)]:
        return too_much
    found = [problem for site in report.sites for problem in _of_site(report, site)]
    found += _compared(
        "epsilon", report.epsilon, largest([profile.claimed(site.spent) for site in report.sites if site.spent])
    )
    worst = [state for state in WORST_FIRST if state in {site.verdict.state for site in report.sites}]
    if worst and WORST_FIRST.index(report.verdict.state) > WORST_FIRST.index(worst[0]):
        found.append(Problem("verdict.state", report.verdict.state, worst[0]))
    for number, cost in enumerate(report.utility.rounds if report.utility else ()):
        after = [step.epsilon for site in report.sites for step in site.steps if step.round == cost.round]
        found += _compared(f"utility.rounds.{number}.epsilon", cost.epsilon, largest(after)) if after else ()
    found += _selection(report)
    found += _kept(report)
    try:
        found += rules.contradictions(report)
        found += audit_problems(report)
    except (ValueError, ArithmeticError, LookupError) as error:  # a time that is none, an order of 0
        found.append(Problem("report", "figures", f"that cannot be compared: {error}"))
    return found


def _too_much_work(report: Report) -> Iterator[Problem]:
    """A small file can name so many different mechanisms that their distributions keep this machine busy for days."""
    parts: dict[tuple[float, frozenset[tuple[DpEvent, int]]], tuple[Charges, int]] = {}
    # In a ledger each run and its plan is computed by itself, too.
    held: list[tuple[Sequence[_Charged], float, int]] = [
        (site.mechanisms, profile.interval_of(site.source), 3 if site.source == "own_ledger" else 1)
        for site in report.sites
    ]
    if report.utility and report.utility.selection:
        held.append(([report.utility.selection], accountant.FINE, 1))
    for rows, interval, times in held:
        try:
            charged = sum(map(_charges, rows), Counter())
        except (ValueError, ArithmeticError, RecursionError):
            continue  # found again, and named, at its place
        parts[interval, frozenset(charged.items())] = charged, times
    single = {(interval, event) for (interval, _), (charged, _) in parts.items() for event in charged}
    work = sum(_BUCKETS_OF_ANY * len(charged) * times for charged, times in parts.values())
    work += sum(_buckets(event) * accountant.FINE / interval for interval, event in single)
    too_much = work > _MOST_BUCKETS
    if not too_much:  # or it would be too much to say how wide the compositions are
        wide = ((interval, charged, times) for (interval, _), (charged, times) in parts.items())
        composed = sum(len(part) * times * (_widest(part) or 0.0) / interval for interval, part, times in wide)
        too_much = composed > _MOST_COMPOSED
    if too_much:
        yield Problem("sites.mechanisms", f"{len(single)} different mechanisms", "that would take hours to compute")


def charges_of(site: SiteReport) -> Charges:
    """Everything that a site was charged, equal mechanisms counted.

    Raises:
        ConfigError: a charge is no event of fedtune's, or one whose epsilon cannot be computed.
    """
    return _computable(site.mechanisms)


def _computable(rows: Sequence[_Charged]) -> Charges:
    total: Charges = sum(map(_charges, rows), Counter())
    widest = _widest(total)
    if widest is None or widest / accountant.FINE > _MOST_BUCKETS:
        raise ConfigError("charges", f"epsilon {widest}", "must be mechanisms whose epsilon can be computed")
    return total


def _widest(charges: Charges) -> float | None:
    """About the largest loss that the distribution of these charges has to hold."""
    noisy = Counter({event: count for event, count in charges.items() if not isinstance(event, NonPrivateDpEvent)})
    return profile.epsilon_rdp(noisy, 1e-12)


def _charges(row: _Charged) -> Charges:
    total = profile.charges_of(row)
    for event, count in total.items():
        _check_size(event, count)
    return total


def _check_size(event: DpEvent, count: int) -> None:
    """Refuse what no site would run, and what would keep this machine busy for hours."""
    rate = event.sampling_probability if isinstance(event, PoissonSampledDpEvent) else 1.0
    gaussian = event.event if isinstance(event, PoissonSampledDpEvent) else event
    if isinstance(gaussian, GaussianDpEvent):
        sigma = gaussian.noise_multiplier
        if rate >= LEAST_SAMPLING_RATE and sigma <= 1e6 and count <= 10**9 and _buckets(event) <= _MOST_BUCKETS:
            return
    elif isinstance(event, NonPrivateDpEvent):
        return
    raise ConfigError(
        "event", f"{count} x {events.to_json(event)}", "must be a mechanism whose epsilon can be computed"
    )


def _buckets(event: DpEvent) -> float:
    """Of a mechanism's distribution on the fine grid, about."""
    gaussian = event.event if isinstance(event, PoissonSampledDpEvent) else event
    if not isinstance(gaussian, GaussianDpEvent):
        return 0.0
    sigma = gaussian.noise_multiplier
    return float(10 / sigma + 1 / sigma**2) / accountant.FINE


def _of_site(report: Report, site: SiteReport) -> list[Problem]:
    where = f"sites.{site.site}"
    try:
        charged = charges_of(site)
        if site.spent is None:
            released = site.source != "not_released" or charged
            return [Problem(f"{where}.spent", None, "figures, or no source")] if released else []
        found = [*_figures(report, site, charged), *_sums(site)]
        if site.lifetime:
            found += _lifetime(report, site, site.lifetime)
        found += _verdict(report, site)
    except (ValueError, ArithmeticError, RecursionError) as error:  # ValueError: no event, or a value out of its range
        return [Problem(f"{where}.mechanisms", "charges", f"that cannot be computed: {error}")]
    return [Problem(f"{where}.{key}", said, right) for key, said, right in found]


def _selection(report: Report) -> list[Problem]:
    """What a report says of the search that its run was picked in, against all that the search might do to a site."""
    if report.utility is None or (told := report.utility.selection) is None:
        return []
    try:
        found = [*_of_selection(report, told, _computable([told]))]
    except (ValueError, ArithmeticError, RecursionError) as error:
        found = [Problem("charges", "charges", f"that cannot be computed: {error}")]
    return [Problem(f"utility.selection.{key}", said, right) for key, said, right in found]


def _kept(report: Report) -> Iterator[Problem]:
    """A round that was kept, and is none of the run's or had another score."""
    if report.utility is None or (kept := report.utility.kept) is None:
        return
    scores = {one.round: one.scores.get(kept.judged_by) for one in report.utility.rounds}
    if kept.round not in scores:
        yield Problem("utility.kept.round", kept.round, "one of utility.rounds")
    elif scores[kept.round] != kept.score:
        yield Problem("utility.kept.score", kept.score, scores[kept.round])


def _of_selection(report: Report, told: Selection, charged: Charges) -> Iterator[Problem]:
    yield from _compared("delta", told.delta, report.delta)
    yield from _compared("epsilon", told.epsilon, finite(accountant.epsilon_pld(charged, told.delta)))
    if told.method not in ("grid", "random", "tpe"):
        yield Problem("method", told.method, "grid, random or tpe")
    if not 1 <= told.trials <= min(sum(charged.values()), MOST_TRIALS):
        yield Problem("trials", told.trials, "no more trials than what they were charged")
    for site in report.sites:
        if charges_of(site) - charged:
            yield Problem("charges", _listed(charged), f"at least what {site.site} was charged for this run")


def _figures(report: Report, site: SiteReport, charged: Charges) -> Iterator[Problem]:
    """What all charges of a site come to."""
    spent, delta = site.spent, report.delta
    assert spent is not None
    pld = profile.epsilon_pld(charged, delta, interval=profile.interval_of(site.source))
    by_filter = _by_filter(charged, site, delta)
    ended = spent.rounds > 0 and report.kind == "run" and RunFacts.of_report(report).ended_by_scores
    yield from _compared("spent.ended_by_scores", spent.ended_by_scores, ended)
    yield from _compared("spent.epsilon_pld", spent.epsilon_pld, pld)
    yield from _compared("spent.epsilon_rdp", spent.epsilon_rdp, profile.epsilon_rdp(charged, delta))
    yield from _compared("spent.epsilon", spent.epsilon, by_filter if site.source == "own_ledger" else pld)
    yield from _trust(site, delta)
    planned = largest([pld, _least_planned(report, site)])
    if spent.planned_epsilon is not None and not _at_most(planned, spent.planned_epsilon):
        yield Problem("spent.planned_epsilon", spent.planned_epsilon, f"at least {planned}")
    deltas = [point.delta for point in site.curve]
    if deltas != [*(profile.curve_deltas(delta) if charged else ())]:
        yield Problem("curve", f"{len(deltas)} deltas", "the powers of ten and the report's own delta")
        return
    for number, (point, again) in enumerate(zip(site.curve, profile.curve(charged, deltas), strict=True)):
        rounding = max(_LAST_DIGITS, _FFT_ROUNDING / point.delta)
        yield from _compared(f"curve.{number}.epsilon_pld", point.epsilon_pld, again.epsilon_pld, under=rounding)
        yield from _compared(f"curve.{number}.epsilon_rdp", point.epsilon_rdp, again.epsilon_rdp)
    if site.meaning is not None:
        meant = reliance.means(site, charged, delta=delta, fixed=verdicts.were_fixed(site))
        yield from _compared("meaning", dataclasses.asdict(site.meaning), dataclasses.asdict(meant))
    before: float | None = 0.0
    for number, step in enumerate(site.steps):
        if not (_at_most(before, step.epsilon) and _at_most(step.epsilon, spent.epsilon)):
            yield Problem(f"steps.{number}.epsilon", step.epsilon, f"from {before} to {spent.epsilon}")
        before = step.epsilon
    if site.steps:
        yield from _compared("steps.-1.epsilon", before, spent.epsilon)
    yield from _least_steps(report, site)


def _least_planned(report: Report, site: SiteReport) -> float | None:
    """Epsilon of as many rounds as the report says that a run was to have, or had; its retries are not known."""
    (row, *_) = [*site.mechanisms, None]
    if row is None or site.source == "own_ledger":
        return 0.0
    progress = [one.evidence for one in report.assumptions if one.code in _TELLING_PROGRESS]
    told = [int(text) for text in (one.rpartition("/")[2].strip() for one in progress) if _NUMBER.fullmatch(text)]
    rounds = max([row.rounds, len(report.utility.rounds) if report.utility else 0, *told])
    return _epsilon_of(row, rounds, report.delta, interval=profile.interval_of(site.source))


def _epsilon_of(row: Mechanism, rounds: int, delta: float, *, interval: float) -> float | None:
    """Of so many rounds with a run's settings; 0, which bounds nothing, where it would take too long to say."""
    charged = Counter(profile.by_settings(dataclasses.replace(row, rounds=rounds)))
    for event, count in charged.items():
        _check_size(event, count)
    widest = _widest(charged)
    if widest is None or widest / interval > _MOST_BUCKETS / 10:
        return 0.0
    return profile.epsilon_pld(charged, delta, interval=interval)


def _least_steps(report: Report, site: SiteReport) -> Iterator[Problem]:
    """Steps that fall short of what was charged in all less what came after them."""
    if (spent := site.spent) is None:
        return
    rows = {row.run: row for row in site.mechanisms}
    lost = {""} if site.lifetime and site.lifetime.restored else set()
    if unknown := [step.run for step in site.steps if rows and step.run not in {*rows, *lost}]:
        yield Problem("steps.run", unknown[0], "a run that was charged")
        return
    if site.source == "own_ledger":
        if spent.rounds and not site.steps:
            yield Problem("steps", "none", "one for each run at least")
        if site.lifetime and not site.lifetime.restored and spent.epsilon is not None:
            yield from _least_by_filter(site, rows, site.lifetime.order)
        return
    stated = [step.round or 0 for step in site.steps]
    costs = report.utility.rounds if report.utility else ()
    least, most = {cost.round for cost in costs if site.site in cost.sites}, {cost.round for cost in costs}
    if costs and (stated != sorted(set(stated)) or not least <= set(stated) <= most):
        yield Problem("steps.round", ", ".join(map(str, stated)), "each round that the site took part in, in order")
        return
    later = range(len(site.steps) - 1, 0, -1)
    for place in later[:: max(1, len(later) // _PLACES)] if len(rows) == 1 else ():
        (row,) = rows.values()
        rounds = max(0, row.rounds - (len(site.steps) - place))
        after = _epsilon_of(row, rounds, report.delta, interval=accountant.FINE) if rounds else 0.0
        if spent.epsilon is not None:
            after = spent.epsilon if after is None else min(after, spent.epsilon)
        if not _at_most(after, site.steps[place - 1].epsilon):
            yield Problem(f"steps.{place - 1}.epsilon", site.steps[place - 1].epsilon, f"at least {after}")


def _least_by_filter(site: SiteReport, rows: Mapping[str, Mechanism], order: float) -> Iterator[Problem]:
    """The same of a ledger, whose filter adds up: each later step took no more than its round, or its whole run."""
    assert site.spent is not None
    assert site.spent.epsilon is not None
    if not rows:
        return
    whole = {run: filter.total_divergence(_charges(row), order) for run, row in rows.items()}
    least = site.spent.epsilon
    for place in range(len(site.steps) - 1, 0, -1):
        step = site.steps[place]
        least -= whole[step.run] / (1 if step.round is None else max(1, rows[step.run].rounds))
        said = site.steps[place - 1].epsilon
        if said is not None and said < least - TOLERANCE * max(1.0, site.spent.epsilon):
            yield Problem(f"steps.{place - 1}.epsilon", said, f"at least {least}")


def _trust(site: SiteReport, delta: float) -> Iterator[Problem]:
    """By who looks, as the site's own figure is computed; of a run that scores ended, for its whole plan."""
    interval, spent, said = profile.interval_of(site.source), site.spent, site.by_trust

    def epsilon(charged: Spent) -> float | None:
        if site.source == "own_ledger":
            return _by_filter(Counter(events.grouped(charged)), site, delta)
        for event, count in events.grouped(charged).items():
            _check_size(event, count)
        return profile.epsilon_pld(charged, delta, interval=interval)

    found = reliance.by_trust(site.mechanisms, epsilon)
    if said is None or found is None or spent is None or not spent.ended_by_scores:
        return (yield from _compared("by_trust", *(one and dataclasses.asdict(one) for one in (said, found))))
    yield from _compared("by_trust.with_colluders", said.with_colluders, spent.planned_epsilon)
    for key in ("server_alone", "with_all_others"):
        if not _at_most(least := getattr(found, key), getattr(said, key)):
            yield Problem(f"by_trust.{key}", getattr(said, key), f"at least {least}")


def _by_filter(charged: Charges, site: SiteReport, delta: float) -> float | None:
    if site.lifetime is None:
        return None
    order = site.lifetime.order
    if not (1 < order < 1e4):
        raise ConfigError("lifetime.order", order, "must be above 1, and an order that can be computed")
    return finite(filter.epsilon_filter(charged, order=order, delta=delta))


def _sums(site: SiteReport) -> Iterator[Problem]:
    """Counts, and each run's settings against its charges."""
    spent = site.spent
    assert spent is not None
    yield from _compared("spent.rounds", spent.rounds, sum(row.rounds for row in site.mechanisms))
    yield from _compared("spent.steps", spent.steps, sum(row.rounds * row.local_steps for row in site.mechanisms))
    for row in site.mechanisms:
        if row.rounds and (charged := _with_noise(_charges(row))) != (
            settings := _with_noise(Counter(profile.by_settings(row)))
        ):
            yield Problem(f"mechanisms.{row.run}", _listed(charged), _listed(settings))


def _with_noise(charged: Charges) -> Charges:
    """Of what ran without noise it does not matter how often it did."""
    return Counter({event: 1 if isinstance(event, NonPrivateDpEvent) else count for event, count in charged.items()})


def _listed(charged: Charges) -> str:
    return "; ".join(f"{count} x {event}" for event, count in events.counted(charged))


def _lifetime(report: Report, site: SiteReport, life: Lifetime) -> Iterator[Problem]:
    """A ledger's own figures, and those of its runs alone."""
    assert site.spent is not None
    if site.source == "own_ledger":  # what a lead joined holds no events but those of its own run
        for key in ("epsilon", "epsilon_pld", "epsilon_rdp"):
            yield from _compared(f"lifetime.{key}", getattr(life, key), getattr(site.spent, key))
        yield from _runs(report, site, life)
    elif "site_report_disagrees" not in site.verdict.reasons:
        # The ledger counts this run, too; of one that is open and fell silent, in what it has set aside.
        least = _by_filter(charges_of(site), site, report.delta)
        most = life.with_set_aside if site.spent.upper_bound else life.epsilon
        if not _at_most(least, most):
            yield Problem("lifetime.epsilon", most, f"at least {least}, by this run alone")
    for key, least, most in (
        ("with_set_aside", life.epsilon, life.with_set_aside),
        ("period_epsilon", life.period_epsilon, life.epsilon),
    ):
        if not _at_most(least, most):
            yield Problem(f"lifetime.{key}", getattr(life, key), f"does not fit epsilon {life.epsilon}")
    yield from _compared("lifetime.left", life.left, site.left)
    cap = life.caps[-1].max_epsilon if life.caps else None
    if site.approved:
        said = site.approved.max_epsilon
        # One that the policy in force has and the ledger has not noted yet is smaller, and stands since nobody knows.
        if said != cap and not (site.approved.since is None and _at_most(said, cap)):
            yield Problem("approved.max_epsilon", said, cap)
        cap = said
    if (left := _left(life, cap)) is not None and (life.left is None or not _near(life.left, left)):
        yield Problem("lifetime.left", life.left, left)


def _runs(report: Report, site: SiteReport, life: Lifetime) -> Iterator[Problem]:
    """Each run's own count and epsilon; one without charges has spent nothing."""
    rows = {row.run: row for row in site.mechanisms}
    if len({run.run for run in life.runs}) < len(life.runs):
        yield Problem("lifetime.runs", len(life.runs), "each run once")
        return
    for run in life.runs:
        where, row = f"lifetime.runs.{run.run}", rows.get(run.run)
        rounds, steps = (row.rounds, row.rounds * row.local_steps) if row else (0, 0)
        epsilon = profile.epsilon_pld(_charges(row) if row else Counter(), report.delta)
        for key, found in (("rounds", rounds), ("steps", steps), ("epsilon", epsilon)):
            yield from _compared(f"{where}.{key}", getattr(run, key), found)
        if run.most_rounds < run.rounds and not life.restored:
            yield Problem(f"{where}.most_rounds", run.most_rounds, f"at least {run.rounds}")
        whole = _epsilon_of(row, run.most_rounds, report.delta, interval=accountant.COARSE) if row else 0.0
        if not _at_most(planned := largest([run.epsilon, whole]), run.planned_epsilon):
            yield Problem(f"{where}.planned_epsilon", run.planned_epsilon, f"at least {planned}")


def _left(life: Lifetime, cap: float | None) -> float | None:
    """What the cap leaves, where charges say it: before the first one a fixed part is still to come."""
    if life.frozen or life.in_doubt:
        return 0.0
    if cap is None or life.with_set_aside == 0:
        return None
    return 0.0 if life.with_set_aside is None else max(0.0, cap - life.with_set_aside)


def _verdict(report: Report, site: SiteReport) -> Iterator[Problem]:
    """A verdict that is better than the report's own facts allow, or an excess that they do not show.

    A ledger's caps on one run, and why a site promises nothing, are not all in the report: that a verdict is worse than
    it would have to be is let be.
    """
    derived = verdicts.verdict_of(_reasons(report, site)).state
    if site.verdict.state not in ("no_guarantee", derived):
        yield Problem("verdict.state", site.verdict.state, derived)


def _reasons(report: Report, site: SiteReport) -> Iterator[str]:
    """The reasons that the report itself gives for a site's verdict."""
    if report.audit is not None and refutes(report.audit, report.sites, site.site):
        yield "refuted_by_audit"
    if report.kind == "run":
        yield from verdicts.of_run(site, RunFacts.of_report(report))
    yield from verdicts.of_ledger(site, LedgerFacts.of_report(report, site))


def _compared(where: str, said: Any, found: Any, *, under: float = _LAST_DIGITS) -> Iterator[Problem]:
    """The differences between two pieces of plain data; numbers with a fraction are upper bounds, but for `under`."""
    if isinstance(said, dict) and isinstance(found, dict) and said.keys() == found.keys():
        for key in said:
            yield from _compared(f"{where}.{key}", said[key], found[key])
    elif isinstance(said, list | tuple) and isinstance(found, list | tuple) and len(said) == len(found):
        for number, (one, other) in enumerate(zip(said, found, strict=True)):
            yield from _compared(f"{where}.{number}", one, other)
    elif isinstance(said, float) and isinstance(found, float | int):
        if not -under * abs(found) <= said - found <= max(under, TOLERANCE) * abs(found):
            yield Problem(where, said, float(found))
    elif said != found:
        yield Problem(where, said, found)


def _near(left: float, found: float) -> bool:
    """What is left may be smaller than found, but for the last digits."""
    return -TOLERANCE * max(1.0, found) <= left - found <= _LAST_DIGITS * max(1.0, found)


def _at_most(epsilon: float | None, most: float | None) -> bool:
    """None is unbounded."""
    return most is None or (epsilon is not None and epsilon <= most * (1 + _LAST_DIGITS))
