"""What 15,000 canaries show at most of epsilon 8: the strongest attack on the private step of banks_intents.

    python simulations/audit/strongest.py                     into strongest.json and the table of the README
    python simulations/audit/strongest.py --into FOLDER       results go to FOLDER

Sampling and noise are fedtune's own; training is left out, since the attacker subtracts all that real records added.
Each canary has a coordinate of its own and exactly the clip norm.  The attacker sees every noisy step and knows the
plan, so the likelihood ratio of all steps is the best evidence that there is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme

from fedtune.api.compose import compose_run
from fedtune.evaluation.audit_bound import compute_epsilon_lower_bound
from fedtune.evaluation.fdp_bound import compute_fdp_lower_bound, refutes_profile
from fedtune.lab.audit.guesses import Count, count_right_guesses
from fedtune.privacy import accountant
from fedtune.privacy.mechanism import GRID_BITS, add_gaussian_noise, draw_poisson_sample
from fedtune.privacy.randomness import RandomStream
from fedtune.privacy.run_plan import Plan
from fedtune.report.derive.profile import count_charged_events

BEGIN = "<!-- strongest: written by simulations/audit/strongest.py -->"
CANARIES, GUESSES, TRIALS, CONFIDENCE = 15_000, (15_000, 1_500, 750, 300), 3, 0.95
_EPSILONS = np.linspace(0.0, 14.0, 281)
_SEARCHES = 10  # halvings between the plan's noise and ten times as much


def attack_steps(plan: Plan, *, canaries: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return the log-likelihood ratio of each canary's steps, and whether the canary was inserted."""
    streams = [RandomStream(os.urandom(32)) for _ in range(3)]
    inserted = streams[0].bernoulli(canaries, 0.5)
    rate, noise, evidence = plan.sampling_rate, plan.accounted_noise, np.zeros(canaries)
    for _ in range(plan.max_rounds * plan.local_steps):
        sums = np.zeros(canaries, dtype=np.int64)
        sums[draw_poisson_sample(canaries, rate, streams[1])] = 1 << GRID_BITS
        noisy = add_gaussian_noise({"all": sums * inserted}, noise_multiplier=noise, stream=streams[2])["all"]
        shift = (noisy / 2.0**GRID_BITS - 0.5) / noise**2
        evidence += np.logaddexp(np.log1p(-rate), np.log(rate) + shift)
    return evidence, inserted


def bound_by_own_curve(plan: Plan, counts: Count) -> float:
    """Return the epsilon of the same plan with the least noise, at least its own, that the counts refute; 0 if none.

    It assumes no Gaussian curve: each plan is tested by its own privacy loss distribution.
    """
    held, refuted, found = 1.0, 10.0, 0.0  # times the plan's noise
    for factor in (refuted, *[0.0] * _SEARCHES):
        factor = factor or (held * refuted) ** 0.5
        spent = count_charged_events(plan.with_noise(plan.noise_multiplier * factor), plan.max_rounds)
        own = accountant.compose_pld(tuple(spent.items()), accountant.COARSE)
        deltas = np.array([own.delta(epsilon) for epsilon in _EPSILONS])
        if refutes_profile(*counts, epsilons=_EPSILONS, deltas=deltas, error=1 - CONFIDENCE):
            refuted, found = factor, own.epsilon(plan.delta)
        elif factor == refuted:
            break
        else:
            held = factor
    return found


def run_trial(plan: Plan, *, canaries: int, guesses: tuple[int, ...]) -> list[dict[str, Any]]:
    """Attack once, and bound epsilon for each number of guesses."""
    evidence, inserted = attack_steps(plan, canaries=canaries)
    rows = []
    for asked in guesses:
        counts = count_right_guesses(evidence, inserted, guesses=asked)
        known = {"delta": plan.delta, "confidence": CONFIDENCE}
        bounds = {
            "by_epsilon_and_delta": compute_epsilon_lower_bound(*counts, **known),
            "as_gaussian": compute_fdp_lower_bound(*counts, **known),
            "by_own_curve": bound_by_own_curve(plan, counts),
        }
        rows.append({"guesses": asked, "right": counts[2], **bounds})
    return rows


def main(words: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--canaries", type=int, default=CANARIES)
    arguments.add_argument("--trials", type=int, default=TRIALS)
    arguments.add_argument("--into", type=Path, default=Path(__file__).parent)
    options = arguments.parse_args(words)
    plan = compose_run(["experiment=simulations/recipes/banks_sampled.yaml", "privacy.epsilon=8"]).plan()
    guesses = tuple(count * options.canaries // CANARIES for count in GUESSES)
    claimed = accountant.epsilon_pld(count_charged_events(plan, plan.max_rounds), plan.delta)
    trials = [run_trial(plan, canaries=options.canaries, guesses=guesses) for _ in range(options.trials)]
    found = {
        "claimed": claimed,
        "noise_multiplier": plan.accounted_noise,
        "canaries": options.canaries,
        "trials": trials,
    }
    (options.into / "strongest.json").write_text(json.dumps(found, indent=1) + "\n")
    table = [("guesses", "right", "by (epsilon, delta)", "as Gaussian", "by the plan's own curve", "of the claim")]
    for rows in zip(*trials, strict=True):
        bounds = {key: [row[key] for row in rows] for key in rows[0]}
        by_key = [
            f"{min(bounds[key]):.2f} to {max(bounds[key]):.2f}"
            for key in ("by_epsilon_and_delta", "as_gaussian", "by_own_curve")
        ]
        shares = [100 * one / claimed for one in bounds["by_own_curve"]]
        right = f"{min(bounds['right']):,} to {max(bounds['right']):,}"
        table.append((f"{rows[0]['guesses']:,}", right, *by_key, f"{min(shares):.0f} to {max(shares):.0f} %"))
    print(text := readme.markdown(table, texts=0))
    if options.into == Path(__file__).parent:
        readme.put(options.into / "README.md", text, begin=BEGIN)


if __name__ == "__main__":
    main()
