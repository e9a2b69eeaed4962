"""A run's live page: the report of the run as it stands, and how far the run has come.

Both are read from a folder that a run may be writing to; nothing is written there.  A round that is under way may have
been charged already, so it counts as charged.  The page is drawn by the code that draws a report's.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from fedtune.config import RunConfig
from fedtune.federation.kept_round import rounds_in_all
from fedtune.federation.run_folder import RunFolder
from fedtune.report import from_run, model
from fedtune.report.derive.facts import RunFacts
from fedtune.report.derive.verdicts import of_settings, verdict_of
from fedtune.report.model import Report, Verdict
from fedtune.report.page.catalogue import catalogue
from fedtune.report.page.charts import Charts
from fedtune.report.page.render import environment
from fedtune.report.page.tables import MOST_LINES, Tables, Words, pointer, shortened
from fedtune.report.record.run_record import RunRecord, not_begun, read_run_under_way
from fedtune.spec import FedtuneError, spec

Phase = Literal["waiting", "preparing", "running", "finished", "stopped", "unreadable"]
ASKED, UPDATE, NOTHING = "asked", "update", "nothing"
PARTS = ("marks", "failures", "phase", "progress", "privacy", "sites", "epsilon", "scores", "traffic")
"""What the script puts in place anew where it changed; each is a macro of the template, and an element of the page."""
_MOST_PLANNED = 12  # points of the planned path, each of which takes a moment once
_AGAIN_S = 0.1
_LONGEST_TITLE = 60
_Stamps = tuple[tuple[str, int, int, int], ...]


@spec
class SiteProgress:
    """How far one site has come.

    Attributes:
        latest: "update", the reason why there is none, "asked" while nothing came, "nothing" before that.
        round: in which; None: not known.
        updates: finished rounds that it took part in, and `failures` those that it did not.
    """

    latest: str
    round: int | None
    updates: int
    failures: int


@spec
class Failure:
    """Why a round went without a site; the newest come first."""

    round: int
    site: str
    reason: str


@spec
class Planned:
    """Epsilon after a round, if the run goes on as planned."""

    round: int
    epsilon: float


@spec
class Left:
    """Time until the last round is done, at the pace so far; rounded up."""

    value: int
    unit: Literal["seconds", "minutes", "hours"]


@spec
class Progress:
    """How far a run has come.

    Attributes:
        problem: why the folder cannot be read, in English.
        verdict: the report's, with what the settings say already while nothing is spent.
        under_way: number of the round that was asked for and is not finished.
        ended: when the newest round was finished, in ISO form.
        sites: in the report's order.
        path: what the plan would spend, to its end; empty without a promise.
        seconds: of all finished rounds, and `bytes_down` and `bytes_up` likewise.
    """

    phase: Phase
    problem: str | None
    verdict: Verdict
    rounds_done: int
    rounds_planned: int
    under_way: int | None
    ended: str | None
    left: Left | None
    sites: tuple[SiteProgress, ...]
    failures: tuple[Failure, ...]
    path: tuple[Planned, ...]
    seconds: float
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """A run at one moment."""

    report: Report
    progress: Progress

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, whose places the page's figures name: report.json, and the progress beside it."""
        found, progress = model.to_json(self.report), asdict(self.progress)
        for site, of_site in zip(found["sites"], progress.pop("sites"), strict=True):
            site["progress"] = of_site
        return found | {"progress": progress}


