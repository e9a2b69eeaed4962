"""What a run costs as it grows: in sites, rounds, records, rank and tokens, each by itself.

    python simulations/benchmarks/growth.py                            into growth.json, growth.svg and the README
    python simulations/benchmarks/growth.py --times 1 --only rank      whether it works; quantities whose names begin so

Runs of the tiny model of `experiment=debug`, which shows what fedtune adds; the sizes of one quantity take turns, and
medians are written down.  Seconds are those of all rounds (training, ledgers, averaging, checkpoints), without start-up
and scoring, and of a round where rounds do not grow.  A straight line doubles at most when its size does.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import readme_table

from fedtune.api.compose import compose_run
from fedtune.flower.simulation import simulate
from fedtune.privacy.durable import write_durably
from fedtune.show.drawing import Panel, Series, chart
from fedtune.training.machine import usable_cores

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- growth: written by growth.py -->", "<!-- end of growth -->"
_LABELS = 4


@dataclass(frozen=True)
class Quantity:
    """What grows.

    Attributes:
        sizes: from the smallest to the largest.
        of: sites, rounds, records of a site, rank, and tokens of a record, for a size.
    """

    sizes: tuple[int, ...]
    of: Callable[[int], dict[str, int]]


QUANTITIES = {
    "sites": Quantity((2, 4, 8, 16, 32, 64, 128), lambda size: {"sites": size, "records": 64}),
    "rounds": Quantity((2, 4, 8, 16, 32, 64), lambda size: {"rounds": size}),
    "records of a site": Quantity((125, 250, 500, 1000, 2000, 4000), lambda size: {"records": size}),
    "rank": Quantity((1, 2, 4, 8, 16, 32), lambda size: {"rank": size}),
    "tokens of a record": Quantity((16, 32, 64, 128, 256), lambda size: {"tokens": size}),
}
_USUAL = {"sites": 2, "rounds": 2, "records": 500, "rank": 4, "tokens": 16}


class Silent:
    """Shows nothing."""

    def preparing(self, what: str, done: int, total: int) -> None: ...
    def note(self, text: str) -> None: ...
    def prepared(self, shared: Any, proposal: Any, state: Any) -> None: ...
    def site_replied(self, number: int) -> None: ...
    def round_finished(self, state: Any) -> None: ...


def seconds_of(asked: dict[str, int]) -> float:
    """Seconds of all rounds of a run; of one round, unless the number of rounds was asked for."""
    wanted = _USUAL | asked
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "records.jsonl")
        # As many tokens as are read; each text once, since equal ones go to one site.
        words = " ".join(["card"] * wanted["tokens"])
        count = wanted["sites"] * wanted["records"]
        lines = (json.dumps({"text": f"{row} {words}", "label": str(row % _LABELS)}) for row in range(count))
        file.write_text("\n".join(lines) + "\n")
        config = compose_run(
            [
                "experiment=debug",
                "tracking=quiet",
                "name=growth",
                "privacy.epsilon=8",
                f"data.train_file={file}",
                "data.validation_file=null",
                "data.test_file=null",
                "data.train_fraction=1.0",
                f"data.labels={[str(label) for label in range(_LABELS)]}",
                f"data.declared_sizes={wanted['records']}",
                f"data.max_length={wanted['tokens']}",
                f"lora.rank={wanted['rank']}",
                f"federation.num_sites={wanted['sites']}",
                f"federation.num_rounds={wanted['rounds']}",
            ]
        )
        result = simulate(config, Path(scratch, "run"), Silent())
    seconds = [one.seconds for one in result.rounds]
    return sum(seconds) if "rounds" in asked else statistics.median(seconds)


def measured(quantity: Quantity, *, times: int) -> dict[str, Any]:
    """Seconds at each size, and what the last doubling comes to."""
    each: dict[int, list[float]] = {size: [] for size in quantity.sizes}
    seconds_of(quantity.of(quantity.sizes[0]))  # not counted: modules are imported
    for _ in range(times):
        for size in quantity.sizes:
            each[size].append(seconds_of(quantity.of(size)))
    seconds = {size: statistics.median(found) for size, found in each.items()}
    before, last = quantity.sizes[-2:]
    return {
        "seconds": {str(size): round(one, 4) for size, one in seconds.items()},
        "last_doubling": round(seconds[last] / seconds[before], 2),
    }


def drawn(quantities: dict[str, dict[str, Any]]) -> str:
    """Time over size, both as shares of the largest: what is below the diagonal grows slower than a straight line."""
    lines = []
    for number, (name, one) in enumerate(quantities.items()):
        points = [(float(size), seconds) for size, seconds in one["seconds"].items()]
        most_size, most_seconds = points[-1]
        shares = [(size / most_size, seconds / most_seconds) for size, seconds in points]
        lines.append(Series(points=shares, number=number, label=name))
    panel = Panel(series=lines, x="size / largest size", y="time / its time")
    about = "Each line ends at 1; the README's table has the figures."
    return str(chart("growth", [panel], named=("Time over size", about), number="{:g}".format, height=300))


def table(quantities: dict[str, dict[str, Any]]) -> str:
    """The Markdown table."""
    rows = [["", "from", "to", "seconds, from", "to", "last doubling"], ["---", *["---:"] * 5]]
    for name, one in quantities.items():
        (first, before), *_, (last, after) = one["seconds"].items()
        rows.append([name, first, last, f"{before:.2f}", f"{after:.2f}", f"{one['last_doubling']:.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(quantities: dict[str, dict[str, Any]], into: Path, *, times: int) -> None:
    """Write the file and the chart beside it, and the README's table where both lie beside it."""
    machine = readme_table.machine(usable_cores())
    result = {"runs": times, "hardware": machine, "quantities": quantities}
    write_durably(into, json.dumps(result, indent=1).encode() + b"\n")
    write_durably(into.with_suffix(".svg"), drawn(quantities).encode())
    if into == FOLDER / "growth.json":
        about = f"Medians of {times} runs, {machine}.\n\n![Time over size](growth.svg)"
        readme_table.put(BEGIN, END, f"{table(quantities)}\n\n{about}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--into", type=Path, default=FOLDER / "growth.json")
    asked = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    known = json.loads(asked.into.read_text())["quantities"] if asked.into.exists() else {}
    for name, quantity in QUANTITIES.items():
        if name.startswith(asked.only):
            known[name] = measured(quantity, times=asked.times)
            print(name, json.dumps(known[name]), flush=True)
            write({name: known[name] for name in QUANTITIES if name in known}, asked.into, times=asked.times)


if __name__ == "__main__":
    main()
