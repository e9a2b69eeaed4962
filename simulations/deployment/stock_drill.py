"""Lines of kills.py in a federation of stock Flower processes, which the tests' own `StockFederation` starts.

A line is a new federation with two runs at once and ten kills, two of each kind of process; where both runs end before
the tenth, two more begin.  Whatever was killed starts again by the words that its unit has; a run whose ServerApp died
goes on with `resume=`.  In the first two lines a
site's process dies while it has charged no round that it has not committed: both runs must come to the simulation's
adapter, byte for byte.  In the third it dies after the charge, and trains the round again with new noise.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.conftest import run_command
from tests.deployment.books import check_books, check_same_adapter
from tests.deployment.federation import list_settings, simulate_same_run
from tests.deployment.stock import StockFederation

KINDS = ("SuperNode", "ClientApp", "site", "ServerApp", "SuperLink") * 2
APPS = {"ClientApp": "flwr-clientapp", "ServerApp": "flwr-serverapp"}
WORDS = list_settings("runtime.seeded_noise=true", "model.dtype=float32", "federation.num_rounds=4")
WORDS += ["federation.spare_rounds=4"]
PATIENCE_S, LOOK_S, RESTART_S = 1200.0, 30.0, 5.0
OVER = "finished:completed"


class StockDrill:
    """Two runs in a stock federation, of which every process can be killed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.made, self.chance, self.name = StockFederation(folder, run_command), random.Random(name), name
        self.numbers, self.states, self.resumed = dict[str, str](), dict[str, str](), dict[str, int]()
        self.looked = self.tried = 0.0

    def begin(self) -> None:
        """Start two runs."""
        for run in [f"run{len(self.states) + number}" for number in (1, 2)]:
            self.numbers[run] = self.made.submit(run, WORDS)
            self.states[run], self.resumed[run] = "pending", 0

    def are_over(self) -> bool:
        return set(self.states.values()) == {OVER}

    def more_than(self, commits: int) -> bool:
        return self.commits() > commits

    def commits(self) -> int:
        return sum(len(site.events(run, "commit")) for site in self.made.sites.values() for run in self.states)

    def open(self) -> list[str]:
        """The sites that have charged a round and not committed it."""
        found = set()
        for name, site in self.made.sites.items():
            for run in self.states:
                kinds = [event.kind.value for event in site.events(run) if event.kind.value in ("reserve", "commit")]
                found |= {name} if kinds[-1:] == ["reserve"] else set()
        return sorted(found)

    def tend(self) -> None:
        """Do what units and a lead do: start ended SuperNodes again, and go on with a run that failed."""
        if time.monotonic() - self.tried > RESTART_S:
            self.tried = time.monotonic()
            for name in [name for name, node in self.made.nodes.items() if node.code is not None]:
                self.made.start_node(self.made.sites[name])
        if time.monotonic() - self.looked < LOOK_S:
            return
        for run in [run for run, state in self.states.items() if state != OVER]:
            with suppress(AssertionError):  # the SuperLink is not there yet
                self.states[run] = self.made.status(self.numbers[run])
                if self.states[run].startswith("finished") and self.states[run] != OVER:
                    folder = self.made.run_folder(run)
                    begun = folder.joinpath("config.yaml").exists()  # else its ServerApp died before it was a run
                    words = [f"resume={folder}"] if begun else WORDS
                    again = f"{run}-{self.resumed[run]}" if begun else run
                    self.numbers[run] = self.made.submit(again, words, new_run=not begun)
                    self.resumed[run] += 1
        self.looked = time.monotonic()

    def wait_for(self, there: Callable[[], object], what: str, *, begins: bool = True) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not there():
            if time.monotonic() > deadline:
                raise RuntimeError(f"a dead end: waited for {what}; the runs: {self.states}")
            self.tend()
            if begins and self.are_over():
                self.begin()
            time.sleep(0.02)

    def kill_one(self, program: str) -> bool:
        """Kill one process of this federation that runs a program of Flower's; False: there is none."""
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words, environment = ((place / file).read_bytes() for file in ("cmdline", "environ"))
                ours = any(str(folder).encode() in environment for folder in (self.made.folder, self.made.public))
                if ours and program.encode() in words:
                    os.kill(int(place.name), signal.SIGKILL)
                    return True
        return False

    def kill(self, kind: str) -> dict[str, object]:
        """Kill one process of a kind, and start it again; says what the kill found."""
        made, site = self.made, self.made.sites[self.chance.choice(list(self.made.sites))]
        time.sleep(self.chance.uniform(0.0, 5.0))
        if kind == "site":
            charged = self.name == "stock-2"
            site.hold(charged)
            while True:
                self.wait_for(lambda: (site.name in self.open()) == charged, f"{site.name} to be at its moment")
                site.up.signal(signal.SIGSTOP)
                if (site.name in self.open()) == charged:  # it can change nothing any more
                    break
                site.up.signal(signal.SIGCONT)
        left_open = self.open()
        if kind in APPS:
            self.wait_for(lambda: self.kill_one(APPS[kind]), f"a {kind}")
        elif kind == "SuperNode":
            made.kill(made.nodes[site.name])
        elif kind == "SuperLink":
            made.kill(made.server)
            made.start_superlink()
        else:
            site.up.kill()
            site.hold(False)
            made.start_site(site)
        return {"who": kind, "victim": site.name if kind in ("site", "SuperNode") else "", "left_open": left_open}

    def carry_out(self) -> dict[str, object]:
        made, kinds = self.made, list(KINDS)
        self.chance.shuffle(kinds)
        try:
            made.start()
            self.begin()
            kills, commits = list[dict[str, object]](), -1
            for kind in kinds:
                self.wait_for(partial(self.more_than, commits), "a commit after a kill")
                kills.append(self.kill(kind))
                commits = self.commits()
                print(kills[-1], flush=True)
            self.wait_for(self.are_over, "the end", begins=False)
            return {"kills": kills, "resumed": self.resumed, "books": self.books()}
        finally:
            made.close()

    def books(self) -> dict[str, object]:
        """Compare ledgers, receipts, results and adapters; raise where an update was lost or counted twice."""
        made, found = self.made, dict[str, object]()
        outcome = run_command(
            "simulate", *simulate_same_run(*WORDS), "name=simulated", f"tracking.output_dir='{made.folder}'"
        )
        assert outcome.code == 0, outcome.err
        for run in self.states:
            check_books(made, run)
            charged = {name: len(site.events(run, "reserve")) for name, site in made.sites.items()}
            free = sum(charged.values()) - sum(len(site.events(run, "commit")) for site in made.sites.values())
            if not free:
                check_same_adapter(made, run, made.folder / "simulated", tolerance=0)
            found[run] = {"rounds": len(made.result(run)["rounds"]), "charged": charged, "charged_without_reply": free}
            found[run] |= {"adapter": "another: new noise" if free else "that of the simulation, byte for byte"}
        return found


