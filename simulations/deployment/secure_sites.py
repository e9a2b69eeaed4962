"""Sixteen real sites that sum securely over TLS: time and bytes beside plain, and two killed in each phase.

python simulations/deployment/secure_sites.py          into secure_sites.json, about 10 minutes
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from local_federation import LocalFederation, environment

from fedtune.privacy.durable import write_durably
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.verify import verify

RESULTS = Path(__file__).parent / "secure_sites.json"
SITES = [f"site-{number:02d}" for number in range(1, 17)]
SECURE = ["federation.aggregation=secure", "training.local_steps=1"]
PHASES = ("training", "uploaded", "confirmed", "revealed", "between rounds")
ROWS_A_SITE, BANKING77_ROWS = 100, 10_003
PATIENCE_S = 60.0


class Victim:
    """A site as its files show it from outside: how far it came in the newest round, and whether it is there."""

    def __init__(self, made: LocalFederation, name: str, run: str) -> None:
        self.made, self.name, self.run = made, name, run

    def phase(self) -> tuple[int, str]:
        """The newest round that it was asked for, and how far it came in it."""
        known = verify(self.made.folder / self.name / "ledger.db").events
        mine = [event for event in known if event.run.startswith(self.run)]
        rounds = [event.round for event in mine if event.kind is Kind.RESERVE]
        if not rounds:
            return 0, "between rounds"
        newest = max(rounds)
        if not any(event.kind is Kind.COMMIT and event.round == newest for event in mine):
            return newest, "training"
        path = self.made.folder / self.name / "ledger.db.promises.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        promised = [json.loads(line) for line in lines if line.endswith("}")][-2:]
        told = {one["confirmed"] for one in promised if one["release"] == newest}
        return newest, "revealed" if True in told else "confirmed" if False in told else "uploaded"

    def kill_in(self, first: int, phase: str) -> None:
        """Kill it as soon as it has come so far in the round `first` or a later one."""
        until(lambda: self.phase() >= (first, "") and self.phase()[1] == phase)
        self.kill()

    def kill(self) -> None:
        os.kill(self.made.pids[self.name], signal.SIGKILL)

    def start(self) -> None:
        log = (self.made.folder / f"{self.name}.again.log").open("w")
        words = ["-m", "fedtune", "site", "start", "--kit", f"{self.name}/kit", "--site", f"{self.name}/site.toml"]
        process = subprocess.Popen([sys.executable, *words], cwd=self.made.folder, stderr=log, env=environment())
        self.made.pids[self.name] = process.pid
        until(lambda: "the site is up" in Path(log.name).read_text())


def until(holds: Callable[[], bool]) -> bool:
    """Wait for it, within a bounded time."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def kill_in_turn(made: LocalFederation, run: str, found: list[dict[str, Any]]) -> None:
    """Two others for each phase; each pair is started again before the next one goes."""
    watch = Victim(made, SITES[-1], run)
    until(lambda: watch.phase()[0] >= 1)
    for number, phase in enumerate(PHASES):
        pair = [Victim(made, name, run) for name in SITES[2 * number : 2 * number + 2]]
        begun = watch.phase()[0] + 1
        if phase == "between rounds":
            until(lambda: watch.phase() == (begun, "revealed"))  # noqa: B023
            time.sleep(0.3)
            for victim in pair:
                victim.kill()
        else:
            each = [threading.Thread(target=victim.kill_in, args=(begun, phase)) for victim in pair]
            for thread in each:
                thread.start()
            for thread in each:
                thread.join()
        found.append({"meant": phase, "sites": {victim.name: victim.phase() for victim in pair}})
        until(lambda: watch.phase()[0] > found[-1]["sites"][pair[0].name][0])  # noqa: B023
        for victim in pair:
            victim.start()


def measured(folder: Path, name: str, *more: str, kills: bool) -> dict[str, Any]:
    rounds = 14 if kills else 6
    fraction = len(SITES) * ROWS_A_SITE / BANKING77_ROWS
    settings = [f"federation.num_rounds={rounds}", "runtime.num_threads=1", "federation.grace_s=3", *more]
    data = [f"data.train_fraction={fraction:.4f}", f"data.declared_sizes={ROWS_A_SITE}"]
    made = LocalFederation(folder, ["experiment=debug", *settings, *data], sites=SITES)
    found: list[dict[str, Any]] = []
    with made.up():
        watcher = threading.Thread(target=kill_in_turn, args=(made, name, found), daemon=True)
        if kills:
            watcher.start()
        result = made.run(name)
        charged = {
            site: sum(event.kind is Kind.RESERVE for event in verify(made.folder / site / "ledger.db").events)
            for site in SITES
        }
        for site in SITES:  # what was started again is nobody's child here
            if (made.folder / f"{site}.again.log").exists():
                os.kill(made.pids[site], signal.SIGTERM)
    told = {site: about["rounds"] for site, about in result["privacy"]["sites"].items()}
    seconds = [one["seconds"] for one in result["rounds"]]
    return {
        "seconds_a_round_median": statistics.median(seconds[1:]),
        "bytes_up_a_round": statistics.median(one["bytes_up"] for one in result["rounds"]),
        "bytes_down_a_round": statistics.median(one["bytes_down"] for one in result["rounds"]),
        "sites_in_each_round": [len(one["sites"]) for one in result["rounds"]],
        "killed": found,
        "rounds_charged_in_ledgers": charged,
        "charged_more_than_told": {site: charged[site] for site in SITES if charged[site] > told[site]},
    }


def main() -> None:
    results: dict[str, Any] = {"sites": len(SITES), "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
    for name, more, kills in (
        ("plain", ["training.local_steps=1"], False),
        ("secure", SECURE, False),
        ("killed", SECURE, True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measured(Path(folder), name, *more, kills=kills)
        print(name, json.dumps(results[name], indent=1), flush=True)
        write_durably(RESULTS, json.dumps(results, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
