"""Releases that a site makes on its own: the proposal, and the answer if it is a sum over the site's units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fedtune.privacy.mechanism import GRID_BITS, compute_cell_width
from fedtune.privacy.proposal import UNVERIFIED, Proposal
from fedtune.privacy.randomness import RandomStream
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import Policy

CHARGED_ONLY = ("gaussian", "laplace", "dp_sgd")
"""Kinds of releases that other software makes: the ledger knows their price alone."""
_NO_MODEL: dict[str, Any] = {"base_model": UNVERIFIED, "dtype": "float32", "train_head": False, "head_scale": 0.0}
_NO_ADAPTER: dict[str, Any] = {"target_modules": (), "rank": 1, "lora_scale": 0.0, "seeded_noise": False}


def propose_release(kind: str, name: str, policy: Policy, **planned: Any) -> Proposal:
    """Return the proposal of a release: a run of one round without a lead, called by its kind and name.

    Raises:
        ConfigError: a value of the plan, whose other fields are `planned`, is out of range.
    """
    population = policy.population
    plan = Plan(unit=population.unit, delta=policy.budget.delta, num_rounds=1, **planned)
    about: dict[str, Any] = {"run": f"{kind} {name}", "lead": "", "dataset": population.name, "task": kind}
    return Proposal(**about, plan=plan, num_sites=1, **_NO_MODEL, **_NO_ADAPTER)


def release_sum(rows: Iterable[Sequence[float]], plan: Plan, *, width: int, stream: RandomStream) -> list[float]:
    """Release the sum of `rows`, with noise on each value.

    Args:
        rows: the `width` values of each unit; a row whose norm is above the clip norm is scaled down to it.
        plan: of the release: the clip norm is the most that one unit may add, in the norm of `clip_to_cells`.
        width: number of values.
        stream: source of the noise.

    Guarantee: one `GaussianDpEvent` or `LaplaceDpEvent` with the plan's noise multiplier, on all units.  Sums are whole
    numbers of cells, and the noise is a real number rounded to one, so the sum of both is the mechanism of real numbers
    and then rounding, as in `mechanism.add_gaussian_noise`.
    """
    sums = [0] * width
    for row in rows:
        sums = [total + cell for total, cell in zip(sums, clip_to_cells(row, plan), strict=True)]
    draw = stream.draw_rounded_normal if plan.noise == "gaussian" else stream.draw_rounded_laplace
    noise = draw(width, plan.noise_multiplier * 2.0**GRID_BITS)
    return [
        (total + int(drawn)) * compute_cell_width(plan.max_grad_norm) for total, drawn in zip(sums, noise, strict=True)
    ]


def clip_to_cells(values: Sequence[float], plan: Plan) -> list[int]:
    """Scale one unit's values to at most the clip norm, and round them towards zero to cells of 2**-24 of it.

    The norm is the one that the noise hides: the L2 norm for Gaussian noise, the L1 norm for Laplace noise.

    Guarantee: the result depends on `values` alone, and its norm is at most 2**24 cells, exactly: it is computed again
    in whole numbers, and a vector beyond it counts as zero.  So does a value that is not finite.
    """
    usable = [value if math.isfinite(value) else 0.0 for value in map(float, values)]
    gaussian = plan.noise == "gaussian"
    norm = math.hypot(*usable) if gaussian else sum(map(abs, usable))
    cells = [int(value * (2.0**GRID_BITS / max(norm, plan.max_grad_norm))) for value in usable]
    size = sum(cell**2 for cell in cells) if gaussian else sum(map(abs, cells)) ** 2
    return cells if size <= 4**GRID_BITS else [0] * len(cells)
