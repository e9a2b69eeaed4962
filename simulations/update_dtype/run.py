"""Updates in float32 and in bfloat16: the same two recipes, three seeds each, with the same noise for both.

    python simulations/update_dtype/run.py                   every line, into results.json and the README's table
    python simulations/update_dtype/run.py --recipes debug   another recipe; results go into RUNS, not here

Stop it when you like: the same command goes on in the round where it was.  Run folders are in RUNS (--runs).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import fedtune

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from study import run_line  # it imports torch, which must find fedtune's settings

from fedtune.privacy.durable import write_durably
from fedtune.sites.session import Session

FOLDER = Path(__file__).parent
RECIPES, DTYPES, SEEDS = ("banks_intents", "hospitals_abstracts"), ("float32", "bfloat16"), (0, 1, 2)
BEGIN, END = "<!-- results: written by simulations/update_dtype/run.py -->", "<!-- end of results -->"


def table(lines: dict[str, Any]) -> str:
    """The Markdown table: both number formats of each recipe, and by seed the difference in accuracy."""
    rows = [["recipe", "updates in", "accuracy", "loss", "by seed", "minus float32, by seed", "MB up, a site and run"]]
    rows.append(["---", "---", "---:", "---:", "---:", "---:", "---:"])
    for line in lines.values():
        scores = [run["accuracy"] for run in line["each_run"]]
        whole = lines[f"{line['recipe']}-float32"]["each_run"]
        differences = [score - run["accuracy"] for score, run in zip(scores, whole, strict=True)]
        rows.append(
            [
                line["recipe"],
                line["dtype"],
                f"{statistics.fmean(scores):.4f}",
                f"{line['metrics']['loss']:.4f}",
                ", ".join(f"{score:.4f}" for score in scores),
                "" if line["dtype"] == "float32" else ", ".join(f"{value:+.4f}" for value in differences),
                f"{line['bytes_of_a_site'][1] / 1e6:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--runs", type=Path, default=Path("runs/update_dtype"))
    options = parser.parse_args()
    lines: dict[str, Any] = {}
    for recipe in options.recipes:
        for dtype in DTYPES:
            print(f"--- {recipe}, {dtype}", flush=True)
            # The same seed draws the same split, start, batches and noise, so that rounding alone differs.
            overrides = ["runtime.seeded_noise=true", f"federation.update_dtype={dtype}"]
            key, title = f"{recipe}-{dtype}", f"{recipe}, updates in {dtype}"
            line = {"key": key, "title": title, "overrides": overrides, "seeds": SEEDS}
            with Session() as session:
                done = run_line(recipe, line, session=session, kept=options.runs)
            lines[key] = {"recipe": recipe, "dtype": dtype, **done}
    here = options.recipes == RECIPES
    out = FOLDER if here else options.runs
    write_durably(
        out / "results.json", json.dumps({"fedtune": fedtune.__version__, "lines": lines}, indent=1).encode() + b"\n"
    )
    print(table(lines))
    if here:
        before, rest = (FOLDER / "README.md").read_text().split(BEGIN)
        (hardware,) = {line["hardware"] for line in lines.values()}
        body = f"{BEGIN}\n{table(lines)}\n\nMeasured on {hardware}.\n{END}"
        write_durably(FOLDER / "README.md", (before + body + rest.split(END)[1]).encode())


if __name__ == "__main__":
    main()
