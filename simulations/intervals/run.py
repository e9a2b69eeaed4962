"""How often the 95 % intervals of `fedtune evaluate` and `fedtune compare` hold the truth.

    python simulations/intervals/run.py                  all cases: results.json, and the table of its README
    python simulations/intervals/run.py --only accuracy  cases whose keys begin so; others are kept

Each case makes up the figures of two models whose true scores are known, draws test sets of them, and counts how often
the interval of one model's score, and that of the paired difference, hold what is true.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.evaluation.bootstrap import Figures, Scores, score_draws
from fedtune.evaluation.groups import Groups, score_groups
from fedtune.tasks.classification import macro_f1

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

Floats: TypeAlias = npt.NDArray[np.float64]
Units: TypeAlias = list[npt.NDArray[np.int64]] | None


@dataclass(frozen=True)
class TestSet:
    """Figures of two models on the same records."""

    models: Mapping[str, Figures]
    units: Units = None


@dataclass(frozen=True)
class Case:
    """A kind of test set, with what is true of it."""

    title: str
    made: Callable[[np.random.Generator], TestSet]
    scores: Scores
    score: str
    truth: tuple[float, float]


def right_or_wrong(shares: tuple[float, float], number: int, *, alike: float = 0.8) -> Callable[..., TestSet]:
    """Records that are hard for both models, or for one: right are so many of all that there are."""

    def made(draws: np.random.Generator) -> TestSet:
        one, other = draws.random(number), draws.random(number)
        hard = np.where(draws.random(number) < alike, one, other)
        return TestSet({"base": {"right": 1.0 * (one < shares[0])}, "tuned": {"right": 1.0 * (hard < shares[1])}})

    return made


def mean_right(figures: Figures) -> dict[str, float]:
    return {"accuracy": float(figures["right"].mean())}


def labeled(shares: tuple[float, float], number: int, num_labels: int) -> Callable[..., TestSet]:
    """Labels that are all as frequent, and wrong answers that are all as likely: a class's F1 is the share."""

    def made(draws: np.random.Generator) -> TestSet:
        truth, hard = draws.integers(0, num_labels, number), draws.random(number)
        wrong = (truth + draws.integers(1, num_labels, number)) % num_labels
        return TestSet(
            {
                name: {"truth": 1.0 * truth, "predicted": 1.0 * np.where(hard < share, truth, wrong)}
                for name, share in zip(("base", "tuned"), shares, strict=True)
            }
        )

    return made


def f1(num_labels: int) -> Scores:
    def scores(figures: Figures) -> dict[str, float]:
        truth, predicted = (figures[name].astype(np.int64) for name in ("truth", "predicted"))
        return {"macro_f1": macro_f1(truth, predicted, num_labels=num_labels)}

    return scores


def losses(number: int) -> Callable[..., TestSet]:
    """Skewed losses of texts of different lengths; the tuned model's are a tenth lower, more or less."""

    def made(draws: np.random.Generator) -> TestSet:
        base = draws.lognormal(0.0, 0.6, number)
        tuned = 0.9 * base * draws.lognormal(0.0, 0.2, number)
        tokens = draws.integers(5, 60, number).astype(np.float64)
        return TestSet({"base": {"loss": base, "tokens": tokens}, "tuned": {"loss": tuned, "tokens": tokens}})

    return made


BASE_LOSS = math.exp(0.6**2 / 2)
TUNED_LOSS = 0.9 * BASE_LOSS * math.exp(0.2**2 / 2)


def mean_loss(figures: Figures) -> dict[str, float]:
    return {"loss": float(figures["loss"].mean())}


def perplexity(figures: Figures) -> dict[str, float]:
    return {"perplexity": math.exp(float(figures["loss"] @ figures["tokens"] / figures["tokens"].sum()))}


def of_users(number: int) -> Callable[..., TestSet]:
    """Users with 1 to 12 records each, who are easy or hard as a whole."""

    def made(draws: np.random.Generator) -> TestSet:
        sizes = draws.integers(1, 13, number)
        ends = np.cumsum(sizes)
        units = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        easy = np.repeat(draws.uniform(-0.25, 0.25, number), sizes)
        hard = draws.random(len(easy))
        models = {"base": {"right": 1.0 * (hard < 0.6 + easy)}, "tuned": {"right": 1.0 * (hard < 0.7 + easy)}}
        return TestSet(models, units)

    return made


