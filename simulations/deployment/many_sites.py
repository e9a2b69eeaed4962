"""Many real site processes against one server on one machine: time of a round, memory and idle CPU time of each part.

python simulations/deployment/many_sites.py                       4, 16, 32 and 64 sites
python simulations/deployment/many_sites.py --sites 64 100:64     64 sites, and 100 of which 64 take part in rounds
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from local_federation import LocalFederation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

NUMBERS = ("4", "16", "32", "64")
IDLE_S = 30.0
ROUNDS = 6
ROWS_A_SITE = 100
IN_ROUNDS_BYTES, IDLE_BYTES, OTHER_BYTES = 250_000_000, 40_000_000, 1_500_000_000
"""What one more site adds, with a part in rounds or none; what lead, server and the sites' common parent take."""
_BANKING77_ROWS = 10_003


def measured(runs: Path, *, num_sites: int, num_in_rounds: int) -> study.Found:
    """Sites of 100 records each on a random tiny model, one step a round: what a round costs is the line."""
    with tempfile.TemporaryDirectory() as folder:
        return rounds_of(Path(folder), num_sites=num_sites, num_in_rounds=num_in_rounds)


def rounds_of(folder: Path, *, num_sites: int, num_in_rounds: int) -> study.Found:
    """The same in an empty folder."""
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


def table(lines: Mapping[str, study.Found]) -> str:
    """The Markdown table."""
    heads = ["sites", "a round, s", "server idle, cores", "server, MB", "lead at most, MB"]
    rows = [[*heads, "a site idle, added / alone, MB", "in rounds, MB"]]
    for number, one in sorted(lines.items(), key=lambda line: int(line[0])):
        some = one["in_rounds"] < int(number)
        last = one["bytes_after_rounds"]
        rows.append(
            [
                f"{number}, of which {one['in_rounds']} in rounds" if some else number,
                f"{one['seconds_a_round_median']:.1f}",
                f"{one['idle_cores']['server']:.3f}",
                *(f"{last[part] / 1e6:.0f}" for part in ("server", "lead_peak")),
                *(f"{two['a_site_added'] / 1e6:.0f} / {two['a_site'] / 1e6:.0f}" for two in (one["idle_bytes"], last)),
            ]
        )
    return readme.markdown(rows, texts=0)


def main() -> None:
    options = study.parser(__doc__, Path(__file__).parent)
    options.add_argument("--sites", nargs="+", default=list(NUMBERS), help="numbers of sites; M:N: N of M in rounds")
    asked = options.parse_args()
    lines: dict[str, study.Line] = {}
    for word in asked.sites:
        all_sites, _, in_rounds = word.partition(":")
        lines[all_sites] = partial(measured, num_sites=int(all_sites), num_in_rounds=int(in_rounds or all_sites))
    study.carry_out(__file__, lines, table, asked=asked, file="many_sites.json")


if __name__ == "__main__":
    main()
