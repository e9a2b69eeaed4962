"""The harness of the studies: their options, their runs, results.json and the table of the README.

    python simulations/study.py simulations/banks_intents              every line of its study.toml
    python simulations/study.py simulations/banks_intents --only e8    lines whose keys begin with e8; others are kept
    ... --missing        only lines that results.json lacks
    ... --runs FOLDER    keep run folders there: finished runs are not repeated, others go on
    ... --states FILE    run frozen layers once for all lines, and keep their output there (`shared_states.py`)

A line of study.toml has a key, a title and overrides; `repeats` runs it several times with fresh noise, `seeds` once
with each seed, and `each_site = true` once for every site alone; scores are averaged.  In overrides {runs} stands for
the folder of the runs: `model.adapter={runs}/start-0-0` begins in the adapter of the line whose key is `start`.

A study that needs code has a script with its own lines and its own table, and the same options (`carry_out`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import fedtune
from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.lab.studies.trials import SearchTrial
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.durable import write_durably
from fedtune.runs.results import RunResult
from fedtune.sites.run_cache import RunCache

import readme  # isort: skip  # fedtune comes first: torch reads settings that it makes

ROOT = Path(__file__).resolve().parents[1]
Found = dict[str, Any]
"""The result of one line, as JSON."""
Line = Callable[[Path], Found]
"""Computes a line; its argument is the folder of the study's runs."""


def parser(doc: str | None, folder: Path | str | None = None) -> argparse.ArgumentParser:
    """Make the parser with the options of every study.

    Args:
        doc: help text.
        folder: the study's own folder, where results are written unless --into names another one.
    """
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", default=[""], metavar="KEY", help="lines whose keys begin so")
    options.add_argument("--missing", action="store_true", help="only lines that the results lack")
    options.add_argument("--runs", type=Path, help="keep run folders there: finished runs are not repeated")
    options.add_argument("--into", type=Path, default=folder, help="folder of the results")
    return options


def carry_out(
    script: str,
    lines: Mapping[str, Line],
    table: Callable[[Mapping[str, Found]], str] | None,
    *,
    asked: argparse.Namespace,
    about: Found | None = None,
    file: str = "results.json",
    measured: bool = True,
) -> None:
    """Compute the lines that were asked for; write the results after each of them, and the README's table at the end.

    Args:
        script: path of the study's script, which the mark in the README names.
        lines: in the order of the table; results of other lines are kept.
        table: formats the README's table; None: the README has none.
        about: further entries of the results file.
        measured: whether results depend on the machine, which is then written down.
    """
    path = asked.into / file
    with nullcontext(asked.runs) if asked.runs else tempfile.TemporaryDirectory() as folder:
        runs = Path(folder).absolute()
        runs.mkdir(parents=True, exist_ok=True)
        for key, line in lines.items():
            if not key.startswith(tuple(asked.only)) or (asked.missing and key in known_lines(path)):
                continue
            print(f"--- {key}", flush=True)
            found = {**line(runs), **({"hardware": hardware()} if measured else {})}
            # Read only now: two processes may compute two lines.
            known = known_lines(path) | {key: found}
            ordered = {one: known[one] for one in [*lines, *known] if one in known}
            write_durably(path, json.dumps({**(about or {}), "lines": ordered}, indent=1).encode() + b"\n")
    if table is not None and path.exists():
        show_table(asked.into / "README.md", script, table(known_lines(path)), known_lines(path))


def known_lines(path: Path) -> dict[str, Found]:
    """Read the lines of a results file; none where there is no such file."""
    return dict(json.loads(path.read_text())["lines"]) if path.exists() else {}


def show_table(page: Path, script: str, text: str, lines: Mapping[str, Found]) -> None:
    """Put the table with its hardware into the README, or print it where the folder has none."""
    machines = "; ".join(sorted({line["hardware"] for line in lines.values() if "hardware" in line}))
    text += f"\n\nMeasured on {machines}." if machines else ""
    if page.exists():
        readme.put(page, text, begin=f"<!-- results: written by {Path(script).resolve().relative_to(ROOT)} -->")
    else:
        print(text)


