"""Is a site's own adapter better than the shared one and the site alone?  On test records weighted to the site's mix.

    python simulations/own_adapter/run.py                    every line, into results.json and README.md
    python simulations/own_adapter/run.py --only four hosp   recipes whose keys begin so; others are kept

The site's mix is the share of each label among its records.  A test record counts by that share over the label's share
of the test file.  Own is compared with the better one of shared and alone, chosen on these same records, so that the
difference is a little lower than it is.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.api.compose import compose_recipe
from fedtune.config import read_saved_config
from fedtune.data.load import derive_split_key
from fedtune.lab.personalization import Parts, personalize
from fedtune.runs.model_comparison import compare_runs
from fedtune.sites.run_records import partition_run_records

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

_BANKS = "simulations/recipes/banks_sampled.yaml"

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "four banks": (_BANKS, {}),
    "four banks, skewed labels": (_BANKS, {"data.partition.kind": "dirichlet", "data.partition.alpha": 0.5}),
    "three hospitals, skewed labels": ("hospitals_abstracts", {}),
    "16 banks": (
        _BANKS,
        {
            "federation.num_sites": 16,
            "federation.site_names": [f"bank-{number}" for number in range(1, 17)],
            "data.declared_sizes": 540,
        },
    ),
}
SEEDS, DRAWS = (0, 1, 2), 1000
SCORES = ("base", "alone", "shared", "own")


def sites(runs: Path, *, recipe: str, settings: dict[str, Any], seed: int, name: str) -> study.Found:
    """Each site's weighted accuracies, and own less the better one of the others with its interval."""
    place = {"name": re.sub("[ ,]+", "-", name), "tracking.output_dir": str(runs), "tracking.progress": False}
    folder = study.finished(compose_recipe(recipe, {"seed": seed, **settings, **place}))
    config = read_saved_config(folder)
    dealt = zip(config.federation.names, partition_run_records(config).sites, strict=True)
    return {site: own_of_site(folder, site, records) for site, records in dealt}


def own_of_site(folder: Path, site: str, records: Any) -> study.Found:
    """The adapters of one site beside each other."""
    config, adapter = read_saved_config(folder), folder / "adapter"
    parts = Parts.split(records, key=derive_split_key(config.seed), unit=config.privacy.unit)
    with tempfile.TemporaryDirectory() as scratch:
        into, alone = Path(scratch, "own"), Path(scratch, "alone")
        beside = {"into": into, "alone": alone, "beside_ledger": Path(scratch)}
        passes = personalize(config, adapter, parts, site=site, **beside)
        folders = {"own": into / "adapter", "shared": adapter, "alone": alone}
        sides = compare_runs({name: (config, one) for name, one in folders.items()})
    mix = Counter(record.fields["label"] for record in records.training)
    test = Counter(record.fields["label"] for record in sides.records)
    weights = np.array([mix[one.fields["label"]] / test[one.fields["label"]] for one in sides.records])
    right = {name: one.examples["truth"] == one.examples["predicted"] for name, one in sides.measured.items()}
    score = {name: float(np.average(one, weights=weights)) for name, one in right.items()}
    best = max(("shared", "alone"), key=score.__getitem__)
    draws = np.random.default_rng(0).integers(len(weights), size=(DRAWS, len(weights)))
    gains = weights * (right["own"].astype(float) - right[best])
    low, high = np.quantile(gains[draws].sum(axis=1) / weights[draws].sum(axis=1), (0.025, 0.975))
    gain = {"gain": score["own"] - score[best], "low": float(low), "high": float(high)}
    return {**score, **gain, "passes": passes, "records": len(records.training)}


def table(lines: Mapping[str, study.Found]) -> str:
    """The Markdown table: a row for each recipe, means over its sites and seeds."""
    rows = [["run", "seeds", "sites", *SCORES, "own - better one", "lowest site", "sites worse"]]
    for name in RECIPES:
        of_recipe = [one for key, one in lines.items() if key.startswith(f"{name}, seed ")]
        found = [site for one in of_recipe for site in one.values()]
        if found:
            scores = [f"{study.mean(found, score):.4f}" for score in SCORES]
            gains = [site["gain"] for site in found]
            worse = sum(site["high"] < 0 for site in found)
            ends = [f"{statistics.fmean(gains):+.4f}", f"{min(gains):+.4f}", f"{worse} of {len(found)}"]
            rows.append([name, str(len(of_recipe)), str(len(found)), *scores, *ends])
    return readme.markdown(rows)


def main() -> None:
    asked = study.parser(__doc__, Path(__file__).parent).parse_args()
    lines: dict[str, study.Line] = {}
    for seed, (name, (recipe, settings)) in product(SEEDS, RECIPES.items()):
        key = f"{name}, seed {seed}"
        lines[key] = partial(sites, recipe=recipe, settings=settings, seed=seed, name=key)
    study.carry_out(__file__, lines, table, asked=asked, measured=False)


if __name__ == "__main__":
    main()
