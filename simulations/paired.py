"""Pairs of runs that differ in one thing alone: a setting (scores), or the commit of the code (times).

    python simulations/paired.py simulations/update_dtype                     every line, into results.json and README
    python simulations/paired.py simulations/mixed_products/pairs --recipes debug --into FOLDER    other recipes
    python simulations/paired.py simulations/benchmarks --before COMMIT       commands, in that commit and in this one

The folder's `paired.toml` says what is compared.

- `setting` with its `values` (the first is what others are compared with), `recipes`, `privacy` and `seeds`: a seed
  draws the same split, start, batches and noise for each value (`runtime.seeded_noise=true`: these runs are studies
  without a guarantee), so that the setting alone differs.
- `commands` by name: each runs in a process of its own, first in one commit and then in the other, so that whatever
  else the machine does meets both alike; {ledger} is a ledger that the same commit wrote, {folder} an empty folder.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import readme
import study

import fedtune

SCORES = ("accuracy", "micro_f1", "spearman")
"""A task has one of them."""
CALL = "import sys; from fedtune.cli.main import main; sys.exit(main())"
SIDES = ("before", "after")


def lines_of_setting(pairs: study.Found, recipes: list[str] | None) -> dict[str, study.Line]:
    """Lines for each privacy, recipe and value of the setting, in the order of the table."""
    lines: dict[str, study.Line] = {}
    for privacy, recipe, value in product(pairs["privacy"], recipes or pairs["recipes"], pairs["values"]):
        file = Path(recipe)
        shown = file.parent.name if file.stem == "experiment" else file.stem
        key = f"{shown}-{privacy.rpartition('=')[2]}-{value}"
        overrides = [privacy, f"{pairs['setting']}={value}"]
        overrides += ["runtime.seeded_noise=true"] if privacy != "privacy=none" else []
        line = {"key": key, "title": key, "overrides": overrides, "seeds": pairs["seeds"]}
        about = {"recipe": shown, "privacy": privacy, "value": value}
        lines[key] = partial(scored, experiment=recipe, line=line, about=about)
    return lines


def scored(runs: Path, *, experiment: str, line: study.Found, about: study.Found) -> study.Found:
    """One value of the setting: the runs of all seeds."""
    return about | study.run_line(runs, experiment=experiment, line=line)


def table_of_setting(lines: Mapping[str, study.Found], *, setting: str) -> str:
    """Format the table: each value of the setting, and by seed the difference from the first value."""
    heads = [*("recipe", "privacy", setting, "score", "loss", "by seed"), "minus the first, by seed"]
    rows = [[*heads, "MB up, a site and run"]]
    firsts: dict[tuple[str, str], list[float]] = {}
    for line in lines.values():
        name = next(one for one in SCORES if one in line["metrics"])
        scores = [run[name] for run in line["each_run"]]
        first = firsts.setdefault((line["recipe"], line["privacy"]), scores)
        differences = [] if first is scores else [score - one for score, one in zip(scores, first, strict=True)]
        rows.append(
            [
                *(line["recipe"], line["privacy"], line["value"], f"{name} {statistics.fmean(scores):.4f}"),
                f"{line['metrics']['loss']:.4f}",
                ", ".join(f"{score:.4f}" for score in scores),
                ", ".join(f"{value:+.4f}" for value in differences),
                f"{line['bytes_of_a_site'][1] / 1e6:.2f}",
            ]
        )
    return readme.markdown(rows, texts=3)


@contextmanager
def checked_out(commit: str) -> Iterator[dict[str, Path]]:
    """An earlier commit and this one in folders of their own, so that neither is edited while they are compared."""
    git = ["git", "-C", str(study.ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        trees = {side: Path(folder) / side for side in SIDES}
        try:
            for tree, one in zip(trees.values(), (commit, "HEAD"), strict=True):
                subprocess.run([*git, "add", "--quiet", "--detach", str(tree), one], check=True)
            yield trees
        finally:
            for tree in trees.values():
                subprocess.run([*git, "remove", "--force", str(tree)], check=False)


def timed(runs: Path, *, words: list[str], trees: Mapping[str, Path], times: int) -> study.Found:
    """Median wall and CPU seconds of a command in each tree, in turns."""
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(times):
        for side, tree in trees.items():
            with tempfile.TemporaryDirectory() as folder:
                ledger = str(runs / side / "run" / "sites" / "site-1")
                own = [word.replace("{ledger}", ledger).replace("{folder}", folder) for word in words]
                taken[side].append(seconds(tree, own))
    ways = ("wall_s", "cpu_s")
    return {
        side: {way: round(statistics.median(one), 2) for way, one in zip(ways, zip(*pairs, strict=True), strict=True)}
        for side, pairs in taken.items()
    }


def seconds(tree: Path, words: list[str]) -> tuple[float, float]:
    """Wall and CPU time (user and system) of one call of fedtune from a tree."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, *words],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"fedtune {' '.join(words)} failed in {tree}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def table_of_times(lines: Mapping[str, study.Found]) -> str:
    """Format the table: CPU and wall seconds of each command, in both commits."""
    rows = [["", "CPU seconds before", "after", "wall seconds before", "after"]]
    for name, line in lines.items():
        times = [line[side][way] for way in ("cpu_s", "wall_s") for side in SIDES]
        rows.append([f"`fedtune {name}`", *(f"{one:.2f}" for one in times)])
    return readme.markdown(rows)


def compare_commits(pairs: study.Found, asked: argparse.Namespace) -> None:
    """Time every command in an earlier commit and in this one."""
    before = asked.before or pairs["before"]
    with checked_out(before) as trees, tempfile.TemporaryDirectory() as folder:
        asked.runs = Path(folder)
        for side, tree in trees.items():  # the first start also compiles, and reads from the disk
            seconds(tree, ["simulate", "experiment=debug", "name=run", f"tracking.output_dir={folder}/{side}"])
        lines: dict[str, study.Line] = {
            name: partial(timed, words=words, trees=trees, times=asked.times)
            for name, words in pairs["commands"].items()
        }
        study.carry_out(__file__, lines, table_of_times, asked=asked, about={"before": before, "runs": asked.times})


def main() -> None:
    options = study.parser(__doc__)
    options.add_argument("folder", type=Path, help="folder of a paired.toml")
    options.add_argument("--recipes", nargs="+", help="for a setting: other recipes")
    options.add_argument("--before", metavar="COMMIT", help="for commands: the earlier commit")
    options.add_argument("--times", type=int, default=5, help="for commands: how often each runs")
    asked = options.parse_args()
    if asked.recipes and asked.into is None:
        options.error("--recipes needs --into: the study's own results are kept")
    asked.into = asked.into or asked.folder
    pairs = tomllib.loads((asked.folder / "paired.toml").read_text())
    if "commands" in pairs:
        compare_commits(pairs, asked)
        return
    lines, table = lines_of_setting(pairs, asked.recipes), partial(table_of_setting, setting=pairs["setting"])
    study.carry_out(__file__, lines, table, asked=asked, about={"fedtune": fedtune.__version__})


if __name__ == "__main__":
    main()
