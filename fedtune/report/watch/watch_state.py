"""From what a run's folder holds at one moment to what its live page shows.

Each figure is one that the run's report would show, too.  A round that is under way may have been charged already, so
it counts as charged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedtune.config import RunConfig
from fedtune.federation.lead import RoundResult, charged_epsilons
from fedtune.report.derive.profile import largest
from fedtune.report.derive.run_site import steps_of
from fedtune.report.model import scores_of
from fedtune.report.record.run_record import RunRecord
from fedtune.report.watch.watch_model import Answer, Failure, Left, Mark, Phase, RoundDone, RunNow, SiteNow, Step
from fedtune.words import finite

ASKED, UPDATE, NOTHING = "asked", "update", "nothing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What the folder holds.

    Attributes:
        config: of its `config.yaml`.
        record: None: no round can have been asked for yet.
        running: a process works on it.
        asked: (round, sites) of each time that a round was asked for, oldest first.
        answers: of real sites, what each last answered, and when.
        problem: why it cannot be read now.
    """

    config: RunConfig
    record: RunRecord | None
    running: bool
    asked: Sequence[tuple[int, Sequence[str]]] = ()
    answers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    problem: str | None = None

    @property
    def rounds(self) -> Sequence[RoundResult]:
        """The finished ones."""
        return self.record.rounds if self.record else ()

    @property
    def under_way(self) -> int | None:
        """The round that was asked for after the last finished one."""
        newest = max((round for round, _ in self.asked), default=0)
        return newest if newest > len(self.rounds) else None

    @property
    def phase(self) -> Phase:
        """Where the run stands."""
        if self.problem is not None:
            return "unreadable"
        if self.record is None:
            return "preparing" if self.running else "waiting"
        if self.running:
            return "running"
        # A finished run's result is written after its last round; without it, it ended in between.
        results = self.record.result.rounds if self.record.result else ()
        return "finished" if self.record.finished and len(results) == len(self.rounds) else "stopped"


def run_now(seen: Seen) -> RunNow:
    """The run as the page shows it, but for the time left."""
    config, record, rounds = seen.config, seen.record, seen.rounds
    private = record.plan.private if record else config.privacy.private
    sites = tuple(_site(seen, site) for site in config.federation.active)
    worst = largest(site.epsilon for site in sites)
    target = config.privacy.epsilon if private else None
    return RunNow(
        name=config.name,
        phase=seen.phase,
        problem=seen.problem,
        simulated=config.runtime.kind != "deployment",
        marks=tuple(_marks(seen, private=private, epsilon=worst, target=target)),
        unit=config.privacy.unit,
        delta=config.privacy.delta,
        target_epsilon=target,
        rounds_done=len(rounds),
        rounds_planned=config.federation.num_rounds,
        under_way=seen.under_way if seen.phase == "running" else None,
        ended=(rounds[-1].ended or None) if rounds else None,
        left=None,
        epsilon=worst,
        upper_bound=all(site.upper_bound for site in sites if site.epsilon == worst),
        sites=sites,
        rounds=tuple(_round(result) for result in rounds),
        failures=tuple(_failures(rounds)),
        seconds=sum(result.seconds for result in rounds),
        bytes_down=sum(result.bytes_down for result in rounds),
        bytes_up=sum(result.bytes_up for result in rounds),
        final=scores_of(record.result.final.metrics if record and record.result else {}),
    )


def time_left(seen: Seen, *, at: datetime) -> Left | None:
    """At the pace of the finished rounds; None while none is finished, after the last, or where nothing runs."""
    done, missing = len(seen.rounds), seen.config.federation.num_rounds - len(seen.rounds)
    if seen.phase != "running" or not done or missing <= 0 or seen.record is None or seen.record.state is None:
        return None
    seconds = missing * seen.record.state.seconds / done
    try:
        since = (at - datetime.fromisoformat(seen.rounds[-1].ended)).total_seconds()
    except (ValueError, TypeError):  # a version that did not note it
        since = 0.0
    # A round that takes longer than those before it does not mean that the run is over.
    seconds = max(seconds - max(since, 0.0), (missing - 1) * seconds / missing)
    if seconds < 60:
        return Left(value=10 * math.ceil(seconds / 10), unit="seconds")
    if seconds < 5400:
        return Left(value=math.ceil(seconds / 60), unit="minutes")
    return Left(value=math.ceil(seconds / 3600), unit="hours")