def drill(runs: Path, *, name: str) -> dict[str, object]:
    """One federation with ten kills."""
    shutil.rmtree(folder := runs / name, ignore_errors=True)
    folder.mkdir(parents=True)
    return StockDrill(folder, name).carry_out()


LINES = {f"stock-{number}": partial(drill, name=f"stock-{number}") for number in range(3)}


def summary(lines: Mapping[str, Any]) -> str:
    """What the lines say, in sentences for the README."""
    kills = [kill for line in lines.values() for kill in line["kills"]]
    runs = [book for line in lines.values() for book in line["books"].values()]
    by_kind = ", ".join(f"{sum(kill['who'] == kind for kill in kills)} {kind}" for kind in sorted(set(KINDS)))
    same, free = (
        [book["charged_without_reply"] for book in runs].count(0),
        sum(b["charged_without_reply"] for b in runs),
    )
    return (
        f"**Stock Flower**: {len(kills)} kills ({by_kind}) in {len(runs)} runs, of which all ended and "
        f"{sum(sum(line['resumed'].values()) for line in lines.values())} were resumed. {same} runs came to the "
        f"simulation's adapter, byte for byte; in the others sites trained {free} killed rounds again with new noise. "
        "No committed update is lost or counted twice, and ledger, run.json and signed receipt agree at all sites."
    )