CASES = {
    **{
        f"accuracy-{number}": Case(
            f"accuracy, {number:,} records", right_or_wrong((0.6, 0.7), number), mean_right, "accuracy", (0.6, 0.7)
        )
        for number in (50, 100, 300, 1000)
    },
    "accuracy-close": Case(
        "accuracy, 300 records, models that seldom differ",
        right_or_wrong((0.80, 0.82), 300, alike=0.98), mean_right, "accuracy", (0.80, 0.82),
    ),
    "accuracy-high": Case(
        "accuracy, 95 % and 97 %, 300 records", right_or_wrong((0.95, 0.97), 300), mean_right, "accuracy", (0.95, 0.97)
    ),
    "f1-3": Case("macro-F1 of 3 labels, 300 records", labeled((0.6, 0.7), 300, 3), f1(3), "macro_f1", (0.6, 0.7)),
    "f1-77": Case(
        "macro-F1 of 77 labels, 3,080 records", labeled((0.7, 0.8), 3080, 77), f1(77), "macro_f1", (0.7, 0.8)
    ),
    "f1-hospitals": Case(
        "macro-F1 of 5 labels, 572 records (as in hospitals_abstracts)",
        labeled((0.55, 0.62), 572, 5), f1(5), "macro_f1", (0.55, 0.62),
    ),
    "f1-banks": Case(
        "macro-F1 of 77 labels, 3,080 records, 85 % and 89 % (as in banks_intents)",
        labeled((0.85, 0.89), 3080, 77), f1(77), "macro_f1", (0.85, 0.89),
    ),
    "loss": Case("loss, 300 records", losses(300), mean_loss, "loss", (BASE_LOSS, TUNED_LOSS)),
    "perplexity": Case(
        "perplexity, 300 records", losses(300), perplexity, "perplexity", (math.exp(BASE_LOSS), math.exp(TUNED_LOSS))
    ),
    "users": Case("accuracy, 60 users", of_users(60), mean_right, "accuracy", (0.6, 0.7)),
}  # fmt: skip
GROUP_SIZES = (20, 50, 100)
"""Of one group among 400 records; the fairness table's three intervals are measured."""


def coverage_of(case: Case, repeats: int, *, resamples: int) -> dict[str, float]:
    """How often the intervals of the second model's score and of the difference hold the truth."""
    draws, held = np.random.default_rng(1), {"score": 0, "difference": 0}
    for _ in range(repeats):
        test = case.made(draws)
        found = score_draws(test.models, scores=case.scores, units=test.units, resamples=resamples)
        compared = found.compare_scores("base", "tuned", case.score)
        base, tuned = case.truth
        held["score"] += compared.tuned.low <= tuned <= compared.tuned.high
        held["difference"] += compared.difference.low <= tuned - base <= compared.difference.high
    return {name: count / repeats for name, count in held.items()}


def coverage_in_group(size: int, repeats: int) -> dict[str, float]:
    """The same in a group of so many: its score, its change from base to tuned, its gap to all others."""
    draws, held = np.random.default_rng(1), {"score": 0, "difference": 0, "gap": 0}
    groups = Groups(
        names=("all others", "small"), codes=(np.arange(400) < size).astype(np.int64), sizes=(400 - size, size)
    )
    for _ in range(repeats):
        inside = right_or_wrong((0.5, 0.6), size)(draws).models
        outside = right_or_wrong((0.6, 0.75), 400 - size)(draws).models
        models = {name: {"right": np.concatenate([inside[name]["right"], outside[name]["right"]])} for name in inside}
        found = score_groups(models, groups, score="accuracy", scores=mean_right, pairs=[("base", "tuned")])
        score, gap = found.scores["small"]["tuned"], found.gaps["small"]["tuned"]
        change = found.changes["small"]["base", "tuned"].difference
        held["score"] += score.low <= 0.6 <= score.high
        held["difference"] += change.low <= 0.1 <= change.high
        held["gap"] += gap.low <= 0.6 - 0.75 <= gap.high
    return {name: count / repeats for name, count in held.items()}


def counted(runs: Path, *, title: str, covers: Callable[[int], dict[str, float]], repeats: int) -> study.Found:
    """One case, with the time that it took."""
    began = time.process_time()
    found = covers(repeats)
    return {"title": title, "repeats": repeats, **found, "cpu_seconds": round(time.process_time() - began, 1)}


def table(lines: Mapping[str, study.Found]) -> str:
    """The Markdown table."""
    rows = [["case", "score", "difference", "gap to others", "test sets"]]
    for found in lines.values():
        cells = (f"{found[name]:.1%}" if name in found else "" for name in ("score", "difference", "gap"))
        rows.append([found["title"], *cells, f"{found['repeats']:,}"])
    return readme.markdown(rows)


def main() -> None:
    options = study.parser(__doc__, Path(__file__).parent)
    options.add_argument("--repeats", type=int, default=1000)
    options.add_argument("--resamples", type=int, default=1000)
    asked = options.parse_args()
    lines: dict[str, study.Line] = {}
    for key, case in CASES.items():
        covers = partial(coverage_of, case, resamples=asked.resamples)
        lines[key] = partial(counted, title=case.title, covers=covers, repeats=asked.repeats)
    for size in GROUP_SIZES:
        title = f"accuracy in a group of {size} among 400 records"
        covers = partial(coverage_in_group, size)
        lines[f"group-{size}"] = partial(counted, title=title, covers=covers, repeats=asked.repeats)
    study.carry_out(__file__, lines, table, asked=asked, about={"level": 0.95}, measured=False)


if __name__ == "__main__":
    main()