def _marks(seen: Seen, *, private: bool, epsilon: float | None, target: float | None) -> Iterator[Mark]:
    if not private:
        yield "no_noise"
    if seen.record.seeded if seen.record else seen.config.runtime.seeded_noise:
        yield "seeded_noise"
    if target is not None and (epsilon is None or epsilon > target):
        yield "above_target"


def _site(seen: Seen, site: str) -> SiteNow:
    charged, upper_bound = seen.record.charged(site) if seen.record else (0, False)
    return SiteNow(
        site=site,
        latest=_latest(seen, site),
        updates=sum(site in result.sites for result in seen.rounds),
        failures=sum(site in result.failed_sites for result in seen.rounds),
        charged=charged,
        epsilon=finite(charged_epsilons(seen.record.plan, charged)[0]) if seen.record else 0.0,
        upper_bound=upper_bound,
        steps=tuple(_steps(seen, site, charged)),
    )


def _steps(seen: Seen, site: str, charged: int) -> Iterator[Step]:
    """Epsilon after each finished round."""
    if seen.record is not None:
        for step in steps_of(seen.record, site, _settled(seen.record, site, charged, under_way=_asks(seen, site))):
            yield Step(round=step.round or 0, epsilon=step.epsilon)


def _asks(seen: Seen, site: str) -> int:
    """How often the site was asked for the round under way."""
    return sum(site in sites for round, sites in seen.asked if round > len(seen.rounds))


def _settled(record: RunRecord, site: str, charged: int, *, under_way: int) -> int:
    """Rounds charged without the one that is under way, which belongs to none of the finished ones."""
    receipt = record.receipts.get(site)
    known, silent = (
        receipt.charged_rounds if receipt else 0,
        record.state.unanswered.get(site, 0) if record.state else 0,
    )
    if charged > known + silent:  # the site's word is missing, and its whole plan counts
        return charged
    return max(known, min(known + silent - under_way, record.plan.most_rounds))


def _latest(seen: Seen, site: str) -> Answer:
    """The newest of: a real site's answer, the request under way, the last finished round."""
    last, under_way = seen.rounds[-1] if seen.rounds else None, seen.under_way
    answer = seen.answers.get(site)
    if under_way is not None and any(site in sites for round, sites in seen.asked if round == under_way):
        if answer and (last is None or _is_after(answer["time"], last.ended)):
            return Answer(what=answer["what"], round=under_way)
        return Answer(what=ASKED, round=under_way)
    if last is None:
        return Answer(what=NOTHING, round=None)
    return Answer(what=UPDATE if site in last.sites else last.failed_sites.get(site, NOTHING), round=last.round)


def _is_after(time: str, other: str) -> bool:
    try:
        one, two = (datetime.fromisoformat(text) for text in (time, other))
        return one.replace(tzinfo=one.tzinfo or UTC) >= two.replace(tzinfo=two.tzinfo or UTC)
    except ValueError:
        return False


def _round(result: RoundResult) -> RoundDone:
    return RoundDone(
        round=result.round,
        ended=result.ended or None,
        seconds=result.seconds,
        bytes_down=result.bytes_down,
        bytes_up=result.bytes_up,
        scores=scores_of(result.metrics),
    )


def _failures(rounds: Sequence[RoundResult]) -> Iterator[Failure]:
    for result in reversed(rounds):
        for site, reason in result.failed_sites.items():
            yield Failure(round=result.round, site=site, reason=reason)
