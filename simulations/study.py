"""Run a study: every line of a study.toml as real runs, into results.json and the table of its README.

    python simulations/study.py simulations/banks_intents              all lines
    python simulations/study.py simulations/banks_intents --only e8    lines whose key begins with e8; others are kept
    ... --states FILE    frozen layers run once for all lines, and their output is kept there (`shared_states.py`)
    ... --runs FOLDER    run folders are kept there: finished ones are not run again, others go on

A line of study.toml has a key, a title and overrides; `repeats` runs it several times with fresh noise, `seeds` once
with each of these, and `each_site = true` once for every site alone; scores are averaged.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import readme
import torch
from shared_states import shared_frozen_states

import fedtune
from fedtune.api.compose import compose_run
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.durable import write_durably
from fedtune.runs.results import RunResult
from fedtune.sites.session import Session
from fedtune.studies.trials import Trial

BEGIN, END = "<!-- results: written by simulations/study.py -->", "<!-- end of results -->"


def run_line(experiment: str, line: dict[str, Any], *, session: Session, kept: Path | None = None) -> dict[str, Any]:
    """All runs of one line: overrides, scores of each run, and what the first one says of privacy and cost."""
    overrides = [f"experiment={experiment}", "tracking=quiet", *line["overrides"]]
    variants: list[list[str]] = [[]]
    if line.get("each_site"):
        variants = [[f"federation.participants=[{site}]"] for site in compose_run(overrides).federation.names]
    elif seeds := line.get("seeds"):
        variants = [[f"seed={seed}"] for seed in seeds]
    runs = []
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
        for number in range(line.get("repeats", 1)):
            for place, variant in enumerate(variants):
                name = f"{line['key']}-{number}-{place}"
                runs.append(finished([*overrides, *variant, f"name={name}", f"tracking.output_dir={folder}"], session))
    first = runs[0]
    names = first["final"]["metrics"]
    return {
        "title": line["title"],
        "overrides": line["overrides"],
        "runs": len(runs),
        "config_sha256": sorted({run["config_sha256"] for run in runs}),
        "hardware": hardware(),
        "epsilon": first["privacy"]["epsilon"],
        "delta": first["privacy"]["delta"],
        "noise_multiplier": next(iter(first["privacy"]["sites"].values()))["noise_multiplier"],
        "metrics": {name: statistics.fmean(run["final"]["metrics"][name] for run in runs) for name in names},
        "each_run": [run["final"]["metrics"] for run in runs],
        "before": first["final"]["metrics_before"],
        "validation_by_round": [r["metrics"] for r in first["rounds"]],
        "seconds": statistics.median(run["final"]["seconds"] for run in runs),
        "peak_memory_bytes": max(run["final"]["peak_memory_bytes"] for run in runs),
        "bytes_of_a_site": [bytes_of_a_site(first, way) for way in ("down", "up")],
    }


def bytes_of_a_site(run: dict[str, Any], way: str) -> int:
    """That a site received ("down") or sent ("up") in the whole run: the mean over its sites."""
    return round(sum(one[f"bytes_{way}"] for one in run["rounds"]) / len(run["privacy"]["sites"]))


def show(progress: fedtune.Progress) -> None:
    """A line for each round."""
    if progress.round:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in progress.round.metrics.items() if value is not None)
        print(f"round {progress.done} of {progress.total}: {scores}", flush=True)


def finished(overrides: list[str], session: Session) -> dict[str, Any]:
    """run.json of a run, which goes on where the same study left it."""

    def work(trial: Trial) -> RunResult:
        return fedtune.simulate(trial.config, progress=show, session=session).result

    done = Trial.of(compose_run(overrides)).run(work)
    if done.error is not None:
        raise done.error
    found: dict[str, Any] = json.loads((done.folder / "run.json").read_text())
    return found


def table(results: dict[str, Any]) -> str:
    """The Markdown table of a study."""
    lines = results["lines"].values()
    metrics = list(next(iter(lines))["metrics"])
    heads = ["", "epsilon", "noise", *metrics, "lowest to highest " + metrics[0], "runs", "seconds a run"]
    sizes = ["MB to a site", "MB from it"] if all("bytes_of_a_site" in line for line in lines) else []
    heads += sizes
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    before = next(iter(lines))["before"]
    # By rounding alone, unless lines begin in several adapters.
    alike = all(
        abs(line["before"].get(name, math.inf) - before.get(name, 0.0)) < 1e-3 for line in lines for name in metrics
    )
    if alike:
        scores = [f"{before[name]:.3f}" for name in metrics]
        rows.append(["before training", "", "", *scores, *[""] * (len(heads) - len(scores) - 3)])
    for line in lines:
        first = [run[metrics[0]] for run in line["each_run"]]
        rows.append(
            [
                line["title"],
                epsilon_text(line["epsilon"]),
                f"{line['noise_multiplier']:g}",
                *(f"{line['metrics'][name]:.3f}" for name in metrics),
                f"{min(first):.3f} to {max(first):.3f}" if len(first) > 1 else "",
                str(line["runs"]),
                f"{line['seconds']:.0f}",
                *(f"{size / 1e6:.1f}" for size in line.get("bytes_of_a_site", ()) if sizes),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def hardware() -> str:
    """What the numbers were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB memory, {gpu}"


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json, and the table between the README's marks."""
    write_durably(folder / "results.json", json.dumps(results, indent=1).encode() + b"\n")
    machines = sorted({line["hardware"] for line in results["lines"].values()})
    text = f"{table(results)}\n\nMeasured on {'; '.join(machines)}."
    readme.put(folder / "README.md", text, begin=BEGIN, end=END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--states", type=Path)
    parser.add_argument("--runs", type=Path)
    options = parser.parse_args()
    study = tomllib.loads((options.study / "study.toml").read_text())
    path = options.study / "results.json"
    for line in study["lines"]:
        if not line["key"].startswith(options.only):
            continue
        print(f"--- {line['title']}", flush=True)
        with Session() as session, shared_frozen_states(options.states) if options.states else nullcontext():
            done = run_line(study["experiment"], line, session=session, kept=options.runs)
        # Read only now: two processes may run two lines.
        old = json.loads(path.read_text())["lines"] if path.exists() else {}
        known = old | {line["key"]: done}
        lines = {other["key"]: known[other["key"]] for other in study["lines"] if other["key"] in known}
        write(options.study, {"experiment": study["experiment"], "lines": lines})


if __name__ == "__main__":
    main()
