"""The report of a ledger: one site's own view over all runs and years, from events that were verified.

Its figures are the filter's, which hold although each run was chosen after what earlier ones released.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent

from fedtune.privacy import accountant, filter
from fedtune.privacy import events as dp_events
from fedtune.privacy.ledger.chain import Event, Kind
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.spending import RunSpending, Spending, divergence_left, runs_left, spending
from fedtune.privacy.policy_file import policy_of
from fedtune.report.derive import cells, profile, reliance, verdicts
from fedtune.report.derive.facts import NOT_RECORDED, LedgerFacts
from fedtune.report.derive.profile import mechanism_of
from fedtune.report.derive.rules import report_of
from fedtune.report.model import (
    Approved,
    Cap,
    Charge,
    Lifetime,
    LifetimeRun,
    Mechanism,
    Release,
    Report,
    SiteReport,
    Spent,
    Step,
    Verdict,
    Verification,
)
from fedtune.report.record.ledger_record import LedgerRecord, read_ledger
from fedtune.words import finite

MOST_STEPS = 400
"""Steps of a report: so many rounds of the newest runs, and one for each run before those."""


def build(site_toml_or_ledger: Path, *, anchor: Path | None = None) -> Report:
    """The report of a ledger, as of its newest event.

    Guarantee: it holds nothing of the records but what was released; the records' fingerprints stay in the ledger.  A
    ledger that does not verify gives a report that says so and promises nothing.

    Args:
        site_toml_or_ledger: a `ledger.db`, or a `site.toml`, whose key and anchor are then used too.
        anchor: file that shows that no event is missing.

    Raises:
        ConfigError: there is no such file, or the files do not belong together.
        RunError: the ledger cannot be read at all.
    """
    record = read_ledger(site_toml_or_ledger, anchor=anchor)
    site, facts = site_report(record, spending(record.history, record.now))
    return report_of(facts, (site,), known=cells.of_ledger(record, facts.provenance))


def site_report(record: LedgerRecord, figures: Spending) -> tuple[SiteReport, LedgerFacts]:
    """The one site of a ledger's report, and what else the rules were told of it.

    Args:
        record: of the ledger.
        figures: what it has spent.
    """
    history, policy = record.history, record.policy
    ran, charged = mechanisms(history), history.charged()
    size = sum(dataset.declared_size for dataset in policy.dataset)
    lifetime, rounds = _lifetime(record, figures, ran), sum(row.rounds for row in ran)
    site = SiteReport(
        site=history.opened.site,
        source="own_ledger",
        verdict=Verdict(state="within"),
        declared_size=size,
        approved=_approved(record),
        spent=Spent(
            epsilon=finite(figures.epsilon),
            epsilon_pld=finite(figures.epsilon_pld),
            epsilon_rdp=finite(figures.epsilon_rdp),
            planned_epsilon=None,
            upper_bound=False,
            rounds=rounds,
            steps=sum(row.rounds * row.local_steps for row in ran),
        ),
        left=lifetime.left,
        meaning=None,
        mechanisms=ran,
        curve=profile.curve(charged, profile.curve_deltas(history.delta)) if charged else (),
        steps=steps(record.events, history, epsilon=figures.epsilon, most=MOST_STEPS),
        lifetime=lifetime,
        verification=_verification(record),
        releases=releases(record.events, history),
        # Nobody stands behind a simulated site who could state anything, whatever its policy says.
        asserted={} if record.simulated else dataclasses.asdict(policy.asserted),
        by_trust=reliance.by_trust(
            ran, lambda spent: finite(filter.epsilon_filter(spent, order=history.order, delta=history.delta))
        ),
    )
    facts = LedgerFacts.of_record(record, above_run_cap=any(_plans_above_their_caps(record, figures)))
    return verdicts.judged(site, verdicts.of_ledger(site, facts), charged=charged, delta=history.delta), facts


def _plans_above_their_caps(record: LedgerRecord, figures: Spending) -> Iterator[bool]:
    caps = _run_caps(record)
    for run in figures.runs:
        cap = caps[run.run]
        if cap is not None and run.planned_epsilon > cap:
            plan = record.history.runs[run.run].plan
            # Once more, as it was decided then: a close call on the fine grid.
            yield accountant.epsilon_above([plan.whole], plan.delta, limit=cap) is not None


def _approved(record: LedgerRecord) -> Approved:
    budget, noted = record.in_force.budget, record.policy.budget
    return Approved(
        max_epsilon=finite(budget.max_epsilon),
        max_epsilon_per_run=budget.max_epsilon_per_run,
        max_epsilon_per_period=budget.max_epsilon_per_period,
        period=budget.period,
        since=_caps_of(record.history)[-1].time if budget.max_epsilon == noted.max_epsilon else None,
    )


def _verification(record: LedgerRecord) -> Verification | None:
    found = record.verified
    if found is None:
        return None
    return Verification(
        num_events=len(found.events),
        head=found.hash,
        site_key=found.site_key,
        key_expected=found.key_expected,
        rollback_excluded=record.anchored_to_the_end,
        anchor_sequence=found.anchor_sequence if found.rollback_excluded else None,
    )


def _lifetime(record: LedgerRecord, figures: Spending, ran: Sequence[Mechanism]) -> Lifetime:
    """The figures over all runs, at the time of the newest event."""
    history, policy, now = record.history, record.in_force, record.now
    in_period = history.charged_in_period(policy.budget.period, now)
    rounds, adapters = {row.run: row.rounds for row in ran}, _final_adapters(record)
    return Lifetime(
        order=figures.order,
        epsilon=finite(figures.epsilon),
        with_set_aside=finite(figures.epsilon_with_set_aside),
        epsilon_pld=finite(figures.epsilon_pld),
        epsilon_rdp=finite(figures.epsilon_rdp),
        left=finite(divergence_left(history, policy, now)),
        period=policy.budget.period,
        period_epsilon=finite(filter.epsilon_filter(in_period, order=history.order, delta=history.delta)),
        reference_runs_left=runs_left(history, policy, policy.budget.reference_event(), now),
        caps=_caps_of(history),
        runs=tuple(_run(history, run, rounds[run.run], adapters.get(run.run)) for run in figures.runs),
        frozen=history.frozen,
        in_doubt=history.in_doubt is not None,
        restored=len(history.restored),
        seeded=history.seeded,
    )


def _run(history: History, run: RunSpending, rounds: int, adapter: str | None) -> LifetimeRun:
    """One run; rounds that it was charged on a lost branch are in its figures."""
    known = history.runs[run.run]
    plan, epsilon = known.plan, run.epsilon
    if rounds != run.rounds:
        epsilon = accountant.epsilon_pld([plan.event(rounds=rounds)], plan.delta, interval=accountant.COARSE)
    return LifetimeRun(
        run=run.run,
        lead=run.lead,
        dataset=run.dataset,
        state=run.state,
        rounds=rounds,
        most_rounds=run.most_rounds,
        steps=rounds * plan.local_steps,
        epsilon=finite(epsilon),
        planned_epsilon=finite(run.planned_epsilon),
        seeded_noise=known.proposal.seeded_noise,
        base_model=known.proposal.base_model,
        adapter_sha256=adapter,
    )


def _final_adapters(record: LedgerRecord) -> Mapping[str, str]:
    """Run -> digest of the adapter that its lead gave to the site at its end."""
    return {
        event.run: str(event.detail["adapter_sha256"])
        for event in record.events
        if event.kind is Kind.NOTE and event.detail["what"] == "run_ended" and event.detail.get("adapter_sha256")
    }


def _caps_of(history: History) -> tuple[Cap, ...]:
    """The lifetime caps, each from when it began to hold."""
    caps: list[Cap] = []
    for time, cap in history.policies:
        if not caps or caps[-1].max_epsilon != finite(cap):
            caps.append(Cap(time=time, max_epsilon=finite(cap)))
    return tuple(caps)


def _run_caps(record: LedgerRecord) -> Mapping[str, float | None]:
    """Run -> the cap on one run that was in force when it was accepted."""
    caps: dict[str, float | None] = {}
    in_force: float | None = None
    for event in record.events:
        if event.kind is Kind.PLAN:
            caps[event.run] = in_force
        elif event.kind is Kind.NOTE and event.detail["what"] == "policy":
            in_force = policy_of(event.detail["policy"]).budget.max_epsilon_per_run
    return caps


def mechanisms(history: History) -> tuple[Mechanism, ...]:
    """What each run did, rounds on lost branches included; then, under no name, what lost runs did."""
    rounds = {name: history.charged_rounds(name) for name in history.runs}
    unexplained = Counter(history.charged())
    for name, run in history.runs.items():
        unexplained.subtract(dp_events.grouped([run.plan.event(rounds=rounds[name])]))
    if any(count < 0 for count in unexplained.values()):
        # A head that names more rounds than charges: the events alone count, and what they leave is nobody's run.
        rounds = {name: run.charged_rounds for name, run in history.runs.items()}
        unexplained = Counter(history.charged())
        for name, run in history.runs.items():
            unexplained.subtract(dp_events.grouped([run.plan.event(rounds=rounds[name])]))
    known = [
        mechanism_of(run.plan, run=name, rounds=rounds[name], sampling="poisson")  # by the fedtune that wrote the event
        for name, run in history.runs.items()
    ]
    return (*known, *(_of_lost_run(event, count) for event, count in unexplained.items() if count > 0))


def _of_lost_run(event: DpEvent, count: int) -> Mechanism:
    """A mechanism that ran on a branch that was lost, of which nothing else is known: steps as those of one round."""
    ((json, _),) = dp_events.counted([event])
    rate, noise, scores = 1.0, 0.0, 0.0
    match event:
        case PoissonSampledDpEvent():
            rate, noise = event.sampling_probability, event.event.noise_multiplier
        case GaussianDpEvent():
            noise = scores = event.noise_multiplier
        case NonPrivateDpEvent():
            pass
    return Mechanism(
        run="",
        sampling_assumed="poisson",
        sampling_run=NOT_RECORDED,
        sampling_rate=rate,
        noise_multiplier=noise,
        max_grad_norm=None,
        local_steps=0 if scores else count,
        rounds=0 if scores else 1,
        metrics_noise_multiplier=scores,
        charges=(Charge(event=json, count=count),),
    )


def day_of(time: str) -> str:
    """The day of an event: a policy may hide from everybody when exactly its site trained."""
    return time[:10]


@dataclass(frozen=True, slots=True)
class _Charge:
    """What one event charged, and to which round."""

    run: str
    round: int | None
    time: str
    divergence: float


def steps(events: Sequence[Event], history: History, *, epsilon: float, most: int) -> tuple[Step, ...]:
    """Epsilon by the filter after each of the newest rounds, and before those after each run.

    Args:
        events: of the ledger.
        history: what they add up to.
        epsilon: after the last of them.
        most: steps, where rounds are among them; 0: one for each run, and for each backup put back.
    """
    charges = list(_charges(events, history))
    by_round = _newest_runs(charges, most)
    last = {charge.run: number for number, charge in enumerate(charges)}
    made, total = [], 0.0
    surcharge = filter.surcharge(history.order, history.delta)
    for number, charge in enumerate(charges):
        total += charge.divergence
        if charge.run in by_round or last[charge.run] == number:
            # Summed in another order than the ledger's own figure, from which it differs in the last digits.
            so_far = epsilon if number == len(charges) - 1 else min(epsilon, max(0.0, total + surcharge))
            shown = charge.round if charge.run in by_round else None
            made.append(Step(run=charge.run, round=shown, time=day_of(charge.time), epsilon=finite(so_far)))
    return tuple(made)


def _charges(events: Sequence[Event], history: History) -> Iterator[_Charge]:
    restored = iter(history.restored)
    each = {name: history.divergence([run.plan.event()]) for name, run in history.runs.items()}
    for event in events:
        if event.kind is Kind.RESERVE:
            yield _Charge(run=event.run, round=event.round, time=event.time, divergence=each[event.run])
        elif event.kind is Kind.NOTE and event.detail["what"] == "restored":
            gap = history.divergence(Counter(dict(next(restored).charges())))
            yield _Charge(run="", round=None, time=event.time, divergence=gap)


def _newest_runs(charges: Sequence[_Charge], most: int) -> set[str]:
    """The runs, newest first, whose rounds all fit into the report beside one step for each other run."""
    count = Counter(charge.run for charge in charges)
    newest_first = list(dict.fromkeys(charge.run for charge in reversed(charges)))
    room, chosen = most - len(newest_first), set[str]()
    for run in newest_first:
        room -= count[run] - 1
        if room < 0:
            break
        chosen.add(run)
    return chosen


def releases(events: Sequence[Event], history: History) -> tuple[Release, ...]:
    """What left the site, and what it refused, by run, kind and reason, the first of each in its order.

    Refusals of runs that the site never took part in are counted together: their names are whatever somebody asked for.
    """
    groups: dict[tuple[str, str, str | None], list[str]] = {}
    unanswered: dict[tuple[str, int, int], str] = {}
    for event in events:
        run = event.run if event.run in history.runs else ""
        match event.kind:
            case Kind.RESERVE:
                unanswered[event.run, event.round, event.attempt] = event.time
            case Kind.COMMIT:
                unanswered.pop((event.run, event.round, event.attempt), None)
                groups.setdefault((run, "update", None), []).append(event.time)
            case Kind.REFUSAL:
                groups.setdefault((run, "refusal", str(event.detail["reason"])), []).append(event.time)
            case Kind.RELEASE:
                groups.setdefault((run, str(event.detail.get("what", "offer")), None), []).append(event.time)
            case _:
                pass
    for (name, _, _), time in unanswered.items():
        groups.setdefault((name, "reservation_without_update", None), []).append(time)
    return tuple(
        Release(kind=kind, run=run, reason=reason, count=len(times), first=day_of(times[0]), last=day_of(times[-1]))
        for (run, kind, reason), times in groups.items()
    )
