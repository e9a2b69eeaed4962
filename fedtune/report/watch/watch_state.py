"""A run at one moment, as its live page shows it, from a folder that a run may be writing to; nothing is written there.

Each figure is one that the run's report would show, too.  A round that is under way may have been charged already, so
it counts as charged.  None says that nothing bounds an epsilon, or that something is not known.  Times are UTC in ISO
form.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedtune.config import RunConfig
from fedtune.federation.lead import RoundResult
from fedtune.federation.results import charged_epsilons
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.plan import Plan
from fedtune.report.derive.profile import largest
from fedtune.report.derive.run_site import steps_of
from fedtune.report.derive.verdicts import above
from fedtune.report.model import Scores
from fedtune.report.record.run_record import RunRecord, read_run
from fedtune.spec import FedtuneError, spec
from fedtune.words import finite, finite_scores

Phase = Literal["waiting", "preparing", "running", "finished", "stopped", "unreadable"]
Mark = Literal["no_noise", "seeded_noise", "above_target"]
ASKED, UPDATE, NOTHING = "asked", "update", "nothing"
_AGAIN_S = 0.1
_Stamps = tuple[tuple[str, int, int, int], ...]


@spec
class Answer:
    """What a site last did.

    Attributes:
        what: "update", the reason why there is none, "asked" while nothing came, "nothing" before that.
        round: in which; None: not known.
    """

    what: str
    round: int | None


@spec
class Step:
    """Epsilon after a finished round."""

    round: int
    epsilon: float | None


@spec
class SiteNow:
    """One site.

    Attributes:
        updates: finished rounds that it took part in, and `failures` those that it did not.
        charged: rounds.
        upper_bound: a round is under way or was not answered, and is counted as charged.
        steps: by finished round.
    """

    site: str
    latest: Answer
    updates: int
    failures: int
    charged: int
    epsilon: float | None
    upper_bound: bool
    steps: tuple[Step, ...]


@spec
class RoundDone:
    """A finished round; scores are exact, on the lead's validation file."""

    round: int
    ended: str | None
    seconds: float
    bytes_down: int
    bytes_up: int
    scores: Scores


@spec
class Failure:
    """Why a round went without a site; the newest come first."""

    round: int
    site: str
    reason: str


@spec
class Left:
    """Time until the last round is done, at the pace so far; rounded up."""

    value: int
    unit: Literal["seconds", "minutes", "hours"]


@spec
class RunNow:
    """A run at one moment.

    Attributes:
        problem: why the folder cannot be read, in English.
        marks: what the report's verdict would be for, were it written now.
        under_way: number of the round that was asked for and is not finished.
        ended: when the newest round was finished.
        epsilon: of the site that spent most, and `upper_bound` of the same.
        target_epsilon: None: the run promises nothing.
    """

    name: str
    phase: Phase
    problem: str | None
    simulated: bool
    marks: tuple[Mark, ...]
    unit: str
    delta: float
    target_epsilon: float | None
    rounds_done: int
    rounds_planned: int
    under_way: int | None
    ended: str | None
    left: Left | None
    epsilon: float | None
    upper_bound: bool
    sites: tuple[SiteNow, ...]
    rounds: tuple[RoundDone, ...]
    failures: tuple[Failure, ...]
    seconds: float
    bytes_down: int
    bytes_up: int
    final: Scores


def to_json(now: RunNow) -> dict[str, Any]:
    """Plain JSON, whose places the page's figures name."""
    return asdict(now)


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
        final=finite_scores(record.result.final.metrics if record and record.result else {}),
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
    if above(epsilon, target):
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
        scores=finite_scores(result.metrics),
    )


def _failures(rounds: Sequence[RoundResult]) -> Iterator[Failure]:
    for result in reversed(rounds):
        for site, reason in result.failed_sites.items():
            yield Failure(round=result.round, site=site, reason=reason)


class WatchedFolder:
    """A run folder and what it held when it last changed.

    Args:
        folder: the run's.
        config: of its `config.yaml`.
        is_running: whether a process works on the folder; must not change it.
    """

    def __init__(self, folder: Path, config: RunConfig, *, is_running: Callable[[Path], bool]) -> None:
        self._folder, self._config, self._is_running = folder, config, is_running
        self._plan: Plan | None = None
        self._known: tuple[bool, _Stamps] | None = None
        self._seen = Seen(config=config, record=None, running=False)
        self._now = run_now(self._seen)

    def now(self, *, at: datetime | None = None) -> RunNow:
        """The run at this moment; files are read again only where one of them changed.

        A folder that cannot be read is told as one, with what was last known of the run: it may be mended.
        """
        # Looked at before it is read: a change in between is found the next time.
        stamps = _stamps(self._folder)
        running = self._is_running(self._folder)
        if (running, stamps) != self._known:
            self._seen = self._look(running=running)
            self._now = run_now(self._seen)
            self._known = None if self._seen.problem else (running, stamps)
        return replace(self._now, left=time_left(self._seen, at=at or datetime.now(UTC)))

    def _look(self, *, running: bool) -> Seen:
        problem = None
        for wait_s in (0.0, _AGAIN_S):  # a checkpoint may be followed by the next while it is read
            time.sleep(wait_s)
            try:
                return self._read(running=running)
            except (FedtuneError, OSError) as error:
                problem = str(error)
        return replace(self._seen, running=running, problem=problem)

    def _read(self, *, running: bool) -> Seen:
        files = RunFolder(self._folder)
        if not files.saved_checkpoints and not files.result.exists():
            # Raises where there is no folder any more: a run that fails before it begins takes it away.
            files.config.stat()
            return Seen(config=self._config, record=None, running=running)
        asked, answers = tuple(_asked(self._folder)), _answers(self._folder)
        record = read_run(self._folder, plan=self._plan)
        self._plan = record.plan
        return Seen(config=record.config, record=record, running=running, asked=asked, answers=answers)


def _stamps(folder: Path) -> _Stamps:
    """Names, times and sizes of all files that the page depends on."""
    files = RunFolder(folder)
    paths = [files.config, files.result, files.answers, files.environment, *sorted(files.checkpoints.glob("*"))]

    def found() -> Iterator[tuple[str, int, int, int]]:
        for path in paths:
            try:
                about = path.stat()
            except OSError:
                continue
            yield path.name, about.st_ino, about.st_mtime_ns, about.st_size

    return tuple(found())


def _asked(folder: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The journal of rounds that were asked for; what it means for the budget is read with the checkpoint."""
    path = RunFolder(folder).asked
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if line.endswith(b"\n"):
            try:
                fields = json.loads(line)
                yield int(fields["round"]), tuple(map(str, fields["sites"]))
            except (ValueError, TypeError, KeyError):
                continue


def _answers(folder: Path) -> Mapping[str, Mapping[str, str]]:
    """What real sites last answered; a simulation has none."""
    path = RunFolder(folder).answers
    try:
        known = json.loads(path.read_bytes()) if path.exists() else {}
        return {site: {key: str(answer[key]) for key in ("what", "time")} for site, answer in known.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