def progress_of(record: RunRecord, report: Report, *, running: bool, problem: str | None = None) -> Progress:
    """How far a run has come, but for the time left.

    Args:
        record: of the run.
        report: of the same.
        running: a process works on it.
        problem: why the folder cannot be read any more.
    """
    phase, rounds = "unreadable" if problem is not None else _phase(record, running=running), record.rounds
    return Progress(
        phase=phase,
        problem=problem,
        verdict=verdict_of([*report.verdict.reasons, *of_settings(RunFacts.of_record(record))]),
        rounds_done=len(rounds),
        rounds_planned=rounds_in_all(rounds, record.config.federation),
        under_way=record.under_way if phase == "running" else None,
        ended=(rounds[-1].ended or None) if rounds else None,
        left=None,
        sites=tuple(_site(record, site) for site in record.config.federation.active),
        failures=tuple(
            Failure(round=result.round, site=site, reason=reason)
            for result in reversed(rounds)
            for site, reason in result.failed_sites.items()
        ),
        path=tuple(
            Planned(round=number, epsilon=epsilon)
            for number, epsilon in from_run.planned_path(record.plan, most=_MOST_PLANNED)
        ),
        seconds=sum(result.seconds for result in rounds),
        bytes_down=sum(result.bytes_down for result in rounds),
        bytes_up=sum(result.bytes_up for result in rounds),
    )


def _phase(record: RunRecord, *, running: bool) -> Phase:
    if record.state is None and record.result is None:
        return "preparing" if running else "waiting"
    if running:
        return "running"
    # A finished run's result is written after its last round; without it, it ended in between.
    results = record.result.rounds if record.result else ()
    return "finished" if record.finished and len(results) == len(record.rounds) else "stopped"


def _site(record: RunRecord, site: str) -> SiteProgress:
    latest, round = _latest(record, site)
    return SiteProgress(
        latest=latest,
        round=round,
        updates=record.updates(site),
        failures=sum(site in result.failed_sites for result in record.rounds),
    )


def _latest(record: RunRecord, site: str) -> tuple[str, int | None]:
    """The newest of: a real site's answer, the request under way, the last finished round."""
    last, under_way = record.rounds[-1] if record.rounds else None, record.under_way
    answer = record.answers.get(site)
    if under_way is not None and any(site in sites for round, sites in record.asked if round == under_way):
        if answer and (last is None or _is_after(answer["time"], last.ended)):
            return answer["what"], under_way
        return ASKED, under_way
    if last is None:
        return NOTHING, None
    return UPDATE if site in last.sites else last.failed_sites.get(site, NOTHING), last.round


def _is_after(time: str, other: str) -> bool:
    try:
        one, two = (datetime.fromisoformat(text) for text in (time, other))
        return one.replace(tzinfo=one.tzinfo or UTC) >= two.replace(tzinfo=two.tzinfo or UTC)
    except ValueError:
        return False


def time_left(record: RunRecord, *, at: datetime) -> Left | None:
    """At the pace of a running run; None while too few rounds show one, and after the last."""
    pace = None if record.state is None else record.state.pace_s
    missing = rounds_in_all(record.rounds, record.config.federation) - len(record.rounds)
    if pace is None or record.finished:
        return None
    seconds = missing * pace
    try:
        since = (at - datetime.fromisoformat(record.rounds[-1].ended)).total_seconds()
    except (ValueError, TypeError):  # a version that did not note it
        since = 0.0
    # A round that takes longer than those before it does not mean that the run is over.
    seconds = max(seconds - max(since, 0.0), (missing - 1) * seconds / missing)
    if seconds < 60:
        return Left(value=10 * math.ceil(seconds / 10), unit="seconds")
    if seconds < 5400:
        return Left(value=math.ceil(seconds / 60), unit="minutes")
    return Left(value=math.ceil(seconds / 3600), unit="hours")


