"""One federation from its first process to its last: killed, looked at, and started again, as often as is asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import checks
from observer import Seen, kept_requests, sort_out
from points import Kill
from process import End, live
from world import Break, Setting, ask_again, run

from fedtune.privacy.ledger.verify import VerifiedLedger
from fedtune.spec import FedtuneError


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A process that was killed, and what was found afterwards.

    Attributes:
        setting: name of the kind of run.
        start: 1 for the first process of a run; a later one resumed it.
        phase: that the process was in; `point`, that it crossed last.
        half_written: whether SQLite had to undo a transaction.
        charged: rounds, by site.
        observed: different noisy updates that had left, by site.
        begun: trainings that had begun, by site.
        problems: what should not be; empty.
    """

    setting: str
    start: int
    kill: Kill
    phase: str
    point: str
    half_written: bool
    charged: dict[str, int]
    observed: dict[str, int]
    begun: dict[str, int]
    problems: list[str]


@dataclass
class Trial:
    """A folder with two sites and a lead."""

    name: str
    setting: Setting
    folder: Path
    seen: dict[str, Seen] = field(default_factory=dict)
    starts: int = 0
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "requests").mkdir(parents=True)

    @property
    def sites(self) -> Path:
        """Where the sites' files lie."""
        return self.folder / "sites"

    def kill(self, kill: Kill, *, broken: Break | None = None) -> Hit | None:
        """Start or resume the run, kill it, and look; None where it came to its end first."""
        end = self._live(kill, broken=broken)
        if not end.killed:
            self.failures += [end.failure] if end.failure else []
            return None
        twin = self.folder / "twin"
        shutil.copytree(self.folder, twin, ignore=shutil.ignore_patterns("twin"))
        half_written = checks.half_written(twin / "sites")
        states, problems = self._states(twin / "sites")
        problems += [f"{name}: {text}" for name, state in states.items() for text in self._site(name, state)]
        problems += checks.lead_problems(twin, states, self.setting)
        if broken is None:
            problems += self._asked_again(twin, states)
        shutil.rmtree(twin)
        runs = {name: state and state.history.runs.get(self.setting.config.run_id()) for name, state in states.items()}
        return Hit(
            setting=self.name,
            start=self.starts,
            kill=kill,
            phase=end.phase,
            point=end.point,
            half_written=half_written,
            charged={name: run.charged_rounds if run else 0 for name, run in runs.items()},
            observed={name: self._seen(name).num_updates for name in states},
            begun={name: self._seen(name).begun for name in states},
            problems=problems,
        )

    def finish(self) -> list[str]:
        """Resume the run to its end, or until a budget is used up, and give what should not be."""
        end = self._live(None)
        states, problems = self._states(self.sites)
        problems += [f"a process failed: {failure}" for failure in (*self.failures, end.failure) if failure]
        for name, state in states.items():
            problems += [f"{name}: {text}" for text in self._site(name, state)]
            if state is not None:
                problems += checks.copy_problems(self.sites, name, state, self.folder / "copy.db")
        refused = any(line["what"] == "refused" for line in end.told)
        problems += checks.result_problems(self.folder, states, self.setting, refused=refused)
        return problems

    def crossed(self) -> tuple[dict[str, int], dict[str, list[float]]]:
        """How often a process that was not killed crossed each point, and how long it was in each phase."""
        found = json.loads((self.folder / "crossed.json").read_text())
        return found["points"], found["seconds"]

    def _live(self, kill: Kill | None, *, broken: Break | None = None) -> End:
        self.starts += 1
        spill = kill is not None and kill.spill
        end = live(run(self.setting, self.folder, spill=spill, broken=broken), kill=kill, folder=self.folder)
        sort_out(end.told, self.seen)
        return end

    def _seen(self, site: str) -> Seen:
        return self.seen.setdefault(site, Seen())

    def _site(self, name: str, state: VerifiedLedger | None) -> Sequence[str]:
        return list(checks.site_problems(self._seen(name), state, self.setting))

    def _states(self, sites: Path) -> tuple[dict[str, VerifiedLedger | None], list[str]]:
        """Each site's verified ledger, and why others do not verify."""
        states, problems = {}, []
        for name in self.setting.names:
            try:
                states[name] = checks.verified(sites, name)
                problems += checks.register_problems(sites, name, self._seen(name), self.setting)
            except FedtuneError as error:
                problems.append(f"{name} does not verify: {error}")
        return states, problems

    def _asked_again(self, twin: Path, before: dict[str, VerifiedLedger | None]) -> list[str]:
        """In a copy of everything, ask each site every request again that it was ever sent."""
        end = live(ask_again(self.setting, twin, self.seen), kill=None, folder=twin)
        requests = [request for request, _ in kept_requests(twin / "requests")]
        after, problems = self._states(twin / "sites")
        problems += [f"asking again failed: {end.failure}"] if end.failure else []
        told = {name: [line for line in end.told if line.get("site") == name] for name in before}
        for name, state in before.items():
            asked = [request for request in requests if request.site == name]
            problems += [f"{name} {line['error']}" for line in told[name] if line["what"] == "failed"]
            problems += checks.again_problems(
                told[name], asked, state, after.get(name), self._seen(name), self.setting.everyone.plan
            )
        return problems