def hardware() -> str:
    """Describe the machine that the numbers are measured on."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB memory, {gpu}"


def finished(config: RunConfig, cache: RunCache | None = None) -> Path:
    """The folder of a finished run: train it, resume it, or find it done.

    Runs without a number format of their own use float32, so that a study is the same on every machine.
    """
    config = config.with_number_format("float32")

    def work(trial: SearchTrial) -> RunResult:
        return fedtune.simulate(trial.config, progress=show_scores, cache=cache).result

    if config.public.train_file is not None:  # two runs in one, which no trial holds
        folder = Path(config.tracking.output_dir) / config.name
        if not (folder / "adapter").exists():
            fedtune.simulate(config, progress=show_scores, cache=cache)
        return folder
    done = SearchTrial.from_config(config).run(work)
    if done.error is not None:
        raise done.error
    return done.folder


def show_scores(progress: fedtune.Progress) -> None:
    """Print a line for each round."""
    if progress.round:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in progress.round.metrics.items() if value is not None)
        print(f"round {progress.done} of {progress.total}: {scores}", flush=True)


def run_line(
    runs: Path, *, experiment: str, line: Found, states: Path | None = None, cache: RunCache | None = None
) -> Found:
    """Run all variants of a line of study.toml and average their scores."""
    words = [
        f"experiment={experiment}",
        "tracking=quiet",
        *(one.replace("{runs}", str(runs)) for one in line["overrides"]),
    ]
    variants: list[list[str]] = [[]]
    if line.get("each_site"):
        variants = [[f"federation.participants=[{site}]"] for site in compose_run(words).federation.names]
    elif seeds := line.get("seeds"):
        variants = [[f"seed={seed}"] for seed in seeds]
    results = []
    with ExitStack() as stack:
        cache = cache or stack.enter_context(RunCache())
        if states is not None:
            from shared_states import shared_frozen_states

            stack.enter_context(shared_frozen_states(states))
        for number in range(line.get("repeats", 1)):
            for place, variant in enumerate(variants):
                own = [f"name={line['key']}-{number}-{place}", f"tracking.output_dir={runs}"]
                folder = finished(compose_run([*words, *variant, *own]), cache)
                results.append(json.loads((folder / "run.json").read_text()))
    return averaged(line, results)


def averaged(line: Found, results: list[Found]) -> Found:
    """Summarize the runs of a line: mean scores, with privacy and cost of the first run."""
    first = results[0]
    each_run = [run["final"]["metrics"] for run in results]
    return {
        "title": line["title"],
        "overrides": line["overrides"],
        "runs": len(results),
        "config_sha256": sorted({run["config_sha256"] for run in results}),
        "epsilon": first["privacy"]["epsilon"],
        "delta": first["privacy"]["delta"],
        "noise_multiplier": next(iter(first["privacy"]["sites"].values()))["noise_multiplier"],
        "metrics": {name: mean(each_run, name) for name in first["final"]["metrics"]},
        "each_run": each_run,
        "before": first["final"]["metrics_before"],
        "each_before": [run["final"]["metrics_before"] for run in results],
        "validation_by_round": [r["metrics"] for r in first["rounds"]],
        "seconds": statistics.median(run["final"]["seconds"] for run in results),
        "peak_memory_bytes": max(run["final"]["peak_memory_bytes"] for run in results),
        "bytes_of_a_site": [bytes_of_a_site(first, way) for way in ("down", "up")],
    }


def mean(scores: Sequence[Mapping[str, float]], name: str) -> float:
    """The mean of one score over runs."""
    return statistics.fmean(one[name] for one in scores)


def bytes_of_a_site(run: Found, way: str) -> int:
    """Bytes that a site received ("down") or sent ("up") in the whole run: the mean over its sites."""
    return round(sum(one[f"bytes_{way}"] for one in run["rounds"]) / len(run["privacy"]["sites"]))


def table(lines: Mapping[str, Found]) -> str:
    """Format the table of a study.toml."""
    found = list(lines.values())
    # Lines that were computed earlier may have fewer scores.
    metrics = [name for name in found[0]["metrics"] if all(name in line["metrics"] for line in found)]
    before = found[0]["before"]
    # By rounding alone, unless lines begin in several adapters.
    alike = all(abs(line["before"].get(name, 1e9) - before.get(name, 0.0)) < 1e-3 for line in found for name in metrics)
    begun = [] if alike else [f"{metrics[0]} before"]
    sizes = ["MB to a site", "MB from it"] if all("bytes_of_a_site" in line for line in found) else []
    ends = ["lowest to highest " + metrics[0], "runs", "seconds a run", *sizes]
    rows = [["", "epsilon", "noise", *begun, *metrics, *ends]]
    if alike:
        rows.append(["before training", "", "", *(f"{before[name]:.3f}" for name in metrics), *[""] * len(ends)])
    for line in found:
        first = [run[metrics[0]] for run in line["each_run"]]
        rows.append(
            [
                line["title"],
                format_epsilon(line["epsilon"]),
                f"{line['noise_multiplier']:g}",
                *(f"{mean(line.get('each_before', [line['before']]), metrics[0]):.3f}" for _ in begun),
                *(f"{line['metrics'][name]:.3f}" for name in metrics),
                f"{min(first):.3f} to {max(first):.3f}" if len(first) > 1 else "",
                str(line["runs"]),
                f"{line['seconds']:.0f}" if "seconds" in line else "",
                *(f"{size / 1e6:.1f}" for size in line.get("bytes_of_a_site", ()) if sizes),
            ]
        )
    return readme.markdown(rows)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("study", type=Path, help="folder of a study.toml")
    options.add_argument("--states", type=Path, help="keep the output of frozen layers there")
    asked = options.parse_args()
    asked.into = asked.into or asked.study
    study = tomllib.loads((asked.study / "study.toml").read_text())
    same = {"experiment": study["experiment"], "states": asked.states}
    lines: dict[str, Line] = {line["key"]: partial(run_line, line=line, **same) for line in study["lines"]}
    carry_out(__file__, lines, table, asked=asked, about={"experiment": study["experiment"]})


if __name__ == "__main__":
    main()
