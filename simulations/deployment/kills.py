"""SIGKILL of real server, site and lead processes over mutual TLS: nothing is lost or charged twice, every run ends.

python simulations/deployment/kills.py                        30 kills in six runs, into kills.json: about 20 minutes
python simulations/deployment/kills.py --only stock           30 kills of stock Flower's processes and sites: an hour
python simulations/deployment/kills.py --missing --runs DIR   goes on after the last finished run, and keeps the logs
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import stock_drill
from local_federation import SITES, LocalFederation, environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import study

from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import Event, Kind
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Receipt
from fedtune.spec import RunError

ROUNDS, KILLS, PATIENCE_S = 6, 5, 600.0
TRAINING = [
    *("experiment=debug", "runtime.device=cpu", "runtime.num_threads=1", "data.validation_rows=10"),
    *("data.test_rows=10", "training.local_steps=6", f"federation.num_rounds={ROUNDS}"),
    *(f"federation.spare_rounds={KILLS}", "privacy.noise_multiplier=20"),
]
SECURE = [
    *(word for word in TRAINING if not word.startswith("training.local_steps")),
    *("training.local_steps=1", "federation.aggregation=secure", "federation.threshold=2"),
]
KINDS = {"plain": TRAINING, "upgraded": TRAINING, "secure": SECURE}
"""Where runs are upgraded, each killed process comes back as the next version, of the same protocol."""
RUNS = {f"{kind}-{seed}": words for kind, words in KINDS.items() for seed in range(2)}
AS_VERSION = """
import sys
import fedtune.spec, fedtune.version
fedtune.version.__version__, protocol = sys.argv[1:3]
fedtune.spec.WIRE_SCHEMA += int(protocol)
from fedtune.cli.main import main
sys.exit(main(sys.argv[3:]))
"""
"""`fedtune` of another version, whose protocol's number is so much higher."""
WHO = ("site", "server", "lead")
MOMENTS = ("charged", "committed", "any")
"""When a process dies: a site has charged a round and not committed it, has just committed it, or a random moment."""


class Drill:
    """One run at three sites, of which every process can be killed and is started again by the same words."""

    def __init__(self, made: LocalFederation, run: str) -> None:
        self.made, self.run = made, run
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *, version: str = "", protocol: int = 0) -> None:
        """Start a process by the words that its service manager has; of another version, if one is given."""
        program = ["-c", AS_VERSION, version, str(protocol)] if version else ["-m", "fedtune"]
        own = [f"{name}/kit", "--site", f"{name}/site.toml"]
        words = {
            "server": ["server", "start", "--kit", "fed/server", "--host", "127.0.0.1"],
            "lead": ["run", "--kit", "fed/lead", "--or-resume", *self.made.overrides, f"name={self.run}"],
        }.get(name, ["site", "start", "--kit", *own])
        with (self.made.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *program, *words],
                cwd=self.made.folder,
                stdout=log,
                stderr=log,
                env=environment(),
            )

    def events(self, site: str) -> list[Event]:
        """The run's events in a site's ledger, also while the site writes."""
        with (
            suppress(RunError),
            store.open_for_reading(self.made.folder / site / "ledger.db") as file,
        ):  # it may be yet to be made
            return [event for event in store.read_events(file) if event.run.rpartition("-")[0] == self.run]
        return []

    def count(self, site: str, kind: Kind) -> int:
        """How many events of a kind a site's ledger has of the run."""
        return sum(event.kind is kind for event in self.events(site))

    def is_open(self, site: str) -> bool:
        """Whether the round that a site charged last has no stored reply."""
        kinds = [event.kind for event in self.events(site) if event.kind in (Kind.RESERVE, Kind.COMMIT)]
        return kinds[-1:] == [Kind.RESERVE]

    def kill(self, who: str, moment: str, chance: random.Random) -> study.Found:
        """Kill a process at its moment and start it again; says what the kill found."""
        site = chance.choice(SITES)
        victim, kind = site if who == "site" else who, {"charged": Kind.RESERVE, "committed": Kind.COMMIT}.get(moment)
        if kind is None:
            time.sleep(chance.uniform(0.0, 6.0))
        else:
            before = self.count(site, kind)
            self.wait_for(lambda: self.count(site, kind) > before, f"{site} to {kind.value} a round")
        process = self.processes[victim]
        process.send_signal(signal.SIGKILL)
        died = process.wait() == -signal.SIGKILL
        found = {"who": who, "moment": moment, "victim": victim, "killed": died, "round": self.round_of(site)}
        found |= {"left_open": [name for name in SITES if self.is_open(name)]}
        time.sleep(chance.uniform(0.0, 2.0))
        self.start(victim, version="0.2.1" if self.run.startswith("upgraded") else "")
        return found

    def round_of(self, site: str) -> int:
        return max((event.round for event in self.events(site) if event.kind is Kind.RESERVE), default=0)

    def wait_for(self, there: Callable[[], bool], what: str) -> None:
        """Wait, but not for ever: who waits in vain has found a dead end."""
        deadline = time.monotonic() + PATIENCE_S
        while not there():
            lead = self.processes["lead"].poll()
            if lead is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a dead end: waited for {what}; the lead's exit code is {lead}")
            time.sleep(0.02)

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def drill(runs: Path, *, name: str, overrides: list[str]) -> study.Found:
    """One run with five kills, and its books afterwards."""
    shutil.rmtree(folder := runs / name, ignore_errors=True)
    folder.mkdir()
    chance, numbers = random.Random(name), list(RUNS)
    pairs = [(who, moment) for who in WHO for moment in MOMENTS]
    first = KILLS * numbers.index(name)
    asked = [pairs[number % len(pairs)] for number in range(first, first + KILLS)]
    chance.shuffle(asked)
    run = Drill(LocalFederation(folder, overrides), name)
    try:
        for one in ("server", *SITES, "lead"):
            run.start(one)
        kills = [run.kill(who, moment, chance) for who, moment in asked]
        code = run.processes["lead"].wait(timeout=PATIENCE_S * 3)
    finally:
        run.stop()
    return {"kills": kills, "exit_code": code, **books(run)}


