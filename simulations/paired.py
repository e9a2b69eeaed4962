"""Does a setting change scores?  The same runs with each of its values, under the same noise, and a table of pairs.

    python simulations/paired.py simulations/mixed_products/pairs                    every line: results.json, README
    python simulations/paired.py simulations/mixed_products/pairs --recipes debug    other recipes; results go into RUNS

The folder's `paired.toml` names the setting with its values (the first is what others are compared with), recipes,
privacy and seeds.  A seed draws the same split, start, batches and noise for each value (`runtime.seeded_noise=true`:
these runs are studies without a guarantee), so that the setting alone differs.  Stop it when you like: the same command
goes on in the round where it was.  Run folders are in RUNS (--runs).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tomllib
from itertools import product
from pathlib import Path
from typing import Any

import fedtune

import readme  # isort: skip
from study import run_line  # isort: skip  # it imports torch, which must find fedtune's settings

from fedtune.privacy.durable import write_durably
from fedtune.sites.session import Session

BEGIN, END = "<!-- results: written by simulations/paired.py -->", "<!-- end of results -->"
SCORES = ("accuracy", "micro_f1", "spearman")
"""One of which a task has."""


def table(lines: dict[str, Any], *, setting: str) -> str:
    """The Markdown table: each value of the setting, and by seed the difference from the first value."""
    heads = [
        "recipe",
        "privacy",
        setting,
        "score",
        "loss",
        "by seed",
        "minus the first, by seed",
        "MB up, a site and run",
    ]
    rows = [heads, ["---", "---", "---", *["---:"] * 5]]
    firsts: dict[tuple[str, str], list[float]] = {}
    for line in lines.values():
        name = next(one for one in SCORES if one in line["metrics"])
        scores = [run[name] for run in line["each_run"]]
        first = firsts.setdefault((line["recipe"], line["privacy"]), scores)
        differences = [] if first is scores else [score - one for score, one in zip(scores, first, strict=True)]
        rows.append(
            [
                line["recipe"],
                line["privacy"],
                line["value"],
                f"{name} {statistics.fmean(scores):.4f}",
                f"{line['metrics']['loss']:.4f}",
                ", ".join(f"{score:.4f}" for score in scores),
                ", ".join(f"{value:+.4f}" for value in differences),
                f"{line['bytes_of_a_site'][1] / 1e6:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--runs", type=Path)
    options = parser.parse_args()
    asked = tomllib.loads((options.folder / "paired.toml").read_text())
    runs = options.runs or Path("runs") / options.folder.name
    out = runs if options.recipes else options.folder
    lines: dict[str, Any] = {}
    for privacy, recipe in product(asked["privacy"], options.recipes or asked["recipes"]):
        with Session() as session:
            for value in asked["values"]:
                shown = Path(recipe).parent.name if recipe.endswith(".yaml") else recipe
                key = f"{shown}-{privacy.rpartition('=')[2]}-{value}"
                print(f"--- {key}", flush=True)
                overrides = [privacy, f"{asked['setting']}={value}"]
                if privacy != "privacy=none":
                    overrides.append("runtime.seeded_noise=true")
                line = {"key": key, "title": key, "overrides": overrides, "seeds": asked["seeds"]}
                done = run_line(recipe, line, session=session, kept=runs)
                lines[key] = {"recipe": shown, "privacy": privacy, "value": value, **done}
                write(lines, out, setting=asked["setting"])
    print(table(lines, setting=asked["setting"]))


def write(lines: dict[str, Any], folder: Path, *, setting: str) -> None:
    """Write what is known so far, and the README's table where the folder has one."""
    content = {"fedtune": fedtune.__version__, "lines": lines}
    write_durably(folder / "results.json", json.dumps(content, indent=1).encode() + b"\n")
    if (page := folder / "README.md").exists():
        hardware = "; ".join(sorted({line["hardware"] for line in lines.values()}))
        text = f"{table(lines, setting=setting)}\n\nMeasured on {hardware}."
        readme.put(page, text, begin=BEGIN, end=END)


if __name__ == "__main__":
    main()
