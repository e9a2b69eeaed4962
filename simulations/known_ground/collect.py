"""fedtune's figures on public test files, beside what others have published on them, and what privacy costs there.

    python simulations/known_ground/collect.py            results.json, losses.json and both tables of the README
    python simulations/known_ground/collect.py --check    exit code 1 if they are out of date

The runs belong to other studies: this script reads their results.json and trains nothing.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
from scipy import stats

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
AGGREGATIONS = ("none", "secure", "plain")
EPSILONS = (8, 3, 1)
FEWEST_RUNS = 3  # for an interval over runs


class Runs(NamedTuple):
    """A line of a study: one privacy setting on one data set."""

    study: str
    key: str
    aggregation: str  # "none" without privacy
    file: str


def list_lines(study: str, file: str = "results.json", **keys: str) -> tuple[Runs, ...]:
    """List lines of a study: each keyword is an aggregation, its value the keys of its lines, separated by spaces."""
    return tuple(Runs(study, key, aggregation, file) for aggregation, words in keys.items() for key in words.split())


class Ground(NamedTuple):
    """A public data set with its test file.

    Attributes:
        name: its name.
        split: which records are the test file.
        base: the base model.
        metric: name of the metric in results.json, and its title.
        size: number of test records.
        runs: the lines of the studies.
    """

    name: str
    split: str
    base: str
    metric: tuple[str, str]
    size: int
    runs: tuple[Runs, ...]


GROUNDS = (
    Ground(
        "E2E",
        "official, 630 test tables",
        "SmolLM2-135M, last 10 layers",
        ("beam", "BLEU, beam search"),
        630,
        list_lines("e2e", "bleu.json", none="none", secure="principal-e8 secure-e3"),
    ),
    Ground(
        "Banking77",
        "official, 3,080 test questions",
        "MiniLM-L6",
        ("accuracy", "accuracy"),
        3080,
        (
            *list_lines("banks_intents", none="none", secure="secure-e8", plain="e8 e3"),
            *list_lines("aggregation/banks", none="four-none-ffa", secure="four-1-secure", plain="four-1-ffa"),
            *list_lines("aggregation", secure="e3-secure"),
        ),
    ),
    Ground(
        "SST-2",
        "1,821 sentences of the original test file",
        "MiniLM-L6, all layers",
        ("accuracy", "accuracy"),
        1821,
        list_lines("sst2_lora", none="all-none-passes", secure="all-secure-e8-passes all-secure-e3 all-secure-e1"),
    ),
    Ground(
        "SST-2",
        "1,821 sentences of the original test file",
        "MiniLM-L6, last 3 layers",
        ("accuracy", "accuracy"),
        1821,
        list_lines("sst2_lora", none="none-60", secure="secure-e8"),
    ),
    Ground(
        "NCBI disease",
        "official, 100 test abstracts",
        "MiniLM-L6, all layers",
        ("untyped_strict_f1", "strict F1, untyped"),
        100,
        list_lines("entities", none="all-none", secure="large-e8-secure large-e3-secure"),
    ),
    Ground(
        "STS-B",
        "official, 1,379 test pairs",
        "MiniLM-L6",
        ("spearman", "Spearman"),
        1379,
        list_lines("stsb", none="none", secure="secure-e8 secure-e3 secure-e1", plain="e8 e3 e1"),
    ),
)


def find_interval(metric: str, scores: Row, size: int) -> tuple[float | None, float | None]:
    """The 95 % interval over the test records; (None, None) for F1, which needs the answers of each record."""
    value = scores[metric]
    if f"{metric}_low" in scores:  # a bootstrap of the study's own
        return scores[f"{metric}_low"], scores[f"{metric}_high"]
    if metric == "accuracy":
        margin = 1.96 * math.sqrt(value * (1 - value) / size)
        return value - margin, value + margin
    if metric == "spearman":  # Fisher's transformation, with the variance of Bonett and Wright (2000)
        margin = 1.96 * math.sqrt((1 + value**2 / 2) / (size - 3))
        return math.tanh(math.atanh(value) - margin), math.tanh(math.atanh(value) + margin)
    return None, None


def list_rows() -> Iterator[Row]:
    """Yield one row for each run: what was trained, its score, its interval, and how to repeat it."""
    for ground in GROUNDS:
        metric, title = ground.metric
        for runs in ground.runs:
            line = json.loads((HERE.parent / runs.study / runs.file).read_text())["lines"][runs.key]
            for number, scores in enumerate(line["each_run"]):
                low, high = find_interval(metric, scores, ground.size)
                yield {
                    "set": ground.name,
                    "split": ground.split,
                    "base": ground.base,
                    "aggregation": runs.aggregation,
                    "epsilon": line["epsilon"],
                    "metric": title,
                    "value": scores[metric],
                    "low": low,
                    "high": high,
                    "seed": number if number or len(line["each_run"]) > 1 else None,
                    "seconds": round(line["seconds"]),
                    "machine": line["hardware"],
                    "command": f"python simulations/study.py simulations/{runs.study} --only {runs.key}",
                }


def select_rows(rows: Sequence[Row], ground: Ground, aggregation: str, epsilon: int | None) -> list[Row]:
    """The rows of all runs at one privacy setting; epsilon is rounded, as in the tables."""
    asked = ground.name, ground.base, aggregation
    found = [row for row in rows if (row["set"], row["base"], row["aggregation"]) == asked]
    return [row for row in found if epsilon is None or round(row["epsilon"]) == epsilon]


def average(rows: Sequence[Row]) -> float:
    """The mean score of runs."""
    return statistics.fmean(row["value"] for row in rows)


def format_scores(rows: Sequence[Row], published: Sequence[Row]) -> str:
    """The table of scores, with the best published figures beside them."""
    columns = [("none", None), *(("secure", epsilon) for epsilon in EPSILONS), *(("plain", e) for e in EPSILONS)]
    table = [
        [
            "set and test file",
            "base and adapted layers",
            "metric",
            *(_title(*column) for column in columns),
            "published beside it",
        ]
    ]
    for ground in GROUNDS:
        runs = [select_rows(rows, ground, *column) for column in columns]
        beside = "; ".join(
            f"{one['base']} {_format_value(one['value'])} {_describe_epsilon(one['epsilon'])}"
            for one in published
            if one["set"] == ground.name
        )
        cells = [f"{_format_value(average(each))} ({len(each)})" if each else "" for each in runs]
        place = f"{ground.name}: {ground.split}"
        table.append([place, ground.base, ground.metric[1], *cells, beside or "none found"])
    return readme.markdown(table, texts=3)


def list_losses(rows: Sequence[Row], published: Sequence[Row]) -> Iterator[Row]:
    """Yield the points lost to the score without privacy at `EPSILONS`, of our lines and of published ones.

    `margin` is half of a 95 % interval; None without one.  A published epsilon counts as the nearest of `EPSILONS`.
    """
    for ground in GROUNDS:
        plain = select_rows(rows, ground, "none", None)
        without = average(plain)
        for aggregation in AGGREGATIONS[1:]:
            each = {epsilon: select_rows(rows, ground, aggregation, epsilon) for epsilon in EPSILONS}
            lost = [
                {"near": epsilon, "epsilon": epsilon, "points": _find_scale(without) * (without - average(runs))}
                | {"margin": _find_margin(plain, runs)}
                for epsilon, runs in each.items()
                if runs
            ]
            if lost:
                yield {"set": ground.name, "base": ground.base, "aggregation": aggregation} | {
                    "without": without,
                    "lost": lost,
                }
    for name, base in dict.fromkeys((one["set"], one["base"]) for one in published):
        own = {one["epsilon"]: one["value"] for one in published if (one["set"], one["base"]) == (name, base)}
        if None in own and len(own) > 1:
            without = own.pop(None)
            lost = [
                {"near": min(EPSILONS, key=lambda known: abs(known - epsilon)), "epsilon": epsilon}
                | {"points": _find_scale(without) * (without - value), "margin": None}
                for epsilon, value in own.items()
            ]
            yield {"set": name, "base": base, "aggregation": None, "without": without, "lost": lost}


def format_losses(losses: Sequence[Row]) -> str:
    """The table of points lost to a set's own line without privacy."""
    table = [["set", "base", "federated", "without privacy", *(f"lost at {epsilon}" for epsilon in EPSILONS)]]
    for line in losses:
        cells = {one["near"]: _format_loss(one) for one in line["lost"]}
        federated = f"yes, {line['aggregation']}" if line["aggregation"] else "no"
        row = [line["set"], line["base"], federated, _format_value(line["without"])]
        table.append([*row, *(cells.get(epsilon, "") for epsilon in EPSILONS)])
    return readme.markdown(table, texts=3)