def apart(runs: Path, *, protocol: int) -> study.Found:
    """One site whose protocol is another than the lead's: what both say, and what is charged."""
    shutil.rmtree(folder := runs / f"apart{protocol:+}", ignore_errors=True)
    folder.mkdir()
    run = Drill(LocalFederation(folder, [*TRAINING, "federation.min_sites=3"]), "apart")
    try:
        run.start("server")
        for site in SITES:
            run.start(site, version="0.3.0" if site == SITES[0] else "", protocol=protocol)
        run.start("lead")
        code = run.processes["lead"].wait(timeout=PATIENCE_S)
    finally:
        run.stop()
    said = {one: " ".join((folder / f"{one}.log").read_text().split()) for one in ("lead", SITES[0])}
    sentences = {one: re.findall(r"protocol \d+ \(fedtune \S+\): upgrade the \w+", text) for one, text in said.items()}
    charged = sum(event.kind in (Kind.PLAN, Kind.RESERVE) for site in SITES for event in run.events(site))
    return {
        "exit_code": code,
        "said": {one: sorted(set(found)) for one, found in sentences.items()},
        "charged": charged,
    }


def books(run: Drill) -> study.Found:
    """Compare the run's result with its sites' ledgers and with the receipts that the lead has."""
    folder = run.made.folder
    result = json.loads((folder / "runs" / run.run / "run.json").read_text())
    receipts = json.loads((folder / "fed/lead/receipts.json").read_text())
    sites = {}
    for site in SITES:
        request = json.loads((folder / site / "kit/join_request.json").read_text())
        verify(folder / site / "ledger.db", site_key=request["site_key"])
        events = run.events(site)
        reserved = [(event.round, event.attempt) for event in events if event.kind is Kind.RESERVE]
        committed = Counter(event.round for event in events if event.kind is Kind.COMMIT)
        counted = Counter(round["round"] for round in result["rounds"] if site in round["sites"])
        unread = Counter(one["round"] for one in result["rounds"] if one["failed_sites"].get(site) == "not_summed")
        receipt = Receipt.from_json(receipts[site])
        sites[site] = {
            "charged": len(reserved),
            "charged_without_reply": len(reserved) - committed.total(),
            "committed_twice": [round for round, times in committed.items() if times > 1],
            "not_summed": sorted((committed & unread).elements()),
            "lost": sorted((committed - counted - unread).elements()),
            "counted_without_charge": sorted((counted - committed).elements()),
            "stated": result["privacy"]["sites"][site]["rounds"],
            "receipt": receipt.charged_rounds if receipt.has_valid_signature() and receipt.ended else None,
        }
    return {"rounds": sum(bool(round["sites"]) for round in result["rounds"]), "sites": sites}


def table(lines: Mapping[str, study.Found]) -> str:
    """One row for each process and moment, and what the books of all runs say."""
    stock = {name: line for name, line in lines.items() if name in stock_drill.LINES}
    lines = {name: line for name, line in lines.items() if name in RUNS}
    kills = [kill for line in lines.values() for kill in line["kills"]]
    rows = [
        "| killed | a round charged, not committed | just committed | at a random moment |",
        "| --- | ---: | ---: | ---: |",
    ]
    for who in WHO:
        numbers = Counter(kill["moment"] for kill in kills if kill["who"] == who and kill["killed"])
        rows.append(f"| {who} | " + " | ".join(str(numbers[moment]) for moment in MOMENTS) + " |")
    books = [site for line in lines.values() for site in line["sites"].values()]
    open_site = sum(kill["who"] == "site" and kill["victim"] in kill["left_open"] for kill in kills)
    between = sum(bool(kill["left_open"]) for kill in kills)
    ended = sum(line["exit_code"] == 0 and line["rounds"] == ROUNDS for line in lines.values())
    charged, free = (sum(book[key] for book in books) for key in ("charged", "charged_without_reply"))
    twice, lost, unread, unpaid = (
        sum(len(book[key]) for book in books)
        for key in ("committed_twice", "lost", "not_summed", "counted_without_charge")
    )
    apart = sum(not book["charged"] == book["stated"] == book["receipt"] for book in books)
    words = [
        f"{len(kills)} kills, {between} of them while a site had charged a round and not committed it ({open_site} of",
        f"that site itself). {ended} of {len(lines)} runs ended with results of {ROUNDS} rounds. {charged} rounds were",
        f"charged, {free} of them without a reply; {twice} were committed twice, {lost} committed updates are in no",
        f"round, {unread} are in a sum that run.json says was not read, {unpaid} are in a round without a charge, and",
        f"at {apart} of {len(books)} sites ledger, run.json and signed receipt differ.",
    ]
    return "\n".join([*rows, "", *words, "", stock_drill.summary(stock)])


if __name__ == "__main__":
    given = study.parser(__doc__, Path(__file__).parent).parse_args()
    every: dict[str, study.Line] = {name: partial(drill, name=name, overrides=words) for name, words in RUNS.items()}
    every |= {f"apart{protocol:+}": partial(apart, protocol=protocol) for protocol in (-1, 1)}
    every |= stock_drill.LINES
    study.carry_out(__file__, every, table, asked=given, file="kills.json")
