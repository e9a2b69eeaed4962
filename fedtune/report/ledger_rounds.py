"""What a ledger's events come to run by run and round by round, in one walk over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent

from fedtune.privacy import events as dp_events
from fedtune.privacy import filter
from fedtune.privacy.ledger.chain import Event, Kind
from fedtune.privacy.ledger.history import History
from fedtune.report.codes import NOT_RECORDED
from fedtune.report.mechanisms import bounded, mechanism_of
from fedtune.report.site_model import Charge, Mechanism, Release, Step

MOST_STEPS = 400
"""Steps of a report: so many rounds of the newest runs, and one for each run before those."""


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


def were_fixed(history: History, ran: Sequence[Mechanism]) -> bool:
    """Whether all that was charged was fixed before any of it was released: one run, charged its whole plan.

    A later run may be chosen, and an earlier one ended, because of what was released.
    """
    charged = [row for row in ran if row.rounds]
    known = history.runs.get(charged[0].run) if len(charged) == 1 else None
    return known is not None and charged[0].rounds == known.plan.most_rounds


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


def steps(events: Sequence[Event], history: History, *, epsilon: float) -> tuple[Step, ...]:
    """Epsilon by the filter after each of the newest rounds, and before those after each run.

    Args:
        events: of the ledger.
        history: what they add up to.
        epsilon: after the last of them.
    """
    charges = list(_charges(events, history))
    by_round = _newest_runs(charges)
    last = {charge.run: number for number, charge in enumerate(charges)}
    made, total = [], 0.0
    surcharge = filter.surcharge(history.order, history.delta)
    for number, charge in enumerate(charges):
        total += charge.divergence
        if charge.run in by_round or last[charge.run] == number:
            # Summed in another order than the ledger's own figure, from which it differs in the last digits.
            so_far = epsilon if number == len(charges) - 1 else min(epsilon, max(0.0, total + surcharge))
            shown = charge.round if charge.run in by_round else None
            made.append(Step(run=charge.run, round=shown, time=day_of(charge.time), epsilon=bounded(so_far)))
    return tuple(made)


def _charges(events: Sequence[Event], history: History) -> Iterator[_Charge]:
    restored = iter(history.restored)
    each = {name: history.divergence([run.plan.event()]) for name, run in history.runs.items()}
    for event in events:
        if event.kind is Kind.RESERVE:
            yield _Charge(run=event.run, round=event.round, time=event.time, divergence=each[event.run])
        elif event.kind is Kind.NOTE and event.detail["what"] == "restored":
            yield _Charge(run="", round=None, time=event.time, divergence=history.divergence(next(restored).gap))


def _newest_runs(charges: Sequence[_Charge]) -> set[str]:
    """The runs, newest first, whose rounds all fit into the report beside one step for each other run."""
    count = Counter(charge.run for charge in charges)
    newest_first = list(dict.fromkeys(charge.run for charge in reversed(charges)))
    room, chosen = MOST_STEPS - len(newest_first), set[str]()
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