class WatchedFolder:
    """A run folder and what it held when it last changed.

    Args:
        folder: the run's.
        config: of its `config.yaml`.
        is_running: whether a process works on the folder; must not change it.
    """

    def __init__(self, folder: Path, config: RunConfig, *, is_running: Callable[[Path], bool]) -> None:
        self._folder, self._config, self._is_running = folder, config, is_running
        self._known: tuple[bool, _Stamps] | None = None
        self._record: RunRecord | None = None
        self._live: Live | None = None

    def now(self, *, at: datetime | None = None) -> Live:
        """The run at this moment; files are read again only where one of them changed.

        A folder that cannot be read is told as one, with what was last known of the run: it may be mended.
        """
        # Looked at before it is read: a change in between is found the next time.
        stamps = _stamps(self._folder)
        running = self._is_running(self._folder)
        if self._live is None or (running, stamps) != self._known:
            self._live = self._look(running=running)
            self._known = None if self._live.progress.problem else (running, stamps)
        live, record = self._live, self._record
        if record is None or live.progress.phase != "running":
            return live
        left = time_left(record, at=at or datetime.now(UTC))
        return live if left is None else replace(live, progress=replace(live.progress, left=left))

    def _look(self, *, running: bool) -> Live:
        problem = None
        for wait_s in (0.0, _AGAIN_S):  # a checkpoint may be followed by the next while it is read
            time.sleep(wait_s)
            try:
                plan = self._record.plan if self._record else None
                self._record = read_run_under_way(self._folder, self._config, plan=plan)
                return self._read(self._record, running=running)
            except (FedtuneError, OSError) as error:
                problem = str(error)
        record = self._record or not_begun(self._config)
        report = self._live.report if self._live else from_run.of_record(self._folder, record, own={})
        return Live(report=report, progress=progress_of(record, report, running=running, problem=problem))

    def _read(self, record: RunRecord, *, running: bool) -> Live:
        # What sites released of their ledgers is joined when the run's own report is written.
        report = from_run.of_record(self._folder, record, own={})
        return Live(report=report, progress=progress_of(record, report, running=running))


def _stamps(folder: Path) -> _Stamps:
    """Names, times and sizes of all files that the page depends on."""
    files = RunFolder(folder)
    paths = [files.config, files.result, files.answers, files.environment, files.audit, files.audit_mark]

    def found() -> Iterator[tuple[str, int, int, int]]:
        for path in (*paths, *sorted(files.checkpoints.glob("*"))):
            try:
                about = path.stat()
            except OSError:
                continue
            yield path.name, about.st_ino, about.st_mtime_ns, about.st_size

    return tuple(found())


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A run at one moment, drawn.

    Attributes:
        state: what the script gets: the figures, and the HTML of each part.
        tag: another one for everything else that can be shown.
    """

    state: str
    tag: str
    title: str
    parts: Mapping[str, Markup]


class WatchPage:
    """Draws a run again and again, in "en" or "de": whole for who opens it, in parts for the script that keeps it new.

    Raises:
        ConfigError: there are no texts in this language.
    """

    def __init__(self, language: str) -> None:
        self._catalogue = catalogue(language)
        self._live: Live | None = None
        self._shown = Shown(state="", tag="", title="", parts={})

    def shown(self, live: Live) -> Shown:
        """All that the page shows of a run; drawn again only where it differs from the last one."""
        if live != self._live:
            self._live, self._shown = live, self._drawn(live)
        return self._shown

    def html(self, shown: Shown, *, nonce: str) -> str:
        """The whole page; nothing else may run or style it than what bears the nonce."""
        assert self._live is not None
        name, text = shortened(self._live.report.name, _LONGEST_TITLE), self._catalogue.text
        template = environment().get_template("watch.html.j2")
        return template.render(t=text, language=self._catalogue.language, nonce=nonce, name=name, shown=shown)

    def _drawn(self, live: Live) -> Shown:
        state = live.to_json()
        words = Words(live.report, self._catalogue, shown=state)
        tables = Tables(words)
        context = {
            "report": live.report,
            "now": live.progress,
            "words": words,
            "t": words.text,
            "code": words.code,
            "figure": words.figure,
            "pointer": pointer,
            "tables": tables,
            "charts": Charts(words, tables),
            "most_lines": MOST_LINES,
        }
        module = environment().get_template("watch_parts.html.j2").make_module(context)
        parts = {part: Markup(getattr(module, part)()).strip() for part in PARTS}
        done, planned = live.progress.rounds_done, live.progress.rounds_planned
        title = words.text("watch.title", done=done, planned=planned, name=live.report.name).unescape()
        text = json.dumps({"title": title, "state": state, "parts": parts}, allow_nan=False, ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Shown(state=text, tag=f'"{digest}"', title=title, parts=parts)
