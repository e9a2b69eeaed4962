"""Which processes are killed where, what came of it, and the table."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import random
import re
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import readme
from broken import ORDERS
from points import PHASES, START, WRITES, Kill
from trial import Hit, Trial
from world import SETTINGS, Setting

import fedtune
from fedtune.privacy.durable import write_durably

KILLS_A_RUN = 3
_ONLY_AT_FIRST = (
    *(f"lead: {when} {call}" for when in ("before", "after") for call in ("fsync", "link")),  # its key
    "open: before COMMIT",
    "open: after COMMIT",
    "site files: before replace",
    "site files: after replace",
)


@dataclass(frozen=True)
class Census:
    """What a process does that nobody kills: how often it crosses each point, and seconds in each phase."""

    points: dict[str, int]
    seconds: dict[str, float]

    @classmethod
    def take(cls, trial: Trial) -> Census:
        """Raises SystemExit where the points are not where they should be, or something is wrong already."""
        problems = trial.finish()
        points, seconds = trial.crossed()
        expected = [f"{phase}: after" for phase in PHASES]
        expected += [f"{phase}: after {call}" for phase, call in WRITES.items()]
        missing = [point for point in expected if point not in points]
        if problems or missing:
            raise SystemExit(f"a run that nobody killed: {problems}; points that are missing: {missing}")
        return cls(points, {phase: statistics.median(times) for phase, times in seconds.items()})


def kills(census: Census, count: int, chance: random.Random) -> list[Kill]:
    """Of `count` kills, two thirds at named points, a sixth inside durable writes, a sixth at any moment."""
    aimed = anywhere = count // 6
    chosen = itertools.islice(_at_points(census, chance), count - aimed - anywhere)
    return [*chosen, *itertools.islice(_inside_writes(census, chance), aimed), *_anywhere(census, anywhere, chance)]


def _at_points(census: Census, chance: random.Random) -> Iterator[Kill]:
    """One phase after the other, and in each one point after the other."""
    points = {phase: [Kill(point=p) for p in census.points if p.startswith(f"{phase}: ")] for phase in PHASES}
    for phase in points:
        chance.shuffle(points[phase])
    for phase in ("open", "commit"):  # the other transactions are too small to be written by half
        points[phase].insert(0, Kill(point=f"{phase}: before COMMIT", spill=True))
    kills = {phase: itertools.cycle(kills) for phase, kills in points.items()}
    for phase in itertools.cycle(PHASES):
        kill = next(kills[phase])
        yield replace(kill, number=chance.randint(1, census.points[kill.point]))


def _inside_writes(census: Census, chance: random.Random) -> Iterator[Kill]:
    for phase, call in itertools.cycle(WRITES.items()):
        point, delay_s = f"{phase}: before {call}", chance.uniform(0, census.seconds[f"{phase}: {call}"])
        yield Kill(point=point, number=chance.randint(1, census.points[point]), delay_s=delay_s)


def _anywhere(census: Census, count: int, chance: random.Random) -> Iterator[Kill]:
    for _ in range(count):
        yield Kill(point=START, delay_s=chance.uniform(0, census.seconds["lead"]))


class Campaign:
    """Trials until as many processes were killed as were asked for.

    Args:
        scratch: where the runs' folders are made.
        chance: decides which points, moments and orders.
    """

    def __init__(self, scratch: Path, chance: random.Random) -> None:
        self._scratch, self._chance = scratch, chance
        self._settings = {name: Setting.build(overrides, scratch) for name, overrides in SETTINGS.items()}
        self._numbers = itertools.count()
        self.census = Census.take(self._trial("spare rounds"))
        self.hits: list[Hit] = []
        self.problems: list[str] = []
        self.starts = self.trials = 0

    def run(self, count: int) -> None:
        """Kill `count` processes."""
        wanted = kills(self.census, count, self._chance)
        self._chance.shuffle(wanted)
        wanted.sort(key=lambda kill: kill.point in _ONLY_AT_FIRST)  # taken from the end
        most_trials = 3 * count
        for name in itertools.islice(itertools.cycle(self._settings), most_trials):
            if not wanted:
                return
            self._kill_some(self._trial(name), wanted)
        raise SystemExit(f"{len(wanted)} of {count} processes could not be killed in {most_trials} runs")

    def try_broken_orders(self) -> list[dict[str, Any]]:
        """Kill ledgers that write in a wrong order, and say what of it was found."""
        found = []
        for order, (broken, points) in ORDERS.items():
            for point in points:
                setting = "arrivals" if order.startswith("admitted") else "spare rounds"
                hit = self._trial(setting).kill(Kill(point=point), broken=broken)
                assert hit is not None, f"{point} was not crossed"
                found.append({"order": order, "point": point, "found": hit.problems})
        return found

    def _trial(self, setting: str) -> Trial:
        return Trial(setting, self._settings[setting], self._scratch / f"{next(self._numbers):04d}")

    def _kill_some(self, trial: Trial, wanted: list[Kill]) -> None:
        """Kill a run's processes one after the other, and let the last one come to its end."""
        for start in range(KILLS_A_RUN):
            if not wanted or (start and wanted[-1].point in _ONLY_AT_FIRST):
                break
            kill = wanted.pop()
            hit = trial.kill(kill if start == 0 else self._sooner(kill))
            if hit is None:  # it came to its end first
                wanted.append(kill if kill.delay_s is None else self._sooner(kill))
                break
            self.hits.append(hit)
            self.problems += [
                f"killed at {kill}, start {trial.starts} of a run with {trial.name}: {p}" for p in hit.problems
            ]
        self.problems += [f"at the end of a run with {trial.name}: {problem}" for problem in trial.finish()]
        self.starts += trial.starts
        self.trials += 1

    def _sooner(self, kill: Kill) -> Kill:
        """For a process that has less to do."""
        if kill.point == START and kill.delay_s is not None:
            return replace(kill, delay_s=kill.delay_s * self._chance.uniform(0.2, 1))
        return replace(kill, number=self._chance.randint(1, max(1, kill.number // 2)))


def how(hit: Hit) -> str:
    """Whether the process died at a named point, at a moment inside a call that writes, or at another moment."""
    if hit.kill.delay_s is None:
        return "named"
    return "inside" if re.search(": before (COMMIT|fsync|replace|link)$", hit.point) else "elsewhere"


def phase(hit: Hit) -> str:
    """The phase that a kill counts for."""
    return hit.kill.point.split(":")[0] if how(hit) == "named" else hit.phase


def by_phase(hits: list[Hit]) -> dict[str, Counter[str]]:
    """How often each phase was hit, and how."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in PHASES}
    for hit in hits:
        row = counts.setdefault(phase(hit), Counter())
        row.update([how(hit), "all", *(["half written"] if hit.half_written else [])])
    return counts


def results(campaign: Campaign, broken: list[dict[str, Any]], *, seed: int, seconds: float) -> dict[str, Any]:
    """Everything that came out, as JSON."""
    return {
        "fedtune": fedtune.__version__,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), {platform.system()}",
        "seed": seed,
        "seconds": round(seconds),
        "kills": len(campaign.hits),
        "runs": campaign.trials,
        "processes": campaign.starts,
        "problems": campaign.problems,
        "phases": {name: dict(counts) for name, counts in by_phase(campaign.hits).items()},
        "broken_orders": broken,
        "hits": [dataclasses.asdict(hit) for hit in campaign.hits],
    }


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write results.json, with one line for each hit."""
    rows = found.pop("hits")
    text = json.dumps(found, indent=1)[:-2] + ',\n "hits": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n"
    write_durably(folder / "results.json", text.encode())


def table(found: dict[str, Any]) -> str:
    """The Markdown table: kills by phase."""
    rows = [["phase", "at a named point", "inside a writing call", "at another moment", "all", "a transaction to undo"]]
    keys = ("named", "inside", "elsewhere", "all", "half written")
    for name, counts in found["phases"].items():
        rows.append([name, *(str(counts.get(key, 0)) for key in keys)])
    total = [sum(counts.get(key, 0) for counts in found["phases"].values()) for key in keys]
    return readme.markdown([*rows, ["all", *map(str, total)]])


def carry_out(count: int, scratch: Path, *, seed: int) -> dict[str, Any]:
    """Kill `count` processes, try the broken orders, and return what came out."""
    began = time.monotonic()
    campaign = Campaign(scratch, random.Random(seed))
    campaign.run(count)
    broken = campaign.try_broken_orders()
    return results(campaign, broken, seed=seed, seconds=time.monotonic() - began)