def _find_margin(plain: Sequence[Row], private: Sequence[Row]) -> float | None:
    """Half of the interval of a loss, in points: over the test records, as if the two scores were independent.

    Scores without an interval over records get Welch's interval over runs, if there are at least three of each.
    """
    scale, both = _find_scale(average(plain)), (plain, private)
    if all(row["high"] is not None for rows in both for row in rows):
        return scale * math.hypot(*(statistics.fmean(row["high"] - row["value"] for row in rows) for rows in both))
    if min(map(len, both)) < FEWEST_RUNS:
        return None
    values = ([row["value"] for row in rows] for rows in both)
    low, high = stats.ttest_ind(*values, equal_var=False).confidence_interval(0.95)
    return float(scale * (high - low) / 2)


def _find_scale(score: float) -> int:
    """The points of a score of 1: BLEU is in points already."""
    return 1 if score > 1 else 100


def _format_loss(one: Row) -> str:
    margin = "" if one["margin"] is None else f" ± {one['margin']:.1f}"
    return f"{one['points']:.1f}{margin}" + ("" if one["epsilon"] == one["near"] else f" (at {one['epsilon']:g})")


def _title(aggregation: str, epsilon: int | None) -> str:
    return "no privacy" if epsilon is None else f"{aggregation}, {epsilon}"


def _format_value(value: float) -> str:
    return f"{value:.1f}" if value > 1 else f"{value:.3f}"


def _describe_epsilon(epsilon: float | None) -> str:
    return "without privacy" if epsilon is None else f"at {epsilon:g}"


def main() -> None:
    """Write the results and the tables, or compare them with what is there."""
    rows = list(list_rows())
    published = json.loads((HERE / "published.json").read_text())["rows"]
    losses = list(list_losses(rows, published))
    tables = {"scores": format_scores(rows, published), "losses": format_losses(losses)}
    files = {
        HERE / f"{name}.json": json.dumps(kept, indent=1) + "\n"
        for name, kept in (("results", rows), ("losses", losses))
    }
    page = HERE / "README.md"
    if "--check" in sys.argv[1:]:
        written = page.read_text()
        is_current = all(file.read_text() == text for file, text in files.items())
        is_current = is_current and all(one in written for one in tables.values())
        sys.exit(0 if is_current else f"{HERE} is out of date: run {Path(__file__).name}")
    for file, text in files.items():
        file.write_text(text)
    for name, table in tables.items():
        readme.put(page, table, begin=f"<!-- {name}: written by collect.py -->")


if __name__ == "__main__":
    main()
