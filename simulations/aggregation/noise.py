"""How much noise each of four banks adds to secure aggregation, and what its records lose to whom.

    python simulations/aggregation/noise.py        noise.json, and the table of the README; seconds

The plan is that of banks_intents: rate 0.3, 50 releases, delta 1e-5.  Nothing is trained.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

from fedtune.privacy import events
from fedtune.privacy.accountant import calibrate_noise, epsilon_pld
from fedtune.privacy.distributed_noise import (
    SecureAggregationSpec,
    combine_noise_shares,
    compute_epsilons_by_adversary,
    compute_min_cell_bits,
)

SITES, RATE, RELEASES, DELTA = 4, 0.3, 50, 1e-5
BOUND = 1000  # clip norms; decides no noise


def ideal_noise(epsilon: float) -> float:
    """The least noise multiplier of one Gaussian mechanism on all records, by the fine grid, to a part in a million."""

    def spent(noise: float) -> float:
        return epsilon_pld(
            [events.build_dp_sgd_event(sampling_rate=RATE, noise_multiplier=noise, steps=RELEASES)], DELTA
        )

    low, high = 0.1, 100.0
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high


def row(runs: Path, *, target: float, threshold: int, colluders: int) -> study.Found:
    """One plan: `target` holds with so many colluders in each sum of at least `threshold` sites."""
    total = calibrate_noise(epsilon=target, delta=DELTA, sampling_rate=RATE, steps=RELEASES)
    sites = SecureAggregationSpec(num_sites=SITES, threshold=threshold, colluders=colluders)
    share = sites.compute_share_for_total(total)
    bits = compute_min_cell_bits(share)
    shared = replace(sites.with_share(share), bound=BOUND)
    found = compute_epsilons_by_adversary(shared, survivors={threshold: RELEASES}, sampling_rate=RATE, delta=DELTA)
    # Each share's own rounding adds a twelfth of a squared cell to what is accounted.
    rounding = math.sqrt(1 + 1 / 12 / (share * 2.0**bits) ** 2)
    of_sum = combine_noise_shares(share, threshold - colluders)
    return {
        "target": target,
        "threshold": threshold,
        "colluders": colluders,
        "noise_alone": total,
        "share": share,
        "cell_bits": bits,
        "server_alone": found.server_alone,
        "with_colluders": found.with_colluders,
        "with_all_others": found.with_all_others,
        "above_ideal_percent": 100 * (of_sum * rounding / ideal_noise(target) - 1),
    }


def table(lines: Mapping[str, study.Found]) -> str:
    """The README's table."""
    heads = ["target", "survivors", "colluders", "noise alone", "a site's share", "cells", "server alone"]
    rows = [[*heads, "with colluders", "all others", "above ideal"]]
    for one in lines.values():
        plan = [f"{one['target']:g}", str(one["threshold"]), str(one["colluders"])]
        noise = [f"{one['noise_alone']:.4f}", f"{one['share']:.4f}", f"C/{2 ** int(one['cell_bits'])}"]
        spent = [f"{one[name]:.2f}" for name in ("server_alone", "with_colluders", "with_all_others")]
        rows.append([*plan, *noise, *spent, f"{one['above_ideal_percent']:.2f} %"])
    return readme.markdown(rows, texts=0)


def main() -> None:
    """Work out every row."""
    asked = study.parser(__doc__, Path(__file__).parent).parse_args()
    lines: dict[str, study.Line] = {
        f"e{target:g}-{threshold}-{colluders}": partial(row, target=target, threshold=threshold, colluders=colluders)
        for target in (8.0, 3.0, 1.0)
        for threshold, colluders in ((4, 0), (4, 1), (3, 0), (3, 1))
    }
    study.carry_out(__file__, lines, table, asked=asked, file="noise.json", measured=False)


if __name__ == "__main__":
    main()
