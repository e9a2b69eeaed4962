"""A site's own releases without a lead: proposals of such releases, and noised sums over the site's privacy units."""

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
"""Kinds of releases that other software computes. fedtune only charges their privacy cost to the ledger."""
_NO_MODEL: dict[str, Any] = {"base_model": UNVERIFIED, "dtype": "float32", "train_head": False, "head_scale": 0.0}
_NO_ADAPTER: dict[str, Any] = {"target_modules": (), "rank": 1, "lora_scale": 0.0, "seeded_noise": False}


def propose_release(kind: str, name: str, policy: Policy, **planned: Any) -> Proposal:
    """Build the proposal of a site's own release, which is charged like a run of one round without a lead.

    Args:
        kind: kind of release, which becomes the task.
        name: name of the release; with the kind, it identifies the run.
        policy: the site's policy, which determines unit and delta.
        **planned: all other fields of the `Plan`.

    Raises:
        ConfigError: a value of the plan is out of range.
    """
    population = policy.population
    plan = Plan(unit=population.unit, delta=policy.budget.delta, num_rounds=1, **planned)
    about: dict[str, Any] = {"run": f"{kind} {name}", "lead": "", "dataset": population.name, "task": kind}
    return Proposal(**about, plan=plan, num_sites=1, **_NO_MODEL, **_NO_ADAPTER)


def release_sum(rows: Iterable[Sequence[float]], plan: Plan, *, width: int, stream: RandomStream) -> list[float]:
    """Sum `rows` over all units, and add noise to each value of the sum.

    Args:
        rows: (units, width), the values of each unit; a row above the clip norm is scaled down to the clip norm.
        plan: plan of the release; its clip norm limits the contribution of one unit, in the norm of `clip_to_cells`.
        width: number of values.
        stream: source of the noise.

    Returns:
        (width,), the noised sums, in the unit of `rows`.

    Guarantee: one `GaussianDpEvent` or `LaplaceDpEvent` with the plan's noise multiplier, on all units. Sums are
    integers (cells), and the noise is a real number rounded to an integer, so the result equals the mechanism on real
    numbers followed by rounding, as in `mechanism.add_gaussian_noise`.
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
    """Clip one unit's values to the clip norm, and round them towards zero to cells of 2**-24 of the clip norm.

    The norm is L2 for Gaussian noise and L1 for Laplace noise. Non-finite values count as 0.

    Guarantee: the result depends only on `values`, and its norm is at most 2**24 cells, exactly: the norm is checked in
    integer arithmetic, and a vector above the bound becomes zero.
    """
    usable = [value if math.isfinite(value) else 0.0 for value in map(float, values)]
    gaussian = plan.noise == "gaussian"
    norm = math.hypot(*usable) if gaussian else sum(map(abs, usable))
    cells = [int(value * (2.0**GRID_BITS / max(norm, plan.max_grad_norm))) for value in usable]
    size = sum(cell**2 for cell in cells) if gaussian else sum(map(abs, cells)) ** 2
    return cells if size <= 4**GRID_BITS else [0] * len(cells)
