"""How often does the report find that a renewed model does worse, and how often does it say so for nothing?

    python simulations/drift/run.py

Makes up series of runs whose true score is known: held-out units that are right or wrong, and the noise that sites add
to sums and counts.  The rule is the report's own (`fedtune.federation.drift`).  Writes results.json, and the README's
table.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import NormalDist

import numpy as np

from fedtune.federation.drift import HeldOut, detect_score_drop, pool_held_out_scores
from fedtune.federation.lead import RoundResult

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

DELTA, ROUNDS, BEFORE, SCORE, FALL = 1e-5, 10, 4, 0.8, 0.05
"""A run has so many rounds; before the fall there were so many runs with so high a score."""
UNITS, SITES, EPSILONS, SERIES = (50, 100, 250, 500, 1000), (1, 4, 16), (0.5, 1.0, 2.0), 1000


def noise_for(epsilon: float) -> float:
    """The noise multiplier of each of a run's releases that together cost an epsilon: of one Gaussian (Balle and Wang
    2018), with whose mean divided by the root of the number of releases."""
    normal = NormalDist()

    def delta(mu: float) -> float:
        return normal.cdf(mu / 2 - epsilon / mu) - float(np.exp(epsilon)) * normal.cdf(-mu / 2 - epsilon / mu)

    low, high = 1e-3, 10.0
    for _ in range(60):
        low, high = ((low + high) / 2, high) if delta((low + high) / 2) < DELTA else (low, (low + high) / 2)
    return float(np.sqrt(ROUNDS) / low)


def run_of(score: float, units: int, sites: int, noise: float, draws: np.random.Generator) -> HeldOut | None:
    """One run: each site's own held-out units, right or wrong, and fresh noise in each round."""
    right = draws.binomial(units, score, sites)
    noised = np.array([right, np.full(sites, units)]) + draws.normal(0, noise * np.sqrt(2), (ROUNDS, 2, sites))
    names = [f"site-{n}" for n in range(sites)]
    rounds = [
        RoundResult(
            round=n + 1, seconds=0.0, sites=(), failed_sites={}, bytes_down=0, bytes_up=0, metrics={}, ended="",
            site_scores=dict(zip(names, sums.T, strict=True)),
        )
        for n, sums in enumerate(noised / units)
    ]  # fmt: skip
    return pool_held_out_scores(rounds, dict.fromkeys(names, float(units)), noise=noise, run="made up")


def found(line: list[HeldOut | None]) -> bool:
    """Whether the report of the newest run tells of a fall; one without a mean tells of none."""
    fall = detect_score_drop([one for one in line if one]) if line[-1] else None
    return fall is not None and bool(fall.significant)


def counted(runs: Path, *, units: int, sites: int, epsilon: float) -> study.Found:
    """How often a report alarms without a fall, and any of eight; how often the first, and the second, finds one."""
    noise, draws = noise_for(epsilon), np.random.default_rng([units, sites, round(100 * epsilon)])
    counts = dict.fromkeys(("false_alarms", "false_alarms_in_8", "found_at_once", "found_by_the_second", "unknown"), 0)
    for _ in range(SERIES):
        line = [run_of(SCORE, units, sites, noise, draws) for _ in range(BEFORE + 8)]
        fallen = line[:BEFORE] + [run_of(SCORE - FALL, units, sites, noise, draws) for _ in range(2)]
        reports = [found(line[: BEFORE + n]) for n in range(1, 9)]
        counts["false_alarms"] += reports[1]
        counts["false_alarms_in_8"] += any(reports)
        counts["found_at_once"] += found(fallen[:-1])
        counts["found_by_the_second"] += found(fallen)
        counts["unknown"] += line[0] is None
    case = {"sites": sites, "units": units, "epsilon": epsilon}
    return case | {name: count / SERIES for name, count in counts.items()}


def table(lines: Mapping[str, study.Found]) -> str:
    """The Markdown table; bold is 80 % or more."""
    rows = [["sites", "held-out units at each", *(f"epsilon {epsilon:g}" for epsilon in EPSILONS)]]
    for sites, units in product(SITES, UNITS):
        of_row = [one for one in lines.values() if (one["sites"], one["units"]) == (sites, units)]
        shares = [f"{one['found_by_the_second']:.0%}" if one["unknown"] < 0.5 else "" for one in of_row]
        rows.append([str(sites), f"{units:,}", *(f"**{s}**" if s and int(s[:-1]) >= 80 else s for s in shares)])
    return readme.markdown(rows)


def main() -> None:
    asked = study.parser(__doc__, Path(__file__).parent).parse_args()
    lines: dict[str, study.Line] = {
        f"{sites}-{units}-e{epsilon:g}": partial(counted, units=units, sites=sites, epsilon=epsilon)
        for sites, units, epsilon in product(SITES, UNITS, EPSILONS)
    }
    about = {"delta": DELTA, "rounds": ROUNDS, "runs_before": BEFORE, "score": SCORE, "fall": FALL, "series": SERIES}
    study.carry_out(__file__, lines, table, asked=asked, about=about, measured=False)


if __name__ == "__main__":
    main()
