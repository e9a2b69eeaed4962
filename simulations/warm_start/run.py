"""Four banks at epsilon 1 that begin in an adapter tuned on the lead's own questions.

    python simulations/warm_start/run.py                every line, into results.json and the README's table; an hour
    python simulations/warm_start/run.py --only gentle  lines whose key begins so; others are kept
    python simulations/warm_start/run.py --runs FOLDER  keep the runs there, and take those that are there

The lead's own questions are the validation slice of banks_intents: 728 that no bank gets.  The start is tuned on them
without privacy.  Rates were chosen by stand_in.py; the test file is scored here alone, before and after each run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from study import hardware

from fedtune.cli.main import main as fedtune
from fedtune.privacy.durable import write_durably

FOLDER = Path(__file__).parent
SLICE = FOLDER.parent / "data" / "banking77" / "validation.jsonl.gz"
BEGIN, END = "<!-- results: written by simulations/warm_start/run.py -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        rates: learning rates of LoRA and of the head.
        start: key of the line whose adapter the banks begin in; None: the lead tunes one on its own questions.
    """

    key: str
    title: str
    rates: tuple[float, float]
    start: str | None = None


LINES = (
    Line("full", "a start at the usual rates, alone", (8, 14)),
    Line("full-banks", "banks that begin in it, epsilon 1", (1 / 3, 8 / 3), start="full"),
    Line("gentle", "a start at a third of these rates, alone", (8 / 3, 14 / 3)),
    Line("gentle-banks", "banks that begin in it, epsilon 1", (1 / 3, 8 / 3), start="gentle"),
)


def settings(line: Line, runs: Path) -> list[str]:
    """The overrides of one line."""
    lora, head = line.rates
    found = ["experiment=banks_intents", "tracking=quiet", "data.validation_file=null", f"tracking.output_dir={runs}"]
    if line.start is not None:
        rates = [f"training.learning_rate={lora:g}", f"training.head_learning_rate={head:g}"]
        return [*found, *rates, "privacy.epsilon=1", f"model.adapter={runs / line.start}"]
    rates = [f"training.unclipped_learning_rate={lora:g}", f"training.unclipped_head_learning_rate={head:g}"]
    alone = ["privacy=none", "federation.num_sites=1", "federation.site_names=[lead]"]
    own = [f"data.train_file={SLICE}", "data.dataset=lead_questions", "data.declared_sizes=728"]
    return [*found, *rates, *alone, *own]


def run_line(line: Line, runs: Path) -> dict[str, Any]:
    """One run, and what it came to."""
    path = runs / line.key / "run.json"
    if not path.exists():
        code = fedtune(["simulate", *settings(line, runs), f"name={line.key}"])
        if code:
            raise SystemExit(code)
    found = json.loads(path.read_text())
    return {
        "title": line.title,
        "rates": line.rates,
        "epsilon": found["privacy"]["epsilon"],
        "before": found["final"]["metrics_before"],
        "metrics": found["final"]["metrics"],
        "start_adapter": found["provenance"]["start_adapter"],
        "config_sha256": found["config_sha256"],
        "seconds": found["final"]["seconds"],
        "hardware": hardware(),
    }


def table(lines: dict[str, Any]) -> str:
    """The README's table."""
    rows = [["", "LoRA rate", "head rate", "epsilon", "accuracy before", "accuracy", "loss", "seconds"]]
    rows.append(["---", *["---:"] * 7])
    for line in lines.values():
        epsilon = "none" if line["epsilon"] is None else f"{line['epsilon']:.3f}"
        figures = (line["before"]["accuracy"], line["metrics"]["accuracy"], line["metrics"]["loss"])
        rates = (f"{rate:.3g}" for rate in line["rates"])
        rows.append([line["title"], *rates, epsilon, *(f"{one:.3f}" for one in figures), f"{line['seconds']:.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(results: dict[str, Any]) -> None:
    """Write results.json, and the table between the README's marks."""
    write_durably(FOLDER / "results.json", json.dumps(results, indent=1).encode() + b"\n")
    readme = FOLDER / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    machines = sorted({line["hardware"] for line in results["lines"].values()})
    body = f"{BEGIN}\n{table(results['lines'])}\n\nMeasured on {'; '.join(machines)}.\n{END}"
    write_durably(readme, (before + body + rest.split(END)[1]).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=Path)
    options = parser.parse_args()
    path = FOLDER / "results.json"
    old = json.loads(path.read_text())["lines"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for line in LINES:
            if line.key.startswith(options.only):
                print(f"--- {line.key}: {line.title}", flush=True)
                old[line.key] = run_line(line, options.runs or Path(scratch))
                write({"lines": {one.key: old[one.key] for one in LINES if one.key in old}})


if __name__ == "__main__":
    main()
