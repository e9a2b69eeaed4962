"""Four banks at epsilon 1 that begin in an adapter tuned on the lead's own questions, beside a start without.

    python simulations/warm_start/run.py              every line, into results.json and the README's table; an hour
    python simulations/warm_start/run.py --only warm  lines whose key begins so; others are kept

The lead's own questions are the validation slice of banks_intents: 728 that no bank gets.  Its start is tuned on them
without privacy.  Settings were chosen on a fifth of the slice, by a hash of each text, with starts that were tuned on
the other four ("choosing"); the test file is scored by the lines "for reporting" alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
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
ALONE = ("privacy=none", "federation.num_sites=1", "federation.site_names=[lead]")


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        chooses: it is scored on a fifth of the slice, and its start is tuned on the rest.
        lora: learning rate of LoRA, and `head` of the head.
        start: key of the line whose adapter it begins in; "": none, and the line tunes one on the lead's own questions;
            None: in a new adapter.
        epsilon: of the banks.
    """

    key: str
    title: str
    chooses: bool
    lora: float
    head: float
    start: str | None = None
    epsilon: float | None = None
    repeats: int = 1


LINES = (
    Line("choose-start", "the lead's start alone", True, 8, 14, start=""),
    Line("choose-start-third", "the same, a third of the rates", True, 8 / 3, 14 / 3, start=""),
    Line("choose-cold-third", "banks in a new adapter, epsilon 1", True, 1, 8, epsilon=1),
    Line("choose-warm-third", "banks in the start, epsilon 1", True, 1, 8, start="choose-start", epsilon=1),
    Line("choose-warm-ninth", "the same, a third of these rates", True, 1 / 3, 8 / 3, start="choose-start", epsilon=1),
    Line("choose-warm-27th", "the same, a ninth", True, 1 / 9, 8 / 9, start="choose-start", epsilon=1),
    Line("start", "the lead's start alone, no bank", False, 8, 14, start=""),
    Line("warm", "banks in the start, epsilon 1", False, 1 / 3, 8 / 3, start="start", epsilon=1, repeats=3),
    Line("cold", "banks in a new adapter, epsilon 1", False, 1, 8, epsilon=1),
)


def split(into: Path) -> dict[str, Path]:
    """The slice, and four fifths and one fifth of it, as files."""
    with gzip.open(SLICE, "rt", encoding="utf-8") as lines:
        texts = [line for line in lines if line.strip()]
    of_text = [int(hashlib.sha256(json.loads(line)["text"].encode()).hexdigest(), 16) % 5 for line in texts]
    files = {name: into / f"{name}.jsonl" for name in ("tuned", "scored")}
    for name, path in files.items():
        chosen = [line for line, part in zip(texts, of_text, strict=True) if (part == 0) == (name == "scored")]
        path.write_text("".join(chosen), encoding="utf-8")
    return files


def settings(line: Line, files: dict[str, Path], runs: Path) -> list[str]:
    """The overrides of one line."""
    found = ["experiment=banks_intents", "tracking=quiet", "data.validation_file=null"]
    found += [f"tracking.output_dir={runs}", *_rates(line)]
    if line.chooses:
        found.append(f"data.test_file={files['scored']}")
    if line.start == "":
        train = files["tuned"] if line.chooses else SLICE
        return [
            *found,
            *ALONE,
            f"data.train_file={train}",
            "data.dataset=lead_questions",
            f"data.declared_sizes={_size(train)}",
        ]
    start = [f"model.adapter={runs / line.start}-0"] if line.start else []
    return [*found, f"privacy.epsilon={line.epsilon:g}", *start]


def _rates(line: Line) -> Sequence[str]:
    prefix = "unclipped_" if line.start == "" else ""
    return (f"training.{prefix}learning_rate={line.lora:g}", f"training.{prefix}head_learning_rate={line.head:g}")


def _size(path: Path) -> int:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return sum(1 for line in text.splitlines() if line.strip())


def run_line(line: Line, files: dict[str, Path], runs: Path) -> dict[str, Any]:
    """All runs of one line, and what they came to."""
    results = []
    for number in range(line.repeats):
        name = f"{line.key}-{number}"
        if not (runs / name / "run.json").exists():
            code = fedtune(["simulate", *settings(line, files, runs), f"name={name}"])
            if code:
                raise SystemExit(code)
        results.append(json.loads((runs / name / "run.json").read_text()))
    accuracies = [one["final"]["metrics"]["accuracy"] for one in results]
    return {
        "title": line.title,
        "chooses": line.chooses,
        "rates": [line.lora, line.head],
        "start": line.start,
        "epsilon": results[0]["privacy"]["epsilon"],
        "before": results[0]["final"]["metrics_before"]["accuracy"],
        "accuracy": statistics.fmean(accuracies),
        "each_run": accuracies,
        "seconds": statistics.median(one["final"]["seconds"] for one in results),
        "start_adapter": results[0]["provenance"]["start_adapter"],
        "hardware": hardware(),
    }


def table(lines: dict[str, Any]) -> str:
    """The README's table."""
    rows = [["", "scored on", "LoRA rate", "head rate", "epsilon", "before", "accuracy", "each run", "seconds"]]
    rows.append(["---", "---", *["---:"] * 7])
    for line in lines.values():
        epsilon = "none" if line["epsilon"] is None else f"{line['epsilon']:.3f}"
        several = ", ".join(f"{one:.3f}" for one in line["each_run"]) if len(line["each_run"]) > 1 else ""
        rates = (f"{rate:.3g}" for rate in line["rates"])
        scored = "a fifth of the slice" if line["chooses"] else "test file"
        figures = (f"{line['before']:.3f}", f"{line['accuracy']:.3f}", several, f"{line['seconds']:.0f}")
        rows.append([line["title"], scored, *rates, epsilon, *figures])
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
    parser.add_argument("--only", default="", help="lines whose key begins so")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and take those that are there")
    options = parser.parse_args()
    path = FOLDER / "results.json"
    old = json.loads(path.read_text())["lines"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        files, runs = split(Path(scratch)), options.runs or Path(scratch, "runs")
        for line in LINES:
            if line.key.startswith(options.only):
                print(f"--- {line.key}: {line.title}", flush=True)
                old[line.key] = run_line(line, files, runs)
                write({"lines": {one.key: old[one.key] for one in LINES if one.key in old}})


if __name__ == "__main__":
    main()
