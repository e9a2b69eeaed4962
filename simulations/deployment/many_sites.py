"""Many real site processes against one server on one machine: time of a round, memory and idle CPU time of each part.

python simulations/deployment/many_sites.py             4, 16, 32 and 64 sites, into many_sites.json and .svg
python simulations/deployment/many_sites.py 64          some of them; the others are kept
python simulations/deployment/many_sites.py 100:64      100 sites, of which 64 take part in the rounds
python simulations/deployment/many_sites.py --chart     the chart alone, from many_sites.json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from local_federation import LocalFederation

from fedtune.privacy.durable import write_durably
from fedtune.show.drawing import Panel, Series, chart

HERE = Path(__file__).parent
RESULTS, CHART = HERE / "many_sites.json", HERE / "many_sites.svg"
NUMBERS = (4, 16, 32, 64)
IDLE_S = 30.0
ROUNDS = 6
ROWS_A_SITE = 100
IN_ROUNDS_BYTES, IDLE_BYTES, OTHER_BYTES = 250_000_000, 40_000_000, 1_500_000_000
"""What one more site adds, with a part in rounds or none; what lead, server and the sites' common parent take."""
_BANKING77_ROWS = 10_003


def measured(num_sites: int, num_in_rounds: int, folder: Path) -> dict[str, Any]:
    """Sites of 100 records each on a random tiny model, one step a round: what a round costs is the line."""
    require_memory(num_sites, num_in_rounds)
    sites = [f"site-{number:02d}" for number in range(1, num_sites + 1)]
    taking_part = sites[:num_in_rounds]
    fraction = min(1.0, num_sites * ROWS_A_SITE / _BANKING77_ROWS)
    training = ["training.local_steps=1", f"federation.num_rounds={ROUNDS}", "runtime.num_threads=1"]
    data = [f"data.train_fraction={fraction:.4f}", f"data.declared_sizes={ROWS_A_SITE}"]
    made = LocalFederation(folder, ["experiment=debug", *training, *data], sites=sites)
    with made.up():
        time.sleep(10)  # for what a start leaves to be done
        before, began = {name: _cpu_s(pid) for name, pid in made.pids.items()}, time.monotonic()
        time.sleep(IDLE_S)
        passed = time.monotonic() - began
        idle = {name: (_cpu_s(pid) - before[name]) / passed for name, pid in made.pids.items()}
        idle_memory = _by_part(made.pids, sites)
        lead = _PeakOfLead(made.folder)
        result = made.run("many", sites=taking_part)
        peak_of_lead = lead.stop()
        memory = _by_part(made.pids, taking_part)
    seconds = [round["seconds"] for round in result["rounds"]]
    answered = all(len(round["sites"]) == num_in_rounds for round in result["rounds"])
    assert answered, "every site that takes part answered every round"
    return {
        "in_rounds": num_in_rounds,
        "rounds": len(seconds),
        "seconds_of_first_round": seconds[0],
        "seconds_a_round_median": statistics.median(seconds[1:]),
        "seconds_a_round_max": max(seconds[1:]),
        "idle_cores": {"server": idle["server"], "a_site": statistics.median(idle[name] for name in sites)},
        "idle_bytes": idle_memory,
        "bytes_after_rounds": memory | {"lead_peak": peak_of_lead},
    }


def require_memory(num_sites: int, num_in_rounds: int) -> None:
    """Stop before the system would stop some process: a site that is killed makes all of it worth nothing."""
    needed = OTHER_BYTES + num_in_rounds * IN_ROUNDS_BYTES + (num_sites - num_in_rounds) * IDLE_BYTES
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    there = int(lines["MemAvailable"].split()[0]) * 1024
    if needed > there:
        room = (there - OTHER_BYTES - num_sites * IDLE_BYTES) // (IN_ROUNDS_BYTES - IDLE_BYTES)
        raise SystemExit(
            f"{num_sites} sites, {num_in_rounds} of them in rounds, take {needed / 1e9:.1f} GB of memory, and "
            f"{there / 1e9:.1f} GB are available: {num_sites}:{max(0, room)} would fit"
        )


def _by_part(pids: Mapping[str, int], sites: Sequence[str]) -> dict[str, int]:
    """Resident memory: of a site all that it has mapped, as if it were alone, and what it adds to this machine's."""
    found = {name: _memory(pid) for name, pid in pids.items()}
    return {
        "server": found["server"]["Rss"],
        "a_site": round(statistics.median(found[name]["Rss"] for name in sites)),
        "a_site_added": round(statistics.median(found[name]["Pss"] for name in sites)),
    }


def _memory(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _PeakOfLead:
    """Follows the largest resident memory of the one process that runs a federation's lead."""

    def __init__(self, folder: Path) -> None:
        self._running, self._peak, self._stop = folder / "runs" / "many" / "running.json", 0, threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(0.5):
            try:
                status = Path(f"/proc/{json.loads(self._running.read_text())['pid']}/status").read_text()
            except (OSError, ValueError):
                continue
            found = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
            self._peak = max(self._peak, *found, 0)

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak


def draw(results: dict[str, Any]) -> str:
    """Seconds of a round, memory, and the idle server's CPU time, by the number of sites."""
    of = {int(number): found for number, found in results["sites"].items()}
    numbers, mb = sorted(of), 1e6
    whole = [n for n in numbers if of[n].get("in_rounds", n) == n]

    def line(name: str, label: str, place: int, sites: Sequence[int]) -> Series:
        points = [(n, of[n]["bytes_after_rounds"][name] / mb) for n in sites]
        return Series(points=points, number=place, label=label)

    seconds = [(n, of[n]["seconds_a_round_median"]) for n in whole]
    memory = [line("a_site", "a site", 1, whole), line("server", "server", 2, numbers)]
    panels = [
        Panel(series=[Series(points=seconds, number=0)], y="seconds a round"),
        Panel(series=[*memory, line("lead_peak", "lead, peak", 3, numbers)], y="memory, MB"),
        Panel(
            series=[Series(points=[(n, of[n]["idle_cores"]["server"]) for n in numbers], number=2)],
            x="sites",
            y="server idle, cores",
            scale="whole",
        ),
    ]
    said = "Seconds a round, memory of site, server and lead, and the idle server's CPU time, by the number of sites."
    drawn = chart("many", panels, named=("Many sites", said), number=lambda value: f"{value:,.4g}")
    return str(drawn).replace("<svg ", '<svg font-family="sans-serif" ', 1)


if __name__ == "__main__":
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"sites": {}}
    for word in [] if "--chart" in sys.argv else sys.argv[1:] or map(str, NUMBERS):
        each, _, in_rounds = word.partition(":")
        with tempfile.TemporaryDirectory() as scratch:
            found["sites"][each] = measured(int(each), int(in_rounds or each), Path(scratch))
        found["hardware"] = f"{os.cpu_count()} CPU cores, {platform.machine()}"
        print(each, json.dumps(found["sites"][each], indent=1), flush=True)
        write_durably(RESULTS, json.dumps(found, indent=1).encode() + b"\n")
    write_durably(CHART, draw(found).encode())
